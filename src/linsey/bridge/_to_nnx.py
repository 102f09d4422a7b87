"""`ToNNX` as the guide shows it: each collection is an attribute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import linen, nnx

from linsey import _boxes, _trees
from linsey._collections import kind_of_collection
from linsey.bridge import _private
from linsey.bridge._wrapped_linen import HELD, WrappedLinen, drawn, renewed, streams_of
from linsey.ir import BridgeError, LinseyError, Path, format_path

_SUFFIX = "__collection"


class ToNNX(WrappedLinen):
    """A Linen module as an NNX module: stands alone, or as a part of another.

    Each collection is an attribute, a dict of Variables laid out as in Linen:
    ``model.params["Dense_0"]["kernel"]``. So equal names in two collections are no clash. A
    collection whose name is taken by the class (``eval``, ``rngs``) is ``eval__collection``.

    All methods of the Linen module can be called, and a call may change state with no more ado:
    batch statistics are updated, and what it sows is kept, without what earlier calls sowed. See
    `__call__` for ``mutable``, ``rngs`` and ``method``.

    Args:
        module: the Linen module, unbound.
        rngs: an ``nnx.Rngs``, which is forked; or an int seed, a jax key, or a dict of these by
            stream, which are used as they are. Initialisation uses the keys of these streams and
            draws nothing: variables made with a plain key are those of ``module.init`` with it, and
            ``nnx.reseed(model, dropout=0)`` repeats the first call of a model that was made with
            ``Rngs(dropout=0)``.

    Raises:
        BridgeError: `module` is a class, a bound module, or no Linen module.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn, nnx
        >>> from linsey import bridge
        >>> model = bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, 3)))
        >>> type(model.params["kernel"]).__name__, model(jnp.ones((1, 3))).shape
        ('Param', (1, 2))
    """

    rngs: Any = None
    """The module's own PRNG streams, an ``nnx.Rngs``; None when it has none."""

    def __init__(self, module: linen.Module, rngs: Any = None) -> None:
        self._hold(module)
        self.rngs = _streams(rngs)

    @property
    def module(self) -> linen.Module:
        """The Linen module."""
        return self.to_nnx__module

    def lazy_init(self, *args: Any, **kwargs: Any) -> ToNNX:
        """Initialises the variables by one call; see `linsey.bridge.lazy_init`."""
        from linsey.bridge._lazy import lazy_init

        lazy_init(self, *args, **kwargs)
        return self

    def _own_keys(self) -> dict[str, Any]:
        if self.rngs is None:
            return {}
        if not _private.is_initializing(self):
            return drawn(self.rngs)
        return _trees.key_dict({name: s.key.get_value() for name, s in streams_of(self.rngs)})

    def _collections(self) -> dict[str, Mapping[Any, Any]]:
        return {
            name.removesuffix(_SUFFIX): value
            for name, value in vars(self).items()
            if isinstance(value, Mapping) and not name.startswith(("_pytree__", "to_nnx__"))
        }

    def _variables(self) -> dict[str, Any]:
        return {name: _values(tree, (name,)) for name, tree in self._collections().items()}

    def _keep(self, collection: str, tree: Mapping[Any, Any]) -> None:
        old = self._collections().get(collection)
        is_sown = collection == "intermediates"
        new = _variables(kind_of_collection(collection), old, tree, is_sown=is_sown)
        if new is not old:
            setattr(self, _attribute(collection), nnx.data(new))

    def linsey_variables(self) -> list[tuple[str, Path, nnx.Variable[Any]]]:
        """Collection, path and Variable of each Linen variable; nothing of what calls sow."""
        found: list[tuple[str, Path, nnx.Variable[Any]]] = []

        def walk(collection: str, path: Path, tree: Any) -> None:
            if isinstance(tree, nnx.Variable):
                found.append((collection, path, tree))
            elif isinstance(tree, Mapping):
                for name in tree:
                    walk(collection, (*path, name), tree[name])

        for collection, tree in self._collections().items():
            if collection != "intermediates":
                walk(collection, (), tree)
        return found

    def linsey_own(self) -> list[str]:
        """The attributes that are neither variables nor the module."""
        taken = {_attribute(collection) for collection in self._collections()}
        return [name for name in vars(self) if name != HELD and name not in taken]

    @staticmethod
    def linsey_place(attributes: Mapping[str, Any], collection: str, path: Path) -> Path:
        """The attribute path of a Linen variable."""
        return (_attribute(collection), *path)


def _attribute(collection: str) -> str:
    is_taken = hasattr(ToNNX, collection) or collection in (HELD, "rngs")
    return f"{collection}{_SUFFIX}" if is_taken else collection


def _streams(rngs: Any) -> nnx.Rngs | None:
    if rngs is None or isinstance(rngs, nnx.Rngs):
        return None if rngs is None else rngs.fork()
    try:
        keys = dict(rngs) if isinstance(rngs, Mapping) else _trees.key_dict(rngs)
        return nnx.Rngs(**keys)
    except (LinseyError, ValueError) as error:
        raise BridgeError(
            f"found {type(rngs).__name__} for PRNG streams",
            path="rngs",
            fix="Pass an nnx.Rngs, an int seed, a jax key, or a dict of these by stream.",
        ) from error


def _values(tree: Any, path: Path) -> Any:
    if isinstance(tree, nnx.Variable):
        return _boxes.boxed(tree)
    if isinstance(tree, Mapping):
        return {name: _values(tree[name], (*path, name)) for name in tree}
    if type(tree) is tuple:
        return tuple(_values(item, path) for item in tree)
    raise BridgeError(
        f"found {type(tree).__name__}, expected a Variable",
        path=format_path(path),
        fix="Put an nnx Variable there, or set the value of the one that was: v[...] = array.",
    )


def _variables(kind: type[nnx.Variable[Any]], old: Any, new: Any, *, is_sown: bool) -> Any:
    """The Variables for Linen variables, nested alike; `old` itself where nothing is new in it."""
    if isinstance(new, Mapping):
        held = old if isinstance(old, Mapping) else {}
        made = {
            name: _variables(kind, held.get(name), value, is_sown=is_sown)
            for name, value in new.items()
        }
        if isinstance(old, Mapping) and all(held.get(name) is made[name] for name in made):
            return old
        return {**held, **made}
    if is_sown and type(new) is tuple:
        if type(old) is not tuple or len(old) != len(new):
            return tuple(renewed(kind, None, value) for value in new)
        for variable, value in zip(old, new, strict=True):
            renewed(kind, variable, value)
        return old
    return renewed(kind, old, new)
