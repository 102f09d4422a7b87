"""Linen code as an NNX module."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from flax import linen, nnx

from linsey import _trees
from linsey._collections import kind_of_collection, unboxed
from linsey._layers.replaced import replaced_op, replaces_linen
from linsey.backends._decode import boxed
from linsey.backends._spec import HostSpec
from linsey.backends.linen.region import NOT_BY_DEFAULT, Region
from linsey.backends.linen.standin import Standin, of_module, of_native
from linsey.backends.nnx.build import Plan
from linsey.backends.nnx.native import Native, native_layer
from linsey.backends.nnx.nodes import is_hosted
from linsey.backends.nnx.objects import value_at
from linsey.ir import (
    EmitError,
    Graph,
    HostParts,
    Key,
    Path,
    StackAxis,
    decode,
    format_path,
    node_paths,
)

SPEC = "linsey_spec"
_RNGS = "rngs"


class LinenHost(nnx.Module):
    """A Linen module that holds its variables itself, as NNX modules do.

    Made by `linsey.to_nnx` and ``program.emit("nnx")``. Submodules and variables are attributes
    under their Linen names; a name that is taken (by a method, or by a variable of another
    collection) gets ``__<collection>`` or ``__module`` at its end. All methods of the Linen module
    can be called. Each call also takes:

    * ``rngs``: keys as ``Module.apply`` takes them; without it the model's own streams are drawn
      from, where it has any.
    * ``mutable``: the collections that the call may change; the changes are written back into the
      model. Without it, all but ``params``, ``intermediates`` and ``perturbations``.
    """

    linsey_spec: HostSpec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the Linen module's ``__call__``."""
        return self._run(None, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        spec = vars(self).get(SPEC)
        if spec is not None and not name.startswith("__"):
            method = getattr(_linen_class(spec), name, None)
            if callable(method):
                return functools.wraps(method)(functools.partial(_call_method, self, name))
        raise AttributeError(
            f"{self._describe()} has no attribute {name!r}; it has"
            f" {', '.join(sorted(key for key in vars(self) if not key.startswith('_'))) or 'none'}"
        )

    def _describe(self) -> str:
        spec = vars(self).get(SPEC)
        return "LinenHost" if spec is None else str(_linen_class(spec).__name__)

    def linsey_call(
        self,
        method: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        rngs: Any = None,
        mutable: Any = None,
    ) -> Any:
        """Calls a method of the Linen module, by name or as a function of the module.

        Raises:
            EmitError: the module's values are stacked by a transform that its parent runs, or a
                PRNG stream is missing.
        """
        region, graph = Region.of(self.linsey_spec), self.linsey_spec.graph
        _check_not_stacked(region)
        held = self._held(region)
        variables = region.assemble(functools.partial(self._value, region), held)
        variable_at: dict[tuple[str, Path], Any] = {}
        for path, (standin, leaves) in held.items():
            standin.prefers_own = rngs is None
            boxes = standin.boxes or [None] * len(leaves)
            pairs = zip(leaves, boxes, strict=True)
            standin.put(variables, path, [_boxed_value(graph, *pair) for pair in pairs])
            for place, leaf in zip(standin.places, leaves, strict=True):
                variable_at[place.collection, (*path, *place.path)] = leaf
        extra = self._extra()
        for collection, tree in extra.items():
            if collection != "intermediates":
                _merge(variables.setdefault(collection, {}), tree)
        output, updates = region.call(
            variables,
            args,
            kwargs,
            method=method,
            rngs=self._keys(rngs),
            mutable=_with_extra(region, extra, held) if mutable is None else mutable,
            live=self._child,
            standins={tuple(map(str, path)): standin for path, (standin, _) in held.items()},
        )
        found, rest = region.find(updates, variable_at)
        for slot, value in found:
            variable = self._variable(region, slot) if isinstance(slot, int) else slot
            if value is not variable.get_raw_value():
                variable.set_raw_value(value)
        for collection, tree in rest.items():
            self._keep(collection, tree)
        return output

    def _run(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rngs, mutable = kwargs.pop("rngs", None), kwargs.pop("mutable", None)
        chosen = kwargs.pop("method", method)
        return self.linsey_call(chosen, args, kwargs, rngs=rngs, mutable=mutable)

    def _held(self, region: Region) -> dict[Path, tuple[Standin, list[nnx.Variable[Any]]]]:
        """The NNX modules in the places of Linen ones, now, with their Variables."""
        graph = self.linsey_spec.graph
        held: dict[Path, tuple[Standin, list[nnx.Variable[Any]]]] = {}

        def walk(host: LinenHost, path: Path) -> None:
            attributes = vars(host)
            for name, number, attribute in _children(host.linsey_spec):
                child = attributes.get(attribute)
                node = graph.nodes[number]
                is_linen = is_hosted(node)
                if isinstance(child, LinenHost) and is_linen and _is_node(child, graph, number):
                    walk(child, (*path, name))
                elif isinstance(child, nnx.Module) and (is_linen or replaces_linen(node)):
                    held[*path, name] = _standin(
                        host.linsey_spec, child, number, region, (*path, name)
                    )

        walk(self, ())
        return held

    def _keys(self, rngs: Any) -> dict[str, Any] | None:
        if rngs is not None:
            return _trees.key_dict(rngs)
        streams = vars(self).get(_RNGS)
        if not isinstance(streams, nnx.Rngs):
            return None
        return _trees.key_dict(streams)

    def _variable(self, region: Region, slot: int) -> nnx.Variable[Any]:
        path = _attribute_paths(region)[slot]
        try:
            value = value_at(self, path)
        except (AttributeError, KeyError, IndexError) as error:
            raise EmitError(
                "the variable is gone from the model",
                path=format_path(path),
                fix="Put a Variable of the same shape back, or emit the program again.",
            ) from error
        if not isinstance(value, nnx.Variable):
            raise EmitError(
                f"found {type(value).__name__}, expected a Variable",
                path=format_path(path),
                fix="Put an nnx Variable there.",
            )
        return value

    def _child(self, path: tuple[str, ...]) -> Any:
        """The NNX module that stands at a scope path now."""
        value: Any = self
        for name in path:
            if not isinstance(value, LinenHost):
                return None
            attribute = names_of(value.linsey_spec).get((None, name))
            value = None if attribute is None else getattr(value, attribute, None)
        return value

    def _value(self, region: Region, slot: int) -> Any:
        return _boxed_value(region.spec.graph, self._variable(region, slot), slot)

    def _extra(self) -> dict[str, Any]:
        """The state that calls made and the graph has no slots for, as Linen variables."""
        return {
            name.removesuffix("__collection"): _raw(value)
            for name, value in vars(self).items()
            if isinstance(value, dict) and not name.startswith("_pytree__")
        }

    def _keep(self, collection: str, tree: dict[str, Any]) -> None:
        taken = collection in vars(self) and not isinstance(vars(self)[collection], dict)
        name = (
            f"{collection}__collection" if taken or _is_reserved(self, collection) else collection
        )
        kind = kind_of_collection(collection)
        old = vars(self).get(name, {})
        setattr(self, name, nnx.data(_variables(kind, tree, old)))

    def linsey_parts(self) -> HostParts:
        """What a frontend sees of it."""
        spec = self.linsey_spec
        names = names_of(spec)
        attributes = vars(self)
        shown = {attribute: place for place, attribute in names.items()}
        children: dict[Key, Any] = {}
        variables: dict[tuple[str, Key], Any] = {}
        for (collection, name), attribute in names.items():
            if attribute in attributes and collection is None:
                children[name] = _seen(spec, name, attributes[attribute])
            elif attribute in attributes and collection is not None:
                variables[collection, name] = attributes[attribute]
        own = {
            name: value
            for name, value in attributes.items()
            if name not in shown and name != SPEC and not name.startswith("_pytree__")
        }
        return HostParts(
            graph=spec.graph, node=spec.node, children=children, variables=variables, own=own
        )

    def linsey_streams(self, rngs: nnx.Rngs) -> None:
        """Gives the model streams of its own, drawn from when a call brings none."""
        setattr(self, _RNGS, rngs)


class LayerView:
    """A native layer that is as it was emitted, as a frontend sees it: the Linen layer that it was.

    Args:
        graph: the graph that it was emitted from.
        node: its node there, or one below.
        variables: its Variables by slot.
    """

    def __init__(self, graph: Graph, node: int, variables: dict[int, nnx.Variable[Any]]) -> None:
        self._graph = graph
        self._node = node
        self._variables = variables

    def linsey_parts(self) -> HostParts:
        """What it holds."""
        node = self._graph.nodes[self._node]
        return HostParts(
            graph=self._graph,
            node=self._node,
            children={
                name: LayerView(self._graph, child, self._variables)
                for name, child in node.children
            },
            variables={
                (self._graph.slots[slot].collection, name): self._variables[slot]
                for name, slot in node.slots
            },
        )


def _seen(spec: HostSpec, name: Key, child: Any) -> Any:
    """A child as a frontend sees it."""
    number = dict(spec.entry.children)[name]
    if not spec.native or not is_hosted(spec.graph.nodes[number]):
        return child
    native = native_layer(spec.graph, number)
    if isinstance(native, Native) and native.is_unchanged(child):
        return LayerView(spec.graph, number, native.slot_variables(child))
    return child


def _call_method(host: LinenHost, name: str, *args: Any, **kwargs: Any) -> Any:
    return host._run(name, args, kwargs)


def _children(spec: HostSpec) -> list[tuple[Key, int, str]]:
    """Name, node and attribute of each child of a host."""
    return spec.cached("children", _find_children)  # type: ignore[no-any-return]


def _find_children(spec: HostSpec) -> list[tuple[Key, int, str]]:
    names = names_of(spec)
    return [(name, number, names[None, name]) for name, number in spec.entry.children]


def _is_node(host: LinenHost, graph: Graph, number: int) -> bool:
    spec = host.linsey_spec
    return spec.node == number and (spec.graph is graph or spec.graph == graph)


def _standin(
    spec: HostSpec, child: Any, number: int, region: Region, path: Path
) -> tuple[Standin, list[nnx.Variable[Any]]]:
    graph = spec.graph
    node = graph.nodes[number]
    native = native_layer(graph, number) if spec.native and is_hosted(node) else None
    if isinstance(native, Native) and native.fits(child):
        return of_native(native, child, node.op)
    op = node.op if is_hosted(node) else replaced_op(node)
    return of_module(child, op, region.lifts, (*region.path, *path))


def _boxed_value(graph: Graph, variable: nnx.Variable[Any], slot: int | None) -> Any:
    """The value of a Variable in the Linen box of its slot, where it has one."""
    entry = None if slot is None else graph.slots[slot]
    if entry is None or entry.box is None:
        return variable.get_raw_value()
    return boxed(entry, variable.get_raw_value(), variable.get_metadata("out_sharding", None))


def _with_extra(region: Region, extra: dict[str, Any], held: Mapping[Path, Any]) -> Any:
    names = [name for name in extra if name != "intermediates"]
    for standin, _ in held.values():
        names += [place.collection for place in standin.places]
    fresh = [name for name in dict.fromkeys(names) if name not in NOT_BY_DEFAULT]
    return list(dict.fromkeys((*region.mutable, *fresh))) or False


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into.setdefault(name, value)


def _raw(tree: Any) -> Any:
    if isinstance(tree, nnx.Variable):
        return tree.get_raw_value()
    return {name: _raw(value) for name, value in tree.items()}


def _variables(kind: Any, tree: Any, old: Any) -> Any:
    if not isinstance(tree, Mapping):
        value = unboxed(tree)
        metadata = {"hijax": False, "ref": False, "eager_sharding": nnx.using_eager_sharding()}
        return kind.from_metadata(value, metadata)
    made = dict(old) if isinstance(old, dict) else {}
    for name, value in tree.items():
        made[name] = _variables(kind, value, made.get(name))
    return made


def _check_not_stacked(region: Region) -> None:
    where, axis = region.spec.cached("outer axis", _outer_axis)
    if axis is not None:
        raise EmitError(
            f"its values are stacked ({axis}) by the transform that"
            f" {format_path(axis.owner) or 'the root'} runs",
            path=format_path(where),
            fix="Call the module that runs the transform; it gives this one its slices.",
        )


def _outer_axis(spec: HostSpec) -> tuple[Path, StackAxis | None]:
    """The path of a node, and an axis that a transform above it stacks its values by."""
    where = node_paths(spec.graph)[spec.node]
    for slot, _, _ in Region.of(spec).slots:
        for axis in spec.graph.slots[slot].stack:
            if axis.owner[: len(where)] != where:
                return where, axis
    return where, None


def _is_reserved(host: LinenHost, name: str) -> bool:
    return name in (_RNGS, SPEC) or hasattr(LinenHost, name) or _is_method(host, name)


def _is_method(host: LinenHost, name: str) -> bool:
    return callable(getattr(_linen_class(host.linsey_spec), name, None))


def _linen_class(spec: HostSpec) -> type[linen.Module]:
    """The class of a node's Linen module; the base class for a node that was never called."""
    source = spec.entry.source
    return linen.Module if source is None else spec.cached("class", lambda _: decode(source.cls))


def attribute_names(spec: HostSpec) -> dict[tuple[str | None, Key], str]:
    """Under which attribute each child (None, name) and variable (collection, name) is kept."""
    node = spec.entry
    cls = _linen_class(spec)
    taken: set[str] = set()
    names: dict[tuple[str | None, Key], str] = {}
    children: list[tuple[str | None, Key]] = [(None, name) for name, _ in node.children]
    slots = [(spec.graph.slots[slot].collection, name) for name, slot in node.slots]
    for collection, name in [*children, *sorted(slots, key=lambda item: item[0] != "params")]:
        plain = str(name)
        reserved = plain in (_RNGS, SPEC) or hasattr(LinenHost, plain)
        is_method = callable(getattr(cls, plain, None)) and plain not in _fields(cls)
        if reserved or is_method or plain in taken or plain.startswith("_pytree__"):
            plain = f"{plain}__{collection or 'module'}"
        taken.add(plain)
        names[collection, name] = plain
    return names


def _fields(cls: type) -> set[str]:
    return set(getattr(cls, "__dataclass_fields__", ()))


def names_of(spec: HostSpec) -> dict[tuple[str | None, Key], str]:
    """The attribute of each child and variable of a host; see `attribute_names`."""
    return spec.cached("names", attribute_names)  # type: ignore[no-any-return]


def _attribute_paths(region: Region) -> dict[int, tuple[Key, ...]]:
    return region.spec.cached("attributes", _find_attributes)  # type: ignore[no-any-return]


def _find_attributes(spec: HostSpec) -> dict[int, tuple[Key, ...]]:
    """The way from a host to the Variable of each slot, by attributes."""
    return dict(Plan(spec.graph, spec.node, native=spec.native).slots)
