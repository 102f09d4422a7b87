"""Runs Linen code on the slots of a graph.

A region is a Linen node and all below it. Its variables are assembled from slot values, the module
runs by ``Module.apply``, and each call of a ``bridge.ToLinen`` inside goes to the NNX module that
the graph holds in its place, so that no NNX constructor runs. So do the calls of Linen modules in
whose place an NNX module stands: see `Standin`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from flax import errors, linen
from flax.nnx import bridge

from linsey._collections import unboxed
from linsey._layers.replaced import replaced_op, replaces_linen
from linsey._lifts import Lifts
from linsey._places import linen_slots
from linsey.backends import _private
from linsey.backends._decode import linen_module
from linsey.backends._spec import HostSpec
from linsey.backends.linen.inner import Inner
from linsey.backends.linen.standin import Standin, of_plan
from linsey.backends.nnx.build import Plan
from linsey.backends.nnx.nodes import graphdef_of
from linsey.ir import EmitError, Path, node_paths
from linsey.ir.reserved import GRAPH_COLLECTION

_NOTHING: Mapping[Any, Any] = MappingProxyType({})
NOT_BY_DEFAULT = frozenset({"params", "intermediates", "perturbations"})
"""The collections that a usual call does not change."""


class _Running(threading.local):
    stack: tuple[Any, ...] = ()


_running = _Running()


class Region:
    """One Linen module with the slots below it.

    Args:
        spec: its node.
    """

    def __init__(self, spec: HostSpec) -> None:
        graph = spec.graph
        self.spec = spec
        self.path = node_paths(graph)[spec.node]
        """Its path in the graph."""
        inside = [
            (path, number, graphdef_of(graph.nodes[number])) for path, number in _nnx_nodes(spec)
        ]
        self._standins = {
            path: self._standin(number, path)
            for path, number, _ in inside
            if replaces_linen(graph.nodes[number])
        }
        self._own_standins = {path: standin for path, (standin, _) in self._standins.items()}
        moved = {
            slot: (place.collection, (*path, *place.path))
            for path, (standin, slots) in self._standins.items()
            for slot, place in zip(slots, standin.places, strict=True)
        }
        self.slots = [
            (slot, *moved.get(slot, (graph.slots[slot].collection, path)))
            for path, slot in linen_slots(graph, spec.node)
            if not graph.slots[slot].is_derived
        ]
        self._left: dict[frozenset[Path], list[tuple[int, str, Path]]] = {}
        self._empty = graph.empty if spec.node == graph.root else ()
        self._slot_at = {(collection, path): slot for slot, collection, path in self.slots}
        self._prefixes = {
            (collection, path[:depth])
            for _, collection, path in self.slots
            for depth in range(len(path))
        }
        collections = dict.fromkeys(collection for _, collection, _ in self.slots)
        self.mutable = [name for name in collections if name not in NOT_BY_DEFAULT]
        self._nnx = {
            path: Inner(graph, number)
            for path, number, stored in inside
            if stored is None and path not in self._standins
        }
        self._graphdefs = [(path, stored) for path, _, stored in inside if stored is not None]

    @functools.cached_property
    def lifts(self) -> Lifts:
        """The lifted transforms of the graph."""
        return Lifts(self.spec.graph)

    def _standin(self, number: int, path: tuple[str, ...]) -> tuple[Standin, list[int]]:
        node = self.spec.graph.nodes[number]
        plan = Plan(self.spec.graph, number)
        return of_plan(plan, replaced_op(node), self.lifts, (*self.path, *path))

    @property
    def module(self) -> linen.Module:
        """The unbound module, made when it is first needed."""
        make: Callable[[HostSpec], Any] = lambda spec: linen_module(spec.graph, spec.node)  # noqa: E731
        return self.spec.cached("module", make)  # type: ignore[no-any-return]

    @staticmethod
    def of(spec: HostSpec) -> Region:
        """That of a spec."""
        return spec.cached("region", Region)  # type: ignore[no-any-return]

    @property
    def replaced(self) -> frozenset[int]:
        """The slots of the NNX modules that stand in the place of Linen ones."""
        return frozenset(slot for _, slots in self._standins.values() for slot in slots)

    def assemble(
        self, value_of: Callable[[int], Any], without: Collection[Path] = ()
    ) -> dict[str, Any]:
        """The Linen variables of the region.

        Args:
            value_of: gives the value of a slot, in its box.
            without: the scope paths of modules whose variables are left out.
        """
        variables: dict[str, Any] = {}
        for slot, collection, path in self._slots_without(without):
            holder = variables.setdefault(collection, {})
            for name in path[:-1]:
                holder = holder.setdefault(name, {})
            holder[path[-1]] = value_of(slot)
        for path in self._empty:
            holder = variables
            for name in path:
                holder = holder.setdefault(str(name), {})
        for path, graphdef in self._graphdefs:
            holder = variables.setdefault(GRAPH_COLLECTION, {})
            for name in path:
                holder = holder.setdefault(name, {})
            holder["graphdef"] = graphdef
        return variables

    def _slots_without(self, paths: Collection[Path]) -> list[tuple[int, str, Path]]:
        if not paths:
            return self.slots
        key = frozenset(paths)
        if key not in self._left:
            self._left[key] = [
                entry
                for entry in self.slots
                if not any(entry[2][:depth] in key for depth in range(len(entry[2])))
            ]
        return self._left[key]

    def find(
        self, updates: Mapping[str, Any], more: Mapping[tuple[str, Path], Any] = _NOTHING
    ) -> tuple[list[tuple[Any, Any]], dict[str, Any]]:
        """Which slots are in some variables, and what belongs to no slot.

        Args:
            updates: as ``Module.apply`` returns them.
            more: what else may be in them, by collection and path: it comes in place of slots.

        Returns:
            Slot and value, unboxed; and the rest, as nested dicts by collection.
        """
        found: list[tuple[Any, Any]] = []
        rest: dict[str, Any] = {}

        def walk(collection: str, path: Path, value: Any) -> None:
            slot = more.get((collection, path)) if more else None
            slot = self._slot_at.get((collection, path)) if slot is None else slot
            if slot is not None:
                found.append((slot, unboxed(value)))
            elif isinstance(value, Mapping) and (value or (collection, path) in self._prefixes):
                for name, below in value.items():
                    walk(collection, (*path, name), below)
            elif not isinstance(value, Mapping):
                holder = rest.setdefault(collection, {})
                for name in path[:-1]:
                    holder = holder.setdefault(name, {})
                holder[path[-1]] = value

        for collection, tree in updates.items():
            if collection != GRAPH_COLLECTION or not self._graphdefs:
                walk(collection, (), tree)
        return found, rest

    def call(
        self,
        variables: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        method: Any = None,
        rngs: Mapping[str, Any] | None = None,
        mutable: Any = None,
        module: linen.Module | None = None,
        live: Callable[[tuple[str, ...]], Any] | None = None,
        standins: Mapping[tuple[str, ...], Standin] | None = None,
    ) -> tuple[Any, Mapping[str, Any]]:
        """Calls the module.

        Args:
            variables: what `assemble` made.
            args: positional arguments.
            kwargs: keyword arguments.
            method: name of the method, or a function of the module; None: the call.
            rngs: keys by stream.
            mutable: the collections that may change; None: all that hold state of a usual call.
            module: the module, where another than the node's own is meant.
            live: gives the NNX object that stands at a scope path, where there are objects; without
                it, objects are built from the graph.
            standins: the NNX modules in the places of Linen ones, by scope path; None: those of
                the graph.

        Returns:
            What the method returned, and the collections that could change.

        Raises:
            EmitError: a PRNG stream is missing.
        """
        keys = None if rngs is None else dict(rngs)
        chosen = (self.mutable or False) if mutable is None else mutable
        module = self.module if module is None else module
        if standins is None:
            standins = self._own_standins
        try:
            with self._routed(live, standins, ()):
                made = module.apply(
                    variables, *args, method=method, rngs=keys, mutable=chosen, **kwargs
                )
        except errors.InvalidRngError as error:
            given = ", ".join(sorted(rngs or ())) or "none"
            raise EmitError(
                f"a PRNG stream is missing; given: {given}. {error}",
                path=type(module).__name__,
                fix="Pass rngs= with a key for every stream that the call draws from.",
            ) from error
        return (made, {}) if chosen is False else (made[0], made[1])

    def call_in(
        self, scope: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Calls the module in a scope of Linen's that holds its variables."""
        with self._routed(None, self._own_standins, scope.path), _private.no_parent():
            module = self.module.clone(parent=scope, _deep_clone=True)
            return getattr(module, method)(*args, **kwargs)

    @contextlib.contextmanager
    def _routed(self, live: Any, standins: Any, base: tuple[str, ...]) -> Iterator[None]:
        """Inside the block, calls of what is no Linen code go where they belong."""
        previous = _running.stack
        _running.stack = (*previous, (self, live, standins, len(base)))
        try:
            is_needed = bool(self._nnx or standins)
            with linen.intercept_methods(self._route) if is_needed else contextlib.nullcontext():
                yield
        finally:
            _running.stack = previous

    def _route(
        self, run: Any, args: Any, kwargs: Any, context: linen.module.InterceptorContext
    ) -> Any:
        """Sends the call of a ToLinen, or of a replaced module, to the NNX module of its node."""
        module = context.module
        running = _running.stack[-1]
        if running is None or running[0] is not self:
            return run(*args, **kwargs)
        path = module.path[running[3] :] if module.scope is not None else ()
        standin = running[2].get(path)
        if standin is not None:
            return self._stand_in(standin, run, args, kwargs, context)
        if (
            not isinstance(module, bridge.ToLinen)
            or getattr(context.orig_method, "func", None) is not _private.to_linen_call()
            or module.is_initializing()
        ):
            return run(*args, **kwargs)
        inner, live = self._nnx.get(path), running[1]
        if inner is None:
            return run(*args, **kwargs)
        previous = _running.stack
        _running.stack = (*previous, None)
        try:
            return inner.call(module, args, kwargs, None if live is None else live(path))
        finally:
            _running.stack = previous

    def _stand_in(self, standin: Standin, run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Makes a call that belongs to a stand-in."""
        module, name = context.module, context.method_name
        if name == "setup":
            try:
                return run(*args, **kwargs)
            except errors.ScopeParamNotFoundError:
                return None  # what it would set up is not there, and not needed
        if not _private.is_own_method(module, name, context.orig_method):
            return run(*args, **kwargs)
        previous = _running.stack
        _running.stack = (*previous, None)
        try:
            return standin.call(module, name, run, args, kwargs)
        finally:
            _running.stack = previous


def _nnx_nodes(spec: HostSpec) -> list[tuple[tuple[str, ...], int]]:
    """The NNX nodes that Linen code of a region calls, with their scope paths."""
    found: list[tuple[tuple[str, ...], int]] = []

    def walk(number: int, path: tuple[str, ...]) -> None:
        node = spec.graph.nodes[number]
        if node.source is not None and node.source.dialect != "linen":
            found.append((path, number))
            return
        for name, child in node.children:
            walk(child, (*path, str(name)))

    walk(spec.node, ())
    return found
