"""From the axis names of slots to the axes of a mesh, by Linen's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from linsey.ir.errors import PartitionError
from linsey.ir.graph import Axis, Slot, TensorType, Unconstrained

Rules: TypeAlias = tuple[tuple[str, Axis], ...]
"""Pairs of a logical axis and what it lies on, in order of precedence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the axes of one slot lie on a mesh."""

    axes: tuple[Axis, ...] = ()
    """One entry per axis, of mesh axes; empty: the slot is replicated."""
    reasons: tuple[str, ...] = ()
    """For each axis, in words, what put it there."""
    unmapped: tuple[str, ...] = ()
    """The logical names that no rule mentions; those axes are replicated."""


REPLICATED = Placement()


def read_rules(rules: object, *, path: str = "rules") -> Rules:
    """Rules as Linen takes them (a sequence of pairs), checked.

    Args:
        rules: the pairs; a list as a target stands for a tuple.
        path: where they come from, for the error.

    Raises:
        PartitionError: they are not a sequence of pairs of a name and mesh axes.

    Example:
        >>> read_rules([("embed", "model"), ("batch", ["data", "replica"]), ("heads", None)])
        (('embed', 'model'), ('batch', ('data', 'replica')), ('heads', None))
    """
    if not isinstance(rules, tuple | list):
        raise _bad_rules(f"found {type(rules).__name__}", path)
    read: list[tuple[str, Axis]] = []
    for rule in rules:
        if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str):
            raise _bad_rules(f"found {rule!r} among them", path)
        name, target = rule
        if isinstance(target, tuple | list):
            target = tuple(target)
        if not all(_is_axis(axis) for axis in (target if isinstance(target, tuple) else (target,))):
            raise _bad_rules(f"found {rule!r} among them", path)
        read.append((name, target))
    return tuple(read)


def _is_axis(axis: object) -> bool:
    return axis is None or isinstance(axis, str | Unconstrained)


def _bad_rules(found: str, path: str) -> PartitionError:
    return PartitionError(
        f"{found}, expected pairs (logical axis, mesh axis or axes or None)",
        path=path,
        fix='Write them as for nn.logical_axis_rules: [("embed", "model"), ("batch", "data")].',
    )


def place(slot: Slot, rules: Rules | None, mesh_axes: tuple[str, ...] | None = None) -> Placement:
    """Maps the axis names of a slot to mesh axes.

    The rules are those of ``flax.linen.logical_to_mesh_axes``: they are taken in their order, the
    first one that fits an axis decides it, a mesh axis is used once in a slot, and a name that is
    left over is replicated. Only a name that is not a logical one (see `Partition`), that no rule
    mentions and that the mesh has, is that axis of the mesh.

    Args:
        slot: the slot.
        rules: the rules; None: there are none in force, and names that are not logical stay.
        mesh_axes: the names of the mesh's axes; None: not known, and any name may be one.

    Raises:
        PartitionError: a name stands at two axes of the slot.

    Example:
        >>> from linsey.ir import Const, Partition
        >>> partition = Partition(axes=("embed", "mlp"), logical=True, spec=Const(None))
        >>> kind = TensorType(shape=(4, 8), dtype="float32")
        >>> slot = Slot(collection="params", paths=(("w",),), type=kind, partition=partition)
        >>> place(slot, (("mlp", "model"), ("embed", "model"))).axes
        (None, 'model')
    """
    partition = slot.partition
    if partition is None or not partition.axes:
        return REPLICATED
    names = partition.axes
    _check_unique(slot, names)
    if rules is None and not partition.logical:
        return Placement(axes=names, reasons=("the annotation itself",) * len(names))
    axes: dict[int, Axis] = {}
    reasons: dict[int, str] = {}
    used: set[str] = set()

    def take(position: int, axis: Axis, reason: str) -> None:
        free = not used.intersection(_mesh_names(axis))
        if position not in axes and free:
            axes[position], reasons[position] = axis, reason
            used.update(_mesh_names(axis))

    for position, name in enumerate(names):
        if not isinstance(name, str):
            axes[position], reasons[position] = name, "the annotation itself"
            used.update(_mesh_names(name))
    for name, target in rules or ():
        if name in names:
            take(names.index(name), target, f"the rule ({name!r}, {target!r})")
    mentioned = {name for name, _ in rules or ()}
    unmapped = []
    for position, name in enumerate(names):
        if not isinstance(name, str) or name in mentioned:
            continue
        if not partition.logical and (mesh_axes is None or name in mesh_axes):
            take(position, name, "the annotation itself")
        else:
            unmapped.append(name)
    count = range(len(names))
    return Placement(
        axes=tuple(axes.get(position) for position in count),
        reasons=tuple(reasons.get(position, "no rule that was free") for position in count),
        unmapped=tuple(unmapped),
    )


def _mesh_names(axis: Axis) -> tuple[str, ...]:
    if isinstance(axis, tuple):
        return tuple(name for name in axis if isinstance(name, str))
    return (axis,) if isinstance(axis, str) else ()


def _check_unique(slot: Slot, names: tuple[Axis, ...]) -> None:
    texts = [name for name in names if isinstance(name, str)]
    twice = sorted({name for name in texts if texts.count(name) > 1})
    if twice:
        raise PartitionError(
            f"the name {twice[0]!r} stands at two axes of {names}",
            path=slot.key,
            fix="Give each axis of the slot a name of its own, or None.",
        )


def misfits(
    slot: Slot, placement: Placement, mesh: Mapping[str, int], *, uneven: bool = False
) -> Iterator[PartitionError]:
    """What of a placement does not fit the slot or the mesh.

    Args:
        slot: the slot.
        placement: what `place` gave.
        mesh: the sizes of the mesh's axes, by name.
        uneven: whether an axis that its mesh axes do not divide is allowed.
    """
    if not placement.axes:
        return
    shapes = [slot.type] if isinstance(slot.type, TensorType) else slot.type.leaves
    seen: dict[str, int] = {}
    for position, axis in enumerate(placement.axes):
        for name in _mesh_names(axis):
            if name not in mesh:
                yield PartitionError(
                    f"axis {position} lies on {name!r}, by {placement.reasons[position]};"
                    f" the mesh has {_sizes(mesh)}",
                    path=slot.key,
                    fix="Name an axis of the mesh, or add a rule that maps the name to one.",
                )
                return
            if name in seen:
                yield PartitionError(
                    f"axes {seen[name]} and {position} both lie on {name!r}, the latter by"
                    f" {placement.reasons[position]}",
                    path=slot.key,
                    fix="Use each axis of the mesh once in a slot.",
                )
                return
            seen[name] = position
    for leaf in shapes:
        if len(leaf.shape) != len(placement.axes):
            yield PartitionError(
                f"the partition {placement.axes} has {len(placement.axes)} entries and the value"
                f" {leaf} has {len(leaf.shape)} axes",
                path=slot.key,
                fix="Annotate one entry per axis (None where it is not split)"
                "; for a lifted transform, name its axis with nn.PARTITION_NAME.",
            )
            return
        for position, (size, axis) in enumerate(zip(leaf.shape, placement.axes, strict=True)):
            parts = shards(axis, mesh)
            if size % parts and not uneven:
                yield PartitionError(
                    f"axis {position} of {leaf} has size {size}, which the {parts} parts of"
                    f" {axis!r} do not divide (the mesh has {_sizes(mesh)}), put there by"
                    f" {placement.reasons[position]}",
                    path=slot.key,
                    fix="Change the size, the mesh, or the rule.",
                )


def shards(axis: Axis, mesh: Mapping[str, int]) -> int:
    """Into how many parts an entry of a placement splits its axis."""
    parts = 1
    for name in _mesh_names(axis):
        parts *= mesh[name]
    return parts


def _sizes(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in mesh.items()) or "no axes"
