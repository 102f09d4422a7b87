"""Many small slots in few buffers: fewer arrays for each call to hand over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from linsey.ir import PartitionError, SlotIndex, TensorType, Values, ValueType
from linsey.runtime import sharding

SMALL = 1 << 16
"""Slots of at most so many bytes are packed. Above, moving the bytes costs more than it saves."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A slot inside a buffer: the elements ``start`` to ``start + size`` of each shard."""

    slot: int
    shape: tuple[int, ...]
    splits: tuple[int, ...]
    """Into how many parts each axis is split."""
    start: int
    size: int


_Buffer = tuple[_Part, ...]
"""The slots of one dtype, one collection and one sharding."""


class Packing:
    """Which slots share which buffer.

    In a buffer each shard holds the elements of all its slots one after another, so that packing
    moves bytes within a device only.

    Args:
        buffers: what is packed.
        loose: the slots that stay as they are.
        slots: the sharding of each slot; None without a mesh.
        shardings: of what is stored, the loose slots and then the buffers; None without a mesh.
    """

    def __init__(
        self,
        buffers: tuple[_Buffer, ...],
        loose: tuple[int, ...],
        slots: tuple[Any, ...] | None,
        shardings: tuple[Any, ...] | None,
    ) -> None:
        self.buffers = buffers
        self.loose = loose
        self.shardings = shardings
        self._data = (buffers, loose, shardings)
        self.unpack_now = jax.jit(self.unpack, out_shardings=slots)
        """`unpack`, under jit."""
        self.pack_now = jax.jit(self.pack, out_shardings=shardings)
        """`pack`, under jit."""
        self.stored_at = {slot: position for position, slot in enumerate(loose)} | {
            part.slot: len(loose) + number
            for number, buffer in enumerate(buffers)
            for part in buffer
        }
        """Position, among what is stored, of what holds each slot."""

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Packing) and self._data == other._data)

    def __hash__(self) -> int:
        return hash((self.buffers, self.loose))

    def pack(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """The loose slots and the buffers, from a value per slot."""
        loose = tuple(arrays[slot] for slot in self.loose)
        return (*loose, *(self._packed(buffer, arrays) for buffer in self.buffers))

    def repack(self, changed: dict[int, Any], arrays: Sequence[Any]) -> dict[int, Any]:
        """What is stored anew after a call, by position among what is stored.

        Args:
            changed: the slots that changed.
            arrays: the values before.
        """
        after = [changed.get(slot, value) for slot, value in enumerate(arrays)]
        stored: dict[int, Any] = {}
        for position in sorted({self.stored_at[slot] for slot in changed}):
            number = position - len(self.loose)
            if number < 0:
                stored[position] = after[self.loose[position]]
            else:
                stored[position] = self._packed(self.buffers[number], after)
        return stored

    def unpack(self, stored: Sequence[Any]) -> tuple[Any, ...]:
        """A value per slot, from what `pack` gave."""
        arrays: list[Any] = [None] * len(self.stored_at)
        for slot, value in zip(self.loose, stored, strict=False):
            arrays[slot] = value
        for buffer, flat in zip(self.buffers, stored[len(self.loose) :], strict=True):
            for part in buffer:
                piece = jax.lax.slice_in_dim(flat, part.start, part.start + part.size, axis=-1)
                arrays[part.slot] = _joined(piece, part)
        return _apart(arrays)

    def _packed(self, buffer: _Buffer, arrays: Sequence[Any]) -> Any:
        return jnp.concatenate(
            _apart([_split(arrays[part.slot], part) for part in buffer]), axis=-1
        )

    def call(
        self,
        run: Callable[..., tuple[Any, dict[int, Any] | None]],
        stored: tuple[Any, ...],
        *operands: Any,
    ) -> tuple[Any, dict[int, Any] | None]:
        """Runs a traced call of slots on what is stored.

        It becomes a computation of its own, which XLA compiles as it does that of separate arrays,
        to the last bit. Else loops that update slots would be made in another way, and round in
        other places.

        Args:
            run: ``run(arrays, *operands)`` gives the result and the slots that change.
            stored: what `pack` gave.
            operands: further operands, pytrees of arrays.

        Returns:
            The result, and what is stored anew by position, or None.
        """
        arrays = self.unpack(stored)
        slots: list[int] = []

        def apart(arrays: tuple[Any, ...], operands: tuple[Any, ...]) -> Any:
            result, changed = run(arrays, *operands)
            slots[:] = changed or ()
            return result, tuple((changed or {}).values())

        traced = cast(Any, jax.jit(apart, inline=True))  # its eval_shape is not annotated
        shapes = traced.eval_shape(arrays, operands)
        if any(_is_key(leaf) for leaf in jax.tree.leaves(shapes)):
            result, new = traced(arrays, operands)  # a key has no value that stands for none
        else:
            result, new = jax.lax.cond(
                _true(stored),
                traced,
                lambda *_: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
                arrays,
                operands,
            )
        changed = dict(zip(slots, new, strict=True))
        return result, self.repack(changed, arrays) if changed else None


def _apart(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """The arrays, which XLA may not compute in one loop with what is before or behind."""
    barrier: Any = jax.lax.optimization_barrier  # not annotated
    return tuple(barrier(tuple(arrays)))


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _true(stored: tuple[Any, ...]) -> Any:
    """True, which XLA does not know: a condition that it knows makes no computation of its own."""
    leaves = map(jnp.asarray, jax.tree.leaves(stored))
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size]
    if not floats:
        return True
    probe = jnp.ravel(floats[-1])[0]
    return (probe == probe) | (probe != probe)


def _split(value: Any, part: _Part) -> Any:
    """A value as (split axes ..., elements of one shard)."""
    steps = [
        size
        for whole, parts in zip(part.shape, part.splits, strict=True)
        for size in (parts, whole // parts)
    ]
    axes = range(len(part.shape))
    order = [2 * axis for axis in axes] + [2 * axis + 1 for axis in axes]
    leading = [parts for parts in part.splits if parts > 1]
    return jnp.reshape(jnp.transpose(jnp.reshape(value, steps), order), (*leading, part.size))


def _joined(piece: Any, part: _Part) -> Any:
    """Undoes `_split`."""
    inner = [whole // parts for whole, parts in zip(part.shape, part.splits, strict=True)]
    count = len(part.shape)
    order = [
        axis for pair in zip(range(count), range(count, 2 * count), strict=True) for axis in pair
    ]
    return jnp.reshape(jnp.transpose(jnp.reshape(piece, (*part.splits, *inner)), order), part.shape)


def packing_of(
    kinds: Sequence[ValueType],
    groups: Sequence[Hashable],
    *,
    mesh: Mesh | None,
    shardings: tuple[Any, ...] | None,
    small: int = SMALL,
) -> Packing:
    """Packs small slots.

    Those of one group, dtype and sharding share a buffer. PRNG keys, pytrees, Python numbers and
    empty arrays stay as they are.

    Args:
        kinds: the type of each slot.
        groups: what each slot belongs to; slots that change together should share a group.
        mesh: the mesh, or None.
        shardings: the sharding of each slot, or None.
        small: the most bytes of a slot that is packed.

    Raises:
        PartitionError: the mesh has explicit axes.
    """
    if mesh is not None and sharding.is_explicit(mesh):
        raise PartitionError(
            "found explicit axes, on which arrays that are split cannot be reshaped freely",
            path="mesh",
            fix="Compile without pack=True, or for a mesh with Auto axes.",
        )
    together: dict[Any, list[_Part]] = {}
    loose = []
    for number, (kind, group) in enumerate(zip(kinds, groups, strict=True)):
        if not isinstance(kind, TensorType) or not _is_small(kind, small):
            loose.append(number)
            continue
        where = None if shardings is None else shardings[number]
        part = _part(number, kind, where)
        names = () if where is None else _split_names(where, part)
        together.setdefault((group, kind.dtype, names), []).append(part)
    buffers, shared = [], []
    for (_, _, names), parts in together.items():
        if len(parts) == 1:
            loose.append(parts[0].slot)
            continue
        starts = itertools.accumulate((part.size for part in parts), initial=0)
        placed = zip(parts, starts, strict=False)
        buffers.append(tuple(replace(part, start=start) for part, start in placed))
        shared.append(names)
    loose.sort()
    if mesh is None or shardings is None:
        return Packing(tuple(buffers), tuple(loose), None, None)
    stored = [shardings[slot] for slot in loose]
    stored += [NamedSharding(mesh, sharding.spec((*names, None))) for names in shared]
    return Packing(tuple(buffers), tuple(loose), shardings, tuple(stored))


def _part(number: int, kind: TensorType, where: NamedSharding | None) -> _Part:
    inner = kind.shape if where is None else where.shard_shape(kind.shape)
    splits = tuple(whole // part for whole, part in zip(kind.shape, inner, strict=True))
    return _Part(number, kind.shape, splits, 0, math.prod(inner))


def _split_names(where: NamedSharding, part: _Part) -> tuple[Any, ...]:
    """The mesh axes of each axis that is split, in order."""
    return tuple(entry for entry, parts in zip(where.spec, part.splits, strict=False) if parts > 1)


def _is_small(kind: TensorType, small: int) -> bool:
    if kind.dtype in ("int", "float", "bool", "complex") or kind.dtype.startswith("key<"):
        return False
    return 0 < math.prod(kind.shape) * jnp.dtype(kind.dtype).itemsize <= small


class PackedValues(Values):
    """The values of a program that was compiled with ``pack=True``.

    Reads like any `Values`. As a pytree its leaves are what is stored: the buffers, and the slots
    that are not packed.

    Args:
        index: the names of the slots.
        packing: which slots share which buffer.
        stored: the slots that are not packed, and the buffers.
    """

    __slots__ = ("_arrays", "packing", "stored")

    def __init__(self, index: SlotIndex, packing: Packing, stored: tuple[Any, ...]) -> None:
        self.index = index
        self.packing = packing
        self.stored = stored
        self._arrays: tuple[Any, ...] | None = None

    @property
    def arrays(self) -> tuple[Any, ...]:  # type: ignore[override]
        """A value per slot, unpacked when first asked for."""
        if self._arrays is None:
            self._arrays = unpacked(self.packing, self.stored)
        return self._arrays


def packed(packing: Packing, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is stored, for values of any kind: concrete, traced or abstract."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arrays)):
        return jax.eval_shape(packing.pack, arrays)  # type: ignore[no-any-return]
    return packing.pack_now(arrays)  # type: ignore[no-any-return]


def unpacked(packing: Packing, stored: tuple[Any, ...]) -> tuple[Any, ...]:
    """A value per slot, for what is stored of any kind."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(stored)):
        return jax.eval_shape(packing.unpack, stored)  # type: ignore[no-any-return]
    return packing.unpack_now(stored)  # type: ignore[no-any-return]


def _flatten(values: PackedValues) -> tuple[tuple[Any, ...], tuple[SlotIndex, Packing]]:
    return values.stored, (values.index, values.packing)


jax.tree_util.register_pytree_node(
    PackedValues, _flatten, lambda form, stored: PackedValues(*form, tuple(stored))
)
