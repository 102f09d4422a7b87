"""Nodes that stand in Linen code in the place of a Linen module: what surgery leaves."""

from __future__ import annotations

from flax import linen
from flax.nnx import bridge

from linsey._layers import op_of
from linsey.ir import Node, decode


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
