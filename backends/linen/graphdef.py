"""The static half of an NNX module, as Linen variables hold it."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx, serialization

from linsey import _trees
from linsey.backends._spec import HostSpec
from linsey.backends.nnx.build import Plan
from linsey.ir import describe_class


@jax.tree_util.register_static
class GraphDef(nnx.GraphDef[Any]):
    """An ``nnx.GraphDef`` that knows its graph.

    ``nnx.merge`` takes it like any other. Two of them are equal when their graphs are, also where a
    static attribute is a lambda, so that equal modules compile once; and it can be pickled where
    its attributes are data or can be imported.

    Args:
        spec: the node of the graph that it stands for.
        plain: what ``nnx.split`` gives for the module.

    Raises:
        LinseyError: on unpickling, when a class or function exists only in another process.
    """

    __slots__ = ("spec",)

    spec: HostSpec

    def __init__(self, spec: HostSpec, plain: nnx.GraphDef[Any]) -> None:
        super().__init__(plain.nodes, plain.attributes, plain.num_leaves)
        object.__setattr__(self, "spec", spec)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, GraphDef):
            return self.spec == other.spec
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        source = self.spec.entry.source
        name = "" if source is None else describe_class(source.cls)
        return f"GraphDef({name}, {self.num_leaves} leaves)"

    def __reduce__(self) -> tuple[Any, ...]:
        return graphdef, (self.spec,)


# Structure is no state: a checkpoint of flax leaves it out, and gives back that of its target.
serialization.register_serialization_state(GraphDef, lambda _: {}, lambda target, _: target)


def graphdef(spec: HostSpec) -> GraphDef:
    """The graphdef of a node."""
    values = list(map(_trees.abstract_value, spec.graph.slots))
    return GraphDef(spec, nnx.split(Plan(spec.graph, spec.node).build(values))[0])
