"""How an emitted module tells a frontend what it is, so that neither layer imports the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

from linsey.ir.graph import Graph
from linsey.ir.paths import Key, Path


@dataclass(frozen=True, kw_only=True)
class HostParts:
    """What an emitted module holds now; the graph tells what it was."""

    graph: Graph
    """The graph that it was emitted from."""
    node: int
    """Its node there."""
    children: Mapping[Key, Any] = field(default_factory=dict)
    """The objects of its children, by name."""
    variables: Mapping[tuple[str, Key], Any] = field(default_factory=dict)
    """Its Variables, by collection and name."""
    places: Mapping[int, Path] = field(default_factory=dict)
    """Where its Linen variables lie, collection first, by slot; empty: at the slots' paths."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """What it keeps beside them: streams, and state that calls made."""


class Host(Protocol):
    """A module that a backend emitted around code of the other dialect.

    A frontend looks through it: it becomes the node that it was emitted from.
    """

    def linsey_parts(self) -> HostParts:
        """What it holds."""


def is_host(obj: object) -> TypeGuard[Host]:
    """Whether an object is an emitted module."""
    return hasattr(type(obj), "linsey_parts")
