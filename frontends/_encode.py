"""How objects of jax and flax become data: attributes, variable classes, metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen, nnx
from flax.core import meta
from jax.sharding import PartitionSpec

from linsey import _trees
from linsey._collections import EPHEMERAL, collection_of, kind_of_collection, unboxed
from linsey.frontends import _private
from linsey.frontends._annotations import box_partition, variable_partition
from linsey.ir import (
    AttrValue,
    Call,
    Const,
    DType,
    Encoder,
    Instance,
    Live,
    NodeRef,
    Partition,
    Ref,
    Slot,
    StackAxis,
    Template,
    ValueType,
    encode,
    format_path,
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
        if isinstance(obj, type) and issubclass(obj, nnx.Variable):
            return reference(obj) or _collection_class(obj)
        if isinstance(obj, jax.ShapeDtypeStruct | jax.core.Tracer):
            return _abstract_array(obj)
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


def _collection_class(kind: type[nnx.Variable[Any]]) -> Call | None:
    """A variable class that flax made for the name of a collection, by that name."""
    if kind.__bases__ != (nnx.Variable,) or kind.__module__.partition(".")[0] != "flax":
        return None
    try:
        name = nnx.variable_name_from_type(kind)
    except ValueError:
        return None
    function = Ref(name="linsey._collections:kind_of_collection", live=kind_of_collection)
    return Call(function=function, args=(Const(name),), live=kind)


def _abstract_array(obj: Any) -> Call | None:
    """An array of which the shape and the dtype are all that is known, as a ShapeDtypeStruct.

    An array that a model computes while it is traced, too, and hands to a submodule as a field: it
    is another one in each call.
    """
    shape, dtype = tuple(obj.shape), obj.dtype
    if isinstance(obj, jax.ShapeDtypeStruct) and (
        obj != _trees.shape_struct(shape, dtype) or obj.weak_type
    ):
        return None
    if not all(type(size) is int for size in shape):
        return None
    name = Ref(name="linsey._trees:dtype_of", live=_trees.dtype_of)
    is_key = jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)
    kind = Call(function=name, args=(Const(str(dtype)),)) if is_key else DType(name=dtype.name)
    return Call(
        function=Ref(name="jax:ShapeDtypeStruct", live=jax.ShapeDtypeStruct),
        args=(encode(shape), kind),
    )


@dataclasses.dataclass(frozen=True)
class Variable:
    """One Linen variable as data."""

    type: ValueType
    box: Template | None
    partition: Partition | None


def linen_variable(
    value: Any, encode: Encoder, where: str, stack: tuple[StackAxis, ...] = ()
) -> Variable:
    """A Linen variable, boxed or not, as data.

    Args:
        value: the variable.
        encode: encodes its annotation.
        where: its slot, for the error.
        stack: the axes that lifted transforms added to it, outermost first.

    Raises:
        TypeError: a leaf is neither an array nor a number.
        LoweringError: its partition annotation cannot be read.
    """
    kind = _trees.value_type(unboxed(value))
    if not isinstance(value, meta.AxisMetadata):
        return Variable(kind, None, None)
    note = box_partition(value, encode, where, stack)
    return Variable(kind, _trees.template(jax.tree.structure(value)), note)


def nnx_variable(
    variable: nnx.Variable[Any], paths: tuple[tuple[str | int, ...], ...], encode: Encoder
) -> Slot:
    """An NNX variable as a slot.

    Raises:
        TypeError: a leaf of its value is neither an array nor a number.
        LoweringError: its partition annotation cannot be read.
    """
    metadata: Mapping[str, Any] = variable.get_metadata()
    collection = collection_of(type(variable))
    note = variable_partition(metadata, encode, format_path((collection, *paths[0])))
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
