"""NNX Variables and Linen's metadata boxes: the one place where either becomes the other.

Shared by frontends, backends and `linsey.bridge`; needs flax.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors, nnx
from flax.core import meta, spmd
from flax.linen import spmd as linen_spmd
from flax.nnx import bridge

LINEN_BOX = "linen_meta_type"
"""The metadata under which a Variable keeps the class of the Linen box that it came from."""


class NNXMeta(bridge.NNXMeta[Any]):
    """The Linen metadata box of an NNX Variable: its class, its value and all its metadata.

    Unlike flax's, it follows the axes that ``nn.vmap`` and ``nn.scan`` add and remove.

    Attributes:
        var_type: the Variable class.
        value: the array, or a pytree of arrays.
        metadata: the Variable's metadata; ``out_sharding`` is one entry per axis.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn, nnx
        >>> box = NNXMeta(nnx.Param, jnp.ones((3, 2)), {"out_sharding": ("in", "out")})
        >>> box.add_axis(0, {nn.PARTITION_NAME: "layers"}).get_partition_spec()
        P('layers', 'in', 'out')
    """

    def add_axis(self, index: int, params: dict[Any, Any]) -> NNXMeta:
        """Names the axis that a lifted transform adds, and runs the hooks for it.

        Args:
            index: position of the axis in the stacked value.
            params: the transform's ``metadata_params``; ``nn.PARTITION_NAME`` names the axis, and
                any other entry goes into the metadata of that name where it is a tuple.

        Raises:
            flax.errors.PartitioningUnspecifiedError: there is a partition, and the axis has no
                name; ``nn.Partitioned`` raises the same.
        """
        return self._moved(index, params, inserted, "add_axis")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> NNXMeta:
        """Undoes `add_axis`.

        Raises:
            ValueError: the axis has another name.
        """
        return self._moved(index, params, _removed, "remove_axis")

    def _moved(
        self, index: int, params: Mapping[Any, Any], change: Callable[..., Any], hook: str
    ) -> NNXMeta:
        metadata = dict(self.metadata)
        if metadata.get("out_sharding"):
            if meta.PARTITION_NAME not in params:
                raise errors.PartitioningUnspecifiedError(self)
            name = params[meta.PARTITION_NAME]
            metadata["out_sharding"] = change(metadata["out_sharding"], index, name)
        for key, entry in params.items():
            if key != meta.PARTITION_NAME and metadata.get(key) and type(metadata[key]) is tuple:
                metadata[key] = change(metadata[key], index, entry)
        if not metadata.get(f"on_{hook}") and not hasattr(self.var_type, f"on_{hook}"):
            return self.replace(metadata=metadata)
        variable = self.replace(metadata=metadata).to_nnx_variable()
        getattr(variable, hook)(index, params.get(meta.PARTITION_NAME))
        return boxed_meta(variable)

    def get_partition_spec(self) -> Any:
        """The ``PartitionSpec``, by the Variable's own rules and those in force."""
        return nnx.get_partition_spec(self.to_nnx_variable()).get_raw_value()

    def get_sharding(self, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
        """The sharding on a mesh."""
        return jax.sharding.NamedSharding(mesh, self.get_partition_spec())

    def to_nnx_variable(self) -> nnx.Variable[Any]:
        """The Variable. No hook runs and nothing is sharded anew."""
        kind: Any = self.var_type
        return kind.from_metadata(self.value, {**plain_metadata(), **self.metadata})  # type: ignore[no-any-return]


def inserted(names: Any, index: int, name: Any) -> Any:
    """Axis names with one more at a position; what is missing before it is filled with None."""
    entries = [*names, *[None] * (index - len(names))]
    return _like(names, (*entries[:index], name, *entries[index:]))


def _removed(names: Any, index: int, name: Any) -> Any:
    entries = list(names)
    found = entries.pop(index)
    if found != name:
        raise ValueError(f"at axis {index} of {names}: found {found!r}, expected {name!r}")
    return _like(names, tuple(entries))


def _like(names: Any, entries: tuple[Any, ...]) -> Any:
    is_spec = isinstance(names, jax.sharding.PartitionSpec)
    make: Any = jax.sharding.PartitionSpec  # its constructor is not annotated
    return make(*entries) if is_spec else entries


def plain_metadata() -> dict[str, Any]:
    """The metadata that every Variable must have, as flax would set it now."""
    return {"hijax": False, "ref": False, "eager_sharding": nnx.using_eager_sharding()}


def own_metadata(variable: nnx.Variable[Any]) -> dict[str, Any]:
    """The metadata of a Variable without what every Variable must have."""
    required = nnx.Variable.required_metadata
    return {key: v for key, v in variable.get_metadata().items() if key not in required}


def box_metadata(box: meta.AxisMetadata[Any]) -> dict[str, Any]:
    """The metadata by which an NNX Variable remembers a Linen box."""
    if isinstance(box, bridge.NNXMeta):
        return dict(box.metadata)
    # flax's LogicallyPartitioned empties itself when it is asked for its metadata: give it a copy.
    fields = getattr(copy.copy(box), "to_nnx_metadata", lambda: dict(vars(box)))()
    return {**{key: v for key, v in fields.items() if key != "value"}, LINEN_BOX: type(box)}


def variable(kind: type[nnx.Variable[Any]], value: Any) -> nnx.Variable[Any]:
    """An NNX Variable for a Linen variable, boxed or not.

    Under a mesh, an annotated value is sharded as NNX shards it when it makes the Variable; with
    none it is only annotated, as in Linen.

    Args:
        kind: the Variable class; that of an `NNXMeta` goes before it.
        value: the Linen variable.
    """
    metadata = plain_metadata()
    if isinstance(value, meta.AxisMetadata):
        metadata |= box_metadata(value)
        kind = value.var_type if isinstance(value, bridge.NNXMeta) else kind
        value = value.value if hasattr(value, "value") else value.unbox()
    if metadata.get("out_sharding") and metadata["eager_sharding"]:
        value = _sharded(value, metadata)
    make: Any = kind
    return make.from_metadata(value, metadata)  # type: ignore[no-any-return]


def _sharded(value: Any, metadata: Mapping[str, Any]) -> Any:
    mesh = metadata.get("mesh") or meta.get_global_mesh()
    if mesh is None or not isinstance(value, jax.Array):
        return value
    names, rules = metadata["out_sharding"], metadata.get("sharding_rules")
    if "sharding_rules" in metadata and LINEN_BOX in metadata:
        # Logical names of Linen: one that no rule maps is replicated.
        names, rules = linen_spmd.logical_to_mesh_axes(names, rules), None
    return spmd.shard_value(value, names, rules, mesh)


def boxed_meta(variable: nnx.Variable[Any]) -> NNXMeta:
    """A Variable in an `NNXMeta`, whatever metadata it has."""
    return NNXMeta(
        var_type=type(variable),
        value=variable.get_raw_value(),
        metadata=own_metadata(variable),
    )


def boxed(variable: nnx.Variable[Any]) -> Any:
    """A Variable as flax 0.12 hands it to Linen.

    In the Linen box that it came from; as the bare value where it has no metadata of its own; and
    in an `NNXMeta` otherwise.
    """
    metadata = own_metadata(variable)
    box: Any = metadata.get(LINEN_BOX)
    if box is not None:
        return box_of(box, {"value": variable.get_raw_value(), **metadata})
    if all(key.endswith("_hooks") and v == () for key, v in metadata.items()):
        return variable.get_raw_value()
    return boxed_meta(variable)


def box_of(box: Any, metadata: Mapping[str, Any]) -> Any:
    """A Linen box from the metadata by which a Variable remembers it.

    Args:
        box: the class.
        metadata: the metadata, and the value as ``value``; what the class has no field for is left
            out.
    """
    fields = {key: v for key, v in metadata.items() if key != LINEN_BOX}
    if hasattr(box, "from_nnx_metadata"):
        return box.from_nnx_metadata(fields)
    known = {item.name for item in dataclasses.fields(box)} if _has_fields(box) else fields
    return box(**{key: v for key, v in fields.items() if key in known})


def _has_fields(box: Any) -> bool:
    return dataclasses.is_dataclass(box)
