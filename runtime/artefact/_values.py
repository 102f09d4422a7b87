"""Values in a file: written one at a time, read when they are asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from linsey import _trees
from linsey.ir import (
    FormatError,
    Graph,
    SlotIndex,
    TensorType,
    TreeType,
    Values,
    slot_index,
)
from linsey.runtime._leaves import (
    NUMBERS,
    Types,
    host_dtype,
    is_key,
    key_impl,
    leaf_name,
    leaf_type,
    leaves,
    slot_types,
)
from linsey.runtime.artefact._container import CODES, Container, Stored

SLOTS = "[slots]"
"""The array that says which arrays each slot has, as msgpack."""


_ABSTRACT = (jax.ShapeDtypeStruct, jax.core.Tracer)


def stored(values: Values) -> list[Stored]:
    """What a file holds of values.

    Raises:
        FormatError: a value cannot be written.
    """
    arrays: list[Stored] = []
    index: list[Any] = []
    for key, value in zip(values.index.keys, values.arrays, strict=True):
        parts = []
        for place, leaf in leaves(value).items():
            name = leaf_name(key, place)
            kind = leaf_type(leaf, name, FormatError)
            arrays.append(_stored(name, kind, leaf))
            parts.append([place, kind.dtype, list(kind.shape)])
        index.append([key, parts])
    data = msgpack.packb(index)
    return [*arrays, bytes_array(SLOTS, data)]


def bytes_array(name: str, data: bytes) -> Stored:
    """Bytes as an array of a file."""
    array = np.frombuffer(data, dtype=np.uint8)
    return Stored(name=name, dtype="uint8", shape=array.shape, get=lambda: array)


def _stored(name: str, kind: TensorType, leaf: Any) -> Stored:
    if isinstance(leaf, _ABSTRACT):
        raise FormatError(
            f"found a {type(leaf).__name__}, expected an array",
            path=name,
            fix="Save concrete values, outside of jit; a program without values saves its graph.",
        )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise FormatError(
            "found an array of which other processes hold a part",
            path=name,
            fix="Save it with linsey.checkpoint, which all processes write together.",
        )
    if kind.dtype in NUMBERS:
        number = _number(name, leaf)
        shape = number.shape
        return Stored(name=name, dtype=number.dtype.name, shape=shape, get=lambda: number)
    if is_key(kind):
        data = jax.random.key_data(leaf)
        return Stored(name=name, dtype="uint32", shape=data.shape, get=lambda: np.asarray(data))
    if kind.dtype in CODES:
        return Stored(name=name, dtype=kind.dtype, shape=kind.shape, get=lambda: _host(leaf))
    try:
        size = math.prod(kind.shape) * host_dtype(kind.dtype).itemsize
    except TypeError as error:
        raise FormatError(
            f"found an array of dtype {kind.dtype}, which cannot be written",
            path=name,
            fix="Cast it before saving.",
        ) from error
    return Stored(
        name=name,
        dtype="uint8",
        shape=(size,),
        get=lambda: _host(leaf).reshape(-1).view(np.uint8),
    )


def _host(leaf: Any) -> np.ndarray[Any, Any]:
    array = np.ascontiguousarray(np.asarray(leaf))
    return array if array.dtype.byteorder != ">" else array.astype(array.dtype.newbyteorder("<"))


def _number(name: str, leaf: Any) -> np.ndarray[Any, Any]:
    """A Python number in 64 bits; a complex one as two."""
    array = np.array([leaf.real, leaf.imag] if isinstance(leaf, complex) else leaf)
    if array.dtype == object or array.dtype == np.uint64:
        raise FormatError(
            f"{leaf} does not fit into 64 bits with sign", path=name, fix="Save it as a float."
        )
    return array


class MappedValues(Values):
    """The values of an artefact; each is read from its file when it is first asked for.

    Reads like any `Values`. A value is then a `jax.Array` on the default device; where jax would
    cut 64 bits to 32 it stays a numpy array, which nobody can write to.

    Args:
        graph: the graph.
        container: the file.
        check: whether checksums are compared.

    Raises:
        FormatError: the file does not hold the slots of the graph.
    """

    __slots__ = ("_check", "_container", "_made", "_slots", "_types")

    def __init__(self, graph: Graph, container: Container, *, check: bool) -> None:
        self.index: SlotIndex = slot_index(graph)
        self._slots = graph.slots
        self._container = container
        self._check = check
        self._types = _read_index(graph, container)
        self._made: list[Any] = [_UNREAD] * len(graph.slots)

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        """A value per slot: all of them are read."""
        return tuple(map(self._value, range(len(self._slots))))

    @property
    def nbytes(self) -> int:
        """Bytes of all values together."""
        return sum(
            self._container.size(leaf_name(key, place))
            for key, types in zip(self.index.keys, self._types, strict=True)
            for place in types
        )

    @property
    def mapped(self) -> tuple[Any, ...]:
        """A value per slot as `host` gives it.

        With several processes, each of which needs a part, checksums are not compared.
        """
        check = self._check and jax.process_count() == 1
        return tuple(self._host(position, check) for position in range(len(self._slots)))

    def __getitem__(self, key: str) -> Any:
        return self._value(self.index.find(key))

    def __len__(self) -> int:
        return len(self._slots)

    def _value(self, position: int) -> Any:
        if self._made[position] is _UNREAD:
            self._made[position] = jax.tree.map(_on_device, self._host(position, self._check))
        return self._made[position]

    def host(self, key: str) -> Any:
        """A value as it lies in the file: numpy arrays that are views of it, and no copies.

        Args:
            key: the name of the slot.

        Returns:
            A numpy array that cannot be written to; a jax array for typed PRNG keys; a Python
            number; or a pytree of these.

        Raises:
            ValuesError: there is no such slot.
            FormatError: its checksum is wrong.
        """
        return self._host(self.index.find(key), self._check)

    def _host(self, position: int, check: bool) -> Any:
        slot, types = self._slots[position], self._types[position]
        found = {
            place: self._leaf(leaf_name(self.index.keys[position], place), kind, check)
            for place, kind in types.items()
        }
        if isinstance(slot.type, TreeType):
            return _trees.fill(slot.type.structure, [found[place] for place in slot_types(slot)])
        return found[""]

    def _leaf(self, name: str, kind: TensorType, check: bool) -> Any:
        array = self._container.array(name, check=check)
        if kind.dtype in NUMBERS:
            number = array.tolist()
            return complex(*number) if kind.dtype == "complex" else NUMBERS[kind.dtype](number)
        if is_key(kind):
            return jax.random.wrap_key_data(jnp.asarray(array), impl=key_impl(kind))
        dtype = host_dtype(kind.dtype)
        return array if kind.dtype in CODES else array.view(dtype).reshape(kind.shape)


_UNREAD = object()


def _on_device(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype:
        return jnp.asarray(leaf)
    return leaf


def _read_index(graph: Graph, container: Container) -> list[Types]:
    """The types of each slot's arrays."""

    @functools.cache  # most arrays are of few types
    def kind(dtype: Any, *shape: Any) -> TensorType:
        return TensorType(shape=tuple(map(int, shape)), dtype=str(dtype))

    try:
        index = msgpack.unpackb(container.array(SLOTS).tobytes())
        stored_types = {
            key: {place: kind(dtype, *shape) for place, dtype, shape in parts}
            for key, parts in index
        }
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise container.damaged("its list of slots cannot be read") from error
    sizes = dict(container.sizes())
    keys = slot_index(graph).keys
    for key, slot in zip(keys, graph.slots, strict=True):
        found = stored_types.get(key)
        # Nothing is decoded here: what the graph names is not to be imported yet.
        if isinstance(slot.type, TreeType):
            is_whole = found is not None and len(found) == len(slot.type.leaves)
        else:
            is_whole = found is not None and len(found) == 1 and "" in found
        if found is None or not is_whole:
            raise container.damaged(f"{key} is not there")
        for place, each in found.items():
            name = leaf_name(key, place)
            if name not in sizes:
                raise container.damaged(f"{name} is not there")
            expected = _size(each)
            if expected is not None and expected != sizes[name]:
                raise container.damaged(f"{name} is not {each}")
            if isinstance(slot.type, TensorType) and each is not slot.type:
                _check_shape(container, slot.type, name, each)
    return [stored_types[key] for key in keys]


@functools.lru_cache
def _size(kind: TensorType) -> int | None:
    """The bytes of an array; -1: there is no such type; None: it is stored in a way of its own."""
    if kind.dtype in NUMBERS or is_key(kind):
        return None
    try:
        itemsize = host_dtype(kind.dtype).itemsize
    except TypeError:
        return -1
    return -1 if min(kind.shape, default=0) < 0 else math.prod(kind.shape) * itemsize


def _check_shape(container: Container, slot: TensorType, name: str, kind: TensorType) -> None:
    if slot.shape != kind.shape and _size(kind) is not None:
        raise container.damaged(f"{name} is {kind}, and its slot {slot}")


def _flatten(values: Values) -> tuple[tuple[Any, ...], SlotIndex]:
    return values.arrays, values.index


def _flatten_with_keys(values: Values) -> tuple[list[tuple[Any, Any]], SlotIndex]:
    return [(jax.tree_util.DictKey(key), value) for key, value in values.items()], values.index


def _unflatten(index: SlotIndex, arrays: Iterable[Any]) -> Any:
    return Values(index, tuple(arrays))


jax.tree_util.register_pytree_with_keys(MappedValues, _flatten_with_keys, _unflatten, _flatten)
