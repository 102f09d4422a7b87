"""Which parameter each variable of an optimizer's state follows, and how it is partitioned.

flax gives the variables of an optimizer's state the metadata of the parameters, and an annotation
with the parameters' rank is wrong for what optax factors. So a slot gets the partition that its own
axes have, and the metadata stays as the user has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from linsey.frontends import _private
from linsey.frontends._annotations import UNWRITTEN
from linsey.frontends._builder import Builder
from linsey.ir import Partition, Path, Slot, TensorType, ValueType, as_key

Shape = tuple[int, ...]
Objects = Mapping[int, tuple[Any, int, Path]]
Slots = Mapping[int, tuple[Any, int]]


def follow_parameters(builder: Builder, objects: Objects, slots: Slots) -> None:
    """Completes the slots of optimizers.

    Args:
        builder: the graph in the making.
        objects: every NNX object in it, by id: the object, its node and its path.
        slots: every Variable in it, by id: the Variable and its slot.
    """
    found = [obj for obj, _, _ in objects.values() if isinstance(obj, nnx.Optimizer)]
    for optimizer in found:
        _Follower(builder, slots, _parameters(optimizer, objects, slots)).follow(optimizer)


class _Follower:
    """Completes the slots of one optimizer.

    Args:
        builder: the graph in the making.
        slots: the slot of each Variable.
        parameters: the slots of the parameters by their path, as far as they are in the graph.
    """

    def __init__(self, builder: Builder, slots: Slots, parameters: Mapping[Path, int]) -> None:
        self._builder = builder
        self._slots = slots
        self._parameters = parameters

    def follow(self, optimizer: nnx.Optimizer[Any]) -> None:
        """Goes through the optimizer's state."""
        for part in _parts(optimizer):
            if isinstance(part, optax.FactoredState):
                self._factored(part)
            elif isinstance(part, nnx.State):
                for path, variable in _flat(part):
                    self._whole(path, variable)
            elif isinstance(part, nnx.Variable):
                self._whole(None, part)

    def _slot(self, variable: nnx.Variable[Any]) -> Slot:
        return self._builder.slots[self._slots[id(variable)][1]]

    def _parameter(self, path: Path | None) -> Slot | None:
        number = None if path is None else self._parameters.get(path)
        return None if number is None else self._builder.slots[number]

    def _whole(self, path: Path | None, variable: nnx.Variable[Any]) -> None:
        """A variable that has its parameter's shape, or that of no part of it."""
        slot, parameter = self._slot(variable), self._parameter(path)
        own = slot.partition
        if parameter is None:
            if own is not None and not _fits(own, slot.type):
                self._derive(variable, None)
        elif not _is_alike(slot.type, parameter.type):
            self._derive(variable, None)
        else:
            assert path is not None
            note = parameter.partition
            if own is None and note is not None:
                self._derive(variable, note)
            elif own is not None and note is not None and own.axes == note.axes:
                own = dataclasses.replace(note, spec=own.spec)  # its rules; whether it is logical
            number = self._slots[id(variable)][1]
            self._builder.slots[number] = dataclasses.replace(
                self._builder.slots[number],
                mirrors=self._parameters[path],
                partition=own or self._builder.slots[number].partition,
            )

    def _factored(self, state: Any) -> None:
        """Adafactor's rows and columns: each lacks one of the parameter's two largest axes."""
        rows, columns = dict(_flat(state.v_row)), dict(_flat(state.v_col))
        for path, variable in _flat(state.v):
            pair, whole = [self._slot(rows[path]), self._slot(columns[path])], self._slot(variable)
            parameter = self._parameter(path)
            named = pair[0].partition if parameter is None else parameter.partition
            dropped = _dropped(pair, parameter, whole, named)
            for part, axis in zip((rows[path], columns[path]), dropped, strict=True):
                self._derive(part, _without(named, axis, _shapes(self._slot(part).type)))
            is_factored = _shapes(pair[0].type) != ((1,),)
            if parameter is None and is_factored:
                self._derive(variable, None)  # a placeholder
            else:
                self._whole(path, variable)
        if isinstance(state.count, nnx.Variable):
            self._whole(None, state.count)

    def _derive(self, variable: nnx.Variable[Any], partition: Partition | None) -> None:
        """Gives a slot another partition than the Variable's own, which stays in the metadata."""
        number = self._slots[id(variable)][1]
        slot = self._builder.slots[number]
        metadata = slot.metadata
        if slot.partition is not None and slot.partition.spec != UNWRITTEN:
            metadata = tuple(sorted((*metadata, ("out_sharding", slot.partition.spec)), key=_name))
        if partition is not None:
            partition = dataclasses.replace(partition, spec=UNWRITTEN)
        self._builder.slots[number] = dataclasses.replace(
            slot, partition=partition, metadata=metadata
        )


def _name(item: tuple[str | int, Any]) -> str:
    return str(item[0])


def _parts(optimizer: nnx.Optimizer[Any]) -> list[Any]:
    """The trees of parameters in an optimizer's state, what is factored, and single Variables."""
    kinds = (nnx.State, nnx.Variable, optax.FactoredState)
    return jax.tree.leaves(optimizer.opt_state, is_leaf=lambda part: isinstance(part, kinds))


def _flat(tree: Any, path: Path = ()) -> Iterator[tuple[Path, nnx.Variable[Any]]]:
    """The Variables of a tree of parameters; what is masked out is left out."""
    if isinstance(tree, nnx.Variable):
        yield path, tree
    elif isinstance(tree, Mapping):
        for name, below in tree.items():
            yield from _flat(below, (*path, name))


def _parameters(optimizer: Any, objects: Objects, slots: Slots) -> Mapping[Path, int]:
    """The parameters that an optimizer was made for, by their paths; empty if they are not here.

    An `nnx.Optimizer` does not hold its model. It is the object that has a Variable at each path of
    the optimizer's state; where several have, the one of which these are all that ``wrt`` selects.
    Where that does not decide it, nothing is said.
    """
    paths = _state_paths(optimizer)
    if not paths:
        return {}
    held = vars(optimizer).get("model")
    candidates = [obj for obj, _, _ in objects.values()] if held is None else [held]
    found: list[tuple[Any, dict[Path, int]]] = []
    for candidate in candidates:
        if not isinstance(candidate, nnx.Optimizer):
            numbers = _at(candidate, paths, slots)
            if numbers is not None:
                found.append((candidate, numbers))
    if len({tuple(numbers.items()) for _, numbers in found}) > 1:
        selected = [(obj, at) for obj, at in found if _selected(obj, optimizer) == set(paths)]
        found = selected or found
    if len({tuple(numbers.items()) for _, numbers in found}) != 1:
        return {}
    return found[0][1]


def _state_paths(optimizer: nnx.Optimizer[Any]) -> list[Path]:
    paths: dict[Path, None] = {}
    for part in _parts(optimizer):
        trees = (part.v_row, part.v) if isinstance(part, optax.FactoredState) else (part,)
        for tree in trees:
            if isinstance(tree, nnx.State):
                paths.update(dict.fromkeys(path for path, _ in _flat(tree)))
    return list(paths)


def _at(obj: Any, paths: list[Path], slots: Slots) -> dict[Path, int] | None:
    """The slots of the Variables at some paths of an object; None if one is not there."""
    found: dict[Path, int] = {}
    for path in paths:
        value = obj
        for name in path:
            impl: Any = _private.get_node_impl(value)
            value = None if impl is None else impl.node_dict(value).get(name)
        if not isinstance(value, nnx.Variable) or id(value) not in slots:
            return None
        found[path] = slots[id(value)][1]
    return found


def _selected(obj: Any, optimizer: Any) -> set[Path]:
    state = nnx.to_flat_state(nnx.state(obj, optimizer.wrt))
    return {tuple(map(as_key, path)) for path, _ in state}


def _shapes(kind: ValueType) -> tuple[Shape, ...]:
    if isinstance(kind, TensorType):
        return (kind.shape,)
    return tuple(leaf.shape for leaf in kind.leaves)


def _is_alike(kind: ValueType, other: ValueType) -> bool:
    return type(kind) is type(other) and _shapes(kind) == _shapes(other)


def _fits(partition: Partition, kind: ValueType) -> bool:
    ranks = {len(shape) for shape in _shapes(kind)}  # none: it was masked out
    return ranks == {len(partition.axes)}


def _without(
    partition: Partition | None, axis: int | None, shapes: tuple[Shape, ...]
) -> Partition | None:
    """A partition without one of its axes, for a value of a shape; None where there is none."""
    if partition is None or axis is None:
        return None
    missing = len(shapes[0]) + 1 - len(partition.axes)  # what a short one leaves out is replicated
    axes = (*partition.axes, *[None] * missing)
    return dataclasses.replace(partition, axes=(*axes[:axis], *axes[axis + 1 :]))


def _dropped(
    pair: list[Slot], parameter: Slot | None, whole: Slot, named: Partition | None
) -> tuple[int | None, int | None]:
    """The axis that the rows lack, and that the columns lack; None where they are placeholders."""
    if not all(isinstance(slot.type, TensorType) for slot in (*pair, whole)):
        return None, None  # masked out
    shapes, whole_shape = [_shapes(slot.type)[0] for slot in pair], _shapes(whole.type)[0]
    if parameter is None:
        if named is None or whole_shape != (1,) or len(named.axes) != len(shapes[0]) + 1:
            return None, None
        candidates = _possible(shapes)
    else:
        shape = _shapes(parameter.type)[0]
        if len(shape) < 2 or whole_shape == shape or shapes != _rows_and_columns(shape):
            return None, None
        candidates = [shape]
    axes = {_largest(shape) for shape in candidates}
    if len(axes) != 1:  # (4, 8) and (8, 4) have the same rows and columns
        return None, None
    return axes.pop()


def _largest(shape: Shape) -> tuple[int, int]:
    """The largest axis and the one before it, as optax finds them."""
    order = np.argsort(shape)
    return int(order[-1]), int(order[-2])


def _rows_and_columns(shape: Shape) -> list[Shape]:
    """The shapes of the rows and of the columns that optax keeps for a parameter."""
    return [shape[:axis] + shape[axis + 1 :] for axis in _largest(shape)]


def _possible(shapes: list[Shape]) -> list[Shape]:
    """The shapes of parameters whose rows and columns have these shapes."""
    rows, columns = shapes
    found = [
        shape
        for axis in range(len(rows) + 1)
        for size in dict.fromkeys(columns)
        for shape in [(*rows[:axis], size, *rows[axis:])]
        if len(shape) >= 2 and _rows_and_columns(shape) == shapes
    ]
    return list(dict.fromkeys(found))
