"""The NNX backend: a graph becomes an NNX module, as graphdef and state."""

from typing import Any

from linsey.backends._record import Backend, Runner
from linsey.backends._report import Report
from linsey.ir import Graph, Values


def module_of(graph: Graph, values: Values | None, *, native: bool = True) -> Any:
    """The NNX module of a graph; abstract when there are no values."""
    from linsey.backends.nnx import emit

    return emit.build(graph, values, native=native)


def _emit(graph: Graph, values: Values | None, *, native: bool = True) -> Any:
    from linsey.backends.nnx import emit

    return emit.emit(graph, values, native=native)


def _runner(graph: Graph) -> Runner:
    from linsey.backends.nnx import emit

    return emit.runner(graph)


def _report(graph: Graph, *, native: bool = True) -> Report:
    from linsey.backends.nnx import report

    return report.report(graph, native=native)


backend = Backend(name="nnx", emit=_emit, runner=_runner, report=_report)

__all__ = ["backend", "module_of"]
