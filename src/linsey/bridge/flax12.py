"""The bridge of flax 0.12: its names, signatures and state layout, without its defects.

A code base that was written for ``flax.nnx.bridge`` changes one import line and keeps its
checkpoints. What differs from flax:

* a ToLinen never runs the constructor of its NNX module to find values, and a variable that is
  missing is an error and no new one;
* a stream that is needed and was not given is an error, and no default;
* what a call sows and the batch statistics are kept without ``mutable=``, those of the last call;
* two Linen variables with one path, and names that the module itself needs (``module``, ``rngs``,
  ``eval``), are kept under another name: ``eval__params``, ``rngs__module``;
* ToNNX and ToLinen nest in each other, and partition metadata follows lifted axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import core, linen, nnx
from flax.nnx.bridge import (
    AttrPriority,
    Module,
    Scope,
    compact,
    current_context,
    current_module,
    initializers,
    linen_in_bridge_mdl,
    nnx_in_bridge_mdl,
)

from linsey import _boxes
from linsey._boxes import NNXMeta
from linsey._collections import collection_of, kind_of_collection
from linsey.backends.linen import Call, Hosting
from linsey.bridge import _private
from linsey.bridge._functional import Functional, functional
from linsey.bridge._lazy import lazy_init
from linsey.bridge._registry import with_partitioning
from linsey.bridge._structure import BARE_ARRAYS, forget, structure_of
from linsey.bridge._wrapped_linen import GRAPHDEFS, HELD, WrappedLinen, drawn, flat, renewed
from linsey.bridge._wrapped_nnx import WrappedNNX, takes_rngs
from linsey.ir import BridgeError, Path, as_key, format_path

__all__ = [
    "AttrPriority",
    "Functional",
    "Module",
    "NNXMeta",
    "Scope",
    "ToLinen",
    "ToNNX",
    "compact",
    "current_context",
    "current_module",
    "functional",
    "initializers",
    "lazy_init",
    "linen_in_bridge_mdl",
    "nnx_in_bridge_mdl",
    "to_linen",
    "to_linen_class",
    "with_partitioning",
]

_NAMES = "to_nnx__names"
_MODULE = ("name", "parent", "abstract_init")

to_linen_var = _boxes.boxed
"""How a Variable is handed to Linen: see `linsey.bridge.flax12.ToLinen`."""


class ToNNX(WrappedLinen):
    """A Linen module as an NNX module, laid out as in flax 0.12: variables are its attributes.

    ``model.kernel``, ``model.Dense_0["kernel"]``. A Variable tells its collection by its class.

    Args:
        module: the Linen module, unbound; afterwards ``to_nnx__module``.
        rngs: an ``nnx.Rngs``, which is forked, or a jax key, which becomes the stream ``params``;
            afterwards ``to_nnx__rngs``. Initialisation draws from them as any call does.

    Raises:
        BridgeError: `module` is a class, a bound module, or no Linen module.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn, nnx
        >>> from linsey.bridge import flax12 as bridge
        >>> model = bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, 3)))
        >>> model.kernel.shape
        (3, 2)
    """

    _keeps_variables = False
    _mode_goes_first = False  # in flax 0.12 train() and eval() do not reach Linen modules

    def __init__(self, module: linen.Module, rngs: nnx.Rngs | jax.Array | None = None) -> None:
        self._hold(module)
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs.fork()
        self.to_nnx__rngs = nnx.Rngs(params=rngs) if isinstance(rngs, jax.Array) else rngs

    def _keeps_sown(self) -> bool:
        if _private.is_initializing(self):
            return False  # as ``Module.init``: a checkpoint holds none
        # Under a trace a new attribute breaks what worked with flax: a carry, a branch.
        return _private.is_eager() or "intermediates" in self._variables()

    def _own_keys(self) -> dict[str, Any]:
        return {} if self.to_nnx__rngs is None else drawn(self.to_nnx__rngs)

    def _trees(self) -> dict[str, Any]:
        """The attributes that hold Linen variables."""
        own = set(self.linsey_own())
        return {k: v for k, v in vars(self).items() if k not in own and k != HELD}

    def _places(self) -> Iterator[tuple[Path, str, Path, nnx.Variable[Any]]]:
        """Attribute path, collection, Linen path and Variable of each Linen variable."""
        named = dict(vars(self).get(_NAMES, ()))
        for place, leaf in flat(self._trees()):
            if not isinstance(leaf, nnx.Variable):
                raise BridgeError(
                    f"found {type(leaf).__name__}, expected a Variable",
                    path=format_path(place),
                    fix="Put an nnx Variable there: its class tells the collection.",
                )
            collection, path = named.get(place, (collection_of(type(leaf)), place))
            yield place, collection, path, leaf

    def _variables(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _, collection, path, leaf in self._places():
            holder = found.setdefault(collection, {})
            for name in path[:-1]:
                holder = holder.setdefault(name, {})
            holder[path[-1]] = _boxes.boxed(leaf)
        return found

    def _keep(self, collection: str, tree: Mapping[Any, Any]) -> None:
        held = {(c, path): (place, leaf) for place, c, path, leaf in self._places()}
        kind = kind_of_collection(collection)
        for path, value in flat(tree):
            place, old = held.get((collection, path), (None, None))
            new = renewed(kind, old, value)
            if place is None:
                self._place_new(collection, path, new)

    def _place_new(self, collection: str, path: Path, leaf: nnx.Variable[Any]) -> None:
        place = path
        if _is_reserved(str(path[0])) or (len(path) > 1 and _is_leaf(self._trees(), path[:1])):
            suffix = "module" if len(path) > 1 else collection
            place = (f"{path[0]}__{suffix}", *path[1:])
        while not _is_free(self._trees(), place):
            place = (*place[:-1], f"{place[-1]}__{collection}")
        if place != path:
            names = {**dict(vars(self).get(_NAMES, ())), place: (collection, path)}
            setattr(self, _NAMES, tuple(sorted(names.items())))
        top = _with(self._trees().get(str(place[0])), place[1:], leaf)
        setattr(self, str(place[0]), nnx.data(top))

    def linsey_variables(self) -> list[tuple[str, Path, nnx.Variable[Any]]]:
        """Collection, path and Variable of each Linen variable; nothing of what calls sow."""
        return [
            (collection, path, leaf)
            for _, collection, path, leaf in self._places()
            if collection != "intermediates"
        ]

    def linsey_own(self) -> list[str]:
        """The attributes that are neither variables nor the module."""
        return [
            name
            for name, value in vars(self).items()
            if name.startswith(("to_nnx__", "_pytree__"))
            or not isinstance(value, nnx.Variable | Mapping)
        ]

    @staticmethod
    def linsey_place(attributes: Mapping[str, Any], collection: str, path: Path) -> Path:
        """The attribute path of a Linen variable."""
        for place, named in attributes.get(_NAMES, ()):
            if named == (collection, path):
                return place  # type: ignore[no-any-return]
        return path


def _is_reserved(name: str) -> bool:
    return name.startswith(("to_nnx__", "_pytree__")) or hasattr(ToNNX, name)


def _is_leaf(tree: Any, path: Path) -> bool:
    return path[0] in tree and not isinstance(tree[path[0]], Mapping)


def _is_free(tree: Any, place: Path) -> bool:
    for name in place[:-1]:
        if name not in tree:
            return True
        tree = tree[name]
        if not isinstance(tree, Mapping):
            return False
    return place[-1] not in tree


def _with(tree: Any, path: Path, leaf: Any) -> Any:
    if not path:
        return leaf
    below = dict(tree) if isinstance(tree, Mapping) else {}
    return {**below, path[0]: _with(below.get(path[0]), path[1:], leaf)}


class ToLinen(WrappedNNX):
    """An NNX module as a Linen module, laid out as in flax 0.12.

    There is no collection ``nnx``: the structure follows from the class and its arguments, and is
    found once for each, without values. PRNG state is not stored either: the streams of Linen give
    it anew at each call. A Variable without metadata of its own is the bare array; one with
    ``linen_meta_type`` goes into that box; any other into an `NNXMeta`.

    Attributes:
        nnx_class: the class of the NNX module; or a factory; or a module that exists, whose PRNG
            state is stored in ``RngKey`` and ``RngCount``.
        args: positional arguments of the class or factory.
        kwargs: keyword arguments of it.
        skip_rng: whether not to pass ``rngs``. They are not passed either where nothing takes them.
        metadata_fn: makes the Linen box of a Variable; None: the bare value.
        abstract_init: whether the structure is found under ``jax.eval_shape``; otherwise the
            constructor really runs, once, for a class that cannot run abstractly.

    Raises:
        BridgeError: `nnx_class` cannot make an NNX module, or two of its Variable classes have one
            name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from linsey.bridge import flax12 as bridge
        >>> model = bridge.ToLinen(nnx.Linear, args=(3, 2))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> list(variables), variables["params"]["kernel"].shape
        (['params'], (3, 2))
    """

    nnx_class: Any
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = core.FrozenDict({})
    skip_rng: bool = False
    metadata_fn: Callable[[nnx.Variable[Any]], Any] | None = _boxes.boxed
    abstract_init: bool = True

    @linen.compact
    def __call__(self, *args: Any, nnx_method: Any = None, **kwargs: Any) -> Any:
        """Calls the NNX module; see `linsey.bridge.ToLinen`."""
        if self.is_initializing() and not self._is_made():
            output, _, made = self._initialize(nnx_method, args, kwargs)
            self._check(made)
            forget(self)
            return output
        return structure_of(self, self.variables).run(self, nnx_method, args, kwargs)

    @linen.nowrap
    def _hosting(self, call: Call) -> Hosting | None:
        if call.variables.given.keys() & BARE_ARRAYS:
            return None
        structure = structure_of(self, call.variables.given)
        return structure.hosting if structure.is_stored else None

    @linen.nowrap
    def get_variable(self, col: str, name: str, default: Any = None) -> Any:
        """As ``linen.Module.get_variable``; finds bare arrays where flax puts them too."""
        if col == "arrays" and not self.has_variable(col, name):
            col = next((other for other in BARE_ARRAYS if self.has_variable(other, name)), col)
        return super().get_variable(col, name, default)

    @linen.nowrap
    def _check(self, made: nnx.Module) -> None:
        """Refuses what could not be found again: no structure is stored here."""
        for path, part in nnx.iter_graph(made):
            if isinstance(part, WrappedLinen) and vars(part)[GRAPHDEFS]:
                raise BridgeError(
                    "found a linsey.bridge.ToLinen below: it stores its graphdef, and a ToLinen of"
                    " this face has no place for it",
                    path=format_path((*self.path, *map(as_key, path))),
                    fix="Use ToLinen of one face at both places.",
                )

    @linen.nowrap
    def _is_made(self) -> bool:
        """Whether an init has come to this module before; see `linsey.bridge.ToLinen`."""
        return bool(self.variables) and structure_of(self, self.variables).is_complete(self)

    @linen.nowrap
    def _keeps_streams(self) -> bool:
        return isinstance(self.nnx_class, nnx.Pytree)  # no call could make them again

    @property
    def linsey_takes_rngs(self) -> bool:
        """Whether the class takes ``rngs``."""
        return takes_rngs(self.nnx_class)


ToLinen.linsey_call = ToLinen.__call__


def to_linen(
    nnx_class: Any,
    *args: Any,
    metadata_fn: Callable[[nnx.Variable[Any]], Any] | None = _boxes.boxed,
    name: str | None = None,
    skip_rng: bool = False,
    abstract_init: bool = True,
    **kwargs: Any,
) -> ToLinen:
    """A `ToLinen` whose arguments are written as those of the NNX class.

    Args:
        nnx_class: the class, a factory, or a module that exists.
        args: positional arguments of the class.
        metadata_fn: makes the Linen box of a Variable; None: the bare value.
        name: name of the Linen module.
        skip_rng: whether not to pass ``rngs``.
        abstract_init: see `ToLinen`.
        kwargs: keyword arguments of the class.
    """
    return ToLinen(
        nnx_class,
        args=args,
        kwargs=core.FrozenDict(kwargs),
        metadata_fn=metadata_fn,
        skip_rng=skip_rng,
        abstract_init=abstract_init,
        name=name,
    )


def to_linen_class(
    base_nnx_class: type[nnx.Module],
    base_metadata_fn: Callable[[nnx.Variable[Any]], Any] | None = _boxes.boxed,
    base_skip_rng: bool = False,
    **partial_kwargs: Any,
) -> type[ToLinen]:
    """A Linen class for an NNX class, to be called or derived from.

    Args:
        base_nnx_class: the NNX class.
        base_metadata_fn: makes the Linen box of a Variable.
        base_skip_rng: whether not to pass ``rngs``.
        partial_kwargs: arguments of the NNX class; those of the Linen class go before them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from linsey.bridge import flax12 as bridge
        >>> Linear = bridge.to_linen_class(nnx.Linear, out_features=2)
        >>> variables = Linear(in_features=3).init(jax.random.key(0), jnp.ones((1, 3)))
        >>> variables["params"]["kernel"].shape
        (3, 2)
    """

    class ToLinenPartial(ToLinen):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            cls.__init__ = __init__  # type: ignore[assignment]

    def __init__(
        self: ToLinen,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        nnx_class: Any = None,
        skip_rng: bool | None = None,
        metadata_fn: Any = None,
        **other_kwargs: Any,
    ) -> None:
        own = {key: other_kwargs.pop(key) for key in _MODULE if key in other_kwargs}
        ToLinen.__init__(
            self,
            nnx_class=nnx_class or base_nnx_class,
            args=args or (),
            metadata_fn=metadata_fn or base_metadata_fn,
            skip_rng=skip_rng or base_skip_rng,
            kwargs=core.FrozenDict({**partial_kwargs, **(kwargs or {}), **other_kwargs}),
            **own,
        )

    ToLinenPartial.__init__ = __init__  # type: ignore[assignment]
    return ToLinenPartial
