"""What a graph says of nodes that become NNX objects."""

from __future__ import annotations

from typing import Any

from flax import linen
from flax.nnx import bridge

from linsey._layers import op_of
from linsey.ir import Graph, Node, decode
from linsey.ir.reserved import GRAPHDEF


def is_hosted(node: Node) -> bool:
    """Whether a node is Linen code that no wrapper of the source holds: it becomes a LinenHost."""
    if node.source is not None and node.source.dialect != "linen":
        return False
    return node.wrapper is None or hasattr(decode(node.wrapper.cls), "linsey_parts")


def replaces_linen(node: Node) -> bool:
    """Whether a node is an NNX module that stands in the place of a Linen module.

    Its wrapper is then that module, and no ToLinen.
    """
    if node.source is None or node.source.dialect == "linen" or node.wrapper is None:
        return False
    cls = decode(node.wrapper.cls)
    return issubclass(cls, linen.Module) and not issubclass(cls, bridge.ToLinen)


def replaced_op(node: Node) -> str:
    """The neutral layer in whose place a node stands; ``module`` where it was user code."""
    assert node.wrapper is not None
    return op_of("linen", decode(node.wrapper.cls))


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
        for slot in _slots_below(graph, child)
    }


def _slots_below(graph: Graph, root: int) -> list[int]:
    """The slots of a node and all below it, wrappers included, each once."""
    found: dict[int, None] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        number = todo.pop()
        if number not in seen:
            seen.add(number)
            node = graph.nodes[number]
            found.update(dict.fromkeys(slot for _, slot in node.slots))
            todo.extend(child for _, child in node.children)
            if node.wrapper is not None:
                found.update(dict.fromkeys(slot for _, slot in node.wrapper.slots))
                todo.extend(child for _, child in node.wrapper.children)
    return list(found)
