"""Runs Linen code on the slots of a graph.

A region is a Linen node and all below it. Its variables are assembled from slot values, the module
runs by ``Module.apply``, and each call of a ``bridge.ToLinen`` inside goes to the NNX module that
the graph holds in its place, so that no NNX constructor runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import core, errors, linen, nnx
from flax.core import meta
from flax.nnx import bridge

from linsey import _trees
from linsey._collections import unboxed
from linsey.backends import _private
from linsey.backends._decode import linen_module
from linsey.backends._spec import HostSpec
from linsey.backends.nnx.build import Plan, linen_slots, rebuild, value_at
from linsey.ir import RNG_COLLECTIONS, EmitError, Path, format_path

_NOT_BY_DEFAULT = frozenset({"params", "intermediates", "perturbations"})

_MISSING = object()


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
        self.slots = [
            (slot, graph.slots[slot].collection, path)
            for path, slot in linen_slots(graph, spec.node)
            if not graph.slots[slot].is_derived
        ]
        self._empty = graph.empty if spec.node == graph.root else ()
        self._slot_at = {(collection, path): slot for slot, collection, path in self.slots}
        self._prefixes = {
            (collection, path[:depth])
            for _, collection, path in self.slots
            for depth in range(len(path))
        }
        collections = dict.fromkeys(collection for _, collection, _ in self.slots)
        self.mutable = [name for name in collections if name not in _NOT_BY_DEFAULT]
        self._nnx = {path: Inner(self, number) for path, number in _nnx_nodes(spec)}

    @property
    def module(self) -> linen.Module:
        """The unbound module, made when it is first needed."""
        make: Callable[[HostSpec], Any] = lambda spec: linen_module(spec.graph, spec.node)  # noqa: E731
        return self.spec.cached("module", make)  # type: ignore[no-any-return]

    def assemble(self, value_of: Callable[[int], Any]) -> dict[str, Any]:
        """The Linen variables of the region.

        Args:
            value_of: gives the value of a slot, in its box.
        """
        variables: dict[str, Any] = {}
        for slot, collection, path in self.slots:
            holder = variables.setdefault(collection, {})
            for name in path[:-1]:
                holder = holder.setdefault(name, {})
            holder[path[-1]] = value_of(slot)
        for path in self._empty:
            holder = variables
            for name in path:
                holder = holder.setdefault(str(name), {})
        return variables

    def find(self, updates: Mapping[str, Any]) -> tuple[list[tuple[int, Any]], dict[str, Any]]:
        """Which slots are in some variables, and what belongs to no slot.

        Args:
            updates: as ``Module.apply`` returns them.

        Returns:
            Slot and value, unboxed; and the rest, as nested dicts by collection.
        """
        found: list[tuple[int, Any]] = []
        rest: dict[str, Any] = {}

        def walk(collection: str, path: Path, value: Any) -> None:
            slot = self._slot_at.get((collection, path))
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

        Returns:
            What the method returned, and the collections that could change.

        Raises:
            EmitError: a PRNG stream is missing.
        """
        keys = None if rngs is None else dict(rngs)
        chosen = (self.mutable or False) if mutable is None else mutable
        module = self.module if module is None else module
        previous = _running.stack
        _running.stack = (*previous, (self, live))
        try:
            if self._nnx:
                with linen.intercept_methods(self._route):
                    made = module.apply(
                        variables, *args, method=method, rngs=keys, mutable=chosen, **kwargs
                    )
            else:
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
        finally:
            _running.stack = previous
        return (made, {}) if chosen is False else (made[0], made[1])

    def _route(
        self, run: Any, args: Any, kwargs: Any, context: linen.module.InterceptorContext
    ) -> Any:
        """Sends the call of a ToLinen to the NNX module of its node."""
        module = context.module
        if (
            not isinstance(module, bridge.ToLinen)
            or _running.stack[-1] is None
            or _running.stack[-1][0] is not self
            or getattr(context.orig_method, "func", None) is not _private.to_linen_call()
            or module.is_initializing()
        ):
            return run(*args, **kwargs)
        inner = self._nnx.get(module.path)
        live = _running.stack[-1][1]
        if inner is None:
            return run(*args, **kwargs)
        return inner.call(module, args, kwargs, None if live is None else live(module.path))


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


class Inner:
    """An NNX module inside Linen code.

    Args:
        region: the code around it.
        number: its node.
    """

    def __init__(self, region: Region, number: int) -> None:
        self._graph = region.spec.graph
        self._plan = Plan(self._graph, number)
        self._derived = [
            (slot, path) for slot, path in self._plan.slots.items() if self._is_derived(slot)
        ]
        self._keys: tuple[Any, Any] | None = None

    def _is_derived(self, slot: int) -> bool:
        return self._graph.slots[slot].collection in RNG_COLLECTIONS

    def call(self, module: bridge.ToLinen, args: Any, kwargs: dict[str, Any], live: Any) -> Any:
        """Does what ``ToLinen.__call__`` does, on a module that is built and not constructed.

        Args:
            module: the ToLinen.
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            live: the object to copy; None builds one from the graph.
        """
        values: list[Any] = [None] * len(self._graph.slots)
        derived = {slot for slot, _ in self._derived}
        for slot, path in self._plan.slots.items():
            if slot not in derived:
                values[slot] = self._variable(module, slot, path)
        missing = self._derive(module, values) if self._derived else ()
        if live is None:
            made = self._plan.build(values)
        else:
            made = rebuild(live, {path: values[slot] for slot, path in self._plan.slots.items()})
        checked = [slot for slot in missing if not self._drop_stream(made, slot)]
        method = kwargs.pop("nnx_method", None)
        if method is None or isinstance(method, str):
            method = getattr(type(made), method or "__call__")
        previous = _running.stack
        _running.stack = (*previous, None)
        try:
            output = method(made, *args, **kwargs)
        finally:
            _running.stack = previous
        if checked:
            after = {path: leaf.get_raw_value() for path, leaf in _rng_leaves(made)}
            for slot in checked:
                if after.get(self._plan.slots[slot]) is not values[slot]:
                    raise EmitError(
                        "the NNX module drew a key, and no PRNG stream was given for it",
                        path=format_path((*module.path, *self._plan.slots[slot][:-1])),
                        fix="Pass rngs= with a key for the stream, as with any Linen module.",
                    )
        if module.scope is not None and module.scope.mutable is not False:
            _private.store_variables(module, made)
        return output

    def _drop_stream(self, made: Any, slot: int) -> bool:
        """Takes a stream that nobody gave away from the ToNNX that holds it.

        A ToNNX draws from all its streams at every call; without it, the Linen code inside says
        itself when it needs one.
        """
        path = self._plan.slots[slot]
        if "to_nnx__rngs" not in path:
            return False
        holder = value_at(made, path[:-2])
        if path[-2] in vars(holder):
            delattr(holder, str(path[-2]))
        return True

    def _variable(self, module: bridge.ToLinen, slot: int, path: Path) -> Any:
        collection = self._graph.slots[slot].collection
        value: Any = module.get_variable(collection, path[0], _MISSING)  # type: ignore[arg-type]
        for name in path[1:]:
            value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            raise EmitError(
                "the variable is missing",
                path=format_path((collection, *module.path, *path)),
                fix="Pass the variables that init returned, or those of program.emit('linen').",
            )
        while isinstance(value, meta.AxisMetadata):
            value = value.unbox()
        return value

    def _derive(self, module: bridge.ToLinen, values: list[Any]) -> tuple[int, ...]:
        """Fills in the PRNG state that the constructor would make from the scope's streams.

        The constructor runs under jit, where XLA drops all of it but the keys. Gives the counters
        of streams that came from no stream of the scope.
        """
        assert module.scope is not None
        keys = (
            {} if module.skip_rng else {name: module.make_rng(name) for name in module.scope.rngs}
        )
        config = (module.nnx_class, module.args, module.kwargs, module.skip_rng)
        if self._keys is None or not _same(self._keys[0], config):
            self._keys = (config, jax.jit(lambda keys: _rng_state(config, keys)))
        state = self._keys[1](keys)
        missing = []
        for slot, path in self._derived:
            # Which streams an nnx.Rngs has follows from those that the call brings.
            found = state.get(path, state.get((*path[:-2], "default", path[-1])))
            values[slot] = _trees.placeholder(self._graph.slots[slot]) if found is None else found
            if found is None or path not in state:
                missing.append(slot)
                continue
            tag = dict(self._graph.slots[slot].metadata).get("tag")
            is_default = tag is not None and getattr(tag, "value", None) == "default"
            is_count = self._graph.slots[slot].collection == "RngCount"
            if is_count and is_default and "default" not in keys and not module.skip_rng:
                missing.append(slot)
        return tuple(missing)


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    try:
        return bool(first == second)
    except Exception:
        return False


def _rng_state(config: tuple[Any, ...], keys: Mapping[str, Any]) -> dict[Path, Any]:
    """The PRNG state of a module as its constructor makes it, by path."""
    make, args, kwargs, skip_rng = config
    arguments = dict(core.unfreeze(kwargs))
    if not skip_rng:
        arguments["rngs"] = nnx.Rngs(**{"default": 0, **keys})
    return {path: leaf.get_raw_value() for path, leaf in _rng_leaves(make(*args, **arguments))}


def _rng_leaves(module: Any) -> Any:
    return nnx.to_flat_state(nnx.state(module, nnx.RngState))
