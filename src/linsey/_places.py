"""Where the variables of a graph's modules lie: as attributes of NNX objects, and in Linen's dicts.

A slot's own path leads through modules only. A wrapper of `linsey.bridge` may lay its variables out
in another way, and says so by two static methods that it has: see `linsey.bridge.ToNNX`.
Shared by frontends and backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linsey.ir import Graph, Key, Node, Path, as_key, decode
from linsey.ir.reserved import NAMES


def real_keys(node: Node) -> Mapping[Key, Any]:
    """The keys of a dict that are neither str nor int, by their names in the graph."""
    value = next((value for name, value in node.attrs if name == NAMES), None)
    return {} if value is None else decode(value)


def stored_path(collection: str, path: Path) -> Path:
    """The path in Linen's variables of an NNX Variable at an attribute path.

    The first name is always a string, and never ``params`` in the collection of that name: Linen
    refuses both.
    """
    first = str(path[0])
    return ("params__nnx" if collection == first == "params" else first, *path[1:])


def linen_slots(graph: Graph, root: int) -> list[tuple[Path, int]]:
    """The variables of a Linen module: path below it, and slot, NNX modules inside included.

    The path is that of the source: it holds the keys of dicts as they are. A tied variable is here
    once, by its canonical path.
    """
    found: dict[int, Path] = {}
    seen: set[int] = set()

    def add(slot: int, path: Path) -> None:
        canonical = graph.slots[slot].path
        if slot not in found or canonical[-len(path) :] == tuple(map(as_key, path)):
            found[slot] = path

    def walk(number: int, path: Path) -> None:
        if number in seen:
            return
        seen.add(number)
        node = graph.nodes[number]
        if node.source is not None and node.source.dialect != "linen":
            for slot, place in attribute_paths(graph, number).items():
                add(slot, (*path, *stored_path(graph.slots[slot].collection, place)))
            return
        names = real_keys(node)
        for name, slot in node.slots:
            add(slot, (*path, names.get(name, name)))
        for name, child in node.children:
            walk(child, (*path, names.get(name, name)))

    walk(root, ())
    return [(path, slot) for slot, path in found.items()]


def attribute_paths(graph: Graph, root: int) -> dict[int, Path]:
    """The attribute path, below an NNX module, of each slot of it."""
    found: dict[int, Path] = {}
    seen: set[int] = set()

    def walk(number: int, path: Path) -> None:
        if number in seen:
            return
        seen.add(number)
        node = graph.nodes[number]
        wrapper = node.wrapper
        if node.source is not None and node.source.dialect == "linen" and wrapper is not None:
            place = layout(wrapper)
            for below, slot in linen_slots(graph, number):
                at = place(graph.slots[slot].collection, below)
                found.setdefault(slot, (*path, *at))
            held, children = wrapper.slots, wrapper.children
        else:
            held, children = node.slots, node.children
        names = real_keys(node)
        for name, slot in held:
            found.setdefault(slot, (*path, names.get(name, name)))
        for name, child in children:
            walk(child, (*path, names.get(name, name)))

    walk(root, ())
    return found


def layout(wrapper: Any) -> Any:
    """A function that tells the attribute path, in a ToNNX, of a variable of what it wraps.

    Args:
        wrapper: the `Wrapper` of the node.
    """
    own = getattr(decode(wrapper.cls), "linsey_place", None)
    if own is None:
        return lambda collection, path: path
    attributes = {str(name): value for name, value in wrapper.attrs}
    return lambda collection, path: own(
        {name: decode(value) for name, value in attributes.items()}, collection, path
    )


def variable_places(graph: Graph) -> dict[int, Path]:
    """Collection and path of each Linen variable of a graph whose root stands in Linen."""
    slots = linen_slots(graph, graph.root)
    return {slot: (graph.slots[slot].collection, *map(as_key, path)) for path, slot in slots}


def slots_below(graph: Graph, root: Node) -> list[int]:
    """The slots of a node and all below it, wrappers included, each once."""
    found: dict[int, None] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        held = ((), ()) if node.wrapper is None else (node.wrapper.slots, node.wrapper.children)
        found.update(dict.fromkeys(slot for _, slot in (*node.slots, *held[0])))
        for _, child in (*node.children, *held[1]):
            if child not in seen:
                seen.add(child)
                todo.append(graph.nodes[child])
    return list(found)
