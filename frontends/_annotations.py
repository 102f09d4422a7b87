"""What the sources say about partitioning, in all their spellings, as partitions of the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen, nnx
from flax.core import meta
from flax.linen import partitioning
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec

from linsey import _trees
from linsey._boxes import LINEN_BOX, inserted
from linsey._collections import unboxed
from linsey.frontends._builder import Builder
from linsey.ir import (
    UNCONSTRAINED,
    Axis,
    Const,
    Encoder,
    LoweringError,
    Partition,
    Slot,
    StackAxis,
    TensorType,
    TreeType,
)

UNWRITTEN = Const(None)
"""The `spec` of a partition that follows from something else than the Variable's own metadata."""
AXES = "_axes"
"""What ``param_with_axes`` adds to a collection and to a name, for where it keeps the axes."""


def partition(
    written: Any,
    encode: Encoder,
    where: str,
    *,
    rules: Any = None,
    mesh: Any = None,
    logical: bool = False,
) -> Partition | None:
    """A partition annotation.

    Args:
        written: what the source wrote: None, a sequence with one entry per axis, or (in NNX) a
            sharding or a format.
        encode: encodes what is kept of it.
        where: the slot, for the error.
        rules: the rules that came with it.
        mesh: the mesh that came with it.
        logical: whether its names are logical ones.

    Raises:
        LoweringError: it is something else, which flax would take apart without a word (the
            letters of a string, say).
    """
    if written is None:
        return None
    names, own_mesh = _plain(written)
    if not isinstance(names, tuple | list):  # a PartitionSpec is a tuple in some versions of jax
        if not isinstance(names, PartitionSpec):
            raise _unreadable(written, where)
        names = tuple(names)
    axes = tuple(_axis(entry, written, where) for entry in names)
    mesh = own_mesh if mesh is None else mesh
    return Partition(
        axes=axes,
        logical=logical,
        spec=encode(written),
        rules=encode(rules),
        mesh=encode(mesh),
    )


def _plain(written: Any) -> tuple[Any, Any]:
    """The entries of an annotation, and the mesh that it names."""
    if isinstance(written, Format):
        return _plain(written.sharding)
    if isinstance(written, NamedSharding):
        return written.spec, written.mesh
    return written, None


def _axis(entry: Any, written: Any, where: str) -> Axis:
    if entry is PartitionSpec.UNCONSTRAINED:
        return UNCONSTRAINED
    if entry is None or isinstance(entry, str):
        return entry or None  # jax takes an empty name for None
    if isinstance(entry, tuple | list) and all(isinstance(name, str) for name in entry):
        return tuple(entry)
    raise _unreadable(written, where)


def _unreadable(written: Any, where: str) -> LoweringError:
    return LoweringError(
        f"found the partition annotation {written!r}, expected one entry per axis: a name, a tuple"
        " of names, None or PartitionSpec.UNCONSTRAINED",
        path=where,
        fix='Write a tuple, ("data", None), or a PartitionSpec.',
    )


def box_partition(
    box: meta.AxisMetadata[Any], encode: Encoder, where: str, stack: tuple[StackAxis, ...] = ()
) -> Partition | None:
    """The annotation of a Linen metadata box, or None.

    Args:
        box: the box.
        encode: encodes what is kept of it.
        where: the slot, for the error.
        stack: the axes that lifted transforms added to the value, outermost first.

    Raises:
        LoweringError: the box has names that are none.
    """
    if isinstance(box, nnx.bridge.NNXMeta):
        metadata = dict(box.metadata)
        if type(box).add_axis is nnx.bridge.NNXMeta.add_axis:
            # flax's own box does not follow the lifted axes, although what it holds does.
            metadata["out_sharding"] = _stacked(metadata.get("out_sharding"), stack)
        return variable_partition(metadata, encode, where)
    is_partitioned = isinstance(box, meta.Partitioned)
    own: Any = getattr(type(box), "get_partition_spec", None)
    if own not in (None, meta.Partitioned.get_partition_spec):
        written: Any = box.get_partition_spec()  # type: ignore[attr-defined]
    elif is_partitioned or isinstance(getattr(box, "names", None), tuple):
        written = box.names  # type: ignore[attr-defined]
    else:
        return None
    return partition(
        written,
        encode,
        where,
        rules=getattr(box, "rules", None),
        mesh=getattr(box, "mesh", None),
        logical=isinstance(box, linen.LogicallyPartitioned),
    )


def variable_partition(
    metadata: Mapping[str, Any], encode: Encoder, where: str
) -> Partition | None:
    """The annotation in the metadata of an NNX Variable, or None.

    Raises:
        LoweringError: there is one that cannot be read.
    """
    box = metadata.get(LINEN_BOX)
    return partition(
        metadata.get("out_sharding"),
        encode,
        where,
        rules=metadata.get("sharding_rules"),
        mesh=metadata.get("mesh"),
        logical=isinstance(box, type) and issubclass(box, linen.LogicallyPartitioned),
    )


def _stacked(names: Any, stack: tuple[StackAxis, ...]) -> Any:
    """Names with those of lifted axes among them."""
    if not names or not isinstance(names, tuple | list | PartitionSpec):
        return names
    for axis in reversed(stack):
        names = inserted(names, axis.axis, axis.name)
    return names


def take_sown_axes(builder: Builder, encode: Encoder) -> None:
    """Gives slots the axes that ``param_with_axes`` and ``variable_with_axes`` have sown.

    They lie beside the variable, in a collection of their own, which stays as it is.

    Args:
        builder: the graph in the making, all its slots included.
        encode: encodes the names.

    Raises:
        LoweringError: axes were sown that are none.
    """
    places = {
        (slot.collection, path): number
        for number, slot in enumerate(builder.slots)
        for path in slot.paths
    }
    for slot in tuple(builder.slots):
        sown = _sown(slot)
        if sown is None:
            continue
        collection = slot.collection.removesuffix(AXES)
        number = places.get((collection, (*slot.path[:-1], str(slot.path[-1]).removesuffix(AXES))))
        if number is None or builder.slots[number].partition is not None:
            continue
        target = builder.slots[number]
        if isinstance(target.type, TensorType):
            names = sown.names
            if _rank(names) + len(target.stack) == len(target.type.shape):
                # A plain nn.scan or nn.vmap: only those of `partitioning` name their axis here.
                names = _stacked(tuple(names), target.stack)
            found = partition(names, encode, slot.key, logical=True)
            if found is not None and target.metadata:  # an NNX Variable: it has none of its own
                found = dataclasses.replace(found, spec=UNWRITTEN)
            builder.slots[number] = dataclasses.replace(target, partition=found)


def _sown(slot: Slot) -> partitioning.AxisMetadata | None:
    kind = slot.type
    if not slot.collection.endswith(AXES) or not isinstance(kind, TreeType) or kind.leaves:
        return None
    value = unboxed(_trees.fill(kind.structure, []))
    return value if isinstance(value, partitioning.AxisMetadata) else None


def _rank(names: Any) -> int:
    return len(names) if isinstance(names, tuple | list | PartitionSpec) else 0
