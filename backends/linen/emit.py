"""Emits a graph as Linen, and runs graphs whose root is Linen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen

from linsey.backends._decode import abstract_value, boxed, emitted_box, linen_module
from linsey.backends._record import Called, SharedCalls
from linsey.backends._share import Session, can_share, run
from linsey.backends._spec import HostSpec
from linsey.backends.linen.host import NNXHost
from linsey.backends.linen.hosting import Hosting
from linsey.backends.linen.region import Region
from linsey.backends.linen.share import Blocks
from linsey.backends.nnx.build import is_hosted
from linsey.ir import Graph, Node, Values, decode


def emit(graph: Graph, values: Values | None) -> tuple[linen.Module, dict[str, Any]]:
    """Emits a graph as ``(module, variables)``; see `linsey.Program.emit`."""
    arrays: Sequence[Any] = (
        list(map(abstract_value, graph.slots)) if values is None else values.arrays
    )
    spec = HostSpec(graph, graph.root)
    if is_linen(spec.entry):
        region = Region(spec)
        variables = region.assemble(lambda slot: boxed(graph.slots[slot], arrays[slot]))
        return linen_module(graph, graph.root), variables
    return NNXHost(spec), _variables(spec, arrays)


def _variables(spec: HostSpec, arrays: Sequence[Any]) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for slot, path in Hosting.of(spec).places.items():
        holder: dict[Any, Any] = variables
        for name in path[:-1]:
            holder = holder.setdefault(name, {})
        holder[path[-1]] = emitted_box(spec.graph.slots[slot], arrays[slot])
    return variables


def is_linen(node: Node) -> bool:
    """Whether a root stands in Linen's world: Linen code, or an NNX module in a ToLinen."""
    wrapped = node.wrapper is not None and issubclass(decode(node.wrapper.cls), linen.Module)
    return wrapped or is_hosted(node)


class LinenRunner:
    """Runs a graph whose root is a Linen module."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._region = Region(HostSpec(graph, graph.root))
        self.default_mutable: Any = self._region.mutable
        self.share_traces = False
        self.shared = SharedCalls()
        self._blocks: Blocks | None = None

    def __call__(
        self,
        arrays: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        method: Any,
        rngs: Mapping[str, Any] | None,
        mutable: Any,
    ) -> Called:
        """See `linsey.backends.Runner`."""
        self.shared = SharedCalls()
        if not self.share_traces or not can_share(arrays, args, kwargs, rngs):
            return self._call(arrays, args, kwargs, method, rngs, mutable)
        if self._blocks is None:
            self._blocks = Blocks(self._graph)
        blocks = self._blocks

        def call(session: Session, given: Any) -> Called:
            arrays, (args, kwargs, rngs) = given
            with blocks.calls(session):
                return self._call(arrays, args, kwargs, method, rngs, mutable)

        called, self.shared = run(call, arrays, (args, dict(kwargs), rngs))
        return called

    def _call(
        self,
        arrays: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        method: Any,
        rngs: Mapping[str, Any] | None,
        mutable: Any,
    ) -> Called:
        slots = self._graph.slots
        variables = self._region.assemble(lambda slot: boxed(slots[slot], arrays[slot]))
        output, updates = self._region.call(
            variables, args, kwargs, method=method, rngs=rngs, mutable=mutable
        )
        found, rest = self._region.find(updates)
        after = list(arrays)
        for slot, value in found:
            after[slot] = value
        return Called(output=output, arrays=after, extra=rest)


def runner(graph: Graph) -> LinenRunner:
    """The runner of a graph whose root is a Linen module."""
    return LinenRunner(graph)
