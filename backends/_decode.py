"""How data becomes objects of flax again: variable classes, metadata, boxes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import linen, nnx
from flax.core import meta

from linsey import _boxes, _trees
from linsey._boxes import LINEN_BOX, NNXMeta
from linsey._collections import kind_of_collection
from linsey.backends import _private
from linsey.ir import (
    RNG_COLLECTIONS,
    UNCONSTRAINED,
    AttrValue,
    Axis,
    Const,
    Decoder,
    Graph,
    Partition,
    PartitionError,
    Slot,
    TreeType,
    decode,
    place,
    read_rules,
)
from linsey.ir.reserved import GRAPHDEF, LIFTED


def kind_of(slot: Slot) -> type[nnx.Variable[Any]]:
    """The NNX variable class of a slot."""
    if slot.kind is not None:
        return decode(slot.kind)  # type: ignore[no-any-return]
    return kind_of_collection(slot.collection)


def metadata_of(slot: Slot) -> dict[str, Any]:
    """The metadata that the NNX Variable of a slot carries."""
    note = slot.partition
    if slot.metadata:
        metadata = {str(name): decode(value) for name, value in slot.metadata}
    else:
        metadata = _boxes.plain_metadata() | _box_metadata(slot)
        if note is not None:
            # As in Linen, where an annotation shards nothing by itself: NNX would refuse what an
            # optimizer makes of the Variable wherever its names are no axes of a mesh in force.
            metadata["eager_sharding"] = False
            extra = {"mesh": decode(note.mesh), "sharding_rules": _own_rules(slot, note)}
            metadata |= {key: value for key, value in extra.items() if value is not None}
    if note is not None and note.spec != _NOTHING:
        metadata["out_sharding"] = decode(note.spec)
    return metadata


_NOTHING = Const(None)


def _box_metadata(slot: Slot) -> dict[str, Any]:
    """The metadata by which a Variable remembers the Linen box of a slot, its own fields too."""
    if slot.box is None:
        return {}
    return _boxes.box_metadata(_trees.fill(slot.box, [None] * _count(slot)))


def _count(slot: Slot) -> int:
    return len(slot.type.leaves) if isinstance(slot.type, TreeType) else 1


def _own_rules(slot: Slot, note: Partition) -> Any:
    """The rules of an annotation as NNX reads them.

    NNX looks each name up, and the last rule for it counts. Linen's rules have an order, and use an
    axis of the mesh once. So the names of this slot are mapped here, and NNX gets what came out.
    """
    rules = decode(note.rules)
    if not rules or not note.logical:
        return rules
    try:
        placed = place(slot, read_rules(rules)).axes
    except PartitionError:  # which Linen, too, tells only when they are used
        return rules
    pairs = zip(note.axes, placed, strict=True)
    return tuple((name, _entry(axis)) for name, axis in pairs if isinstance(name, str))


def boxed(slot: Slot, value: Any, names: Any = None) -> Any:
    """A value in its Linen box, or as it is when it has none.

    Args:
        slot: whose box.
        value: the value.
        names: the axis names to use where they are no longer those of the slot.
    """
    if slot.box is None:
        return value
    box = _trees.fill(slot.box, jax.tree.leaves(value))
    note = slot.partition
    if names is None or note is None or not hasattr(box, "names") or names == decode(note.spec):
        return box
    return dataclasses.replace(box, names=names)


def emitted_box(slot: Slot, value: Any) -> Any:
    """A value as Linen variables hold it: in its own box, or in one that its metadata asks for.

    That is the Linen box which the Variable remembers, or which its annotation is; and an `NNXMeta`
    where there is metadata that these do not hold.
    """
    if slot.box is not None or slot.raw or slot.kind is None:
        return boxed(slot, value)
    required = nnx.Variable.required_metadata
    metadata = {key: v for key, v in metadata_of(slot).items() if key not in required}
    box, note = metadata.get(LINEN_BOX), slot.partition
    held = {"out_sharding", "mesh"}
    if note is not None:
        held.add("sharding_rules")
    if box is not None:
        held.update((LINEN_BOX, "sharding_rules", *_fields(box)))
    more = any(v is not None and v != () for key, v in metadata.items() if key not in held)
    if more and slot.collection not in RNG_COLLECTIONS:
        return NNXMeta(var_type=kind_of(slot), value=value, metadata=metadata)
    if note is not None:
        return _partitioned(note, box, metadata, value)
    # The annotation of a Variable that has no partition is one of another rank: an optimizer's.
    is_other = box is None or issubclass(box, meta.Partitioned)
    return value if is_other else _boxes.box_of(box, {**metadata, "value": value})


def _fields(box: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(box))


def _partitioned(note: Partition, box: Any, metadata: dict[str, Any], value: Any) -> Any:
    names, mesh = tuple(map(_entry, note.axes)), decode(note.mesh)
    rules = metadata.get("sharding_rules")
    if box is not None:
        fields = {**metadata, "value": value, "out_sharding": names, "sharding_rules": rules}
        return _boxes.box_of(box, fields)
    if rules:
        return linen.LogicallyPartitioned(value, names, mesh=mesh, rules=rules)
    return meta.Partitioned(value, names, mesh=mesh)


def _entry(axis: Axis) -> Any:
    return jax.sharding.PartitionSpec.UNCONSTRAINED if axis is UNCONSTRAINED else axis


def linen_module(graph: Graph, number: int) -> linen.Module:
    """The unbound Linen module of a node.

    Raises:
        LinseyError: a hyper-parameter exists only in the process that lowered it.
    """
    made: dict[int, linen.Module] = {}

    def module(index: int) -> linen.Module:
        if index not in made:
            node = graph.nodes[index]
            assert node.source is not None
            # An NNX module stands in Linen code as the ToLinen around it.
            held = node.source if node.source.dialect == "linen" else node.wrapper
            assert held is not None
            attrs = node.attrs if held is node.source else node.wrapper.attrs  # type: ignore[union-attr]
            cls = value(held.cls)
            fields = [(str(key), attr) for key, attr in attrs if key not in (GRAPHDEF, LIFTED)]
            made[index] = cls(**{name: value.field(cls, name, attr) for name, attr in fields})
        return made[index]

    value = Decoder(node=module)
    with _private.no_parent():
        return module(number)


def decode_linen(value: AttrValue) -> Any:
    """An attribute value that holds Linen modules: they are made unbound, whatever is called now.

    Raises:
        LinseyError: a part of it exists only in the process that it was made in.
    """
    with _private.no_parent():
        return decode(value)
