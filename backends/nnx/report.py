"""What the nodes of a graph become in NNX."""

from __future__ import annotations

from collections.abc import Iterator

from linsey.backends._report import Report, ReportRow
from linsey.backends.nnx.native import Native, native_layer, native_root
from linsey.backends.nnx.nodes import is_hosted, is_leaf
from linsey.ir import Graph, Path, describe, describe_class
from linsey.ir.ops import OPS

USER_CODE = "it is user code"


def report(graph: Graph, *, native: bool = True) -> Report:
    """The report of a graph; see `linsey.Program.report`."""
    return Report(rows=tuple(_rows(graph, graph.root, (), native, set())))


def _rows(
    graph: Graph, number: int, path: Path, native: bool, seen: set[int]
) -> Iterator[ReportRow]:
    node = graph.nodes[number]
    if number in seen:
        return
    seen.add(number)
    if node.source is not None and node.op != "container":
        row = _row(graph, number, path, native)
        yield row
        if row.became == "native":
            return
        if node.wrapper is not None and row.became == "kept" and node.source.dialect == "linen":
            return  # what is below it stays in the source's own bridge
    for name, child in node.children:
        yield from _rows(graph, child, (*path, name), native, seen)


def _row(graph: Graph, number: int, path: Path, native: bool) -> ReportRow:
    node = graph.nodes[number]
    assert node.source is not None
    layer = f"{node.source.dialect}.{describe_class(node.source.cls)}"
    if node.source.dialect == "nnx":
        reason = "it is NNX already"
        return ReportRow(path=path, layer=layer, became="kept", target=layer, reason=reason)
    if not is_hosted(node):
        assert node.wrapper is not None
        held = describe(node.wrapper.cls)
        reason = f"the source holds it in a {held}"
        return ReportRow(path=path, layer=layer, became="kept", target=held, reason=reason)
    found = why(graph, number, native)
    if isinstance(found, Native):
        return ReportRow(
            path=path,
            layer=layer,
            became="native",
            target=f"nnx.{found.cls.__name__}",
            is_layer=is_leaf(node),
        )
    return ReportRow(
        path=path,
        layer=layer,
        became="hosted",
        target="LinenHost",
        reason=found,
        is_layer=is_leaf(node),
    )


def why(graph: Graph, number: int, native: bool) -> Native | str:
    """How a Linen node is emitted natively, or why it is hosted."""
    node = graph.nodes[number]
    if node.op not in OPS:
        return USER_CODE
    if not native:
        return "native=False"
    return native_root(graph) if number == graph.root else native_layer(graph, number)
