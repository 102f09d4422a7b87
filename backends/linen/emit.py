"""Emits a graph as Linen, and runs graphs whose root is Linen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen

from linsey import _trees
from linsey.backends._decode import boxed, emitted_box, linen_module
from linsey.backends._record import Called
from linsey.backends._runner import SharingRunner
from linsey.backends._share import Session
from linsey.backends._spec import HostSpec
from linsey.backends.linen.host import LinenWithNNX, NNXHost
from linsey.backends.linen.hosting import Hosting
from linsey.backends.linen.native import NativeModule, native_module
from linsey.backends.linen.region import Region
from linsey.backends.linen.share import Blocks
from linsey.backends.nnx.nodes import is_hosted
from linsey.ir import Graph, Node, Values, decode


def emit(
    graph: Graph, values: Values | None, *, native: bool = True
) -> tuple[linen.Module, dict[str, Any]]:
    """Emits a graph as ``(module, variables)``; see `linsey.Program.emit`."""
    arrays: Sequence[Any] = (
        list(map(_trees.abstract_value, graph.slots)) if values is None else values.arrays
    )
    spec = HostSpec(graph, graph.root)
    if is_linen(spec.entry):
        region = Region.of(spec)
        replaced = region.replaced

        def value(slot: int) -> Any:
            box = emitted_box if slot in replaced else boxed
            return box(graph.slots[slot], arrays[slot])

        made = LinenWithNNX(spec) if replaced else linen_module(graph, graph.root)
        return made, region.assemble(value)
    found = native_module(graph, graph.root) if native else ""
    if isinstance(found, NativeModule):
        return found.module, found.variables(graph, arrays)
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


class LinenRunner(SharingRunner):
    """Runs a graph whose root is a Linen module."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._region = Region(HostSpec(graph, graph.root))
        self.default_mutable = self._region.mutable

    @functools.cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self._graph)

    def _call(
        self,
        arrays: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        method: Any,
        rngs: Mapping[str, Any] | None,
        mutable: Any,
        session: Session | None,
    ) -> Called:
        slots = self._graph.slots
        variables = self._region.assemble(lambda slot: boxed(slots[slot], arrays[slot]))
        with contextlib.nullcontext() if session is None else self._blocks.calls(session):
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
