"""What the lifted transforms of a graph do to the variables of a module at some path."""

from __future__ import annotations

import functools
from typing import Any

from linsey.ir import EmitError, Graph, Path, StackAxis, format_path


class Lifts:
    """The lifted transforms of a graph that stack variables.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._owners = sorted({axis.owner for slot in graph.slots for axis in slot.stack}, key=len)

    def _around(self, path: Path) -> list[Path]:
        """The transforms that a module at a path is called inside of, outermost first."""
        return [owner for owner in self._owners if path[: len(owner)] == owner]

    @functools.cache  # noqa: B019 - it lives as long as its graph
    def _lifted(self, owner: Path) -> dict[str, StackAxis | None]:
        """The collections that a transform passes on, with the axis that it stacks them by."""
        found: dict[str, StackAxis | None] = {}
        for slot in self._graph.slots:
            if slot.path[: len(owner)] == owner:
                axis = next((axis for axis in slot.stack if axis.owner == owner), None)
                found[slot.collection] = found.get(slot.collection) or axis
        return found

    def carrier(self, path: Path, collection: str) -> str:
        """The collection in which a variable reaches a module at a path."""
        around = self._around(path)
        if all(collection in self._lifted(owner) for owner in around):
            return collection
        return "params"

    def stack(self, path: Path, collection: str) -> tuple[StackAxis, ...]:
        """The axes by which a variable of a module at a path has to be stacked, outermost first."""
        carrier = self.carrier(path, collection)
        axes = (self._lifted(owner).get(carrier) for owner in self._around(path))
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
                lengths = [each.length for each in axes]
                split = lengths[0] if len(lengths) == 1 else tuple(lengths)
                raise EmitError(
                    f"found the shape {tuple(getattr(value, 'shape', ()))}, expected one stacked by"
                    f" {sizes}: the module is called inside the transform that"
                    f" {format_path(axis.owner) or 'the root'} runs",
                    path=format_path((*path, *own)),
                    fix="Make one module per step and stack them: nnx.vmap(lambda key:"
                    f" YourModule(..., rngs=nnx.Rngs(key)))(jax.random.split(key, {split})).",
                )
            del rest[axis.axis]
