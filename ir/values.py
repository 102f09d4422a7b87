"""The arrays of a program: one value per slot, in slot order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from linsey.ir.errors import ValuesError
from linsey.ir.graph import Graph
from linsey.ir.paths import format_path


class SlotIndex:
    """The names of some slots of a graph, in order; shared by all `Values` of a program."""

    __slots__ = ("_aliases", "_hash", "collections", "keys", "positions")

    def __init__(
        self, keys: tuple[str, ...], collections: tuple[str, ...], aliases: Mapping[str, str]
    ) -> None:
        self.keys = keys
        self.collections = collections
        self.positions = {key: position for position, key in enumerate(keys)}
        self._aliases = aliases
        self._hash = hash(keys)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, SlotIndex) and self.keys == other.keys)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return SlotIndex, (self.keys, self.collections, dict(self._aliases))

    def has(self, key: str) -> bool:
        """Whether there is a slot of this name."""
        return key in self.positions or self._aliases.get(key) in self.positions

    def find(self, key: str) -> int:
        """The position of a slot, by any of its names.

        Raises:
            ValuesError: there is no such slot; the message names the nearest ones.
        """
        position = self.positions.get(key)
        if position is None:
            position = self.positions.get(self._aliases.get(key, ""))
        if position is None:
            raise ValuesError(
                f"no slot named {key!r}{_nearest(key, self.keys)}",
                path=key,
                fix="Use one of `values.keys()`; `print(program)` shows them in place.",
            )
        return position

    def subset(self, positions: Iterable[int]) -> SlotIndex:
        """The index of some of the slots, by position."""
        chosen = tuple(positions)
        keys = tuple(self.keys[position] for position in chosen)
        collections = tuple(self.collections[position] for position in chosen)
        return SlotIndex(keys, collections, self._aliases)


def _nearest(key: str, keys: tuple[str, ...]) -> str:
    import difflib

    near = difflib.get_close_matches(key, keys, n=3)
    return f"; near it: {', '.join(near)}" if near else ""


def slot_index(graph: Graph) -> SlotIndex:
    """The index of all slots of a graph, the same object each time."""
    if "index" not in graph.memo:
        aliases = {
            format_path((slot.collection, *path)): slot.key
            for slot in graph.slots
            for path in slot.paths[1:]
        }
        keys = tuple(slot.key for slot in graph.slots)
        graph.memo["index"] = SlotIndex(
            keys, tuple(slot.collection for slot in graph.slots), aliases
        )
    return graph.memo["index"]  # type: ignore[no-any-return]


class Values:
    """One value per slot, or per slot of a selection, by name or in order.

    A pytree for jax: ``jax.grad``, ``jax.jit`` and optax take it as it is.

    Args:
        index: the names of the slots.
        arrays: their values, as many as there are names.

    Example:
        >>> index = SlotIndex(("params/w", "params/b"), ("params", "params"), {})
        >>> values = Values(index, (1.0, 2.0))
        >>> values["params/b"]
        2.0
        >>> dict(values.select("params").items())
        {'params/w': 1.0, 'params/b': 2.0}
    """

    __slots__ = ("arrays", "index")

    def __init__(self, index: SlotIndex, arrays: tuple[Any, ...]) -> None:
        self.index = index
        self.arrays = arrays

    def __getitem__(self, key: str) -> Any:
        return self.arrays[self.index.find(key)]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.index.has(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.keys)

    def __len__(self) -> int:
        return len(self.arrays)

    def keys(self) -> tuple[str, ...]:
        """The names of the slots, in order."""
        return self.index.keys

    def items(self) -> Iterator[tuple[str, Any]]:
        """Name and value of each slot, in order."""
        return zip(self.index.keys, self.arrays, strict=True)

    def select(self, *wanted: str | Callable[[str], bool]) -> Values:
        """The values of some slots.

        Args:
            wanted: names of collections, or predicates on a slot's name; a slot is taken when one
                of them says so.

        Raises:
            ValuesError: a collection that no slot is in.
        """
        for name in wanted:
            if isinstance(name, str) and name not in self.index.collections:
                known = ", ".join(sorted(set(self.index.collections))) or "none"
                raise ValuesError(
                    f"no slot is in the collection {name!r}; there are: {known}",
                    path=name,
                    fix="Select one of these, or by a predicate on the slot's name.",
                )
        chosen = [
            position
            for position, (key, collection) in enumerate(
                zip(self.index.keys, self.index.collections, strict=True)
            )
            if any(name(key) if callable(name) else name == collection for name in wanted)
        ]
        return Values(self.index.subset(chosen), tuple(self.arrays[i] for i in chosen))

    def replace(self, other: Values | Mapping[str, Any]) -> Values:
        """These values with some of them replaced.

        Args:
            other: new values by name.

        Raises:
            ValuesError: a name that is not here.
        """
        arrays = list(self.arrays)
        for key, value in other.items():
            arrays[self.index.find(key)] = value
        return Values(self.index, tuple(arrays))

    def __repr__(self) -> str:
        lines = (f"  {key}: {_describe(value)}" for key, value in self.items())
        return "Values(\n" + "\n".join(lines) + "\n)" if self.arrays else "Values()"


def _describe(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return type(value).__name__
    return f"{dtype}[{','.join(map(str, shape))}]"
