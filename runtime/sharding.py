"""Where the slots of a program lie on a mesh: specs, shardings, and values put there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from linsey.ir import (
    UNCONSTRAINED,
    Axis,
    Graph,
    PartitionError,
    Placement,
    Rules,
    Slot,
    Values,
    decode,
    misfits,
    place,
    read_rules,
    slot_index,
)
from linsey.runtime import _flax


def mesh_sizes(mesh: Mesh | AbstractMesh | Mapping[str, int]) -> dict[str, int]:
    """The sizes of a mesh's axes, by name.

    Raises:
        PartitionError: it is no mesh, or a size is not a positive number.

    Example:
        >>> mesh_sizes({"data": 16, "model": 2})
        {'data': 16, 'model': 2}
    """
    shape = mesh.shape if isinstance(mesh, Mesh | AbstractMesh) else mesh
    if not isinstance(shape, Mapping):
        raise PartitionError(
            f"found {type(mesh).__name__}, expected a mesh",
            path="mesh",
            fix="Pass a jax.sharding.Mesh, an AbstractMesh, or a dict of sizes by axis name.",
        )
    for name, size in shape.items():
        if not isinstance(name, str) or not isinstance(size, int) or size < 1:
            raise PartitionError(
                f"found {name!r}: {size!r}, expected the name of an axis and its size",
                path="mesh",
                fix="Give each axis a size of 1 or more.",
            )
    return dict(shape)


def rules_in_force(rules: Any = None) -> Rules | None:
    """The rules that were given, or else those of ``nn.logical_axis_rules``; None: neither.

    Raises:
        PartitionError: they are not pairs.
    """
    if rules is not None:
        return read_rules(_own_axes(rules))
    ambient = _flax.logical_axis_rules()
    return read_rules(_own_axes(ambient), path="nn.logical_axis_rules") if ambient else None


def _own_axes(rules: Any) -> Any:
    """Rules with jax's UNCONSTRAINED replaced by the graph's."""
    if not isinstance(rules, tuple | list):
        return rules
    free = PartitionSpec.UNCONSTRAINED

    def own(axis: Any) -> Any:
        if isinstance(axis, tuple | list):
            return tuple(map(own, axis))
        return UNCONSTRAINED if axis is free else axis

    return [
        (rule[0], own(rule[1])) if isinstance(rule, tuple | list) and len(rule) == 2 else rule
        for rule in rules
    ]


def placements(
    graph: Graph, mesh: Mapping[str, int] | None = None, rules: Any = None
) -> tuple[Placement, ...]:
    """Where each slot lies on a mesh, whether it fits or not.

    Rules that are given hold for all slots. Otherwise a slot goes by the rules that came with it
    (``LogicallyPartitioned.rules``, ``sharding_rules``) and by those of ``nn.logical_axis_rules``:
    as in flax, its own rules shut out the others for Linen's logical names, and are joined with
    them for NNX's.

    Args:
        graph: the graph.
        mesh: the sizes of the mesh's axes, by name; None: not known.
        rules: pairs of a logical axis and mesh axes, in order of precedence.

    Raises:
        PartitionError: the rules are not pairs, or contradict each other; a name stands at two
            axes of a slot.
    """
    given = rules_in_force(rules)
    names = None if mesh is None else tuple(mesh)
    return tuple(
        place(slot, given if rules is not None else _rules_of(slot, given), names)
        for slot in graph.slots
    )


def _rules_of(slot: Slot, ambient: Rules | None) -> Rules | None:
    if slot.partition is None:
        return None
    own: Any = decode(slot.partition.rules)
    if not own:
        return ambient
    own = read_rules(_own_axes(own), path=slot.key)
    if slot.partition.logical or ambient is None:
        return own  # type: ignore[no-any-return]
    targets = dict(own)
    for name, target in ambient:
        if targets.get(name, target) != target:
            raise PartitionError(
                f"{name!r} is mapped to {targets[name]!r} by the slot's own sharding_rules and to"
                f" {target!r} by nn.logical_axis_rules",
                path=slot.key,
                fix="Make them agree, or pass rules=, which go before both.",
            )
    return (*own, *(rule for rule in ambient if rule[0] not in targets))


def specs(graph: Graph, mesh: Any = None, rules: Any = None) -> Values:
    """The ``PartitionSpec`` of each slot; see `linsey.Program.partition_specs`."""
    found = _fitting(graph, mesh, rules)
    return Values(slot_index(graph), tuple(spec(placement.axes) for placement in found))


def shardings(graph: Graph, mesh: Mesh, rules: Any = None) -> Values:
    """The ``NamedSharding`` of each slot on a mesh.

    Raises:
        PartitionError: a slot does not fit.
    """
    found = _fitting(graph, mesh, rules)
    return Values(slot_index(graph), tuple(stored(placement, mesh) for placement in found))


def stored(placement: Placement, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of what is stored at a placement.

    Where the annotation leaves an axis to the compiler (``UNCONSTRAINED``) it is replicated: what
    is stored must lie somewhere.
    """
    return NamedSharding(
        mesh, spec(tuple(None if a is UNCONSTRAINED else a for a in placement.axes))
    )


def _fitting(graph: Graph, mesh: Any, rules: Any) -> tuple[Placement, ...]:
    """The placements, all of which fit.

    Raises:
        PartitionError: the first that does not; notes tell of the others.
    """
    sizes = None if mesh is None else mesh_sizes(mesh)
    found = placements(graph, sizes, rules)
    if sizes is None:
        return found
    wrong = [
        problem
        for slot, placement in zip(graph.slots, found, strict=True)
        for problem in misfits(slot, placement, sizes)
    ]
    if wrong:
        for other in wrong[1:]:
            wrong[0].add_note(str(other))
        raise wrong[0]
    return found


def spec(axes: tuple[Axis, ...]) -> PartitionSpec:
    """The ``PartitionSpec`` of a placement's axes."""
    make: Any = PartitionSpec  # its constructor is not annotated
    return make(*(PartitionSpec.UNCONSTRAINED if a is UNCONSTRAINED else a for a in axes))  # type: ignore[no-any-return]


@contextlib.contextmanager
def tracing_on(mesh: Mesh | None, rules: Rules | None) -> Iterator[None]:
    """What code that is traced for a mesh finds around it: the mesh, and the rules.

    Constraints of the model (``nn.with_logical_constraint``, ``lax.with_sharding_constraint`` with
    a bare spec) are resolved by these. Variables that are made inside are not sharded one by one.
    """
    pairs = rules and tuple((name, _flax_axis(target)) for name, target in rules)
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        stack.enter_context(_flax.tracing(pairs))
        yield


def is_explicit(mesh: Mesh) -> bool:
    """Whether the types of arrays on this mesh tell how they lie."""
    return AxisType.Explicit in mesh.axis_types


def _flax_axis(axis: Any) -> Any:
    if isinstance(axis, tuple):
        return tuple(map(_flax_axis, axis))
    return PartitionSpec.UNCONSTRAINED if axis is UNCONSTRAINED else axis


def put(values: tuple[Any, ...], wanted: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values on their shardings; one that lies right already is the very object."""
    return tuple(
        value if _lies_on(value, sharding) else jax.tree.map(partial(_sent, sharding), value)
        for value, sharding in zip(values, wanted, strict=True)
    )


def _sent(sharding: Any, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):  # of a file, perhaps: only what the shards of here need
        return jax.make_array_from_callback(leaf.shape, sharding, lambda at: leaf[at])
    return jax.device_put(leaf, sharding)


def near(tree: Any, mesh: Mesh) -> Any:
    """A pytree whose arrays may take part in a call on a mesh.

    One that is committed to other devices is copied to all of the mesh; any other is the very
    object.
    """
    devices = set(mesh.devices.flat)
    everywhere = NamedSharding(mesh, spec(()))

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return leaf
        is_near = not leaf.committed or leaf.sharding.device_set == devices
        return leaf if is_near else jax.device_put(leaf, everywhere)

    return jax.tree.map(moved, tree)


def _lies_on(value: Any, sharding: Any) -> bool:
    if sharding is None or isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct):
        return True
    return all(
        isinstance(leaf, jax.Array) and leaf.committed and _same(leaf, sharding)
        for leaf in jax.tree.leaves(value)
    )


def _same(array: jax.Array, sharding: Any) -> bool:
    found = array.sharding
    if found is sharding:
        return True
    # Equal layouts on other axis types are other shardings for a mesh with explicit axes.
    same_mesh = not isinstance(found, NamedSharding) or found.mesh == sharding.mesh
    return same_mesh and found.is_equivalent_to(sharding, array.ndim)
