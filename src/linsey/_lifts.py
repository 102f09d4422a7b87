"""What the lifted transforms of a graph do to the variables of a module at some path.

Shared by frontends and backends.
"""

from __future__ import annotations

from typing import Any

from linsey._places import slots_below
from linsey.ir import (
    EmitError,
    Graph,
    Path,
    StackAxis,
    TensorType,
    ValueType,
    decode,
    format_path,
)
from linsey.ir.reserved import LIFTED

CARRIER = "params"
"""The collection in which variables travel whose own collection no transform lifts."""


class Lifts:
    """The lifted transforms of a graph that stack variables.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._owners = sorted({axis.owner for slot in graph.slots for axis in slot.stack}, key=len)
        self._known: dict[Path, dict[str, StackAxis | None]] = {}
        self._carried: dict[int, frozenset[str]] = {}
        """For the slots of NNX modules in the place of Linen ones: what passes there."""
        for node in graph.nodes:
            names = None if node.wrapper is None else dict(node.wrapper.attrs).get(LIFTED)
            if names is not None:
                passes = frozenset(decode(names))
                self._carried |= dict.fromkeys(slots_below(graph, node), passes)

    def around(self, path: Path) -> list[Path]:
        """The transforms that a module at a path is called inside of, outermost first."""
        return [owner for owner in self._owners if path[: len(owner)] == owner]

    def _lifted(self, owner: Path) -> dict[str, StackAxis | None]:
        """The collections that a transform passes on, with the axis that it stacks them by."""
        if owner in self._known:
            return self._known[owner]
        found: dict[str, StackAxis | None] = {}
        self._known[owner] = found
        for number, slot in enumerate(self._graph.slots):
            if slot.path[: len(owner)] != owner:
                continue
            axis = next((axis for axis in slot.stack if axis.owner == owner), None)
            passes = self._carried.get(number)
            own = slot.collection if passes is None or slot.collection in passes else CARRIER
            for name in (own, *sorted(passes or ())):
                known = found.get(name)
                found[name] = known or (axis if name == own else None)
        return found

    def passed(self, path: Path) -> tuple[str, ...]:
        """The collections that reach a module at a path, through the transforms around it."""
        around = [set(self._lifted(owner)) for owner in self.around(path)]
        return tuple(sorted(set.intersection(*around))) if around else ()

    def carrier(self, path: Path, collection: str) -> str:
        """The collection in which a variable reaches a module at a path."""
        around = self.around(path)
        if all(collection in self._lifted(owner) for owner in around):
            return collection
        return CARRIER

    def stack(self, path: Path, collection: str) -> tuple[StackAxis, ...]:
        """The axes by which a variable of a module at a path has to be stacked, outermost first."""
        carrier = self.carrier(path, collection)
        axes = (self._lifted(owner).get(carrier) for owner in self.around(path))
        return tuple(axis for axis in axes if axis is not None)

    def check(self, path: Path, own: Path, collection: str, value: Any) -> None:
        """Checks that a variable is stacked as the transforms around it ask for.

        Args:
            path: the path of its module.
            own: its path below that.
            collection: its collection.
            value: its value.

        Raises:
            EmitError: it is not.
        """
        axes = self.stack(path, collection)
        rest = list(getattr(value, "shape", ()))
        for axis in axes:
            if not axis.axis < len(rest) or rest[axis.axis] != axis.length:
                sizes = ", ".join(f"{each} (axis {each.axis})" for each in axes)
                raise EmitError(
                    f"found the shape {tuple(getattr(value, 'shape', ()))}, expected one stacked by"
                    f" {sizes}: the module is called inside the transform that"
                    f" {format_path(axis.owner) or 'the root'} runs",
                    path=format_path((*path, *own)),
                    fix="Make one module per step, stacked: " + _stacking(axes),
                )
            del rest[axis.axis]


def _stacking(axes: tuple[StackAxis, ...]) -> str:
    """The code that makes a stacked module."""
    make, keys = "lambda key: YourModule(..., rngs=nnx.Rngs(key))", "jax.random.key(0)"
    for axis in reversed(axes):
        make = f"nnx.vmap({make}, out_axes={axis.axis})"
    lengths = tuple(axis.length for axis in axes)
    return f"{make}(jax.random.split({keys}, {lengths}))."


def fits_stack(kind: ValueType, axes: tuple[StackAxis, ...]) -> bool:
    """Whether a type has stacked axes, outermost first."""
    if not isinstance(kind, TensorType):
        return False
    rest = list(kind.shape)
    for axis in axes:
        if not axis.axis < len(rest) or rest[axis.axis] != axis.length:
            return False
        del rest[axis.axis]
    return bool(axes)
