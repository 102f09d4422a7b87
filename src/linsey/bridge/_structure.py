"""The structure of an NNX module in a ToLinen that stores none: found once, and kept.

Only `linsey.bridge.flax12` needs it.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx import bridge

from linsey import _boxes, _trees
from linsey._collections import kind_of_collection
from linsey.backends import HostSpec
from linsey.backends.linen import Hosting, Inner
from linsey.bridge._wrapped_nnx import WrappedNNX, make_module, takes_rngs
from linsey.frontends import FlaxEncoder
from linsey.frontends.nnx import made_abstractly, read_module
from linsey.ir import Path, as_key, format_path

_PLAIN = (bool, int, float, complex, str, bytes, type, type(None))
BARE_ARRAYS = frozenset({"ArrayImpl", "ndarray"})
"""Where flax's ToLinen stores an array that is no Variable: in the collection of its type."""
_KEPT = 256
"""How many structures are kept; the oldest goes first."""


class Structure:
    """How an NNX module that no constructor makes runs on Linen variables.

    Args:
        module: an abstract NNX module.
        is_stored: whether its PRNG state is a variable like any other.
    """

    def __init__(self, module: Any, *, is_stored: bool) -> None:
        graph, _ = read_module(module)
        self.hosting = Hosting.of(HostSpec(graph, graph.root))
        self._inner = Inner(graph, graph.root)
        self.is_stored = is_stored or not self._inner.is_needed
        """Whether a call needs nothing but the variables."""

    def is_complete(self, module: WrappedNNX) -> bool:
        """Whether the scope of a bound module holds all the variables."""
        return self.hosting.is_stored(module, with_streams=self.is_stored)

    def run(
        self, module: WrappedNNX, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls a method on the variables of a bound module; see `Hosting.run`."""
        if self.is_stored:
            around, box = module.linsey_around, module._box
            return self.hosting.run(
                module, method, args, kwargs, box=box, around=around, strict=False
            )
        return self._inner.call(module, args, {**kwargs, "nnx_method": method})


class _Template:
    """An abstract module as its class makes it, and what it becomes with its ToNNX filled."""

    def __init__(self, made: Any, *, is_stored: bool) -> None:
        self._is_stored = is_stored
        self._split = nnx.split(made)
        self._wrappers: list[Path] = [
            tuple(map(as_key, path))
            for path, part in nnx.iter_graph(made)
            if isinstance(part, bridge.ToNNX)
        ]
        self._structures: dict[Hashable, Structure] = {}

    def structure(self, variables: Mapping[str, Any]) -> Structure:
        """The structure for some variables: those of a ToNNX are told by nothing else."""
        held = {path: _below(variables, path) for path in self._wrappers}
        leaves, treedef = jax.tree.flatten(held)
        key = (treedef, *((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        if key not in self._structures:
            made = nnx.merge(*self._split)
            parts = {tuple(map(as_key, path)): part for path, part in nnx.iter_graph(made)}
            for path, collections in held.items():
                for collection, tree in collections.items():
                    kind = kind_of_collection(collection)
                    for name, value in tree.items():
                        old = vars(parts[path]).get(name)
                        setattr(parts[path], name, nnx.data(_filled(kind, old, value)))
            self._structures[key] = Structure(made, is_stored=self._is_stored)
        return self._structures[key]


def _below(variables: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The Linen variables below a path, without the PRNG state of the ToNNX there."""
    found: dict[str, Any] = {}
    for collection, tree in variables.items():
        for name in path:
            tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
        if tree and collection not in ("intermediates", "RngKey", "RngCount"):
            found[collection] = tree
    return found


def _filled(kind: Any, old: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        held = old if isinstance(old, Mapping) else {}
        made = {name: _filled(kind, held.get(name), below) for name, below in value.items()}
        return {**held, **made}

    def abstract(leaf: Any) -> Any:
        return _trees.shape_struct(leaf.shape, leaf.dtype)

    return _boxes.variable(kind, jax.tree.map(abstract, value))


# By the way to make the module, then by the streams that it is given.
_templates: OrderedDict[Hashable, dict[tuple[str, ...], _Template]] = OrderedDict()


def structure_of(module: WrappedNNX, variables: Mapping[str, Any]) -> Structure:
    """The structure of a ToLinen's NNX module; its constructor runs when it is first asked for.

    A variable that is of no use is told by a warning, as flax does.

    Args:
        module: the ToLinen, bound or not.
        variables: its variables.
    """
    streams = () if module.scope is None else tuple(sorted(module.scope.rngs))
    kept = _kept(module)
    if streams not in kept:
        kept[streams] = _template(module, streams)
    structure = kept[streams].structure(variables)
    kept_apart = {name: tree for name, tree in variables.items() if name not in BARE_ARRAYS}
    unknown = structure.hosting.unknown(kept_apart)
    if unknown is not None:
        warnings.warn(
            f"Found unknown module paths in incoming state:\n  - {format_path(unknown[1:])}",
            stacklevel=4,
        )
    return structure


def forget(module: WrappedNNX) -> None:
    """Drops what was found for a ToLinen: its constructor may read what its arguments do not tell.

    An ``init`` runs the constructor anyway, and what follows is to agree with it.
    """
    _kept(module).clear()


def _kept(module: WrappedNNX) -> dict[tuple[str, ...], _Template]:
    config = (module.nnx_class, module.args, module.kwargs, module.skip_rng, module.abstract_init)
    values = (*module.args, *module.kwargs.values())
    # In Python 1, 1.0 and True are equal; and so are containers of them, and arrays have no hash.
    is_plain = all(isinstance(value, _PLAIN) or callable(value) for value in values)
    key = (config, tuple(map(type, values))) if is_plain else None
    try:
        found = None if key is None else _templates.get(key)
    except TypeError:  # a callable object without a hash
        key, found = None, None
    if found is None:
        # The same again where only functions are other objects.
        found = _templates.setdefault(FlaxEncoder()(config), {})
        if key is not None:
            _templates[key] = found
        while len(_templates) > _KEPT:
            _templates.popitem(last=False)
    return found


def _template(module: WrappedNNX, streams: tuple[str, ...]) -> _Template:
    def make() -> Any:
        takes = not module.skip_rng and takes_rngs(module.nnx_class)
        keys = dict.fromkeys(("default", *streams), 0) if takes else None
        return make_module(module, keys, "" if module.scope is None else format_path(module.path))

    made = made_abstractly(make) if module.abstract_init else make()
    return _Template(made, is_stored=isinstance(module.nnx_class, nnx.Pytree))
