"""The arrays of a slot's value, by name: what stores them calls them so."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import ml_dtypes
import numpy as np

from linsey import _trees
from linsey.ir import LinseyError, Slot, TensorType, TreeType

Types: TypeAlias = dict[str, TensorType]
"""The arrays of a pytree by place, as ``jax.tree_util.keystr`` writes it; empty: the only one."""

NUMBERS: dict[str, Any] = {
    "python_bool": bool,
    "int": int,
    "float": float,
    "complex": complex,
}
"""Python numbers by the dtype they are described with; ``bool`` is that of an array."""


def leaf_name(key: str, place: str) -> str:
    """The name of one array of a slot; no slot is called so, since ``[`` begins an index."""
    return f"{key}/[{place}]" if place else key


def leaves(value: Any) -> dict[str, Any]:
    """The arrays of a value or of a pytree, by place."""
    if isinstance(value, jax.Array):
        return {"": value}
    return {jax.tree_util.keystr(at): leaf for at, leaf in jax.tree.leaves_with_path(value)}


def leaf_type(leaf: Any, path: str, error: type[LinseyError]) -> TensorType:
    """The type of an array or a Python number, told from each other.

    Args:
        leaf: the array or number.
        path: where it is, for the error.
        error: what to raise where it is neither.
    """
    if isinstance(leaf, bool):
        return TensorType(shape=(), dtype="python_bool")
    try:
        return _trees.tensor_type(leaf)
    except TypeError as cause:
        raise error(str(cause), path=path, fix="Save arrays and Python numbers only.") from cause


def slot_types(slot: Slot) -> Types:
    """The types of a slot's arrays."""
    if isinstance(slot.type, TreeType):
        return leaves(_trees.fill(slot.type.structure, list(slot.type.leaves)))
    return {"": slot.type}


def is_key(kind: TensorType) -> bool:
    """Whether it is the type of typed PRNG keys."""
    return kind.dtype in _trees.KEY_IMPLS


def key_impl(kind: TensorType) -> str:
    """The implementation of typed PRNG keys, as ``jax.random.key`` takes it."""
    return _trees.KEY_IMPLS[kind.dtype]


@functools.cache
def host_dtype(name: str) -> np.dtype[Any]:
    """The dtype of numpy, or of ml_dtypes, by its name.

    Raises:
        TypeError: there is none, or it holds objects.
    """
    found = np.dtype(getattr(ml_dtypes, name, name))
    if found.hasobject:
        raise TypeError(f"{name} holds objects")
    return found
