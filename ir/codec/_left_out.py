"""What of a graph cannot be data, where it is, and what to do about it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from linsey.ir.analysis import node_paths
from linsey.ir.attributes import Live
from linsey.ir.graph import Graph
from linsey.ir.paths import Path, format_path


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A value that cannot be data."""

    path: str
    """Where it is: the path of a module or slot, and the field."""
    text: str
    """What it is."""
    fix: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.path}: {self.text}. {self.fix}"


def left_out(graph: Graph) -> tuple[LeftOut, ...]:
    """All that `dumps` cannot write, each with its place and the remedy; empty when it can.

    Example:
        >>> from linsey.ir import Node, encode
        >>> square = lambda x: x * x
        >>> graph = Graph(nodes=(Node(attrs=(("activation", encode(square)),)),))
        >>> print(left_out(graph)[0])
        activation: the lambda <lambda>. Give it a name: def it at the top of a module.
    """
    found: dict[tuple[str, str], LeftOut] = {}
    for place, value in _values(graph):
        for live, below in _live(value, ()):
            path = "".join((place, *below))
            found.setdefault((path, live.text), _left_out(path, live))
    return tuple(found.values())


def _left_out(path: str, live: Live) -> LeftOut:
    obj = live.live
    if isinstance(obj, types.FunctionType):
        if obj.__name__ == "<lambda>":
            return LeftOut(
                path=path,
                text=f"the lambda {live.text}",
                fix="Give it a name: def it at the top of a module.",
            )
        return LeftOut(
            path=path,
            text=f"the function {live.text}, made inside another one",
            fix="Move it to the top of a module; what it captured, pass by functools.partial.",
        )
    if isinstance(obj, type):
        return LeftOut(
            path=path,
            text=f"the class {live.text}, which cannot be imported",
            fix="Move it to the top of a module.",
        )
    return LeftOut(
        path=path,
        text=live.text,
        fix="Make it a dataclass, an array, or something that can be imported by name.",
    )


def _values(graph: Graph) -> Iterator[tuple[str, Any]]:
    """All attribute values, each with its place."""
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
    return (
        format_path((*path, name))
        if isinstance(name, int)
        else "/".join(filter(None, (format_path(path), name)))
    )


def _live(value: Any, below: tuple[str, ...]) -> Iterator[tuple[Live, tuple[str, ...]]]:
    """What is `Live` in a value, and where."""
    if isinstance(value, Live):
        yield value, below
    elif isinstance(value, tuple):
        is_named = len(value) == 2 and isinstance(value[0], str)
        for number, item in enumerate(value[is_named:]):
            label = f".{value[0]}" if is_named else f"[{number}]" if below else ""
            yield from _live(item, (*below, label))
    elif is_dataclass(value):
        for each in fields(value):
            if each.name != "live":
                yield from _live(getattr(value, each.name), below)
