"""All attribute values of a graph, each with its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from linsey.ir.analysis import node_paths
from linsey.ir.attributes import Sequence
from linsey.ir.graph import Graph
from linsey.ir.paths import Path, format_path


def walk(graph: Graph, kind: type) -> Iterator[tuple[str, Any]]:
    """The values of one class in a graph, with their places in the user's notation.

    A value that stands in several places is given for the first of them only.

    Args:
        graph: the graph.
        kind: the class: `Ref`, `Live` …

    Example:
        >>> from linsey.ir import Const, Graph, Node
        >>> list(walk(Graph(nodes=(Node(attrs=(("features", Const(3)),)),)), Const))
        [('features', Const(value=3))]
    """
    seen: set[int] = set()
    for place, value in _places(graph):
        for found, below in _inside(value, (), kind, seen):
            yield "".join((place, *below)), found


def _places(graph: Graph) -> Iterator[tuple[str, Any]]:
    value: Any
    paths = node_paths(graph)
    for number, node in enumerate(graph.nodes):
        path: Path = paths.get(number, ())
        yield _place(path, "class"), node.source and node.source.cls
        for name, value in node.attrs:
            yield _place(path, name), value
        for signature in node.signatures:
            for name, value in signature.inputs:
                yield _place(path, f"{signature.method}({name})"), value
            yield _place(path, f"{signature.method}()"), signature.output
        if node.wrapper is not None:
            yield _place(path, "wrapper"), node.wrapper.cls
            for name, value in node.wrapper.attrs:
                yield _place(path, name), value
    for slot in graph.slots:
        for part in ("kind", "type", "partition", "box"):
            yield f"{slot.key}, {part}", getattr(slot, part)
        for name, value in slot.metadata:
            yield f"{slot.key}, {format_path((name,))}", value


def _place(path: Path, name: str | int) -> str:
    if isinstance(name, int):
        return format_path((*path, name))
    return "/".join(filter(None, (format_path(path), name)))


def _inside(
    value: Any, below: tuple[str, ...], kind: type, seen: set[int]
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    if isinstance(value, tuple):
        is_named = len(value) == 2 and isinstance(value[0], str)
        for number, item in enumerate(value[is_named:]):
            label = f".{value[0]}" if is_named else f"[{number}]" if below else ""
            yield from _inside(item, (*below, label), kind, seen)
    elif is_dataclass(value) and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, kind):
            yield value, below
        if isinstance(value, Sequence):
            for number, item in enumerate(value.items):
                yield from _inside(item, (*below, f"[{number}]"), kind, seen)
            return
        for each in fields(value):
            if each.name not in ("live", "key"):
                yield from _inside(getattr(value, each.name), below, kind, seen)
