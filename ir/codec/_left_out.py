"""What of a graph cannot be data, where it is, and what to do about it."""

from __future__ import annotations

import types
from dataclasses import dataclass

from linsey.ir.attributes import Live
from linsey.ir.graph import Graph
from linsey.ir.walk import walk


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
    for path, live in walk(graph, Live):
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
