"""Runs an NNX module on variables that a Linen scope holds: no constructor, no flattening."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax import linen, nnx
from flax.core import meta

from linsey import _trees
from linsey._collections import unboxed
from linsey._places import stored_path
from linsey.backends._spec import HostSpec
from linsey.backends.linen._nested import MISSING, merged, value_in, with_value
from linsey.backends.linen.detached import Detached
from linsey.backends.nnx.build import Plan
from linsey.backends.nnx.emit import new_state, override_streams
from linsey.backends.nnx.nodes import wrapper_slots
from linsey.backends.nnx.objects import value_at
from linsey.ir import RNG_COLLECTIONS, EmitError, Path, format_path
from linsey.ir.reserved import GRAPH_COLLECTION

_FIX = "Pass the variables that came with the module, as init or linsey.to_linen returned them."

_FRESH = frozenset({GRAPH_COLLECTION, "intermediates", "perturbations"})
_NOTHING: Mapping[Any, Any] = MappingProxyType({})
_LEAF: Mapping[Any, Any] = MappingProxyType({})

Box = Callable[[nnx.Variable[Any]], Any]
"""How a Variable that a call made is handed to Linen."""


class Hosting:
    """One node of a graph, run on Linen variables; made once per `HostSpec`.

    Args:
        spec: the node.
    """

    def __init__(self, spec: HostSpec) -> None:
        self._graph = spec.graph
        self._plan = Plan(spec.graph, spec.node)
        self.places: dict[int, Path] = {}
        """Collection and path of each Linen variable, by slot."""
        for slot, path in self._plan.slots.items():
            collection = spec.graph.slots[slot].collection
            self.places[slot] = (collection, *stored_path(collection, path))
        self._counts = _counts(spec)
        self._known = {path for slot in spec.graph.slots for path in slot.paths}
        self._known.update(self._plan.slots.values())
        self._collections = {str(place[0]) for place in self.places.values()}
        self._names: dict[str, Any] = {}
        for place in self.places.values():
            holder: dict[Any, Any] = self._names
            for name in place[:-1]:
                holder = holder.setdefault(name, {})
            holder[place[-1]] = _LEAF
        self._streams = {s.name for s in spec.graph.streams if s.derivation == "count"}

    @staticmethod
    def of(spec: HostSpec) -> Hosting:
        """That of a spec."""
        return spec.cached("hosting", Hosting)  # type: ignore[no-any-return]

    def leaf(self, made: Any, slot: int) -> Any:
        """The Variable, or the bare array, of a slot in objects of this structure."""
        return value_at(made, self._plan.slots[slot])

    def has(self, path: Path) -> bool:
        """Whether the module was made with a variable at an attribute path."""
        return path in self._known

    def is_stored(self, module: linen.Module, *, with_streams: bool = True) -> bool:
        """Whether the scope of a bound Linen module holds all the variables."""
        return all(
            value_in(module.get_variable(str(place[0]), str(place[1]), MISSING), place[2:])
            is not MISSING
            for place in self.places.values()
            if with_streams or place[0] not in RNG_COLLECTIONS
        )

    def unknown(self, variables: Mapping[str, Any]) -> Path | None:
        """A variable that the module does not have, or None.

        What calls make anew is left out: ``intermediates``, ``perturbations``, and the tuples that
        ``sow`` makes in other collections.
        """

        def first(tree: Any, names: Mapping[Any, Any], path: Path) -> Path | None:
            if not isinstance(tree, Mapping):
                is_leaf = names is _LEAF or isinstance(unboxed(tree), tuple)
                return None if is_leaf else path
            if names is _LEAF:  # its value is a dict
                return None
            found = (first(tree[name], names.get(name, _NOTHING), (*path, name)) for name in tree)
            return next((path for path in found if path is not None), None)

        for name, tree in variables.items():
            if name not in _FRESH:
                found = first(tree, self._names.get(name, _NOTHING), (name,))
                if found is not None:
                    return found
        return None

    def run(
        self,
        module: linen.Module | Detached,
        method: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        box: Box = nnx.Variable.get_raw_value,
        around: Callable[[Any], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        restructured: Callable[[Any], None] | None = None,
        strict: bool = True,
    ) -> Any:
        """Calls a method on the variables of a bound Linen module, or on detached ones.

        Args:
            module: the module; what changed is stored in its scope, where that is mutable.
            method: name of the method, or a function of the NNX module; None: the call.
            args: positional arguments.
            kwargs: keyword arguments.
            box: for the Variables that the call makes.
            around: makes, from the NNX module, a context for the call.
            restructured: is given the NNX module when the call changed its structure.
            strict: whether a changed static attribute is an error; it is dropped otherwise.

        Raises:
            EmitError: a variable is missing or of another shape; a stream that the call draws from
                is nowhere, or cannot advance.
        """
        scope: Any = module.scope
        given = self._given(scope)
        keys = {name: module.make_rng(name) for name in given}

        def stored(collection: str, name: str) -> Any:
            return module.get_variable(collection, name, MISSING)

        values = self._values(stored, scope.path, without_streams=bool(keys))
        called = override_streams(self._graph, values, keys) if keys else values
        made = self._plan.build(called)
        with around(made):
            output = _method(made, method)(*args, **kwargs)
        replaced = {slot for slot, value in enumerate(called) if value is not values[slot]}
        if not module.is_mutable_collection("RngCount"):
            self._check_streams(made, called, scope.path, replaced)
        if scope.mutable is not False:
            after, changes = self._plan.read_changes(made, called)
            if changes and strict:
                raise changes[0]
            for slot in replaced:  # the stored streams stay when a call brings keys of its own
                after[slot] = values[slot]
            self._store(module, values, after)
            if changes or self._plan.has_grown(made):
                self._store_new(module, made, box)
                if restructured is not None:
                    restructured(made)
        return output

    def _given(self, scope: Any) -> list[str]:
        """The streams for which the call brings keys that are this module's."""
        if not self._streams:
            return []
        # At the root a name that no stream has is a mistake, which `override_streams` tells. Below,
        # it may be another module's.
        is_strict = not scope.path or "default" in self._streams
        return [
            name for name in scope.rngs if name in self._streams or (is_strict and name != "params")
        ]

    def _values(
        self, stored: Callable[[str, str], Any], where: Path, *, without_streams: bool
    ) -> list[Any]:
        slots = self._graph.slots
        values: list[Any] = [None] * len(slots)
        for slot, place in self.places.items():
            collection = place[0]
            value = value_in(stored(str(collection), str(place[1])), place[2:])
            if value is MISSING:
                if without_streams and collection in RNG_COLLECTIONS:
                    values[slot] = _trees.placeholder(slots[slot])
                    continue
                raise EmitError("the variable is missing", path=_shown(place, where), fix=_FIX)
            while isinstance(value, meta.AxisMetadata):
                value = value.unbox()
            if not _trees.fits(slots[slot], value):
                raise EmitError(
                    f"found the shape {getattr(value, 'shape', None)}, expected {slots[slot].type}",
                    path=_shown(place, where),
                    fix=_FIX,
                )
            values[slot] = value
        return values

    def _check_streams(
        self, made: Any, before: list[Any], where: Path, exempt: Any = frozenset()
    ) -> None:
        """Refuses a call that drew from stored streams whose counters cannot change.

        Every such call would draw the same keys. A ToNNX draws from all its streams at every call,
        needed or not: those do not count.
        """
        checked = [slot for slot in self._counts if slot not in exempt]
        if not checked:
            return
        after = self._plan.read(made, before, strict=False)
        for slot in checked:
            if after[slot] is not before[slot]:
                raise EmitError(
                    "the call drew a key from this stream, and its counter cannot change: the next"
                    " call would draw the same",
                    path=format_path((*where, *self._graph.slots[slot].path[:-1])),
                    fix="Pass mutable=['RngCount'] and store what comes back, or rngs= with a key.",
                )

    def _store(self, module: linen.Module | Detached, before: list[Any], after: list[Any]) -> None:
        changed: dict[tuple[str, str], list[tuple[Path, Any]]] = {}
        for slot, place in self.places.items():
            collection, top = str(place[0]), str(place[1])
            if after[slot] is not before[slot] and module.is_mutable_collection(collection):
                changed.setdefault((collection, top), []).append((place[2:], after[slot]))
        for (collection, top), updates in changed.items():
            old: Any = module.get_variable(collection, top)
            for path, value in updates:
                old = with_value(old, path, value)
            module.put_variable(collection, top, old)

    def _store_new(self, module: linen.Module | Detached, made: Any, box: Box) -> None:
        for collection, tree in new_state(made, self._known, box).items():
            if module.is_mutable_collection(collection):
                for name, value in tree.items():
                    if collection in self._collections:
                        value = merged(module.get_variable(collection, str(name), {}), value)
                    module.put_variable(collection, str(name), value)


def _method(made: Any, method: Any) -> Callable[..., Any]:
    if method is None or isinstance(method, str):
        return getattr(made, method or "__call__")  # type: ignore[no-any-return]
    return lambda *args, **kwargs: method(made, *args, **kwargs)


def _shown(place: Path, where: Path) -> str:
    return format_path((place[0], *where, *place[1:]))


def _counts(spec: HostSpec) -> list[int]:
    """The counters of the streams that the NNX code itself draws from: not those of a ToNNX."""
    drawn_always = wrapper_slots(spec.graph)
    counts = [stream.count for stream in spec.graph.streams if stream.count is not None]
    return [slot for slot in counts if slot not in drawn_always]
