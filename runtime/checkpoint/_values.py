"""Between the values of a program and the arrays of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from linsey import _trees
from linsey.ir import CheckpointError, Graph, Slot, TreeType, Values, slot_index
from linsey.runtime._leaves import Types, leaf_name, leaves, slot_types
from linsey.runtime.checkpoint import _arrays
from linsey.runtime.checkpoint._arrays import Target
from linsey.runtime.checkpoint._document import Stored, document, types
from linsey.runtime.checkpoint._report import Comparison, DTypes, Source, dtype_finder

PathLike = str | os.PathLike[str]


def graph_of(program: Any) -> Graph:
    """The graph of a program, of an executable, or the graph itself.

    Raises:
        CheckpointError: it is none of these.
    """
    graph = getattr(program, "graph", program)
    if not isinstance(graph, Graph):
        raise CheckpointError(
            f"found {type(program).__name__}, expected a program or a graph",
            path="program",
            fix="Pass what linsey.lower gave.",
        )
    return graph


def persistent(graph: Graph, collections: tuple[str, ...] | None) -> dict[int, Slot]:
    """The slots that a checkpoint holds, by position: all, or those of some collections.

    Raises:
        CheckpointError: a collection has no such slot.
    """
    slots = {
        position: slot for position, slot in enumerate(graph.slots) if slot.lifetime == "persistent"
    }
    if collections is None:
        return slots
    known = sorted({slot.collection for slot in slots.values()})
    for name in collections:
        if name not in known:
            raise CheckpointError(
                f"no persistent slot is in the collection {name!r}; there are:"
                f" {', '.join(known) or 'none'}",
                path="collections",
                fix='Name some of these, as in collections=("params",).',
            )
    return {position: slot for position, slot in slots.items() if slot.collection in collections}


def save_args(
    graph: Graph, values: Values, state: Any = None, collections: tuple[str, ...] | None = None
) -> Any:
    """What Orbax is to write.

    Raises:
        CheckpointError: a value is missing, or one cannot be saved.
    """
    kinds: dict[str, Types] = {}
    arrays: dict[str, Any] = {}
    for slot in persistent(graph, collections).values():
        key = slot.key
        value = _value(values, slot, key)
        kinds[key] = types(value, key)
        for place, leaf in leaves(value).items():
            arrays[leaf_name(key, place)] = leaf
    state_kinds = None if state is None else types(state, "state")
    beside = {f"state{place}": leaf for place, leaf in leaves(state).items()}
    return _arrays.save_args(arrays, beside, document(graph, kinds, state_kinds))


def _value(values: Values, slot: Slot, key: str) -> Any:
    if not isinstance(values, Values) or key not in values:
        found = "no value" if isinstance(values, Values) else type(values).__name__
        raise CheckpointError(
            f"found {found}, expected a value for every slot that is saved",
            path=key,
            fix="Pass what exe.init, program.values or a call gave; to save a part, name its"
            " collections.",
        )
    value = values[key]
    if not _trees.fits(slot, value):
        known = hasattr(value, "shape") and hasattr(value, "dtype")
        raise CheckpointError(
            f"found {_trees.tensor_type(value) if known else type(value).__name__},"
            f" expected {slot.type}",
            path=key,
            fix="Save the values of the program whose slots they are.",
        )
    return value


def compare(
    stored: Stored,
    graph: Graph,
    state: Any,
    *,
    dtype: DTypes,
    collections: tuple[str, ...] | None,
    ignore_extra: bool = False,
) -> Comparison:
    """Compares what is stored with a graph, and with a state where one is given."""
    dtype_of = dtype_finder(dtype, [slot.collection for slot in graph.slots])
    comparison = Comparison(stored.path)
    slots = persistent(graph, collections)
    comparison.slots(stored, slots, dtype_of, collections, ignore_extra)
    if state is not None:
        comparison.state(stored, types(state, "state"))
    return comparison


def restore(
    path: PathLike,
    graph: Graph,
    state: Any,
    *,
    shardings: Any,
    dtype: DTypes,
    collections: tuple[str, ...] | None,
    values: Values | None,
    ignore_extra: bool,
) -> tuple[Values, Any]:
    """Reads values, and a state where one is given; see `linsey.runtime.checkpoint.restore`."""
    stored = _arrays.describe(path)
    comparison = compare(
        stored, graph, state, dtype=dtype, collections=collections, ignore_extra=ignore_extra
    )
    report = comparison.report()
    if not report.is_clean:
        raise CheckpointError(
            "the checkpoint does not fit, and nothing was loaded: "
            + str(report).removeprefix(f"{stored.path}: "),
            path=stored.path,
            fix="Restore a part with collections=, cast with dtype=, leave out what is extra with"
            " ignore_extra=True, or use the program that saved it.",
        )
    chosen = persistent(graph, collections)
    filled = {} if collections is not None and values is None else _rest(graph, chosen, values)
    targets = _targets(comparison.sources, graph, shardings, state)
    read: dict[int, dict[str, Any]] = {}
    for target, array in zip(targets, _arrays.read(stored.path, targets), strict=True):
        read.setdefault(target.source.slot, {})[target.source.place] = array
    filled |= {number: _filled(slot, read.get(number, {})) for number, slot in chosen.items()}
    order = sorted(filled)
    index = slot_index(graph)
    if len(order) < len(graph.slots):
        index = index.subset(order)
    restored = Values(index, tuple(filled[number] for number in order))
    if state is None:
        return restored, None
    return restored, jax.tree.unflatten(jax.tree.structure(state), read.get(-1, {}).values())


def _rest(graph: Graph, chosen: Mapping[int, Slot], values: Values | None) -> dict[int, Any]:
    """Values for the slots that are not restored.

    Raises:
        CheckpointError: one is not given.
    """
    rest: dict[int, Any] = {}
    for position, slot in enumerate(graph.slots):
        if position in chosen:
            continue
        if values is not None and slot.key in values:
            rest[position] = values[slot.key]
        elif slot.is_derived:
            rest[position] = _trees.placeholder(slot)
        else:
            what = (
                "is ephemeral, and no checkpoint holds it"
                if slot.lifetime == "ephemeral"
                else "is not among those restored"
            )
            raise CheckpointError(
                f"the slot {what}; no value was given for it",
                path=slot.key,
                fix="Pass values=, with those of exe.init for example; or name collections=, to get"
                " the values of these only.",
            )
    return rest


def _filled(slot: Slot, read: Mapping[str, Any]) -> Any:
    if isinstance(slot.type, TreeType):
        return _trees.fill(slot.type.structure, [read[place] for place in slot_types(slot)])
    return read[""]


def _targets(sources: Sequence[Source], graph: Graph, shardings: Any, state: Any) -> list[Target]:
    """Where each array goes: the state's where the leaf that was given for it lies."""
    of_state = {place: getattr(leaf, "sharding", None) for place, leaf in leaves(state).items()}
    targets = []
    for source in sources:
        if source.slot < 0:
            name, found = source.name, of_state[source.place]
        else:
            name = leaf_name(graph.slots[source.slot].key, source.place)
            found = _of_slot(shardings, source.slot, graph)
            if found is not None and not isinstance(found, Sharding):
                found = leaves(found).get(source.place)
        targets.append(Target(source=source, sharding=_checked(name, source, found)))
    return targets


def _checked(name: str, source: Source, found: Any) -> Sharding:
    """A sharding that fits, or that of the first device where none is given.

    Raises:
        CheckpointError: it does not fit, or is none.
    """
    if found is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    if not isinstance(found, Sharding):
        raise CheckpointError(
            f"found {type(found).__name__}, expected a jax.sharding.Sharding",
            path=name,
            fix="Pass shardings=exe.shardings, or NamedSharding(mesh, spec) for each slot.",
        )
    try:
        found.shard_shape(source.wanted.shape)
    except ValueError as error:
        raise CheckpointError(
            f"{source.wanted} cannot lie as {found}: {error}",
            path=name,
            fix="Pass a sharding that divides its axes.",
        ) from error
    return found


def _of_slot(shardings: Any, position: int, graph: Graph) -> Any:
    key = graph.slots[position].key
    if shardings is None or isinstance(shardings, Sharding):
        return shardings
    if isinstance(shardings, Values | Mapping):
        if key in shardings:
            return shardings[key]
        found = f"no sharding for it among {len(shardings)}"
    elif isinstance(shardings, Sequence):
        if len(shardings) == len(graph.slots):
            return shardings[position]
        found = f"{len(shardings)} shardings for {len(graph.slots)} slots"
    else:
        found = f"{type(shardings).__name__} for shardings"
    raise CheckpointError(
        f"found {found}, expected one for every slot that is restored",
        path=key,
        fix="Pass shardings=exe.shardings, a mapping by slot name, or one sharding for all.",
    )
