"""A graph in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from linsey.ir import (
    AttrValue,
    Graph,
    Key,
    Node,
    Path,
    Signature,
    Slot,
    Source,
    Stream,
    Wrapper,
    canonical,
    verify,
)


@dataclass
class Draft:
    """A node in the making; the fields are those of `Node`."""

    op: str = "module"
    source: Source | None = None
    attrs: list[tuple[Key, AttrValue]] = field(default_factory=list)
    children: dict[Key, int] = field(default_factory=dict)
    slots: list[tuple[Key, int]] = field(default_factory=list)
    streams: dict[str, int] = field(default_factory=dict)
    signatures: list[Signature] = field(default_factory=list)
    wrapper: Wrapper | None = None

    def finish(self) -> Node:
        """The node."""
        return Node(
            op=self.op,
            source=self.source,
            attrs=tuple(self.attrs),
            children=tuple(self.children.items()),
            slots=tuple(self.slots),
            streams=tuple(self.streams.items()),
            signatures=tuple(self.signatures),
            wrapper=self.wrapper,
        )


class Builder:
    """Collects nodes, slots and streams, and makes the graph of them."""

    def __init__(self) -> None:
        self.nodes: list[Draft] = []
        self.slots: list[Slot] = []
        self.empty: list[Path] = []
        self._streams: dict[str, Stream] = {}
        self._counted: list[Stream] = []

    def add(self, draft: Draft) -> int:
        """Adds a node and gives its index."""
        self.nodes.append(draft)
        return len(self.nodes) - 1

    def add_slot(self, slot: Slot) -> int:
        """Adds a slot and gives its index."""
        self.slots.append(slot)
        return len(self.slots) - 1

    def child(self, parent: int, name: Key) -> int:
        """The child of a node by name; made as a ``scope`` when it is not there."""
        children = self.nodes[parent].children
        if name not in children:
            children[name] = self.add(Draft(op="scope"))
        return children[name]

    def at(self, start: int, path: Path) -> int:
        """The node at a path below a node; what is missing on the way is made."""
        for name in path:
            start = self.child(start, name)
        return start

    def path_stream(self, draft: Draft, name: str, *, at_call: bool) -> None:
        """Notes that a node draws from a stream that derives keys by path."""
        known = self._streams.get(name)
        if known is None or (at_call and known.use == "init"):
            self._streams[name] = Stream(
                name=name, derivation="path", use="call" if at_call else "init"
            )
        draft.streams[name] = list(self._streams).index(name)

    def counted_stream(self, draft: Draft, name: str, key: int, count: int) -> None:
        """Adds a stream that keeps its key and its counter in slots."""
        self._counted.append(Stream(name=name, derivation="count", key=key, count=count))
        draft.streams[name] = -len(self._counted)

    def finish(self) -> Graph:
        """The verified graph.

        Raises:
            VerifyError: it is not sound.
        """
        offset = len(self._streams)
        for draft in self.nodes:
            draft.streams = {
                name: offset - 1 - index if index < 0 else index
                for name, index in draft.streams.items()
            }
        graph = Graph(
            nodes=tuple(draft.finish() for draft in self.nodes),
            slots=tuple(self.slots),
            streams=(*self._streams.values(), *self._counted),
            empty=tuple(self.empty),
        )
        return verify(canonical(graph))
