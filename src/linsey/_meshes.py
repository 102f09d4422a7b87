"""Meshes and shardings from data: what a graph holds of those in the metadata of variables."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)


def mesh(
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    types: tuple[str, ...],
    devices: tuple[int, ...],
    kind: tuple[str, int | None, str] | None = None,
) -> Mesh | AbstractMesh:
    """A mesh; an abstract one where its devices are not there.

    Args:
        names: names of its axes.
        sizes: their sizes.
        types: their types: ``Auto``, ``Explicit``, ``Manual``.
        devices: ids of its devices, the last axis fastest; empty: an abstract mesh.
        kind: of an abstract mesh, what its devices are: their kind, cores and platform.

    Example:
        >>> mesh(("data",), (2,), ("Auto",), ()).shape["data"]
        2
    """
    by_id = {device.id: device for device in jax.devices()} if devices else {}
    kinds = tuple(AxisType[name] for name in types)
    if devices and by_id.keys() >= set(devices):
        held = np.array([by_id[number] for number in devices]).reshape(sizes)
        return Mesh(held, names, axis_types=kinds)
    make: Any = AbstractMesh  # its constructor is not annotated
    known = {} if kind is None else {"abstract_device": AbstractDevice(*kind)}
    return make(sizes, names, axis_types=kinds, **known)  # type: ignore[no-any-return]


def named_sharding(on: Any, spec: Any, memory_kind: str | None) -> NamedSharding:
    """A sharding.

    Args:
        on: its mesh.
        spec: its ``PartitionSpec``.
        memory_kind: its memory kind, or None.
    """
    return NamedSharding(on, spec, memory_kind=memory_kind)


def partition_spec(
    entries: tuple[Any, ...], unreduced: frozenset[str], reduced: frozenset[str]
) -> PartitionSpec:
    """A spec.

    Args:
        entries: one entry per axis.
        unreduced: the mesh axes over which values are yet to be summed.
        reduced: those over which their gradients are.

    Example:
        >>> tuple(partition_spec(("data", unconstrained()), frozenset(), frozenset()))
        ('data', UNCONSTRAINED)
    """
    make: Any = PartitionSpec  # its constructor is not annotated
    more = {"unreduced": unreduced, "reduced": reduced} if unreduced or reduced else {}
    return make(*entries, **more)  # type: ignore[no-any-return]


def unconstrained() -> Any:
    """``PartitionSpec.UNCONSTRAINED``."""
    return PartitionSpec.UNCONSTRAINED
