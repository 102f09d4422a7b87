"""Which nodes of a graph are of equal structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from linsey.ir import Graph, Node, Slot, Stream, moved, renumber


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """The outermost nodes of a graph whose structure occurs more than once.

    Example:
        >>> import jax, linsey
        >>> from flax import linen as nn
        >>> x = jax.ShapeDtypeStruct((1, 4), "float32")
        >>> graph = linsey.lower(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4)]), x).graph
        >>> sorted(find_repeats(graph, lambda node: True).group.items())
        [(1, 1), (2, 1)]
    """

    group: dict[int, int]
    """For each such node the first one that equals it."""
    slots: dict[int, tuple[int, ...]]
    """The slots of each such node and all below it, in the same order for equal ones."""


def find_repeats(graph: Graph, enters: Callable[[Node], bool]) -> Repeats:
    """Finds the outermost nodes whose structure occurs more than once.

    Two nodes are equal in structure when they and all below them have the same classes, attributes,
    names, kinds of slots and streams, and share and tie the same of these.

    Args:
        graph: the graph.
        enters: whether what is below a node may be considered.
    """
    alike: dict[Hashable, list[int]] = {}
    kinds = _kinds(graph)
    for number, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(number)
    equal: dict[Hashable, dict[Hashable, list[int]]] = {}
    orders: dict[int, tuple[int, ...]] = {}

    def equals(number: int) -> list[int]:
        kind = kinds[number]
        if len(alike[kind]) == 1 or graph.nodes[number].op in ("container", "scope"):
            return []
        if kind not in equal:
            equal[kind] = {}
            for other in alike[kind]:
                structure, orders[other] = _structure(graph, other)
                equal[kind].setdefault(structure, []).append(other)
        return next(found for found in equal[kind].values() if number in found)

    group: dict[int, int] = {}
    seen: set[int] = {graph.root}
    todo = [graph.root]
    while todo:
        number = todo.pop()
        found = equals(number) if number != graph.root else []
        if len(found) > 1:
            group[number] = found[0]
        elif enters(graph.nodes[number]):
            below = [child for child in _held(graph.nodes[number]) if child not in seen]
            seen.update(below)
            todo.extend(below)
    # Of some, all others may be inside a larger one.
    times = Counter(group.values())
    group = {number: first for number, first in group.items() if times[first] > 1}
    return Repeats(group=group, slots={number: orders[number] for number in group})


def _held(node: Node) -> list[int]:
    held = node.wrapper.children if node.wrapper is not None else ()
    return [child for _, child in (*node.children, *held)]


class _Zero(dict[int, int]):
    """Gives every number the same new one."""

    def __missing__(self, number: int) -> int:
        return 0

    def get(self, number: int, default: object = None) -> int:
        return 0


def _kinds(graph: Graph) -> list[int]:
    """A number for each node, equal for nodes that look the same, whatever they share and tie."""
    numbers: dict[Hashable, int] = {}
    found: dict[int, int] = {}
    zero = _Zero()

    def kind(number: int) -> int:
        if number in found:
            return found[number]
        found[number] = -1  # for a node that is below itself
        node = graph.nodes[number]
        below = tuple(map(kind, _held(node)))
        slots = tuple(_slot(graph.slots[slot], zero) for slot in _own_slots(node))
        entry = (_node(node, zero, zero, zero), below, slots)
        found[number] = numbers.setdefault(entry, len(numbers))
        return found[number]

    return [kind(number) for number in range(len(graph.nodes))]


def _structure(graph: Graph, root: int) -> tuple[Hashable, tuple[int, ...]]:
    """A node and all below it, numbered from there; and its slots in that order."""
    nodes: dict[int, int] = {}
    slots: dict[int, int] = {}
    streams: dict[int, int] = {}
    todo = [root]
    while todo:
        number = todo.pop()
        if number in nodes:
            continue
        nodes[number] = len(nodes)
        node = graph.nodes[number]
        for slot in _own_slots(node):
            slots.setdefault(slot, len(slots))
        for _, stream in node.streams:
            streams.setdefault(stream, len(streams))
        todo.extend(reversed(_held(node)))
    structure = (
        tuple(_node(graph.nodes[number], nodes, slots, streams) for number in nodes),
        tuple(_slot(graph.slots[slot], slots) for slot in slots),
        tuple(_stream(graph.streams[stream], slots) for stream in streams),
    )
    return structure, tuple(slots)


def _own_slots(node: Node) -> list[int]:
    held = node.wrapper.slots if node.wrapper is not None else ()
    return [slot for _, slot in (*node.slots, *held)]


def _node(
    node: Node, nodes: dict[int, int], slots: dict[int, int], streams: dict[int, int]
) -> Node:
    return replace(renumber(node, nodes, slots, streams), signatures=())


def _slot(slot: Slot, slots: dict[int, int]) -> Slot:
    stack = tuple(replace(axis, owner=()) for axis in slot.stack)
    return replace(slot, paths=(), stack=stack, mirrors=moved(slot.mirrors, slots))


def _stream(stream: Stream, slots: dict[int, int]) -> Stream:
    return replace(stream, key=moved(stream.key, slots), count=moved(stream.count, slots))
