"""How data becomes objects of flax again: variable classes, metadata, boxes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import linen, nnx
from flax.core import meta

from linsey import _trees
from linsey._boxes import NNXMeta
from linsey._collections import kind_of_collection
from linsey.backends import _private
from linsey.ir import (
    RNG_COLLECTIONS,
    AttrValue,
    Const,
    Decoder,
    Graph,
    Slot,
    TreeType,
    decode,
)
from linsey.ir.reserved import GRAPHDEF


def kind_of(slot: Slot) -> type[nnx.Variable[Any]]:
    """The NNX variable class of a slot."""
    if slot.kind is not None:
        return decode(slot.kind)  # type: ignore[no-any-return]
    return kind_of_collection(slot.collection)


def metadata_of(slot: Slot) -> dict[str, Any]:
    """The metadata that the NNX Variable of a slot carries."""
    if slot.metadata:
        metadata = {str(name): decode(value) for name, value in slot.metadata}
    else:
        metadata = {"hijax": False, "ref": False, "eager_sharding": nnx.using_eager_sharding()}
        if slot.partition is not None:
            extra = {"mesh": slot.partition.mesh, "sharding_rules": slot.partition.rules}
            metadata |= {key: decode(v) for key, v in extra.items() if v != Const(None)}
    if slot.partition is not None:
        metadata["out_sharding"] = decode(slot.partition.spec)
    return metadata


def boxed(slot: Slot, value: Any, names: Any = None) -> Any:
    """A value in its Linen box, or as it is when it has none.

    Args:
        slot: whose box.
        value: the value.
        names: the axis names to use when they are no longer those of the slot.
    """
    if slot.box is None:
        return value
    box = _trees.fill(slot.box, jax.tree.leaves(value))
    if names is not None and slot.partition is not None and hasattr(box, "names"):
        box = dataclasses.replace(box, names=names)
    return box


def emitted_box(slot: Slot, value: Any) -> Any:
    """A value as Linen variables hold it: in its own box, or in one that its metadata asks for."""
    if slot.box is not None or slot.raw or slot.kind is None:
        return boxed(slot, value)
    metadata = metadata_of(slot)
    own = set(metadata) - {*nnx.Variable.required_metadata, "out_sharding", "mesh"}
    own -= {"sharding_rules"} if slot.partition is not None else set()
    if slot.collection not in RNG_COLLECTIONS and any(metadata[k] not in (None, ()) for k in own):
        return NNXMeta(
            var_type=kind_of(slot),
            value=value,
            metadata={k: v for k, v in metadata.items() if k not in nnx.Variable.required_metadata},
        )
    if slot.partition is None:
        return value
    names, mesh = metadata["out_sharding"], metadata.get("mesh")
    if metadata.get("sharding_rules"):
        rules = metadata["sharding_rules"]
        return linen.LogicallyPartitioned(value, tuple(names), mesh=mesh, rules=rules)
    return meta.Partitioned(value, tuple(names), mesh=mesh)


def abstract_value(slot: Slot) -> Any:
    """The value of a slot as shapes and dtypes."""
    if isinstance(slot.type, TreeType):
        leaves = [_shape(leaf.shape, leaf.dtype) for leaf in slot.type.leaves]
        return _trees.fill(slot.type.structure, leaves)
    return _shape(slot.type.shape, slot.type.dtype)


def _shape(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    if dtype.startswith("key<"):
        with_impl = jax.eval_shape(lambda: jax.random.key(0, impl=_IMPLS.get(dtype, dtype[4:-1])))
        return _trees.shape_struct(shape, with_impl.dtype)
    return _trees.shape_struct(shape, jax.numpy.dtype(dtype))


_IMPLS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


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
            fields = {str(key): value(attr) for key, attr in attrs if key != GRAPHDEF}
            made[index] = value(held.cls)(**fields)
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
