"""What the nodes of a graph become in Linen."""

from __future__ import annotations

from collections.abc import Iterator

from flax import linen, nnx

from linsey._layers.replaced import replaces_linen
from linsey.backends._report import Report, ReportRow
from linsey.backends.linen.native import NativeModule, native_module
from linsey.backends.nnx.nodes import is_leaf
from linsey.ir import Graph, Node, Path, decode, describe_class
from linsey.ir.ops import OPS


def report(graph: Graph, *, native: bool = True) -> Report:
    """The report of a graph; see `linsey.Program.report`."""
    return Report(rows=tuple(_rows(graph, graph.root, (), native, "", set())))


def _rows(
    graph: Graph, number: int, path: Path, native: bool, host: str, seen: set[int]
) -> Iterator[ReportRow]:
    """The rows of a node and all below it.

    Args:
        graph: the graph.
        number: the node.
        path: its path.
        native: whether layers may be native.
        host: why all below a host is hosted with it; empty outside of one.
        seen: the nodes that have rows.
    """
    node = graph.nodes[number]
    if number in seen:
        return
    seen.add(number)
    source = node.source
    if source is not None and (number == graph.root or not _is_container(node)):
        layer = f"{source.dialect}.{describe_class(source.cls)}"
        is_kept = source.dialect == "linen" or (
            node.wrapper is not None and issubclass(decode(node.wrapper.cls), linen.Module)
        )
        if is_kept:
            reason = "it is Linen already"
            if source.dialect != "linen":
                bridge = describe_class(node.wrapper.cls)  # type: ignore[union-attr]
                is_new = replaces_linen(node)
                reason = f"{'it replaces a' if is_new else 'the source holds it in a'} {bridge}"
            yield ReportRow(path=path, layer=layer, became="kept", target=layer, reason=reason)
            if source.dialect != "linen":
                return
        else:
            found = host or _why(graph, number, native)
            if isinstance(found, NativeModule):
                target = f"linen.{type(found.module).__mro__[_depth(found.module)].__name__}"
                is_layer = is_leaf(node)
                yield ReportRow(
                    path=path, layer=layer, became="native", target=target, is_layer=is_layer
                )
                if is_layer:
                    return
            else:
                host = host or "it is called by the hosted code above it"
                yield ReportRow(
                    path=path,
                    layer=layer,
                    became="hosted",
                    target="NNXHost",
                    reason=found,
                    is_layer=is_leaf(node),
                )
    for name, child in node.children:
        yield from _rows(graph, child, (*path, name), native, host, seen)


def _is_container(node: Node) -> bool:
    return node.op == "container" or (
        node.source is not None and decode(node.source.cls) in (nnx.List, nnx.Dict)
    )


def _depth(module: linen.Module) -> int:
    return 0 if type(module).__module__.startswith("flax.") else 1


def _why(graph: Graph, number: int, native: bool) -> NativeModule | str:
    if graph.nodes[number].op not in OPS:
        return "it is user code"
    return native_module(graph, number) if native else "native=False"
