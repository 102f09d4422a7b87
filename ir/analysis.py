"""Questions about a graph, answered with networkx."""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import replace

import networkx as nx

from linsey.ir.attributes import ABSENT, Attrs, AttrValue, Call, Instance, Map, NodeRef, Sequence
from linsey.ir.errors import LinseyError
from linsey.ir.graph import Graph, Node, Slot
from linsey.ir.paths import Path, format_path


def digraph(graph: Graph) -> nx.MultiDiGraph:
    """The nodes as a networkx graph, an edge per child with its ``name``."""
    out = nx.MultiDiGraph()
    out.add_nodes_from(range(len(graph.nodes)))
    for number, node in enumerate(graph.nodes):
        out.add_edges_from((number, child, {"name": name}) for name, child in node.children)
        if node.wrapper is not None:
            held = node.wrapper.children
            out.add_edges_from((number, child, {"name": name}) for name, child in held)
    return out


def node_paths(graph: Graph) -> dict[int, Path]:
    """The first path of each node, breadth first: the shortest one, in the order of children."""
    paths: dict[int, Path] = {graph.root: ()}
    todo = deque([graph.root])
    while todo:
        number = todo.popleft()
        node = graph.nodes[number]
        held = node.wrapper.children if node.wrapper is not None else ()
        for name, child in (*node.children, *held):
            if child not in paths:
                paths[child] = (*paths[number], name)
                todo.append(child)
    return paths


def find_node(graph: Graph, path: Path) -> int:
    """The node at a path.

    Raises:
        LinseyError: there is none; the message names the children that there are.
    """
    number = graph.root
    for depth, name in enumerate(path):
        children = dict(graph.nodes[number].children)
        if name not in children:
            raise LinseyError(
                f"no child {name!r}; there are: {', '.join(map(repr, children)) or 'none'}",
                path=format_path(path[: depth + 1]),
                fix="Give the path of a node as `print(program)` shows it.",
            )
        number = children[name]
    return number


def shared_nodes(graph: Graph) -> tuple[int, ...]:
    """The nodes that several parents use, as children or as attributes."""
    users: dict[int, set[tuple[int, str]]] = {}
    for number, node in enumerate(graph.nodes):
        for name, child in node.children:
            users.setdefault(child, set()).add((number, str(name)))
        for name, attr in node.attrs:
            for child in _references(attr):
                if child not in (index for _, index in node.children):
                    users.setdefault(child, set()).add((number, str(name)))
    return tuple(sorted(number for number, uses in users.items() if len(uses) > 1))


def tied_slots(graph: Graph) -> tuple[int, ...]:
    """The slots with several paths."""
    return tuple(number for number, slot in enumerate(graph.slots) if len(slot.paths) > 1)


def dominators(graph: Graph) -> dict[int, int]:
    """The immediate dominator of each node: the nearest one on every way from the root to it.

    A node that is shared below its immediate dominator only can be moved or replaced with it. The
    root is its own dominator.
    """
    found = dict(nx.immediate_dominators(nx.DiGraph(digraph(graph)), graph.root))
    found[graph.root] = graph.root
    return {number: graph.root if parent is None else parent for number, parent in found.items()}


def extract(graph: Graph, path: Path) -> Graph:
    """The subgraph below a node as a graph of its own, with paths counted from there.

    Args:
        graph: the whole.
        path: path of the node that becomes the root.

    Raises:
        LinseyError: no node has this path.
    """
    start = find_node(graph, path)
    reach = [start, *sorted(nx.descendants(digraph(graph), start))]
    new_node = {old: new for new, old in enumerate(reach)}
    held: dict[int, None] = {}
    for old in reach:
        node = graph.nodes[old]
        for _, index in (*node.slots, *(node.wrapper.slots if node.wrapper else ())):
            held.setdefault(index)
    new_slot = {old: new for new, old in enumerate(sorted(held))}
    used = {index for old in reach for _, index in graph.nodes[old].streams}
    new_stream = {old: new for new, old in enumerate(sorted(used))}
    root = replace(graph.nodes[start], wrapper=None)
    places = _slot_paths(graph, start)
    nodes = [root, *(graph.nodes[old] for old in reach[1:])]
    return Graph(
        nodes=tuple(renumber(node, new_node, new_slot, new_stream) for node in nodes),
        slots=tuple(_rebase(graph.slots[old], path, places[old], new_slot) for old in sorted(held)),
        streams=tuple(
            replace(
                graph.streams[old],
                key=moved(graph.streams[old].key, new_slot),
                count=moved(graph.streams[old].count, new_slot),
            )
            for old in sorted(used)
        ),
        empty=tuple(
            (entry[0], *entry[1 + len(path) :])
            for entry in graph.empty
            if entry[1 : 1 + len(path)] == path
        ),
    )


def renumber(
    node: Node, nodes: dict[int, int], slots: dict[int, int], streams: dict[int, int]
) -> Node:
    """A node with other numbers for the nodes, slots and streams that it holds."""
    wrapper = node.wrapper and replace(
        node.wrapper,
        children=tuple((name, nodes[child]) for name, child in node.wrapper.children),
        slots=tuple((name, slots[slot]) for name, slot in node.wrapper.slots),
    )
    return replace(
        node,
        attrs=_renumber_attrs(node.attrs, nodes),
        children=tuple((name, nodes[child]) for name, child in node.children),
        slots=tuple((name, slots[slot]) for name, slot in node.slots),
        streams=tuple((name, streams[stream]) for name, stream in node.streams),
        wrapper=wrapper,
    )


def _renumber_attrs(attrs: Attrs, nodes: dict[int, int]) -> Attrs:
    return tuple((name, _renumber_value(value, nodes)) for name, value in attrs)


def _renumber_value(value: AttrValue, nodes: dict[int, int]) -> AttrValue:
    """A value with the nodes that it refers to renumbered; those outside stay as they are."""
    if not _references(value):
        return value
    again = functools.partial(_renumber_value, nodes=nodes)
    match value:
        case NodeRef():
            return NodeRef(node=nodes.get(value.node, value.node))
        case Sequence():
            return replace(value, items=tuple(map(again, value.items)))
        case Map():
            items = tuple((key, again(item)) for key, item in value.items)
            return replace(value, items=items, live=ABSENT)
        case Instance():
            fields = tuple((name, again(item)) for name, item in value.fields)
            return replace(value, fields=fields, live=ABSENT)
        case Call():
            kwargs = tuple((name, again(item)) for name, item in value.kwargs)
            return replace(value, args=tuple(map(again, value.args)), kwargs=kwargs, live=ABSENT)
    return value


def _slot_paths(graph: Graph, start: int) -> dict[int, Path]:
    """The first path of each slot below a node, depth first."""
    found: dict[int, Path] = {}
    seen: set[int] = set()
    todo: list[tuple[int, Path]] = [(start, ())]
    while todo:
        number, path = todo.pop()
        if number in seen:
            continue
        seen.add(number)
        node = graph.nodes[number]
        own = node.wrapper if number != start else None
        for name, slot in (*node.slots, *(own.slots if own else ())):
            found.setdefault(slot, (*path, name))
        children = (*node.children, *(own.children if own else ()))
        todo.extend((child, (*path, name)) for name, child in reversed(children))
    return found


def _rebase(slot: Slot, path: Path, place: Path, slots: dict[int, int]) -> Slot:
    depth = len(path)
    below = dict.fromkeys(entry[depth:] for entry in slot.paths if entry[:depth] == path)
    return replace(
        slot,
        paths=tuple(below) or (place,),
        stack=tuple(
            replace(entry, owner=entry.owner[depth:] if entry.owner[:depth] == path else ())
            for entry in slot.stack
        ),
        mirrors=moved(slot.mirrors, slots),
    )


def moved(index: int | None, numbers: dict[int, int]) -> int | None:
    """An index under other numbers; None where there is none any more."""
    return None if index is None else numbers.get(index)


def _references(value: AttrValue) -> tuple[int, ...]:
    match value:
        case NodeRef():
            return (value.node,)
        case Sequence():
            parts = value.items
        case Map():
            parts = tuple(item for _, item in value.items)
        case Instance():
            parts = tuple(item for _, item in value.fields)
        case Call():
            parts = (*value.args, *(item for _, item in value.kwargs))
        case _:
            return ()
    return tuple(node for part in parts for node in _references(part))
