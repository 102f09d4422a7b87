"""NNX code as a Linen module."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen
from flax.core import meta

from linsey import _trees
from linsey.backends import _private
from linsey.backends._spec import HostSpec
from linsey.backends.nnx.build import Plan
from linsey.backends.nnx.emit import new_state, override_streams
from linsey.ir import RNG_COLLECTIONS, EmitError, HostParts, Path, decode, format_path

_MISSING = object()


class NNXHost(linen.Module):
    """An NNX module whose variables are Linen's.

    Made by `linsey.to_linen` and ``program.emit("linen")``. The module is built from the graph at
    each call and its constructor never runs. All its methods can be called, as ``apply(...,
    method="encode")``. ``apply(..., mutable=...)`` decides which changes come back; ``rngs`` given
    to ``apply`` are used in place of the stored streams.
    """

    spec: HostSpec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the NNX module's ``__call__``."""
        return self._run("__call__", args, kwargs)

    @linen.nowrap
    def linsey_parts(self) -> HostParts:
        """What a frontend sees of it."""
        return HostParts(graph=self.spec.graph, node=self.spec.node, places=_places(self.spec))

    @linen.nowrap
    def __getattr__(self, name: str) -> Any:
        spec = self.__dict__.get("spec")
        if spec is not None and not name.startswith("__"):
            cls = _class(spec)
            method = getattr(cls, name, None)
            if callable(method) and not hasattr(linen.Module, name):
                # A bound method, so that `apply(method=...)` can bind it to another scope.
                return types.MethodType(functools.partial(_method, name), self)
        return super().__getattr__(name)

    @linen.nowrap
    def _run(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.is_initializing():
            raise EmitError(
                "init was called on a module whose variables came with it",
                path=_class(self.spec).__name__,
                fix="Use the variables that linsey.to_linen or program.emit('linen') returned.",
            )
        plan = _plan(self.spec)
        given = self._given_streams()
        values = self._values(self._stored, optional=bool(given))
        keys = {name: self.make_rng(name) for name in given}
        called = override_streams(self.spec.graph, values, keys) if keys else values
        module = plan.build(called)
        output = getattr(module, name)(*args, **kwargs)
        assert self.scope is not None
        if not keys:
            self._check_streams(module, called, self.is_mutable_collection)
        if self.scope.mutable is not False:
            after = plan.read(module, called)
            if keys:  # the stored streams stay as they are when a call brings its own
                for slot, entry in enumerate(self.spec.graph.slots):
                    if entry.collection in RNG_COLLECTIONS:
                        after[slot] = values[slot]
            self._store(values, after)
            self._store_new(new_state(plan, module, _known(self.spec)))
        return output

    @linen.nowrap
    def _given_streams(self) -> list[str]:
        assert self.scope is not None
        known = {s.name for s in self.spec.graph.streams if s.derivation == "count"}
        return [name for name in self.scope.rngs if name in known or (known and name != "params")]

    @linen.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a method; see ``linen.Module.apply``.

        A plain call (no ``rngs``, nothing mutable, nobody watching) does not go through Linen's
        scopes, which would cost more than a small module itself.
        """
        options = {"rngs": None, "mutable": False, "capture_intermediates": False}
        # A lifted class must run its transform.
        is_plain = type(self) is NNXHost and all(
            kwargs.get(name, value) == value for name, value in options.items()
        )
        method = kwargs.get("method")
        if not is_plain or _private.is_watched() or not (method is None or isinstance(method, str)):
            return super().apply(variables, *args, **kwargs)
        call = {k: v for k, v in kwargs.items() if k not in options and k != "method"}

        def stored(collection: str, name: str) -> Any:
            return variables.get(collection, {}).get(name, _MISSING)

        values = self._values(stored, optional=False)
        module = _plan(self.spec).build(values)
        output = getattr(module, method or "__call__")(*args, **call)
        self._check_streams(module, values, is_mutable=lambda collection: False)
        return output

    @linen.nowrap
    def _check_streams(
        self, module: Any, before: list[Any], is_mutable: Callable[[str], bool]
    ) -> None:
        """Refuses a call that drew from stored streams whose counters cannot change.

        Every such call would draw the same keys. A ToNNX draws from all its streams at every call,
        needed or not: those do not count.
        """
        counts = self.spec.cached("counts", _counts)
        if not counts or is_mutable("RngCount"):
            return
        after = _plan(self.spec).read(module, before)
        for slot in counts:
            if after[slot] is not before[slot]:
                raise EmitError(
                    "the call drew a key from this stream, and its counter cannot change: the next"
                    " call would draw the same",
                    path=format_path(self.spec.graph.slots[slot].path[:-1]),
                    fix="Pass mutable=['RngCount'] and store what comes back, or rngs= with a key.",
                )

    @linen.nowrap
    def _stored(self, collection: str, name: str) -> Any:
        return self.get_variable(collection, name, _MISSING)

    @linen.nowrap
    def _values(self, stored: Callable[[str, str], Any], *, optional: bool) -> list[Any]:
        slots = self.spec.graph.slots
        values: list[Any] = [None] * len(slots)
        for slot, place in _places(self.spec).items():
            collection = place[0]
            value = stored(str(collection), str(place[1]))
            for name in place[2:]:
                value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
            if value is _MISSING:
                if optional and collection in RNG_COLLECTIONS:
                    values[slot] = _trees.placeholder(slots[slot])
                    continue
                raise EmitError(
                    "the variable is missing",
                    path=format_path(place),
                    fix="Pass the variables that linsey.to_linen or program.emit returned.",
                )
            while isinstance(value, meta.AxisMetadata):
                value = value.unbox()
            if not _trees.fits(slots[slot], value):
                raise EmitError(
                    f"found the shape {getattr(value, 'shape', None)}, expected {slots[slot].type}",
                    path=format_path(place),
                    fix="Pass the variables that linsey.to_linen or program.emit returned.",
                )
            values[slot] = value
        return values

    @linen.nowrap
    def _store(self, before: list[Any], after: list[Any]) -> None:
        changed: dict[tuple[str, str], list[tuple[Path, Any]]] = {}
        for slot, place in _places(self.spec).items():
            collection, top = str(place[0]), str(place[1])
            if after[slot] is not before[slot] and self.is_mutable_collection(collection):
                changed.setdefault((collection, top), []).append((place[2:], after[slot]))
        for (collection, top), updates in changed.items():
            old: Any = self.get_variable(collection, top)
            for path, value in updates:
                old = _with(old, path, value)
            self.put_variable(collection, top, old)

    @linen.nowrap
    def _store_new(self, extra: Mapping[str, Any]) -> None:
        for collection, tree in extra.items():
            if self.is_mutable_collection(collection):
                for name, value in tree.items():
                    self.put_variable(collection, str(name), value)


def _method(name: str, host: NNXHost, *args: Any, **kwargs: Any) -> Any:
    return host._run(name, args, kwargs)


def _class(spec: HostSpec) -> Any:
    source = spec.entry.source
    assert source is not None
    return spec.cached("class", lambda _: decode(source.cls))


def _plan(spec: HostSpec) -> Plan:
    return spec.cached("plan", lambda spec: Plan(spec.graph, spec.node))  # type: ignore[no-any-return]


def _places(spec: HostSpec) -> dict[int, Path]:
    return spec.cached("places", linen_places)  # type: ignore[no-any-return]


def linen_places(spec: HostSpec) -> dict[int, Path]:
    """Where the Linen variables of an NNX module lie: collection and path, by slot.

    The first name is always a string, and never ``params`` in the collection of that name: Linen
    refuses both.
    """
    places: dict[int, Path] = {}
    for slot, path in _plan(spec).slots.items():
        collection = spec.graph.slots[slot].collection
        first = str(path[0])
        is_doubled = collection == "params" and first == "params"
        places[slot] = (collection, "params__nnx" if is_doubled else first, *path[1:])
    return places


def _counts(spec: HostSpec) -> list[int]:
    """The counters of the streams that the NNX code itself draws from."""
    streams = spec.graph.streams
    counts = [stream.count for stream in streams if stream.count is not None]
    return [slot for slot in counts if "to_nnx__rngs" not in spec.graph.slots[slot].path]


def _known(spec: HostSpec) -> set[Path]:
    return spec.cached(  # type: ignore[no-any-return]
        "known", lambda spec: {path for slot in spec.graph.slots for path in slot.paths}
    )


def _with(tree: Any, path: Path, value: Any) -> Any:
    """A nested dict with one value replaced inside its box."""
    if path:
        return {**tree, path[0]: _with(tree[path[0]], path[1:], value)}
    return tree.replace_boxed(value) if isinstance(tree, meta.AxisMetadata) else value
