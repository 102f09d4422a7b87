"""Walks an NNX module and turns it into nodes and slots."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx import bridge

from linsey import _trees
from linsey._collections import collection_of
from linsey._layers import op_of
from linsey._layers.replaced import replaces_linen
from linsey._lifts import Lifts, fits_stack
from linsey.frontends import _private
from linsey.frontends._builder import Builder, Draft
from linsey.frontends._encode import FlaxEncoder, nnx_variable
from linsey.ir import (
    Const,
    Graph,
    Host,
    HostParts,
    Key,
    LoweringError,
    Node,
    Path,
    Sequence,
    Slot,
    Source,
    StackAxis,
    Wrapper,
    as_key,
    decode,
    encode,
    format_path,
    is_host,
    node_paths,
)
from linsey.ir.reserved import KEYS, LIFTED, NAMES, NODES, STATE, TREE

_MAX_ALIASES = 8

Named = Iterable[tuple[Key, int]]
"""Slots or children of a node: name and index."""
SlotOf = Callable[[nnx.Variable[Any], Path], int | None]


class Walker:
    """Adds the nodes and slots of one NNX module to a graph in the making.

    Args:
        builder: the graph.
        slot_of: gives the slot of a variable that has one already, by the variable and its path
            below the module; None makes one.
        nested: what was observed of the ToNNX wrappers inside, by their id.
    """

    def __init__(
        self,
        builder: Builder,
        slot_of: SlotOf | None = None,
        nested: dict[int, tuple[Any, Any]] | None = None,
    ) -> None:
        self._builder = builder
        self._slot_of = slot_of
        self._nested = nested or {}
        self.objects: dict[int, tuple[Any, int, Path]] = {}
        """Every object of NNX that was met, by its id: the object, its node and its path."""
        self.slots: dict[int, tuple[Any, int]] = {}
        """Every Variable that was met, by its id: the Variable and its slot."""
        self._start: Path = ()
        self.values: dict[int, Any] = {}
        """The value of each slot that was met."""
        self.encode = FlaxEncoder()

    def add(self, module: Any, path: Path, at: int | None = None) -> int:
        """Adds a module and all that it holds, and gives its node.

        Args:
            module: the module, or another graph node or pytree of NNX.
            path: its path in the graph.
            at: the node that it becomes; None adds one.

        Raises:
            LoweringError: something in it cannot be lowered, with its path.
        """
        self._start = path
        return self._node(module, path, at)

    def _node(self, obj: Any, path: Path, at: int | None = None) -> int:
        known = self.objects.get(id(obj))
        if known is not None:
            self._alias(known[1], known[2], path)
            return known[1]
        number = self._builder.add(Draft()) if at is None else at
        impl = _private.get_node_impl(obj)
        if isinstance(impl, _private.GraphNodeImpl):
            self.objects[id(obj)] = (obj, number, path)
        if isinstance(obj, bridge.ToNNX):
            self._linen(obj, path, number)
        elif is_host(obj):
            self._host(obj, path, number)
        else:
            self._fill(obj, impl, path, number)
        return number

    def _fill(self, obj: Any, impl: Any, path: Path, number: int) -> None:
        draft = self._builder.nodes[number]
        is_object = isinstance(impl, _private.GraphNodeImpl)
        draft.op = op_of("nnx", type(obj)) if is_object else "container"
        draft.source = Source(dialect="nnx", cls=self.encode(type(obj)))
        items, metadata = impl.flatten(obj)
        if isinstance(metadata, _private.IndexesPytreeDef):
            order = sorted(metadata.key_index, key=lambda key: metadata.key_index[key])
            draft.attrs.append((TREE, _trees.template(metadata.treedef)))
            keys = Sequence(kind="tuple", items=tuple(Const(as_key(key)) for key in order))
            draft.attrs.append((KEYS, keys))
        odd = [key for key, _ in items if type(key) not in (str, int)]
        if odd and not isinstance(metadata, _private.IndexesPytreeDef):
            named = {as_key(key): key for key in odd}
            draft.attrs.append((NAMES, self.encode(named)))
        for key, value in items:
            self._item(draft, as_key(key), value, (*path, as_key(key)))
        if isinstance(obj, nnx.RngStream):
            held = dict(draft.slots)
            if {"key", "count"} <= held.keys():
                self._builder.counted_stream(draft, str(obj.tag), held["key"], held["count"])

    def _item(self, draft: Draft, key: Key, value: Any, path: Path) -> None:
        is_data: bool | None = None
        if isinstance(value, _private.DataElem | _private.StaticElem):
            is_data = isinstance(value, _private.DataElem)
            value = value.value
        if key == STATE:
            draft.attrs.append((key, encode((value.initializing, value.is_setup))))
        elif key == NODES:  # what was set first is no part of the structure
            draft.attrs.append((key, self.encode(type(value)(dict(sorted(value.items()))))))
        elif is_data is False:
            draft.attrs.append((key, self.encode(value)))
        elif isinstance(value, nnx.Variable):
            if not self._is_sown(value, path):
                draft.slots.append((key, self._variable(value, path)))
        elif _private.get_node_impl(value) is not None:
            draft.children[key] = self._node(value, path)
        elif isinstance(value, jax.Array | np.ndarray) or is_data:
            draft.slots.append((key, self._raw(value, path)))
        else:
            draft.attrs.append((key, self.encode(value)))

    def _is_sown(self, variable: nnx.Variable[Any], path: Path) -> bool:
        """Whether the call of a ToLinen that was observed made a variable: it is none of its."""
        if self._slot_of is None or isinstance(variable, nnx.RngState):
            return False
        below = path[len(self._start) :]
        return id(variable) not in self.slots and self._slot_of(variable, below) is None

    def _variable(self, variable: nnx.Variable[Any], path: Path, place: Path | None = None) -> int:
        """The slot of a variable; `place`: its attribute path, where that is another."""
        known = self.slots.get(id(variable))
        if known is not None:
            self._add_path(known[1], path)
            return known[1]
        if variable.get_metadata("ref", False) or variable.get_metadata("hijax", False):
            raise LoweringError(
                "found a Variable that holds a mutable reference or a hijax value",
                path=format_path(path),
                fix="Construct the model without ref=True and hijax=True.",
            )
        value = variable.get_raw_value()
        below = (path if place is None else place)[len(self._start) :]
        number = self._slot_of(variable, below) if self._slot_of else None
        try:
            slot = nnx_variable(variable, (path,), self.encode)
        except TypeError as error:
            raise LoweringError(
                f"{error} in a {type(variable).__name__}",
                path=format_path(path),
                fix="Keep in Variables only arrays, numbers and pytrees of them.",
            ) from error
        if number is None:
            if self._slot_of is not None:  # inside a ToLinen: flax derives it at every call
                slot = dataclasses.replace(slot, lifetime="ephemeral")
            number = self._builder.add_slot(slot)
        else:
            stored = self._builder.slots[number]
            self._builder.slots[number] = dataclasses.replace(
                stored, kind=slot.kind, metadata=slot.metadata
            )
        self.slots[id(variable)] = (variable, number)
        self.values[number] = value
        return number

    def _raw(self, value: Any, path: Path) -> int:
        # A bare array has no identity in NNX: each place is a leaf of its own.
        try:
            kind = _trees.tensor_type(value)
        except TypeError as error:
            raise LoweringError(
                f"{error} as data",
                path=format_path(path),
                fix="Mark it nnx.static(...), or give an array.",
            ) from error
        number = self._builder.add_slot(
            Slot(collection="arrays", paths=(path,), type=kind, raw=True)
        )
        self.values[number] = value
        return number

    def _linen(self, wrapper: bridge.ToNNX, path: Path, number: int) -> None:
        """Adds what a ToNNX wraps, in its place."""
        import linsey.frontends.linen.build as linen_build
        from linsey.frontends.linen.observe import Observer

        impl: Any = _private.get_node_impl(wrapper)
        items, _ = impl.flatten(wrapper)
        variables = wrapped_variables(wrapper)
        kept = _own_attributes(wrapper)
        own = Draft()
        for key, element in items:
            if key in kept:
                self._item(own, key, element, (*path, key))
        draft = self._builder.nodes[number]
        module = self.encode.module(wrapper.to_nnx__module)
        draft.op = "module"
        draft.source = Source(dialect="linen", cls=module.cls)
        draft.attrs.extend(module.fields)
        draft.wrapper = Wrapper(
            cls=self.encode(type(wrapper)),
            attrs=tuple(own.attrs),
            children=tuple(own.children.items()),
            slots=tuple(own.slots),
        )
        observer: Observer = self._nested.get(id(wrapper), (None, Observer()))[1]
        if any(not hasattr(inner, "linsey_variables") for inner, _ in observer.nested):
            raise LoweringError(
                "found a ToNNX inside a ToLinen inside a ToNNX: flax cannot initialise or call it",
                path=format_path(path),
                fix="Hold the inner Linen module without wrappers, in the Linen module above.",
            )
        if () in observer.modules and observer.modules[()].nnx is not None:
            raise LoweringError(
                "found a ToLinen with nothing between it and the ToNNX around it",
                path=format_path(path),
                fix="Use the NNX module as it is: it needs neither.",
            )
        region = linen_build.Region(self._builder, number, path, observer)
        graphdefs = dict(vars(wrapper).get("to_nnx__graphdefs", ()))
        region.graphdefs = {where[:-1]: graphdef for where, graphdef in graphdefs.items()}
        region.add_modules()
        moved = region.slot_paths()
        slots: dict[tuple[str, Path], int] = {}
        for below, place, variable in variables:
            linen_place = (collection_of(type(variable)), below)
            own_path = (*path, *moved.get(linen_place, below))
            slot = slots[linen_place] = self._variable(variable, own_path, (*path, *place))
            if not region.is_inside_nnx(below):
                region.bind(below, slot)
        region.add_nnx(lambda collection, below: slots.get((collection, below)))
        if observer.entry is not None:
            stacks = linen_build.observed_stacks(wrapper.to_nnx__module, observer.entry)
            for linen_place, stack in stacks.items():
                if linen_place in slots:
                    self._stack(slots[linen_place], path, stack)

    def _stack(self, number: int, path: Path, stack: tuple[StackAxis, ...]) -> None:
        """Gives a slot the axes that Linen code below `path` stacks it by."""
        placed = tuple(dataclasses.replace(axis, owner=(*path, *axis.owner)) for axis in stack)
        slot = dataclasses.replace(self._builder.slots[number], stack=placed)
        self._builder.slots[number] = slot

    def _host(self, host: Host, path: Path, number: int) -> None:
        """Adds the node that an emitted module was emitted from, as it is now."""
        parts = host.linsey_parts()
        was = parts.graph.nodes[parts.node]
        draft = self._builder.nodes[number]
        draft.op, draft.source = was.op, was.source
        draft.attrs = list(was.attrs)
        draft.signatures = list(was.signatures)
        self._restore_streams(draft, parts.graph, was)
        indices = {(parts.graph.slots[slot].collection, name): slot for name, slot in was.slots}
        for (collection, name), variable in parts.variables.items():
            slot = self._variable(variable, (*path, name))
            self._restore(slot, parts.graph.slots[indices[collection, name]], variable)
            draft.slots.append((name, slot))
        known = dict(was.children)
        for name, child in parts.children.items():
            draft.children[name] = self._node(child, (*path, name))
            if name in known and _is_replaced(child, parts, known[name]):
                self._replaced(draft.children[name], (*path, name), parts, known[name])
            elif not is_host(child) and name in known:
                self._restore_below(draft.children[name], parts.graph, known[name])
        if parts.own:
            own = Draft()
            for attribute, value in parts.own.items():
                self._item(own, attribute, value, (*path, attribute))
            draft.wrapper = Wrapper(
                cls=self.encode(type(host)),
                children=tuple(own.children.items()),
                slots=tuple(own.slots),
            )

    def _restore(self, number: int, was: Slot, variable: nnx.Variable[Any]) -> None:
        """Gives a slot back what an NNX Variable does not carry: its Linen box and stack."""
        now = self._builder.slots[number]
        names = variable.get_metadata("out_sharding", None)
        same = was.partition is None or names == decode(was.partition.spec)
        self._builder.slots[number] = dataclasses.replace(
            now,
            collection=was.collection,
            kind=was.kind,
            stack=_moved_stack(was, now),
            metadata=was.metadata,
            partition=was.partition if same else now.partition,
            lifetime=was.lifetime,
            box=was.box,
        )

    def _restore_below(self, number: int, graph: Graph, was: int) -> None:
        """The same for an NNX child, and all below it that is still there."""
        draft, node = self._builder.nodes[number], graph.nodes[was]
        self._restore_streams(draft, graph, node)  # a ToLinen draws from Linen's streams
        own, wrapper = draft.wrapper, node.wrapper
        if own is None:  # that of a ToNNX is here again, that of a ToLinen is not
            draft.wrapper = wrapper
        elif wrapper is not None:
            self._restore_slots(own.slots, graph, wrapper.slots)
            self._restore_children(own.children, graph, wrapper.children)
        self._restore_slots(draft.slots, graph, node.slots)
        self._restore_children(tuple(draft.children.items()), graph, node.children)

    def _replaced(self, number: int, path: Path, parts: HostParts, was: int) -> None:
        """Notes that an NNX module stands where Linen code calls a module of its own."""
        draft, node = self._builder.nodes[number], parts.graph.nodes[was]
        assert node.source is not None
        lifts, place = Lifts(parts.graph), node_paths(parts.graph)[was]
        base = path[: len(path) - len(place)]
        if node.source.dialect == "linen":
            passed = lifts.passed(place)
            more = ((LIFTED, encode(passed)),) if passed else ()
            draft.wrapper = Wrapper(cls=node.source.cls, attrs=(*node.attrs, *more))
        else:
            draft.wrapper = node.wrapper
        draft.signatures = list(node.signatures)
        self._restore_streams(draft, parts.graph, node, uses=("call",))
        for slot in self._slots_below(number):
            found = self._builder.slots[slot]
            stack = lifts.stack(place, found.collection)
            if not found.stack and fits_stack(found.type, stack):
                stack = tuple(dataclasses.replace(a, owner=(*base, *a.owner)) for a in stack)
                self._builder.slots[slot] = dataclasses.replace(found, stack=stack)

    def _slots_below(self, number: int) -> list[int]:
        found: dict[int, None] = {}
        seen: set[int] = set()
        todo = [number]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                found.update(dict.fromkeys(slot for _, slot in self._builder.nodes[node].slots))
                todo.extend(self._builder.nodes[node].children.values())
        return list(found)

    def _restore_streams(
        self, draft: Draft, graph: Graph, node: Node, uses: tuple[str, ...] = ("call", "init")
    ) -> None:
        """Notes the streams of Linen that a node draws from."""
        for name, index in node.streams:
            stream = graph.streams[index]
            if stream.derivation == "path" and stream.use in uses:
                self._builder.path_stream(draft, name, at_call=stream.use == "call")

    def _restore_slots(self, slots: Named, graph: Graph, were: Named) -> None:
        before = dict(were)
        for name, slot in slots:
            if name in before:
                now, old = self._builder.slots[slot], graph.slots[before[name]]
                self._builder.slots[slot] = dataclasses.replace(
                    now, box=old.box, stack=_moved_stack(old, now), lifetime=old.lifetime
                )

    def _restore_children(self, children: Named, graph: Graph, were: Named) -> None:
        before = dict(were)
        for name, child in children:
            if name in before:
                self._restore_below(child, graph, before[name])

    def _alias(self, number: int, first: Path, path: Path) -> None:
        """Notes that a node, and so every slot below it, is also found at another path."""
        seen: set[int] = set()
        todo = [number]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            draft = self._builder.nodes[node]
            for _, slot in draft.slots:
                canonical = self._builder.slots[slot].path
                if canonical[: len(first)] == first:
                    self._add_path(slot, (*path, *canonical[len(first) :]))
            todo.extend(draft.children.values())

    def _add_path(self, number: int, path: Path) -> None:
        slot = self._builder.slots[number]
        if path not in slot.paths and len(slot.paths) < _MAX_ALIASES:
            paths = (*slot.paths, path)
            self._builder.slots[number] = dataclasses.replace(slot, paths=paths)


def _is_replaced(child: Any, parts: HostParts, was: int) -> bool:
    """Whether a child of Linen code is no longer the Linen module that the code makes there."""
    node = parts.graph.nodes[was]
    if node.source is None or not (isinstance(child, nnx.Module) or is_host(child)):
        return False
    if node.source.dialect != "linen":  # replaced before, or in a ToLinen
        return replaces_linen(node)
    if not is_host(child):
        return True
    here = child.linsey_parts()
    if here.node == was and (here.graph is parts.graph or here.graph == parts.graph):
        return False
    raise LoweringError(
        "found Linen code of another program in the place of a Linen module",
        path=str(here.graph.nodes[here.node].source),
        fix="Hold it in an nnx.Module of your own, and put that in its place.",
    )


def _moved_stack(was: Slot, now: Slot) -> tuple[StackAxis, ...]:
    """The stack of a slot whose module now stands elsewhere: its owners moved with it."""
    base = now.path[: len(now.path) - len(was.path)]
    return tuple(dataclasses.replace(axis, owner=(*base, *axis.owner)) for axis in was.stack)


def wrapped_variables(wrapper: Any) -> list[tuple[Path, Path, nnx.Variable[Any]]]:
    """The Linen variables of a ToNNX: path in Linen, attribute path, Variable."""
    if hasattr(wrapper, "linsey_variables"):
        place = functools.partial(type(wrapper).linsey_place, vars(wrapper))
        found = wrapper.linsey_variables()
        return [(below, place(collection, below), leaf) for collection, below, leaf in found]
    own = _own_attributes(wrapper)
    return [
        (below, below, leaf)
        for name, value in sorted(vars(wrapper).items())
        if name not in own and name != "to_nnx__module"
        for below, leaf in _flat_variables(value, (name,))
    ]


def _own_attributes(wrapper: Any) -> set[str]:
    """The attributes of a ToNNX that hold neither Linen variables nor the Linen module."""
    if hasattr(wrapper, "linsey_own"):
        return set(wrapper.linsey_own())
    return {
        name
        for name, value in vars(wrapper).items()
        if name != "to_nnx__module"
        and (name.startswith(("to_nnx__", "_pytree__")) or not _holds_variables(value))
    }


def _holds_variables(value: Any) -> bool:
    if isinstance(value, nnx.Variable):
        return True
    return isinstance(value, dict) and all(map(_holds_variables, value.values()))


def _flat_variables(value: Any, path: Path) -> Iterator[tuple[Path, nnx.Variable[Any]]]:
    if isinstance(value, nnx.Variable):
        yield path, value
        return
    for key in sorted(value):
        yield from _flat_variables(value[key], (*path, key))
