"""Turns what an `Observer` saw of Linen code into nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen, nnx

import linsey.frontends.nnx.build as nnx_build
from linsey import _trees
from linsey._collections import EPHEMERAL, collection_of, unboxed
from linsey._layers import op_of
from linsey._places import stored_path
from linsey.frontends import _private
from linsey.frontends._builder import Builder
from linsey.frontends._encode import (
    FlaxEncoder,
    linen_variable,
)
from linsey.frontends.linen.observe import (
    Call,
    LinenPath,
    Module,
    Observer,
    StackBox,
    observing,
)
from linsey.ir import (
    Attrs,
    Encoder,
    LoweringError,
    Path,
    Signature,
    Slot,
    Source,
    StackAxis,
    TensorType,
    Wrapper,
    as_key,
    format_path,
)
from linsey.ir.reserved import GRAPH_COLLECTION, GRAPHDEF

SlotAt = Callable[[str, Path], int | None]
"""Gives the slot of a variable by collection and path below the region's root, or None."""


class Region:
    """One connected piece of Linen code, whose root is a node of the graph.

    Args:
        builder: the graph in the making.
        root: the node of the region's outermost module.
        prefix: path of that node in the graph.
        observer: what was seen of the region.
    """

    def __init__(self, builder: Builder, root: int, prefix: Path, observer: Observer) -> None:
        self._builder = builder
        self._root = root
        self._prefix = prefix
        self._observer = observer
        self._node_of: dict[LinenPath, int] = {}
        self.graphdefs: dict[Path, Any] = {}
        """The graphdefs that linsey's ToLinen stored, by scope path."""
        self.encode = FlaxEncoder(self._bound_node)

    def _bound_node(self, module: linen.Module) -> int | None:
        return None if module.scope is None else self._node_of.get(module.scope.path)

    def add_modules(self) -> None:
        """Adds a node for every module that was called."""
        paths = list(self._observer.modules)
        for path in paths:
            self._node_of[path] = self._builder.at(self._root, path)
        for path in paths:
            self._fill(self._node_of[path], path, self._observer.modules[path])

    def _fill(self, number: int, path: LinenPath, seen: Module) -> None:
        draft = self._builder.nodes[number]
        for stream, at_call in seen.draws.items():
            self._builder.path_stream(draft, stream, at_call=at_call)
        if seen.nnx is not None:
            return  # its node is that of the NNX module; `add_nnx` fills it
        draft.op = op_of("linen", type(seen.instance))
        if path:  # the root's class and attributes are those of the module that the user gave
            draft.source = Source(dialect="linen", cls=self.encode(type(seen.instance)))
            draft.attrs.extend(self.encode.fields(seen.instance))
        draft.signatures.extend(signature(call, self.encode) for call in seen.calls.values())

    def add_nnx(self, slot_at: SlotAt) -> None:
        """Adds the nodes of the NNX modules that ToLinen wrappers made."""
        for path, seen in self._observer.modules.items():
            if seen.nnx is None:
                continue
            number, inner = self._node_of[path], (*self._prefix, *path)
            if isinstance(seen.nnx, nnx.bridge.ToNNX):
                raise LoweringError(
                    "found a ToNNX with nothing between it and the ToLinen around it",
                    path=format_path(inner) or type(seen.instance).__name__,
                    fix="Use the Linen module as it is: it needs neither.",
                )
            wrapper = Wrapper(
                cls=self.encode(type(seen.instance)),
                attrs=self.wrapper_attributes(path, self.encode.fields(seen.instance)),
            )
            walker = nnx_build.Walker(
                self._builder,
                slot_of=functools.partial(_slot_below, slot_at, path),
                nested=dict(_by_identity(self._observer.nested)),
            )
            walker.add(seen.nnx, inner, at=number)
            self._builder.nodes[number].wrapper = wrapper

    def wrapper_attributes(self, path: Path, fields: Attrs) -> Attrs:
        """The attributes of the ToLinen at a scope path."""
        graphdef = self.graphdefs.get(path)
        if graphdef is None:
            return fields
        return (*fields, (GRAPHDEF, self.encode(graphdef)))

    def nnx_variables(self) -> dict[tuple[str, Path], nnx.Variable[Any]]:
        """The variables of those NNX modules, by collection and path; not their PRNG state."""
        found: dict[tuple[str, Path], nnx.Variable[Any]] = {}
        for path, seen in self._observer.modules.items():
            if seen.nnx is not None:
                state = nnx.state(seen.nnx, nnx.Not(nnx.RngState))
                for below, leaf in nnx.to_flat_state(state):
                    if isinstance(leaf, nnx.Variable):
                        names = map(as_key, below)
                        found[collection_of(type(leaf)), (*path, *names)] = leaf
        return found

    def slot_paths(self) -> dict[tuple[str, Path], Path]:
        """The paths of slots whose variables lie elsewhere, by collection and path of those."""
        found: dict[tuple[str, Path], Path] = {}
        for scope, seen in self._observer.modules.items():
            wrappers = () if seen.nnx is None else nnx.iter_graph(seen.nnx)
            for keys, part in wrappers:
                where: Path = tuple(map(as_key, keys))
                if hasattr(part, "linsey_variables") and isinstance(part, nnx.Module):
                    for below, place, leaf in nnx_build.wrapped_variables(part):
                        collection = collection_of(type(leaf))
                        at = stored_path(collection, (*where, *place))
                        found[collection, (*scope, *map(as_key, at))] = (
                            *scope,
                            *map(as_key, (*where, *below)),
                        )
        return found

    def is_inside_nnx(self, path: Path) -> bool:
        """Whether a path leads into an NNX module."""
        return any(
            seen.nnx is not None and path[: len(root)] == root
            for root, seen in self._observer.modules.items()
        )

    def bind(self, path: Path, slot: int) -> None:
        """Gives a slot to the node that its path leads to."""
        node = self._builder.at(self._root, path[:-1])
        self._builder.nodes[node].slots.append((path[-1], slot))


def _slot_below(
    slot_at: SlotAt, path: LinenPath, variable: nnx.Variable[Any], below: Path
) -> int | None:
    return slot_at(collection_of(type(variable)), (*path, *below))


def _by_identity(nested: list[tuple[Any, Observer]]) -> dict[int, tuple[Any, Observer]]:
    return {id(wrapper): (wrapper, observer) for wrapper, observer in reversed(nested)}


def signature(call: Call, encode: Encoder) -> Signature:
    """One observed call as data."""
    try:
        output = None if call.output is None else _trees.value_type(call.output)
    except TypeError:  # a module, a string, a function: not a value
        output = None
    return Signature(
        method=call.method,
        inputs=_trees.input_types(call.args, call.kwargs, encode),
        output=output,
    )


def add_variables(region: Region, builder: Builder, variables: Mapping[str, Any]) -> None:
    """Adds a slot for every variable of a Linen variable dict.

    Raises:
        LoweringError: a variable holds something that is neither an array nor a number.
    """
    inner = region.nnx_variables()
    ends = region._observer.variables
    edges = {(collection, (*path, name)) for collection, path, name in ends}
    outer = {(collection, path[:depth]) for collection, path in edges for depth in range(len(path))}
    stops = (edges - outer) | set(inner)
    made: dict[tuple[str, Path], int] = {}
    region.graphdefs = dict(_graphdefs(variables.get(GRAPH_COLLECTION, {}), ()))
    paths = region.slot_paths()

    def walk(collection: str, path: Path, value: Any) -> None:
        at = (collection, path)
        is_tree = isinstance(value, Mapping)
        inside_nnx = region.is_inside_nnx(path)
        if is_tree and (at not in stops or (inside_nnx and at not in inner)):
            if not value:
                builder.empty.append((collection, *path))
            for name in sorted(value, key=str):
                walk(collection, (*path, as_key(name)), value[name])
            return
        slot = _slot(collection, paths.get(at, path), value, region.encode)
        made[at] = builder.add_slot(slot)
        if not inside_nnx:
            region.bind(path, made[at])

    for collection in sorted(variables):
        if collection != GRAPH_COLLECTION or not region.graphdefs:
            walk(collection, (), variables[collection])
    region.add_nnx(lambda collection, path: made.get((collection, path)))


def _graphdefs(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, nnx.GraphDef):
        yield path[:-1], tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _graphdefs(value, (*path, name))


def _slot(collection: str, path: Path, value: Any, encode: Encoder) -> Slot:
    boxes = [
        leaf
        for leaf in jax.tree.leaves(value, is_leaf=lambda leaf: isinstance(leaf, StackBox))
        if isinstance(leaf, StackBox)
    ]
    plain = jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, StackBox) else leaf,
        value,
        is_leaf=lambda leaf: isinstance(leaf, StackBox),
    )
    stack: tuple[StackAxis, ...] = ()
    try:
        kind = _trees.value_type(unboxed(plain))
        if boxes and isinstance(kind, TensorType):
            stack = _stack(boxes[0].stack, kind.shape)
        found = linen_variable(plain, encode, format_path((collection, *path)), stack)
    except TypeError as error:
        raise LoweringError(
            f"{error} in a variable",
            path=format_path((collection, *path)),
            fix="Keep in Linen variables only arrays, numbers and pytrees of them.",
        ) from error
    return Slot(
        collection=collection,
        paths=(path,),
        type=found.type,
        partition=found.partition,
        stack=stack,
        lifetime="ephemeral" if collection in EPHEMERAL else "persistent",
        box=found.box,
    )


def observed_stacks(module: linen.Module, call: Call) -> dict[tuple[str, Path], Any]:
    """The stacked axes of the variables that a module would make in one call.

    For a module inside a ToNNX: its variables are NNX's, which nobody tells of an axis. So its init
    is traced once more, by itself.

    Args:
        module: the unbound module.
        call: a call of it that was observed.
    """
    observer = Observer()
    arguments = _trees.Arguments.split(call.args, call.kwargs)
    kept: list[Any] = []

    def init(keys: dict[str, Any], dynamic: tuple[Any, ...]) -> Any:
        args, kwargs = arguments.merge(dynamic)
        kept.append(module.init(keys, *args, method=call.method, **kwargs))
        return ()

    try:
        with observing(observer), _private.annotating("always"):
            jax.eval_shape(init, _trees.key_dict(0), _trees.abstract(arguments.dynamic))
    except Exception:  # it can only be called with variables at hand: nothing is known then
        return {}
    found: dict[tuple[str, Path], Any] = {}

    def walk(collection: str, path: Path, value: Any) -> None:
        if isinstance(value, StackBox):
            kind = _trees.value_type(unboxed(value.value))
            if isinstance(kind, TensorType):
                found[collection, path] = _stack(value.stack, kind.shape)
        elif isinstance(value, Mapping):
            for name, below in value.items():
                walk(collection, (*path, as_key(name)), below)

    for collection, tree in kept[0].items():
        walk(collection, (), tree)
    return found


def _stack(
    stack: tuple[tuple[int, str | None, LinenPath], ...], shape: tuple[int, ...]
) -> tuple[StackAxis, ...]:
    """The observed axes, outermost first, with their lengths read off the final shape."""
    rest, out = list(shape), []
    for axis, name, owner in stack:
        position = axis % len(rest) if rest else 0
        out.append(StackAxis(axis=position, length=rest.pop(position), name=name, owner=owner))
    return tuple(out)
