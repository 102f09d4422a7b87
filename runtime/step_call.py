"""One signature of a train step under jit, with donation and with shardings."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from linsey.ir import Values
from linsey.runtime import sharding
from linsey.runtime.train_state import TrainState

Traced: TypeAlias = Callable[[TrainState, tuple[Any, ...], Any], tuple[TrainState, Any]]
"""State, arrays of the batch, and keys -> the state afterwards, and the loss."""


class StepCall:
    """A step for one signature of the batch: a jit over flat tuples.

    Slots that no step changes are inputs and no outputs, and are not donated.

    Args:
        traced: the step.
        state: a state, or its shapes and dtypes.
        mesh: the mesh, or None.
        where: the sharding of all that is in the state, or None.
        inputs: the sharding of each array of the batch, None for one that stays where it is; or
            None.
        changed: the slots that the step changes, as far as is known.
    """

    def __init__(
        self,
        traced: Traced,
        state: TrainState,
        *,
        mesh: Mesh | None,
        where: TrainState | None,
        inputs: tuple[Any, ...] | None,
        changed: set[int],
    ) -> None:
        self._mesh = mesh
        self._traced = traced
        self._index = state.values.index
        self._structure: Any = state.structure
        self._where = None if where is None else (where.values.arrays, where.leaves)
        self._inputs = inputs
        self._arrange(changed)

    def fits(self, state: Any) -> bool:
        """Whether a state is of this program and optimizer."""
        if type(state) is not TrainState:
            return False
        index, structure = state.values.index, state.structure
        return (index is self._index or index == self._index) and (
            structure is self._structure or bool(structure == self._structure)
        )

    def _arrange(self, changed: set[int]) -> None:
        """Makes the jit for a step that changes these slots."""
        count = len(self._index.keys)
        kept = tuple(position for position in range(count) if position not in changed)
        self._changed = tuple(sorted(changed))
        order = {slot: place for place, slot in enumerate((*self._changed, *kept))}
        self._take = _getter(self._changed, count)
        self._leave = _getter(kept, count)
        self._merge = _getter(tuple(order[slot] for slot in range(count)), count)
        options: dict[str, Any] = {}
        if self._where is not None:
            slots, leaves = self._where
            options["in_shardings"] = (
                self._take(slots),
                leaves,
                self._leave(slots),
                self._inputs,
                None,
            )
            options["out_shardings"] = (self._take(slots), leaves, None, None)
        self._jitted = jax.jit(self._flat, donate_argnums=(0, 1), **options)

    def _flat(
        self,
        given: tuple[Any, ...],
        leaves: tuple[Any, ...],
        kept: tuple[Any, ...],
        dynamic: tuple[Any, ...],
        keys: Any,
    ) -> Any:
        """What is compiled: what changes, what a call for other shapes changed too, the loss."""
        arrays = self._merge((*given, *kept))
        if self._where is not None and _is_explicit(self._mesh):
            arrays = _resharded(arrays, self._where[0])
            leaves = _resharded(leaves, self._where[1])
            dynamic = _resharded(dynamic, self._inputs or (None,) * len(dynamic))
        state = TrainState.of_leaves(Values(self._index, arrays), leaves, self._structure)
        new, result = self._traced(state, dynamic, keys)
        more = changes(arrays, new.values.arrays)
        for position in self._changed:
            more.pop(position, None)
        return self._take(new.values.arrays), new.leaves, more, result

    def __call__(
        self, state: TrainState, dynamic: tuple[Any, ...], keys: Any
    ) -> tuple[TrainState, Any]:
        """The state afterwards, and the loss."""
        arrays = state.values.arrays
        kept = self._leave(arrays)
        try:
            given, leaves, more, result = self._jitted(
                self._take(arrays), state.leaves, kept, dynamic, keys
            )
        except ValueError:
            moved = self._placed(state, dynamic, keys)
            if moved is None:
                raise
            return self(*moved)
        arrays = self._merge((*given, *kept)) if kept else given
        if more:
            new = list(arrays)
            for position, array in more.items():
                new[position] = array
            arrays = tuple(new)
        values = Values(self._index, arrays)
        return TrainState.of_leaves(values, leaves, self._structure), result

    def _placed(self, state: TrainState, dynamic: tuple[Any, ...], keys: Any) -> Any:
        """The arguments, on the mesh; None where they lie right already, or there is no mesh."""
        if self._where is None or self._mesh is None:
            return None
        slots, leaves = self._where
        spec: Any = PartitionSpec  # its constructor is not annotated
        where = NamedSharding(self._mesh, spec())
        devices = set(self._mesh.devices.flat)

        def near(array: Any) -> Any:
            if not isinstance(array, jax.Array) or not array.committed:
                return array
            return array if array.sharding.device_set == devices else jax.device_put(array, where)

        before = (*state.values.arrays, *state.leaves, *dynamic, *jax.tree.leaves(keys))
        values = Values(self._index, sharding.put(state.values.arrays, slots))
        moved = TrainState.of_leaves(values, sharding.put(state.leaves, leaves), state.structure)
        dynamic, keys = tuple(map(near, dynamic)), jax.tree.map(near, keys)
        after = (*values.arrays, *moved.leaves, *dynamic, *jax.tree.leaves(keys))
        if all(map(operator.is_, before, after)):
            return None
        return moved, dynamic, keys

    def lower(self, state: TrainState, dynamic: tuple[Any, ...], keys: Any) -> Any:
        """The step lowered, a `jax.stages.Lowered`."""
        arrays = state.values.arrays
        return self._jitted.lower(
            self._take(arrays), state.leaves, self._leave(arrays), dynamic, keys
        )


def changes(old: tuple[Any, ...], new: tuple[Any, ...]) -> dict[int, Any]:
    """The values that are not the very objects they were, by position."""
    return {
        position: after
        for position, (before, after) in enumerate(zip(old, new, strict=True))
        if after is not before
    }


def _getter(slots: tuple[int, ...], count: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    if slots == tuple(range(count)):
        return tuple
    if len(slots) > 1:
        return operator.itemgetter(*slots)
    return lambda arrays: tuple(arrays[slot] for slot in slots)


def _is_explicit(mesh: Mesh | None) -> bool:
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def _resharded(values: tuple[Any, ...], wanted: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values with the shardings in their types, as explicit axes need it."""
    reshard: Any = jax.sharding.reshard  # it is not annotated
    return tuple(
        value if where is None else reshard(value, where)
        for value, where in zip(values, wanted, strict=True)
    )
