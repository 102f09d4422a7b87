"""What each device of a mesh would hold of a program, counted without any device."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType

from linsey import _trees
from linsey.ir import (
    Axis,
    Graph,
    PartitionError,
    Placement,
    Rules,
    Slot,
    TensorType,
    Values,
    misfits,
    shards,
    slot_index,
)
from linsey.ir.summary import nbytes
from linsey.runtime import sharding
from linsey.runtime._plan_types import (
    Group,
    Plan,
    Problem,
    Replicated,
    Share,
    Uneven,
    Unmapped,
    UnusedRule,
)
from linsey.runtime._shards import axis_names, largest_shard, most_parts
from linsey.runtime.gradients import Wanted, chosen
from linsey.runtime.optimizer_state import state_shardings

__all__ = ["Plan", "plan"]

_REPLICATED = Placement()
_Placed = Sequence[tuple[Slot, Placement]]
_T = TypeVar("_T", bound=Hashable)


def plan(
    graph: Graph,
    mesh: Any,
    rules: Any = None,
    *,
    optimizer: Any = None,
    wrt: Wanted = "params",
) -> Plan:
    """Counts what each device of a mesh would hold of a program. Needs none of the devices.

    Args:
        graph: the structure.
        mesh: a ``jax.sharding.Mesh`` or ``AbstractMesh``, a dict of sizes by axis name, or pairs of
            the two.
        rules: pairs of a logical axis and mesh axes; None: those that came with the slots, and
            those of ``nn.logical_axis_rules``.
        optimizer: an optax transformation, whose state is counted too.
        wrt: the slots that it is for: a collection, a predicate on names, or a tuple of these.

    Raises:
        PartitionError: the mesh or the rules are not in one of these forms.
        ValuesError: ``wrt`` selects nothing, or a slot that has no gradient.

    Example:
        >>> import jax, linsey
        >>> from flax import linen as nn
        >>> kernel = nn.with_partitioning(nn.initializers.ones, ("model", None))
        >>> x = jax.ShapeDtypeStruct((1, 8), "float32")
        >>> graph = linsey.lower(nn.Dense(4, kernel_init=kernel), x).graph
        >>> made = plan(graph, {"data": 2, "model": 4})
        >>> made.whole, made.per_device  # the kernel in four parts, the bias on each device
        (144, 48)
    """
    sizes = _sizes(mesh)
    used = sharding.rules_in_force(rules)
    found, problems = _placed(graph, sizes, rules)
    pairs = list(zip(graph.slots, found, strict=True))
    lies_on = {name for each in found for axis in each.axes for name in axis_names(axis)}
    return Plan(
        mesh=tuple(sizes.items()),
        rules=used,
        collections=_collections(pairs, sizes),
        optimizer=None if optimizer is None else _optimizer(graph, found, sizes, optimizer, wrt),
        replicated=_replicated(pairs, sizes),
        uneven=_uneven(pairs, sizes),
        unmapped=_unmapped(pairs),
        unused_rules=_unused_rules(used or (), pairs),
        unused_axes=tuple(name for name in sizes if name not in lies_on),
        problems=problems,
    )


def _sizes(mesh: Any) -> dict[str, int]:
    """The sizes of a mesh's axes, of which there is one at least."""
    is_pairs = isinstance(mesh, Sequence) and all(
        isinstance(axis, Sequence) and not isinstance(axis, str) and len(axis) == 2 for axis in mesh
    )
    names = [name for name, _ in mesh] if is_pairs else []
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise PartitionError(
            f"found the axis {twice[0]!r} twice",
            path="mesh",
            fix="Give each axis of the mesh a name of its own.",
        )
    sizes = sharding.mesh_sizes(dict(mesh) if is_pairs else mesh)
    if not sizes:
        raise PartitionError(
            "found no axes, expected one at least",
            path="mesh",
            fix='Pass for example {"data": 8}; one device is {"data": 1}.',
        )
    return sizes


def _placed(
    graph: Graph, sizes: Mapping[str, int], rules: Any
) -> tuple[tuple[Placement, ...], tuple[Problem, ...]]:
    """Where each slot lies, and what is wrong; a slot with something wrong is replicated."""
    wrong: list[tuple[str, str]] = []
    found: list[Placement] = []
    for slot, placement in zip(graph.slots, _each(graph, sizes, rules), strict=True):
        if isinstance(placement, PartitionError):
            wrong.append((slot.key, _message(placement)))
            placement = _REPLICATED
        bad = [_message(error) for error in misfits(slot, placement, sizes, uneven=True)]
        wrong.extend((slot.key, message) for message in bad)
        found.append(_REPLICATED if bad else placement)
        if nbytes(slot.type) is None:
            message = f"the size of {slot.type} is not known; it is counted as 0 bytes"
            wrong.append((slot.key, message))
    problems = _grouped((key, message) for key, message in wrong)
    return tuple(found), tuple(Problem(group=group, message=text) for group, text in problems)


def _each(
    graph: Graph, sizes: Mapping[str, int], rules: Any
) -> Sequence[Placement | PartitionError]:
    """Where each slot lies, or why it lies nowhere."""
    try:
        return sharding.placements(graph, sizes, rules)
    except PartitionError:  # of one slot: the others are still of use

        def one(slot: Slot) -> Placement | PartitionError:
            try:
                alone = dataclasses.replace(graph, slots=(slot,))
                return sharding.placements(alone, sizes, rules)[0]
            except PartitionError as error:
                return error

        return [one(slot) for slot in graph.slots]


def _message(error: PartitionError) -> str:
    return f"{error.message}\n{error.fix}"


def _collections(placed: _Placed, sizes: Mapping[str, int]) -> tuple[Share, ...]:
    names = dict.fromkeys(slot.collection for slot, _ in placed)
    return tuple(
        _share(name, [pair for pair in placed if pair[0].collection == name], sizes)
        for name in names
    )


def _share(name: str, placed: _Placed, sizes: Mapping[str, int]) -> Share:
    return Share(
        name=name,
        slots=len(placed),
        whole=sum(nbytes(slot.type) or 0 for slot, _ in placed),
        per_device=sum(_per_device(slot, each, sizes) for slot, each in placed),
    )


def abstract_values(graph: Graph) -> Values:
    """The values of a graph as shapes and dtypes: what ``exe.lower`` takes when there are none.

    Example:
        >>> import jax, linsey
        >>> from flax import linen as nn
        >>> x = jax.ShapeDtypeStruct((1, 8), "float32")
        >>> abstract_values(linsey.lower(nn.Dense(4), x).graph)["params/kernel"].shape
        (8, 4)
    """
    return Values(slot_index(graph), tuple(map(_trees.abstract_value, graph.slots)))


def _optimizer(
    graph: Graph, found: Sequence[Placement], sizes: Mapping[str, int], optimizer: Any, wrt: Wanted
) -> Share:
    """The state that an optax transformation keeps, where a train step would put it."""
    make: Any = AbstractMesh  # its constructor is not annotated
    mesh = make(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    lie_on = tuple(sharding.stored(placement, mesh) for placement in found)
    shardings = Values(slot_index(graph), lie_on)
    params = abstract_values(graph).select(*chosen(graph, wrt))
    state = jax.eval_shape(optimizer.init, params)
    lies = jax.tree.leaves(state_shardings(state, params, shardings))
    whole = per_device = 0
    leaves = jax.tree.leaves(state)
    for leaf, where in zip(leaves, lies, strict=True):
        kind = _trees.tensor_type(leaf)
        axes = (*where.spec, *[None] * (len(kind.shape) - len(where.spec)))
        whole += nbytes(kind) or 0
        per_device += nbytes(largest_shard(kind, axes, sizes)) or 0
    return Share(name="optimizer", slots=len(leaves), whole=whole, per_device=per_device)


def _arrays(slot: Slot) -> tuple[TensorType, ...]:
    return (slot.type,) if isinstance(slot.type, TensorType) else slot.type.leaves


def _per_device(slot: Slot, placement: Placement, sizes: Mapping[str, int]) -> int:
    return sum(nbytes(largest_shard(leaf, placement.axes, sizes)) or 0 for leaf in _arrays(slot))


def _replicated(placed: _Placed, sizes: Mapping[str, int]) -> tuple[Replicated, ...]:
    entries = []
    for slot, placement in placed:
        used = {name for axis in placement.axes for name in axis_names(axis)}
        over = tuple(name for name, size in sizes.items() if size > 1 and name not in used)
        if over:
            entries.append((slot.key, (slot.type, placement.axes, over)))
    made = []
    for group, (kind, axes, over) in _grouped(entries):
        leaves = (kind,) if isinstance(kind, TensorType) else kind.leaves
        held = [largest_shard(leaf, axes, sizes) for leaf in leaves]
        free = [sizes[name] for name in over]
        made.append(
            Replicated(
                group=group,
                type=str(kind),
                axes=axes,
                over=over,
                copies=math.prod(free),
                per_device=sum(nbytes(leaf) or 0 for leaf in held),
                least=sum((nbytes(leaf) or 0) // most_parts(leaf.shape, free) for leaf in held),
            )
        )
    made.sort(key=lambda each: (each.saved, each.per_device), reverse=True)
    return tuple(made)


def _uneven(placed: _Placed, sizes: Mapping[str, int]) -> tuple[Uneven, ...]:
    entries = []
    for slot, placement in placed:
        for leaf in _arrays(slot) if placement.axes else ():
            for position, (size, axis) in enumerate(zip(leaf.shape, placement.axes, strict=True)):
                parts = shards(axis, sizes)
                if size % parts:
                    reason = placement.reasons[position]
                    entries.append((slot.key, (position, size, parts, axis, reason)))
    return tuple(
        Uneven(group=group, axis=position, size=size, parts=parts, on=axis, reason=reason)
        for group, (position, size, parts, axis, reason) in _grouped(entries)
    )


def _unmapped(placed: _Placed) -> tuple[Unmapped, ...]:
    slots: dict[str, list[str]] = {}
    for slot, placement in placed:
        for name in dict.fromkeys(placement.unmapped):
            slots.setdefault(name, []).append(slot.key)
    return tuple(
        Unmapped(name=name, slots=len(keys), example=keys[0]) for name, keys in slots.items()
    )


def _unused_rules(rules: Rules, placed: _Placed) -> tuple[UnusedRule, ...]:
    """The rules that decided no axis: of equal ones, the first may have decided."""
    ends: dict[str, set[Axis]] = {}
    for slot, placement in placed:
        names = () if slot.partition is None else slot.partition.axes
        for position, name in enumerate(names):
            if isinstance(name, str):
                entry = placement.axes[position] if placement.axes else None
                ends.setdefault(name, set()).add(entry)
    unused = []
    seen: set[tuple[str, Axis]] = set()
    for name, target in rules:
        if name not in ends:
            unused.append(UnusedRule(rule=(name, target), reason="no slot has this name"))
        elif target not in ends[name] or (name, target) in seen:
            reason = "an earlier rule comes first wherever a slot has this name"
            unused.append(UnusedRule(rule=(name, target), reason=reason))
        seen.add((name, target))
    return tuple(unused)


def _grouped(entries: Iterable[tuple[str, _T]]) -> list[tuple[Group, _T]]:
    """Slots of which the same is said, and whose names differ in numbers only, as one group."""
    found: dict[tuple[str, _T], list[str]] = {}
    for key, said in entries:
        found.setdefault((re.sub(r"\d+", "*", key), said), []).append(key)
    return [
        (Group(name=name if len(keys) > 1 else keys[0], example=keys[0], slots=len(keys)), said)
        for (name, said), keys in found.items()
    ]
