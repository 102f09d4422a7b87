"""The static half of a hosted module: which node of which graph it is."""

from __future__ import annotations

from typing import Any

from linsey.ir import Graph, Node


class HostSpec:
    """A node of a graph, hashable and compared by value, so that equal modules compile once.

    Args:
        graph: the graph.
        node: index of the node.
        native: whether layers below it that the other API has are that API's own.
    """

    __slots__ = ("_cache", "graph", "native", "node")

    def __init__(self, graph: Graph, node: int, native: bool = False) -> None:
        self.graph = graph
        self.node = node
        self.native = native
        self._cache: dict[str, Any] = {}

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, HostSpec)
            and self.node == other.node
            and self.native == other.native
            and (self.graph is other.graph or self.graph == other.graph)
        )

    def __hash__(self) -> int:
        return hash((self.graph, self.node))

    def __repr__(self) -> str:
        return f"HostSpec(%{self.node})"

    @property
    def entry(self) -> Node:
        """The node."""
        return self.graph.nodes[self.node]

    def cached(self, name: str, make: Any) -> Any:
        """Something that follows from the node, made once."""
        if name not in self._cache:
            self._cache[name] = make(self)
        return self._cache[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return HostSpec, (self.graph, self.node, self.native)
