"""How objects of jax and flax become data: attributes, variable classes, metadata, partitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen, nnx
from flax.core import meta
from jax.sharding import PartitionSpec

from linsey import _trees
from linsey._boxes import LINEN_BOX
from linsey._collections import EPHEMERAL, collection_of, unboxed
from linsey.frontends import _private
from linsey.ir import (
    UNCONSTRAINED,
    AttrValue,
    Axis,
    Call,
    Const,
    Encoder,
    Instance,
    Live,
    NodeRef,
    Partition,
    Ref,
    Slot,
    Template,
    ValueType,
    reference,
)


class FlaxEncoder(Encoder):
    """Encodes attributes of flax modules.

    Args:
        node: gives the node of a bound Linen module, or None.
    """

    def __init__(self, node: Callable[[linen.Module], int | None] = lambda module: None) -> None:
        super().__init__(self._flax)
        self._node = node

    def _flax(self, obj: Any) -> AttrValue | None:
        if isinstance(obj, linen.Module):
            number = None if obj.scope is None else self._node(obj)
            return NodeRef(node=number) if number is not None else self.module(obj)
        if isinstance(obj, PartitionSpec):
            return Call(
                function=Ref(name="jax.sharding:PartitionSpec", live=PartitionSpec),
                args=tuple(map(self, obj)),
                live=obj,
            )
        if obj is PartitionSpec.UNCONSTRAINED:
            return Ref(name="jax.sharding:PartitionSpec.UNCONSTRAINED", live=obj)
        if isinstance(obj, nnx.GraphDef):
            return Live(key=obj, text="graphdef", live=obj)
        if isinstance(obj, type) and issubclass(obj, linen.Module):
            return reference(obj) or _private.transformed_class(obj, self)
        return None

    def module(self, module: linen.Module) -> Instance:
        """An unbound Linen module, by its class and fields."""
        fields = self.fields(module)
        if module.name is not None:
            fields += (("name", Const(module.name)),)
        live = module if module.scope is None else None
        value = Instance(cls=self(type(module)), fields=fields, share=self._share(module))
        return value if live is None else dataclasses.replace(value, live=live)

    def fields(self, module: linen.Module) -> tuple[tuple[str, AttrValue], ...]:
        """The hyper-parameters of a Linen module, by name."""
        return tuple(
            (item.name, self(getattr(module, item.name)))
            for item in dataclasses.fields(module)
            if item.init and item.name not in ("parent", "name") and hasattr(module, item.name)
        )


def partition(
    names: Any, rules: AttrValue, mesh: AttrValue, encode: Encoder, *, logical: bool = False
) -> Partition | None:
    """A partition annotation, or None when `names` is not one entry per axis."""
    if not isinstance(names, tuple | list | PartitionSpec):
        return None
    axes: list[Axis] = []
    for entry in names:
        if entry is None or isinstance(entry, str):
            axes.append(entry)
        elif isinstance(entry, tuple | list) and all(isinstance(name, str) for name in entry):
            axes.append(tuple(entry))
        elif entry is PartitionSpec.UNCONSTRAINED:
            axes.append(UNCONSTRAINED)
        else:
            axes.append(str(entry))
    return Partition(axes=tuple(axes), logical=logical, spec=encode(names), rules=rules, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class Variable:
    """One Linen variable as data."""

    type: ValueType
    box: Template | None
    partition: Partition | None


def linen_variable(value: Any, encode: Encoder) -> Variable:
    """A Linen variable, boxed or not, as data.

    Raises:
        TypeError: a leaf is neither an array nor a number.
    """
    kind = _trees.value_type(unboxed(value))
    if not isinstance(value, meta.AxisMetadata):
        return Variable(kind, None, None)
    names = getattr(value, "names", None)
    if names is None and isinstance(value, nnx.bridge.NNXMeta):
        names = value.metadata.get("out_sharding")
    note = partition(
        names,
        encode(getattr(value, "rules", None)),
        encode(getattr(value, "mesh", None)),
        encode,
        logical=isinstance(value, linen.LogicallyPartitioned),
    )
    return Variable(kind, _trees.template(jax.tree.structure(value)), note)


def nnx_variable(
    variable: nnx.Variable[Any], paths: tuple[tuple[str | int, ...], ...], encode: Encoder
) -> Slot:
    """An NNX variable as a slot.

    Raises:
        TypeError: a leaf of its value is neither an array nor a number.
    """
    metadata: Mapping[str, Any] = variable.get_metadata()
    note = partition(
        metadata.get("out_sharding"),
        encode(metadata.get("sharding_rules")),
        encode(metadata.get("mesh")),
        encode,
        logical=metadata.get(LINEN_BOX) is linen.LogicallyPartitioned,
    )
    collection = collection_of(type(variable))
    kept = ((k, v) for k, v in metadata.items() if note is None or k != "out_sharding")
    return Slot(
        collection=collection,
        paths=paths,
        kind=encode(type(variable)),
        type=_trees.value_type(variable.get_raw_value()),
        partition=note,
        lifetime="ephemeral" if collection in EPHEMERAL else "persistent",
        metadata=tuple((name, encode(value)) for name, value in sorted(kept)),
    )
