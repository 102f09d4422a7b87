"""The Linen backend: a graph becomes a Linen module and its variables."""

from typing import Any

from linsey.backends._record import Backend, Runner
from linsey.backends._report import Report
from linsey.backends.linen.detached import Call, Options, detached
from linsey.backends.linen.graphdef import GraphDef
from linsey.backends.linen.hosting import Hosting
from linsey.backends.linen.inner import Inner
from linsey.ir import Graph, Values


def _emit(graph: Graph, values: Values | None, *, native: bool = True) -> Any:
    from linsey.backends.linen import emit

    return emit.emit(graph, values, native=native)


def _runner(graph: Graph) -> Runner:
    from linsey.backends.linen import emit

    return emit.runner(graph)


def _report(graph: Graph, *, native: bool = True) -> Report:
    from linsey.backends.linen import report

    return report.report(graph, native=native)


backend = Backend(name="linen", emit=_emit, runner=_runner, report=_report)

__all__ = ["Call", "GraphDef", "Hosting", "Inner", "Options", "backend", "detached"]
