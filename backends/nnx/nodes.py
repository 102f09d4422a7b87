"""What a graph says of nodes that become NNX objects."""

from __future__ import annotations

from typing import Any

from linsey._places import slots_below
from linsey.ir import Graph, Node, decode
from linsey.ir.ops import OPS
from linsey.ir.reserved import GRAPHDEF


def is_hosted(node: Node) -> bool:
    """Whether a node is Linen code that no wrapper of the source holds: it becomes a LinenHost."""
    if node.source is not None and node.source.dialect != "linen":
        return False
    return node.wrapper is None or hasattr(decode(node.wrapper.cls), "linsey_parts")


def graphdef_of(node: Node) -> Any:
    """The graphdef that Linen variables hold for a node, if they do."""
    attrs = () if node.wrapper is None else node.wrapper.attrs
    value = next((value for name, value in attrs if name == GRAPHDEF), None)
    return None if value is None else decode(value)


def wrapper_slots(graph: Graph) -> set[int]:
    """The slots that ToNNX wrappers hold themselves: their PRNG state."""
    return {
        slot
        for node in graph.nodes
        if node.wrapper is not None and node.source is not None and node.source.dialect == "linen"
        for _, child in node.wrapper.children
        for slot in slots_below(graph, graph.nodes[child])
    }


def is_leaf(node: Node) -> bool:
    """Whether a node is a layer of flax that holds no others."""
    return node.op in OPS and not OPS[node.op].holds
