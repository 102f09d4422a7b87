"""A Linen layer as NNX's own layer: which class and fields, and where each variable goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from linsey import _trees
from linsey._layers import Place, RefusedError, Row, row_for_class, row_for_op
from linsey._places import linen_slots
from linsey.backends import _private
from linsey.backends._decode import kind_of, metadata_of
from linsey.backends.nnx.objects import value_at
from linsey.ir import (
    Decoder,
    EmitError,
    Graph,
    LinseyError,
    Path,
    Slot,
    TensorType,
    decode,
    encode,
    format_path,
)
from linsey.ir.ops import Shape

Changes = tuple[tuple[Path, Any], ...]
"""Attributes of a module, by path below it, with their values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One Variable of a native layer."""

    path: Path
    """Where it is, below the layer."""
    slots: tuple[int, ...]
    """The slots of the graph that it holds; several where Linen keeps apart what NNX joins."""
    axis: int = 0
    """The axis by which several are joined, stacked axes counted."""
    sizes: tuple[int, ...] = ()
    """The sizes of the parts along it; empty where there is one part."""

    def join(self, values: Sequence[Any]) -> Any:
        """The value of the Variable, from those of its slots."""
        if len(values) == 1:
            return values[0]
        if any(isinstance(value, jax.ShapeDtypeStruct) for value in values):
            return jax.eval_shape(self._joined, list(values))
        return self._joined(values)

    def _joined(self, values: Sequence[Any]) -> Any:
        return jnp.concatenate(list(values), axis=self.axis)

    def split(self, value: Any) -> list[Any]:
        """The values of its slots: the inverse of `join`."""
        if not self.sizes:
            return [value]
        ends = [sum(self.sizes[: count + 1]) for count in range(len(self.sizes) - 1)]
        if isinstance(value, jax.ShapeDtypeStruct):
            return list(jax.eval_shape(lambda v: jnp.split(v, ends, axis=self.axis), value))
        return list(jnp.split(value, ends, axis=self.axis))


class Native:
    """How one layer of a graph is made as NNX's own.

    Args:
        source: the row of its class.
        target: the row of NNX's class.
        neutral: its fields.
        parts: its Variables.
        graph: the graph.
        own: the fields of the Linen layer.
        shapes: the shapes of its variables by neutral name.
        inputs: the shape of its first input, where that is known.
        template: the layer with shapes for values, which equal layers share.
    """

    def __init__(
        self,
        source: Row,
        target: Row,
        own: Mapping[str, Any],
        neutral: Mapping[str, Any],
        parts: Sequence[Part],
        graph: Graph,
        shapes: Mapping[str, Shape],
        inputs: Shape | None,
        template: Any,
    ) -> None:
        self.source = source
        self.target = target
        self.own = own
        self.neutral = neutral
        self._shapes = shapes
        self._inputs = inputs
        self._seen: dict[tuple[int, ...], tuple[Any, Changes]] = {}
        self.cls = target.cls
        self.is_lifted = False
        """Whether the Linen class is one that a transform made of it."""
        self.parts = tuple(parts)
        self._kinds = {
            part: (kind_of(graph.slots[part.slots[0]]), _metadata(graph, part)) for part in parts
        }
        self._collections = {part: graph.slots[part.slots[0]].collection for part in parts}
        self._template = template
        self.keeps_places = all(
            len(part.slots) == 1 and part.path in {place.path for place in source.slots.values()}
            for part in parts
        )
        """Whether its Variables lie where the Linen layer keeps them."""

    def collection(self, part: Part) -> str:
        """The Linen collection of a Variable."""
        return self._collections[part]

    def make(self, variable: Callable[[Part], Any]) -> Any:
        """The layer, in the current trace.

        Args:
            variable: gives each Variable.
        """
        return with_variables(self._template, {part.path: variable(part) for part in self.parts})

    def variable(self, part: Part, value: Any) -> nnx.Variable[Any]:
        """A Variable of the layer."""
        kind, metadata = self._kinds[part]
        return kind.from_metadata(value, dict(metadata))

    def changes(self, module: Any) -> Changes:
        """The attributes of the layer, by path, that another Linen instance asks for.

        Linen code makes its layers anew in each call, and may make them otherwise:
        ``nn.Dropout(0.5, deterministic=not train)``.

        Args:
            module: the instance.

        Raises:
            EmitError: it asks for what the class cannot do.
        """
        names = [name for name in self.own if name not in self.source.ignored | MODES]
        values = [getattr(module, name) for name in names]
        key = tuple(map(id, values))
        if key not in self._seen:
            new = {
                name: value
                for name, value in zip(names, values, strict=True)
                if not _is_equal(value, self.own[name])
            }
            if len(self._seen) > _MOST_SEEN:
                self._seen.clear()
            self._seen[key] = values, self._asked(module, new)  # which keeps the ids
        return self._seen[key][1]

    def _asked(self, module: Any, new: Mapping[str, Any]) -> Changes:
        """What differs in the layer that has some fields otherwise, in those that it holds too."""
        if not new:
            return ()
        try:
            neutral = self.source.read({**self.own, **new}, self._shapes, self._inputs)
            made = construct(self.target, neutral)
        except (RefusedError, TypeError, ValueError, IndexError, KeyError) as error:
            fields = ", ".join(
                f"{name}={value!r} (was {self.own[name]!r})" for name, value in new.items()
            )
            raise EmitError(
                f"this call makes the layer with other fields than when it was lowered: {fields};"
                f" {self.cls.__name__} cannot follow that: {error}",
                path=format_path(module.path),
                fix="Emit the model with native=False.",
            ) from error
        return tuple(_differences(self._template, made, ()))

    def fits(self, obj: Any) -> bool:
        """Whether an object still has the classes and the Variables of this layer."""
        return _has_classes(obj, self._template, self.parts)

    def is_unchanged(self, obj: Any) -> bool:
        """Whether an object is this layer still: the same class, fields and kinds of Variables."""
        return is_alike(obj, self._template)

    def slot_variables(self, obj: Any) -> dict[int, nnx.Variable[Any]]:
        """The Variables of a layer by slot; of one that holds several slots, its pieces."""
        found = {}
        for part in self.parts:
            variable = value_at(obj, part.path)
            pieces = part.split(variable.get_raw_value())
            for slot, piece in zip(part.slots, pieces, strict=True):
                is_whole = len(part.slots) == 1
                found[slot] = (
                    variable
                    if is_whole
                    else type(variable).from_metadata(piece, variable.get_metadata())
                )
        return found


def maker(
    row: Row, neutral: Mapping[str, Any], inits: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[nnx.Rngs], Any]:
    """What calls the constructor of a layer of NNX.

    Args:
        row: the row of its class.
        neutral: its fields.
        inits: initialisers by name; those that it does not take are left out.

    Raises:
        RefusedError: this release of flax does not take one of the fields.
    """
    options = {**row.write(neutral), **row.make}
    constructor: Any = row.cls.__init__  # type: ignore[misc]
    known = inspect.signature(constructor).parameters
    unknown = options.keys() - known.keys()
    if unknown:
        raise RefusedError(f"this flax.nnx.{row.cls.__name__} has no {min(unknown)}")
    options |= {name: init for name, init in inits.items() if name in known}
    takes_rngs = "rngs" in known and "rngs" not in options
    return lambda rngs: row.cls(**options, **({"rngs": rngs} if takes_rngs else {}))


def construct(row: Row, neutral: Mapping[str, Any]) -> Any:
    """A layer of NNX as its constructor makes it, with shapes for values.

    Raises:
        RefusedError: this release of flax does not take one of the fields.
    """
    make = maker(row, neutral)
    with nnx.use_eager_sharding(False):
        made = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    for attribute, name in row.set_after.items():
        setattr(made, attribute, neutral[name])
    return made


MODES = frozenset({"deterministic", "use_running_average"})
"""What Linen code may say of a layer when it makes it, or when it calls it: it changes no layer."""
_MOST_SEEN = 64


def _differences(old: Any, new: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The attributes of a module that are otherwise in another of its class, with their values."""
    for name, value in vars(new).items():
        other = vars(old)[name]
        if isinstance(value, nnx.Module):
            yield from _differences(other, value, (*path, name))
        elif not name.startswith("_pytree__") and not isinstance(other, nnx.Variable):
            yield from () if _is_equal(value, other) else (((*path, name), value),)


def _is_equal(value: Any, other: Any) -> bool:
    if value is other:
        return True
    try:
        return encode(value) == encode(other)
    except Exception:
        return False


def with_variables(obj: Any, variables: Mapping[Path, Any]) -> Any:
    """A copy of a module with other Variables at some paths; all else is shared with it."""
    new: Any = object.__new__(type(obj))
    attributes = vars(new)
    attributes.update(vars(obj))
    state = attributes.get("_pytree__state")
    if state is not None:
        attributes["_pytree__state"] = _private.PytreeState(state.initializing, state.is_setup)
    below: dict[str, dict[Path, Any]] = {}
    for path, variable in variables.items():
        if len(path) == 1:
            attributes[str(path[0])] = variable
        else:
            below.setdefault(str(path[0]), {})[path[1:]] = variable
    for name, rest in below.items():
        attributes[name] = with_variables(attributes[name], rest)
    return new


def _has_classes(obj: Any, template: Any, parts: Sequence[Part]) -> bool:
    if type(obj) is not type(template) or len(vars(obj)) != len(vars(template)):
        return False
    for part in parts:
        here, there = obj, template
        for name in part.path:
            here, there = vars(here).get(str(name)), vars(there)[str(name)]
            if type(here) is not type(there) and not isinstance(here, nnx.Variable):
                return False
    return True


def is_alike(obj: Any, template: Any) -> bool:
    """Whether two layers have the same class, fields and kinds of Variables."""
    if isinstance(template, nnx.Variable):
        return type(obj) is type(template)
    if isinstance(template, nnx.Module):
        names = vars(template).keys() - {"_pytree__state", "_pytree__nodes"}
        return (
            type(obj) is type(template)
            and names == vars(obj).keys() - {"_pytree__state", "_pytree__nodes"}
            and all(is_alike(vars(obj)[name], vars(template)[name]) for name in names)
        )
    try:
        return obj is template or bool(obj == template)
    except Exception:
        return False


def _metadata(graph: Graph, part: Part) -> dict[str, Any]:
    found = [metadata_of(graph.slots[slot]) for slot in part.slots]
    if any(other != found[0] for other in found[1:]):
        raise RefusedError("what it keeps in one variable is annotated in several ways")
    return found[0]


def native_layer(graph: Graph, number: int) -> Native | str:
    """How a node is emitted as NNX's own layer, or why it is not."""
    key = f"native nnx {number}"
    if key not in graph.memo:
        try:
            graph.memo[key] = _native_layer(graph, number)
        except RefusedError as refused:
            graph.memo[key] = str(refused)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            # Fields that flax itself refuses, by then or at the first call.
            graph.memo[key] = f"flax.nnx does not take its fields: {error}"
    return graph.memo[key]  # type: ignore[no-any-return]


def native_root(graph: Graph) -> Native | str:
    """How the root is emitted as NNX's own layer, or why it is not.

    A layer that draws keys takes them by Linen's rules, ``rngs=`` of each call, which only a host
    does; so does one whose values a transform stacks.
    """
    node = graph.nodes[graph.root]
    found = native_layer(graph, graph.root)
    if not isinstance(found, Native):
        return found
    if any(graph.streams[stream].use == "call" for _, stream in node.streams):
        return "it draws keys, and as the root takes them from rngs= as Module.apply does"
    if found.is_lifted:
        return "it is the root, and a transform is around it"
    return found


def _native_layer(graph: Graph, number: int) -> Native:
    node = graph.nodes[number]
    assert node.source is not None
    cls = decode(node.source.cls)
    source = row_for_class(node.source.dialect, cls)
    if source is None:
        raise RefusedError("it is user code")
    target = row_for_op("nnx", source.op)
    if source.reason or target is None:
        raise RefusedError(source.reason or "flax.nnx has no such layer")
    decoded = Decoder()
    try:
        fields = {str(name): decoded(value) for name, value in node.attrs}
    except LinseyError as error:
        raise RefusedError(str(error)) from error
    slots = _neutral_slots(graph, number, source)
    shapes = {name: own_shape(graph.slots[slot]) for name, slot in slots.items()}
    is_lifted = cls is not source.cls
    inputs = None if is_lifted else _first_input(graph, number)
    neutral = source.read(fields, shapes, inputs)
    parts = list(_parts(graph, target, slots))
    templates = graph.memo.setdefault("native templates", {})
    key = (node.source.cls, node.attrs, tuple(sorted(shapes.items())), inputs)
    if key not in templates:
        templates[key] = _template(target, neutral, parts, graph)
    template = templates[key]
    native = Native(source, target, fields, neutral, parts, graph, shapes, inputs, template)
    native.is_lifted = is_lifted
    return native


def _template(target: Row, neutral: Mapping[str, Any], parts: Sequence[Part], graph: Graph) -> Any:
    """A layer as its constructor makes it, with the Variables that a graph has for it."""
    made = construct(target, neutral)
    found = {path for path, _ in nnx.to_flat_state(nnx.state(made))}
    more = found - {part.path for part in parts}
    if more:
        raise RefusedError(f"flax.nnx.{target.cls.__name__} holds {min(map(str, more))} besides")
    for part in parts:
        if part.path not in found:  # a cache
            value = part.join([_trees.abstract_value(graph.slots[slot]) for slot in part.slots])
            holder = value_at(made, part.path[:-1])
            setattr(holder, str(part.path[-1]), kind_of(graph.slots[part.slots[0]])(value))
    return made


def _neutral_slots(graph: Graph, number: int, row: Row) -> dict[str, int]:
    """The slots of a layer by neutral name."""
    names = {(place.collection, place.path): name for name, place in row.slots.items()}
    found = {}
    for path, slot in linen_slots(graph, number):
        collection = graph.slots[slot].collection
        name = names.get((collection, path))
        if name is None:
            raise RefusedError(f"it holds {collection}/{'/'.join(map(str, path))} besides")
        if not isinstance(graph.slots[slot].type, TensorType):
            raise RefusedError(f"its {name} is no array")
        found[name] = slot
    return found


def own_shape(slot: Slot) -> tuple[int, ...]:
    """The shape of a slot without its stacked axes."""
    assert isinstance(slot.type, TensorType)
    shape = list(slot.type.shape)
    for axis in slot.stack:
        del shape[axis.axis]
    return tuple(shape)


def _first_input(graph: Graph, number: int) -> tuple[int, ...] | None:
    for signature in graph.nodes[number].signatures:
        if signature.method == "__call__" and signature.inputs:
            kind = signature.inputs[0][1]
            return kind.shape if isinstance(kind, TensorType) else None
    return None


def _parts(graph: Graph, target: Row, slots: Mapping[str, int]) -> Iterator[Part]:
    left = dict(slots)
    for name, place in target.slots.items():
        names = place.parts or (name,)
        held = [left.pop(each) for each in names if each in left]
        if not held:
            continue
        if len(held) != len(names):
            raise RefusedError(f"it has some of {', '.join(names)} and not all")
        yield _part(graph, place, tuple(held))
    if left:
        raise RefusedError(f"flax.nnx keeps no {', '.join(left)}")


def _part(graph: Graph, place: Place, slots: tuple[int, ...]) -> Part:
    if len(slots) == 1:
        return Part(path=place.path, slots=slots)
    first = graph.slots[slots[0]]
    if any(graph.slots[slot].stack != first.stack for slot in slots):
        raise RefusedError("what it keeps in one variable is stacked in several ways")
    axis = place.axis % len(own_shape(first))
    for stacked in reversed(first.stack):
        axis += stacked.axis <= axis
    sizes = tuple(graph.slots[slot].type.shape[axis] for slot in slots)  # type: ignore[union-attr]
    return Part(path=place.path, slots=slots, axis=axis, sizes=sizes)
