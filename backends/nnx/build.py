"""Builds NNX objects from a graph and reads their state back.

A `Plan` is made once per node; `Plan.build` then makes fresh objects inside whatever trace it is
called in, with no constructor and no flattening.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from linsey import _trees
from linsey._places import layout, linen_slots, real_keys
from linsey.backends import _private
from linsey.backends._decode import kind_of, linen_module, metadata_of
from linsey.backends._spec import HostSpec
from linsey.backends.nnx.native import Native, Part, native_layer
from linsey.backends.nnx.nodes import is_hosted
from linsey.ir import (
    Decoder,
    EmitError,
    Graph,
    Key,
    Node,
    Path,
    Template,
    decode,
    format_path,
)
from linsey.ir import (
    Sequence as SequenceAttr,
)
from linsey.ir.reserved import KEYS, NAMES, NODES, STATE, TREE

# A call may add Variables (sow does); these two attributes keep track of that.
_BOOKKEEPING = frozenset({NODES, STATE})

_CHILD, _VARIABLE, _RAW, _STATIC = range(4)


class _Entry:
    """What one node is built from."""

    __slots__ = (
        *("cls", "is_object", "is_wrapper", "items", "keys", "linen", "native", "state", "tree"),
    )

    def __init__(self) -> None:
        self.cls: Any = None
        self.is_object = True
        self.is_wrapper = False
        self.state: tuple[bool, bool] | None = None
        self.items: list[tuple[Key, int, Any]] = []
        self.tree: Template | None = None
        self.keys: tuple[Key, ...] = ()
        self.native: Native | None = None
        """What makes it, for a Linen layer that is one of NNX's own."""
        self.linen: list[tuple[Path, int]] = []
        """The variables of a wrapped Linen module: attribute path in the wrapper, and slot."""


class Plan:
    """How to build one node, and all below it, as NNX objects.

    Args:
        graph: the graph.
        root: the node.
        native: whether Linen layers are made as NNX's own where they can be.
        of_root: how the node itself is made so; None: it is hosted.
    """

    def __init__(
        self, graph: Graph, root: int, *, native: bool = False, of_root: Native | None = None
    ) -> None:
        self.graph = graph
        self.root = root
        self._native = native
        self._of_root = of_root
        self._entries: dict[int, _Entry] = {}
        self._kinds: dict[int, tuple[type[nnx.Variable[Any]], dict[str, Any]]] = {}
        self._decode = Decoder()  # an object that two modules hold stays one object
        self.slots: dict[int, Path] = {}
        """Each slot below the root, with its path from there."""
        self._prepare(root, ())

    def _prepare(self, number: int, path: Path) -> None:
        if number in self._entries:
            return
        node = self.graph.nodes[number]
        entry = self._entries[number] = _Entry()
        if self._native and is_hosted(node) and node.source is not None:
            is_root = number == self.root
            found = self._of_root if is_root else native_layer(self.graph, number)
            if isinstance(found, Native):
                self._prepare_native(entry, found, path)
                return
        if is_hosted(node):
            self._prepare_host(entry, number, node, path)
            return
        assert node.source is not None
        if node.source.dialect == "linen":
            self._prepare_wrapper(entry, number, node, path)
            return
        entry.cls = decode(node.source.cls)
        impl = _private.get_node_impl_for_type(entry.cls)
        entry.is_object = isinstance(impl, _private.GraphNodeImpl)
        for name, value in node.attrs:
            if name == STATE:
                entry.state = decode(value)
            elif name == TREE:
                assert isinstance(value, Template)
                entry.tree = value
            elif name == KEYS:
                assert isinstance(value, SequenceAttr)
                entry.keys = decode(value)
            elif name == NAMES:
                continue
            else:
                entry.items.append((name, _STATIC, self._decode(value)))
        self._prepare_held(entry, node.children, node.slots, path, real_keys(node))

    def _prepare_native(self, entry: _Entry, native: Native, path: Path) -> None:
        """A Linen layer that is one of NNX's own."""
        entry.native = native
        entry.cls = native.cls
        for part in native.parts:
            if len(part.slots) == 1:
                self.slots.setdefault(part.slots[0], (*path, *part.path))

    def _prepare_host(self, entry: _Entry, number: int, node: Node, path: Path) -> None:
        """Linen code that no wrapper of the source holds: a LinenHost."""
        from linsey.backends.nnx.host import SPEC, LinenHost, names_of  # builds on this file

        spec = HostSpec(self.graph, number, self._native)
        names = names_of(spec)
        entry.cls = LinenHost
        entry.items.append((SPEC, _STATIC, spec))
        entry.state = (False, False)
        for name, slot in node.slots:
            attribute = names[self.graph.slots[slot].collection, name]
            entry.items.append((attribute, self._slot(slot, (*path, attribute)), slot))
        for name, child in node.children:
            attribute = names[None, name]
            entry.items.append((attribute, _CHILD, child))
            # Each NNX module in Linen code was lowered with numbers of its own for shared objects.
            decode_here, self._decode = self._decode, Decoder()
            self._prepare(child, (*path, attribute))
            self._decode = decode_here
        if node.wrapper is not None:  # streams, and state that calls made
            self._prepare_held(entry, node.wrapper.children, node.wrapper.slots, path, {})
        is_data = {str(attribute): kind != _STATIC for attribute, kind, _ in entry.items}
        nodes = LinenHost._pytree__nodes.update(is_data)
        entry.items.append((NODES, _STATIC, nodes))
        entry.items.sort(key=lambda item: _order(item[0]))

    def _prepare_held(
        self,
        entry: _Entry,
        children: tuple[tuple[Key, int], ...],
        slots: tuple[tuple[Key, int], ...],
        path: Path,
        names: Mapping[Key, Any],
    ) -> None:
        for key, slot in slots:
            name = names.get(key, key)
            entry.items.append((name, self._slot(slot, (*path, name)), slot))
        for key, child in children:
            name = names.get(key, key)
            entry.items.append((name, _CHILD, child))
            self._prepare(child, (*path, name))
        entry.items.sort(key=lambda item: _order(item[0]))

    def _slot(self, number: int, path: Path) -> int:
        slot = self.graph.slots[number]
        self.slots.setdefault(number, path)
        if slot.raw:
            return _RAW
        if number not in self._kinds:
            self._kinds[number] = (kind_of(slot), metadata_of(slot))
        return _VARIABLE

    def _prepare_wrapper(self, entry: _Entry, number: int, node: Node, path: Path) -> None:
        """A Linen module inside a ToNNX of the source: that ToNNX is built again."""
        assert node.wrapper is not None
        entry.is_wrapper = True
        entry.cls = decode(node.wrapper.cls)
        for name, value in node.wrapper.attrs:
            if name == STATE:
                entry.state = decode(value)
            else:
                entry.items.append((name, _STATIC, self._decode(value)))
        hold = getattr(entry.cls, "linsey_hold", lambda module: ("to_nnx__module", module))
        name, held = hold(linen_module(self.graph, number))
        entry.items.append((name, _STATIC, held))
        self._prepare_held(entry, node.wrapper.children, node.wrapper.slots, path, {})
        place_of = layout(node.wrapper)
        for below, slot in linen_slots(self.graph, number):
            if self.graph.slots[slot].is_derived:
                continue  # PRNG state in a ToLinen below: flax stores it nowhere
            place = place_of(self.graph.slots[slot].collection, below)
            self._slot(slot, (*path, *place))
            entry.linen.append((place, slot))

    def build(self, values: Sequence[Any]) -> Any:
        """Builds the objects.

        Args:
            values: a value per slot of the graph, in slot order.
        """
        return self._make(self.root, values, {}, {})

    def _make(
        self, number: int, values: Sequence[Any], made: dict[int, Any], variables: dict[int, Any]
    ) -> Any:
        if number in made:
            return made[number]
        entry = self._entries[number]
        if entry.native is not None:
            native = entry.native
            made[number] = native.make(
                lambda part: self._native_variable(native, part, values, variables)
            )
            return made[number]
        if entry.tree is not None:
            parts = {
                name: item if kind == _STATIC else self._item(kind, item, values, made, variables)
                for name, kind, item in entry.items
            }
            return _trees.fill(entry.tree, [parts[key] for key in entry.keys])
        if not entry.is_object:
            return self._container(entry, values, made, variables)
        obj: Any = object.__new__(entry.cls)
        made[number] = obj
        attributes = vars(obj)
        for name, kind, item in entry.items:
            attributes[name if type(name) is str else str(name)] = (
                item if kind == _STATIC else self._item(kind, item, values, made, variables)
            )
        for below, slot in entry.linen:
            holder = attributes
            for name in below[:-1]:
                holder = holder.setdefault(name, {})
            holder[below[-1]] = self._variable(slot, values, variables)
        if entry.state is not None:
            attributes[STATE] = _private.PytreeState(*entry.state)
        return obj

    def _item(
        self,
        kind: int,
        item: Any,
        values: Sequence[Any],
        made: dict[int, Any],
        variables: dict[int, Any],
    ) -> Any:
        if kind == _CHILD:
            return self._make(item, values, made, variables)
        return values[item] if kind == _RAW else self._variable(item, values, variables)

    def _variable(self, slot: int, values: Sequence[Any], variables: dict[int, Any]) -> Any:
        if slot not in variables:
            kind, metadata = self._kinds[slot]
            variables[slot] = kind.from_metadata(values[slot], dict(metadata))
        return variables[slot]

    def _native_variable(
        self, native: Native, part: Part, values: Sequence[Any], variables: dict[int, Any]
    ) -> Any:
        if len(part.slots) > 1:
            return native.variable(part, part.join([values[slot] for slot in part.slots]))
        (slot,) = part.slots
        if slot not in variables:
            variables[slot] = native.variable(part, values[slot])
        return variables[slot]

    def _container(
        self,
        entry: _Entry,
        values: Sequence[Any],
        made: dict[int, Any],
        variables: dict[int, Any],
    ) -> Any:
        parts = [
            (name, item if kind == _STATIC else self._item(kind, item, values, made, variables))
            for name, kind, item in entry.items
        ]
        impl = _private.get_node_impl_for_type(entry.cls)
        assert impl is not None
        assert not isinstance(impl, _private.GraphNodeImpl)
        return impl.unflatten(parts, None)

    def read(self, obj: Any, values: Sequence[Any], *, strict: bool = True) -> list[Any]:
        """The state of built objects after a call.

        Args:
            obj: what `build` gave.
            values: what it was given.
            strict: whether a change of structure is an error; otherwise a slot that is gone keeps
                its value.

        Returns:
            A value per slot of the graph; an unchanged one is the very object in `values`.

        Raises:
            EmitError: the call changed the structure: an attribute went, or a static one changed.
        """
        out, changes = self.read_changes(obj, values)
        if changes and strict:
            raise changes[0]
        return out

    def read_changes(self, obj: Any, values: Sequence[Any]) -> tuple[list[Any], list[EmitError]]:
        """As `read`, with what changed of the structure but for attributes that are new."""
        out = list(values)
        return out, list(self._read(self.root, obj, out, set(), ()))

    def has_grown(self, obj: Any) -> bool:
        """Whether any of the objects has attributes that it was not built with."""
        seen: set[int] = set()

        def grown(number: int, obj: Any) -> bool:
            if number in seen:
                return False
            seen.add(number)
            entry = self._entries[number]
            if entry.tree is not None or not entry.is_object:
                impl = _private.get_node_impl(obj)
                parts: Any = impl.node_dict(obj) if impl is not None else {}
                count = len(entry.items)
            else:
                parts = vars(obj)
                tops = {place[0] for place, _ in entry.linen}
                count = len(entry.items) + len(tops) + (entry.state is not None)
                if sum(_leaves(parts.get(top)) for top in tops) != len(entry.linen):
                    return True
            if len(parts) != count:
                return True
            text = entry.is_object and entry.tree is None
            return any(
                grown(item, parts[str(name) if text else name])
                for name, kind, item in entry.items
                if kind == _CHILD and (str(name) if text else name) in parts
            )

        return grown(self.root, obj)

    def _read(
        self, number: int, obj: Any, out: list[Any], seen: set[int], path: Path
    ) -> Iterator[EmitError]:
        """Reads into `out`, and gives each change of structure as an error."""
        if number in seen:
            return
        seen.add(number)
        entry = self._entries[number]
        if entry.tree is not None or not entry.is_object:
            impl = _private.get_node_impl(obj)
            parts: Any = impl.node_dict(obj) if impl is not None else {}
        else:
            parts = vars(obj)
        for name, kind, item in entry.items:
            where = (*path, name)
            key = str(name) if entry.is_object and entry.tree is None else name
            if key not in parts:
                yield _changed(where, "is gone")
                continue
            value = parts[key]
            if kind == _CHILD:
                child = self._entries[item]
                if child.tree is None and type(value) is not child.cls:
                    became = type(value).__name__
                    yield _changed(where, f"was a {child.cls.__name__} and became a {became}")
                else:
                    yield from self._read(item, value, out, seen, where)
            elif kind == _STATIC:
                if name in _BOOKKEEPING:
                    continue
                if value is not item and not _equal(value, item):
                    yield _changed(where, f"was {item!r} and became {value!r}")
            elif kind == _VARIABLE:
                if not isinstance(value, nnx.Variable):
                    yield _changed(where, f"was a Variable and became {type(value).__name__}")
                else:
                    out[item] = value.get_raw_value()
            else:
                out[item] = value
        for below, slot in entry.linen:
            holder: Any = parts
            for name in below:
                holder = holder[name]
            out[slot] = holder.get_raw_value()


def _leaves(value: Any) -> int:
    """How many leaves nested dicts have."""
    return sum(map(_leaves, value.values())) if isinstance(value, Mapping) else 1


def _order(key: Any) -> tuple[int, Any]:
    """NNX sorts integers before names; anything else goes last."""
    if isinstance(key, int | str):
        return int(isinstance(key, str)), key
    return 2, repr(key)


def _equal(first: Any, second: Any) -> bool:
    try:
        return bool(first == second)
    except Exception:
        return False


def _changed(path: Path, what: str) -> EmitError:
    return EmitError(
        f"the call changed the structure of the module: this attribute {what}",
        path=format_path(path),
        fix="Keep what a call changes in Variables; change structure outside of compiled calls.",
    )
