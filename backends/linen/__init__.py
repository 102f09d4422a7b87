"""The Linen backend: a graph becomes a Linen module and its variables."""

from typing import Any

from linsey.backends._record import Backend, Runner
from linsey.backends.linen.detached import Call, Options, detached
from linsey.backends.linen.graphdef import GraphDef
from linsey.backends.linen.hosting import Hosting
from linsey.backends.linen.inner import Inner
from linsey.ir import Graph, Values


def _emit(graph: Graph, values: Values | None) -> Any:
    from linsey.backends.linen import emit

    return emit.emit(graph, values)


def _runner(graph: Graph) -> Runner:
    from linsey.backends.linen import emit

    return emit.runner(graph)


backend = Backend(name="linen", emit=_emit, runner=_runner)

__all__ = ["Call", "GraphDef", "Hosting", "Inner", "Options", "backend", "detached"]
