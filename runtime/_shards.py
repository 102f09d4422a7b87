"""The sizes of shards, counted without any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from linsey.ir import Axis, TensorType, shards


def largest_shard(leaf: TensorType, axes: Sequence[Axis], sizes: Mapping[str, int]) -> TensorType:
    """The largest shard of an array: XLA rounds up where the sizes do not divide evenly.

    Args:
        leaf: the type of the array.
        axes: the mesh axes that each of its axes lies on; empty: it is replicated.
        sizes: the sizes of the mesh's axes.

    Example:
        >>> print(largest_shard(TensorType(shape=(10, 4), dtype="int8"), ("x", None), {"x": 4}))
        int8[3,4]
    """
    if not axes:
        return leaf
    shape = tuple(
        -(-size // shards(axis, sizes)) for size, axis in zip(leaf.shape, axes, strict=True)
    )
    return dataclasses.replace(leaf, shape=shape)


def most_parts(shape: tuple[int, ...], cuts: Sequence[int]) -> int:
    """Into how many parts at most an array can be cut evenly, each cut along one axis.

    Example:
        >>> most_parts((6, 4), (2, 4, 3))
        24
        >>> most_parts((6, 5), (2, 4))
        2
    """
    reached = {shape: 1}
    for cut in cuts:
        for sizes, count in list(reached.items()):
            for axis, size in enumerate(sizes):
                if size % cut == 0:
                    smaller = (*sizes[:axis], size // cut, *sizes[axis + 1 :])
                    reached[smaller] = max(count * cut, reached.get(smaller, 0))
    return max(reached.values())


def axis_names(axis: Axis) -> tuple[str, ...]:
    """The mesh axes in one entry of a placement."""
    if isinstance(axis, tuple):
        return tuple(name for name in axis if isinstance(name, str))
    return (axis,) if isinstance(axis, str) else ()
