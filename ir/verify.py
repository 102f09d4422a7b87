"""The rules of the IR: a table of small checks that together say whether a graph is sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from linsey.ir.errors import VerifyError
from linsey.ir.graph import Graph, Node, TensorType
from linsey.ir.paths import Key, format_path

Rule = Callable[[Graph], Iterator[str]]


def _edges(node: Node) -> Iterator[tuple[Key, int]]:
    yield from node.children
    if node.wrapper is not None:
        yield from node.wrapper.children


def _bindings(node: Node) -> Iterator[tuple[Key, int]]:
    yield from node.slots
    if node.wrapper is not None:
        yield from node.wrapper.slots


def _indices(graph: Graph) -> Iterator[str]:
    """Every index points into its table."""
    nodes, slots, streams = len(graph.nodes), len(graph.slots), len(graph.streams)
    if not 0 <= graph.root < nodes:
        yield f"root {graph.root} is not one of {nodes} nodes"
    for number, node in enumerate(graph.nodes):
        for name, index in _edges(node):
            if not 0 <= index < nodes:
                yield f"node %{number} child {name!r}: %{index} is not one of {nodes} nodes"
        for name, index in _bindings(node):
            if not 0 <= index < slots:
                yield f"node %{number} slot {name!r}: {index} is not one of {slots} slots"
        for name, index in node.streams:
            if not 0 <= index < streams:
                yield f"node %{number} stream {name!r}: {index} is not one of {streams} streams"
    for stream in graph.streams:
        for role, held in (("key", stream.key), ("count", stream.count)):
            if held is not None and not 0 <= held < slots:
                yield f"stream {stream.name!r} {role}: {held} is not one of {slots} slots"
    for slot in graph.slots:
        if slot.mirrors is not None and not 0 <= slot.mirrors < slots:
            yield f"slot {slot.key} mirrors {slot.mirrors}, which is not one of {slots} slots"


def _reachable(graph: Graph) -> Iterator[str]:
    """Every node and slot belongs to the program."""
    seen, todo = {graph.root}, [graph.root]
    held: set[int] = set()
    while todo:
        node = graph.nodes[todo.pop()]
        held.update(index for _, index in _bindings(node))
        for _, index in _edges(node):
            if index not in seen:
                seen.add(index)
                todo.append(index)
    for number in range(len(graph.nodes)):
        if number not in seen:
            yield f"node %{number} cannot be reached from the root"
    for number, slot in enumerate(graph.slots):
        if number not in held:
            yield f"slot {slot.key} belongs to no node"


def _names(graph: Graph) -> Iterator[str]:
    """A node has one child and, per collection, one slot of a name; slots share no path."""
    for number, node in enumerate(graph.nodes):
        for name, count in Counter(name for name, _ in node.children).items():
            if count > 1:
                yield f"node %{number} has {count} children named {name!r}"
        if len(node.slots) > 1:
            bindings = Counter((graph.slots[index].collection, name) for name, index in node.slots)
            for (collection, name), count in bindings.items():
                if count > 1:
                    yield f"node %{number} has {count} slots named {name!r} in {collection!r}"
    owners: dict[tuple[str, tuple[Key, ...]], int] = {}
    for number, slot in enumerate(graph.slots):
        if not slot.paths:
            yield f"slot {number} has no path"
        for path in slot.paths:
            other = owners.setdefault((slot.collection, path), number)
            if other != number:
                where = format_path((slot.collection, *path))
                yield f"slots {other} and {number} have the same path {where}"


def _types(graph: Graph) -> Iterator[str]:
    """Sizes are not negative, and stacked axes are there."""
    for slot in graph.slots:
        if not isinstance(slot.type, TensorType):
            continue
        shape = slot.type.shape
        if any(size < 0 for size in shape):
            yield f"slot {slot.key} has a negative size: {slot.type}"
        rest = list(shape)
        for entry in slot.stack:
            if not 0 <= entry.axis < len(rest) or rest[entry.axis] != entry.length:
                yield f"slot {slot.key} {slot.type} has no stacked axis {entry}"
                break
            del rest[entry.axis]


def _streams(graph: Graph) -> Iterator[str]:
    """A counted stream has its key and its counter."""
    for stream in graph.streams:
        if stream.derivation == "count" and (stream.key is None or stream.count is None):
            yield f"stream {stream.name!r} counts, but has no slot for its key or its counter"


RULES: tuple[Rule, ...] = (_names, _reachable, _types, _streams)
"""The checks, in the order in which they report; the one on indices runs before all of them."""


def problems(graph: Graph) -> tuple[str, ...]:
    """All problems of a graph, one line each; empty when it is sound.

    Example:
        >>> problems(Graph(nodes=(Node(), Node())))
        ('node %1 cannot be reached from the root',)
    """
    broken = tuple(_indices(graph))
    return broken or tuple(line for rule in RULES for line in rule(graph))


def verify(graph: Graph) -> Graph:
    """Checks a graph and gives it back.

    Raises:
        VerifyError: with all problems.
    """
    found = problems(graph)
    if found:
        raise VerifyError(found)
    return graph
