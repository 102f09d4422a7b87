"""An NNX module in the place of a Linen module: Linen code calls it without knowing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import linen, nnx
from flax.core import meta

from linsey._collections import collection_of
from linsey._lifts import Lifts
from linsey._places import stored_path
from linsey.backends import _private
from linsey.backends.linen._nested import MISSING, merged, value_in, with_value
from linsey.backends.linen.calls import adapted, with_modes
from linsey.backends.nnx.build import Plan
from linsey.backends.nnx.emit import new_state
from linsey.backends.nnx.native import Changes, Native, with_variables
from linsey.backends.nnx.objects import rebuild, value_at
from linsey.ir import EmitError, Path, as_key, format_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one variable of the NNX module lies while Linen code runs."""

    collection: str
    """Its Linen collection there."""
    path: Path
    """Its path there, below the Linen module."""
    own: Path
    """Its attribute path in the NNX module."""


class Standin:
    """An NNX module that is called in place of the Linen module at a scope path.

    Its variables travel as Linen variables, so that they arrive sliced where the path is below a
    lifted transform. A copy that holds them is made for each call, in the trace of that call.

    Args:
        places: its variables.
        build: makes the module, from their values in this order.
        read: gives their values after a call.
        op: the neutral layer that the Linen module is.
        changes: gives the attributes that a Linen instance asks for and the module has otherwise;
            an EmitError where the module cannot follow.
        is_linens: tells whether Linen's own code can run on these variables in its place.
        boxes: the slot of the graph in whose Linen box each variable travels, or None.
    """

    def __init__(
        self,
        places: Sequence[Place],
        build: Callable[[list[Any]], Any],
        read: Callable[[Any], Sequence[Any]],
        op: str,
        changes: Callable[[linen.Module], Changes] | None = None,
        is_linens: Callable[[], bool] | None = None,
        boxes: Sequence[int | None] = (),
    ) -> None:
        self.prefers_own = False
        """Whether a stream of the module's own comes before those of the Linen scope."""
        self._changes = changes
        self._is_linens = is_linens
        self.places = places
        self.boxes = boxes
        self._build = build
        self._read = read
        self._op = op

    def put(self, variables: dict[str, Any], path: Path, values: Sequence[Any]) -> None:
        """Puts its values among the Linen variables that the region at its root is called with."""
        for place, value in zip(self.places, values, strict=True):
            holder = variables.setdefault(place.collection, {})
            for name in (*path, *place.path[:-1]):
                holder = holder.setdefault(name, {})
            holder[place.path[-1]] = value

    def call(
        self,
        module: linen.Module,
        name: str,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Calls a method in place of the Linen module's, which is `run`.

        Raises:
            EmitError: a variable did not arrive, or one that changed cannot leave; or the layer is
                made otherwise than when it was lowered, and cannot follow.
        """
        try:
            changes = () if self._changes is None else self._changes(module)
        except EmitError:
            if self._is_linens is not None and self._is_linens():
                return run(*args, **kwargs)
            raise
        values = [self._value(module, place) for place in self.places]
        made = self._build(values)
        for path, value in changes:
            vars(value_at(made, path[:-1]))[str(path[-1])] = value
        kwargs = with_modes(module, made, kwargs)
        args, kwargs = adapted(self._op, module, made, args, kwargs, self.prefers_own)
        grown = _size(made)
        output = getattr(made, name)(*args, **kwargs)
        for place, old, new in zip(self.places, values, self._read(made), strict=True):
            if new is not old:
                self._store(module, place, new)
        if _size(made) != grown:
            self._store_new(module, made)
        return output

    def _value(self, module: linen.Module, place: Place) -> Any:
        top = module.get_variable(place.collection, str(place.path[0]), MISSING)
        value = value_in(top, place.path[1:])
        if value is MISSING:
            raise EmitError(
                f"the variable did not arrive here: no transform around it lifts"
                f" {place.collection!r}",
                path=format_path((place.collection, *module.path, *place.own)),
                fix="Name the collection in variable_axes, variable_broadcast or variable_carry.",
            )
        while isinstance(value, meta.AxisMetadata):
            value = value.unbox()
        return value

    def _store(self, module: linen.Module, place: Place, value: Any) -> None:
        if place.path[0] != stored_path(place.collection, place.own)[0]:
            raise EmitError(
                "the call changed this variable, and no transform around it lifts its collection",
                path=format_path((*module.path, *place.own)),
                fix="Name the collection in the transform's variable_axes, or keep the state out.",
            )
        top = str(place.path[0])
        old: Any = module.get_variable(place.collection, top)
        module.put_variable(place.collection, top, with_value(old, place.path[1:], value))

    def _store_new(self, module: linen.Module, made: Any) -> None:
        """What the call sowed."""
        for collection, tree in new_state(made, {place.own for place in self.places}).items():
            if module.is_mutable_collection(collection):
                for name, value in tree.items():
                    old: Any = module.get_variable(collection, str(name), {})
                    module.put_variable(collection, str(name), merged(old, value))


def _size(made: Any) -> int:
    return len(vars(made))


def of_native(native: Native, obj: Any, op: str) -> tuple[Standin, list[nnx.Variable[Any]]]:
    """The stand-in of a layer that is as it was emitted, and its Variables."""
    variables = [value_at(obj, part.path) for part in native.parts]
    paths = [part.path for part in native.parts]
    kinds: list[Any] = [
        type(variable) if native.collection(part) == "params" else _written(type(variable))
        for part, variable in zip(native.parts, variables, strict=True)
    ]

    def build(values: list[Any]) -> Any:
        made = {
            path: kind.from_metadata(value, variable.get_metadata())
            for path, kind, variable, value in zip(paths, kinds, variables, values, strict=True)
        }
        return with_variables(obj, made)

    def read(made: Any) -> list[Any]:
        return [value_at(made, path).get_raw_value() for path in paths]

    def is_linens() -> bool:
        return native.keeps_places and native.is_unchanged(obj)

    boxes = [part.slots[0] if len(part.slots) == 1 else None for part in native.parts]
    places = _native_places(native)
    return Standin(places, build, read, op, native.changes, is_linens, boxes), variables


_written: Callable[[Any], Any] = _private.written_as_linen


def _native_places(native: Native) -> tuple[Place, ...]:
    return tuple(
        Place(
            collection=native.collection(part),
            path=stored_path(native.collection(part), part.path),
            own=part.path,
        )
        for part in native.parts
    )


def of_module(
    obj: Any, op: str, lifts: Lifts, path: Path
) -> tuple[Standin, list[nnx.Variable[Any]]]:
    """The stand-in of any NNX module, and its Variables.

    Args:
        obj: the module.
        op: the neutral layer that it replaces.
        lifts: the lifted transforms of the graph.
        path: its path in the graph.

    Raises:
        EmitError: its state is not stacked where the transform around it expects that.
    """
    found = list(_leaves(obj))
    for own, variable in found:
        lifts.check(path, own, collection_of(type(variable)), variable.get_raw_value())
    places = [place_of(lifts, path, collection_of(type(leaf)), own) for own, leaf in found]

    def build(values: list[Any]) -> Any:
        return rebuild(obj, dict(zip([own for own, _ in found], values, strict=True)))

    def read(made: Any) -> list[Any]:
        return [value_at(made, own).get_raw_value() for own, _ in found]

    return Standin(places, build, read, op), [variable for _, variable in found]


def _leaves(obj: Any) -> Iterator[tuple[Path, nnx.Variable[Any]]]:
    for keys, leaf in nnx.to_flat_state(nnx.state(obj)):
        if isinstance(leaf, nnx.Variable):
            path: Path = tuple(map(as_key, keys))
            yield path, value_at(obj, path)


def of_plan(plan: Plan, op: str, lifts: Lifts, path: Path) -> tuple[Standin, list[int]]:
    """The stand-in of a node of a graph, and its slots."""
    slots = list(plan.slots)
    graph = plan.graph
    places = [
        place_of(lifts, path, graph.slots[slot].collection, plan.slots[slot]) for slot in slots
    ]
    before: list[Any] = [None] * len(graph.slots)

    def build(values: list[Any]) -> Any:
        given = list(before)
        for slot, value in zip(slots, values, strict=True):
            given[slot] = value
        return plan.build(given)

    def read(made: Any) -> list[Any]:
        after = plan.read(made, before)
        return [after[slot] for slot in slots]

    return Standin(places, build, read, op), slots


def place_of(lifts: Lifts, path: Path, collection: str, own: Path) -> Place:
    """Where a variable of an NNX module at a path of the graph travels.

    A collection that a transform around it does not lift never arrives inside; such a variable
    travels with the parameters.
    """
    stored = stored_path(collection, own)
    carrier = lifts.carrier(path, collection)
    if carrier != collection:
        stored = (f"{collection}~{stored[0]}", *stored[1:])
    return Place(collection=carrier, path=stored, own=own)
