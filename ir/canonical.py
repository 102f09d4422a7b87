"""The canonical numbering of a graph, so that equal structures are equal values."""

from __future__ import annotations

from dataclasses import replace

from linsey.ir.analysis import moved, renumber
from linsey.ir.graph import Graph, Node, Slot, Stream
from linsey.ir.paths import Key


def canonical(graph: Graph) -> Graph:
    """Renumbers a graph, whatever the order in which it was made.

    Nodes: depth first from the root, children in their order; slots: by collection, then by path;
    streams: by name, those with a key of their own after the others. What cannot be reached keeps
    its order at the end, for `verify` to report.
    """
    nodes = _order_nodes(graph)
    slots = sorted(range(len(graph.slots)), key=lambda index: _slot_key(graph.slots[index]))
    new_node = {old: new for new, old in enumerate(nodes)}
    new_slot = {old: new for new, old in enumerate(slots)}
    streams = sorted(
        range(len(graph.streams)), key=lambda index: _stream_key(graph.streams[index], new_slot)
    )
    new_stream = {old: new for new, old in enumerate(streams)}
    return Graph(
        nodes=tuple(
            _sorted(renumber(graph.nodes[old], new_node, new_slot, new_stream)) for old in nodes
        ),
        slots=tuple(
            replace(graph.slots[old], mirrors=moved(graph.slots[old].mirrors, new_slot))
            for old in slots
        ),
        streams=tuple(
            replace(
                graph.streams[old],
                key=moved(graph.streams[old].key, new_slot),
                count=moved(graph.streams[old].count, new_slot),
            )
            for old in streams
        ),
        root=new_node[graph.root],
        empty=tuple(sorted(graph.empty, key=lambda path: [_key(name) for name in path])),
    )


def _sorted(node: Node) -> Node:
    """A node with its slots and streams in the order of their numbers."""

    def by_number(held: tuple[str | int, int]) -> int:
        return held[1]

    return replace(
        node,
        slots=tuple(sorted(node.slots, key=by_number)),
        streams=tuple(sorted(node.streams, key=by_number)),
    )


def _order_nodes(graph: Graph) -> list[int]:
    seen: dict[int, None] = {}
    todo = [graph.root]
    while todo:
        number = todo.pop()
        if number in seen:
            continue
        seen[number] = None
        node = graph.nodes[number]
        held = node.wrapper.children if node.wrapper is not None else ()
        todo.extend(child for _, child in reversed((*node.children, *held)))
    rest = (number for number in range(len(graph.nodes)) if number not in seen)
    return [*seen, *rest]


def _key(name: Key) -> tuple[bool, Key]:
    return isinstance(name, str), name


def _slot_key(slot: Slot) -> tuple[str, list[tuple[bool, Key]]]:
    return slot.collection, [_key(name) for name in slot.paths[0]]


def _stream_key(stream: Stream, slots: dict[int, int]) -> tuple[bool, str, int]:
    place = -1 if stream.key is None else slots[stream.key]
    return stream.derivation == "count", stream.name, place
