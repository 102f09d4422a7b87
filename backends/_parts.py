"""Pytrees as arrays, which a trace takes and gives, and all else, which it depends on."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

_SMALL = 1 << 16
"""The bytes up to which a numpy array is compared by content."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, np.dtype, type)
_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    functools.partial,
    np.ufunc,
    type(jax.jit(lambda: None)),
    jax.custom_jvp,
    jax.custom_vjp,
)


class UnshareableError(Exception):
    """A call cannot go through a shared trace, for a reason that only this call knows."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A pytree without its arrays: hashable, and compared by content."""

    treedef: Any
    places: tuple[int | None, ...]
    """For each leaf the number of its array; an array that is there twice has one number."""
    key: tuple[Hashable, ...]
    """What the other leaves are, so that 1, 1.0 and True differ."""
    static: tuple[Any, ...] = dataclasses.field(compare=False)

    def filled(self, arrays: Sequence[Any]) -> Any:
        """The tree with these arrays."""
        rest = iter(self.static)
        leaves = [next(rest) if place is None else arrays[place] for place in self.places]
        return jax.tree.unflatten(self.treedef, leaves)


def take_apart(tree: Any, *, strict: bool = True) -> tuple[Layout, list[Any]]:
    """A pytree as its arrays and all else.

    Args:
        tree: the pytree.
        strict: whether everything else must be comparable by content.

    Raises:
        UnshareableError: a part of it is not.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_module if strict else None)
    arrays: list[Any] = []
    numbers: dict[int, int] = {}
    places: list[int | None] = []
    static = []
    for leaf in leaves:
        if not isinstance(leaf, jax.Array):
            places.append(None)
            static.append(leaf)
            continue
        if id(leaf) not in numbers:
            numbers[id(leaf)] = len(arrays)
            arrays.append(leaf)
        places.append(numbers[id(leaf)])
    key = tuple(map(static_key, static)) if strict else ()
    return Layout(treedef, tuple(places), key, tuple(static)), arrays


def _is_module(leaf: Any) -> bool:
    return isinstance(leaf, linen.Module | nnx.Pytree | nnx.Variable)


def static_key(value: Any) -> Hashable:
    """What a static value is compared by.

    Raises:
        UnshareableError: it can only be compared by identity, and may change.
    """
    if isinstance(value, float | complex):
        return type(value), repr(value)
    if isinstance(value, np.ndarray | np.generic):
        if value.nbytes > _SMALL or value.dtype.hasobject:
            raise UnshareableError("a large numpy array")
        return type(value), str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, _PLAIN) or type(value) in _FUNCTIONS:
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), tuple(map(static_key, value))
    if isinstance(value, Mapping):
        items = ((static_key(name), static_key(item)) for name, item in value.items())
        return type(value), tuple(items)
    if _is_module(value) or isinstance(value, jax.Array | types.MethodType):
        raise UnshareableError(f"a {type(value).__name__}")
    own_hash: Any = type(value).__hash__
    if own_hash is None or own_hash is object.__hash__:
        raise UnshareableError(f"a {type(value).__name__}, which may change")
    return type(value), value


@jax.tree_util.register_pytree_node_class
class Result:
    """What a traced function gives: the new arrays are children, all else comes with the trace."""

    def __init__(self, new: Sequence[Any], parts: _Parts) -> None:
        self.new = new
        self._parts = parts

    @staticmethod
    def of(tree: Any, inputs: Sequence[Any], *, strict: bool = True) -> Result:
        """A result.

        Args:
            tree: any pytree.
            inputs: the inputs of the trace; one of them in `tree` stands for what is passed there.
            strict: whether a leaf that is no constant is an error.

        Raises:
            UnshareableError: a leaf is neither an array nor a constant.
        """
        leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_module if strict else None)
        given = {id(array): number for number, array in enumerate(inputs)}
        new: list[Any] = []
        places: list[Any] = []
        for leaf in leaves:
            if id(leaf) in given:
                places.append(("given", given[id(leaf)]))
            elif isinstance(leaf, jax.core.Tracer):
                places.append(("new", len(new)))
                new.append(leaf)
            elif strict and not isinstance(leaf, (*_PLAIN, jax.Array, np.ndarray, np.generic)):
                raise UnshareableError(f"it gives a {type(leaf).__name__}")
            else:
                places.append(("static", leaf))
        return Result(new, _Parts(treedef, places))

    def restored(self, inputs: Sequence[Any]) -> Any:
        """The tree, with what was passed in for the inputs of the trace."""
        return self._parts.filled(self.new, inputs)

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Parts]:
        """For jax."""
        return (tuple(self.new),), self._parts

    @classmethod
    def tree_unflatten(cls, parts: _Parts, children: tuple[Any, ...]) -> Result:
        """For jax."""
        return cls(children[0], parts)


class _Parts:
    """The static half of a `Result`, compared by identity."""

    def __init__(self, treedef: Any, places: list[Any]) -> None:
        self._treedef = treedef
        self._places = places

    def filled(self, new: Sequence[Any], inputs: Sequence[Any]) -> Any:
        leaves = [
            value if kind == "static" else (new if kind == "new" else inputs)[value]
            for kind, value in self._places
        ]
        return jax.tree.unflatten(self._treedef, leaves)


def is_same(first: Any, second: Any) -> bool:
    """Whether two pytrees are of the very same leaves."""
    if first is second or isinstance(first, jax.Array):
        return first is second
    left, left_def = jax.tree.flatten(first)
    right, right_def = jax.tree.flatten(second)
    same: bool = left_def == right_def  # type: ignore[operator]
    return same and all(a is b for a, b in zip(left, right, strict=True))
