"""An NNX layer as Linen's own layer: which class and fields, and where each variable goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import linen, nnx

from linsey import _trees
from linsey._layers import RefusedError, Row, row_for_class, row_for_op
from linsey._places import attribute_paths
from linsey.backends import _private
from linsey.backends._decode import emitted_box
from linsey.backends.linen.layers import (
    NNXBatchNorm,
    NNXDropout,
    NNXEinsum,
    NNXSequential,
)
from linsey.backends.nnx.build import Plan
from linsey.backends.nnx.native import Part, construct, is_alike, own_shape
from linsey.ir import Graph, LinseyError, Path, TensorType, decode

STREAM: Mapping[tuple[str, Path], str] = {
    ("RngKey", ("rngs", "key")): "key",
    ("RngCount", ("rngs", "count")): "count",
}
"""Where a layer of NNX keeps the stream that it draws from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeModule:
    """A node of NNX as a Linen module of its own."""

    module: linen.Module
    """The module, unbound."""
    places: tuple[tuple[Part, tuple[tuple[str, Path], ...]], ...]
    """The slots, and collection and path of the Linen variables that each part of them becomes."""

    def variables(self, graph: Graph, arrays: Sequence[Any]) -> dict[str, Any]:
        """The Linen variables, boxed where they are annotated."""
        variables: dict[str, Any] = {}
        for part, targets in self.places:
            (slot,) = part.slots
            values = part.split(arrays[slot]) if part.sizes else [arrays[slot]]
            for (collection, path), value in zip(targets, values, strict=True):
                holder = variables.setdefault(collection, {})
                for name in path[:-1]:
                    holder = holder.setdefault(name, {})
                holder[path[-1]] = emitted_box(graph.slots[slot], value)
        return variables


def native_module(graph: Graph, number: int) -> NativeModule | str:
    """How a node is emitted as a Linen module, or why it is hosted."""
    key = f"native linen {number}"
    if key not in graph.memo:
        try:
            with _private.no_parent():
                graph.memo[key] = _native_module(graph, number)
        except (RefusedError, LinseyError) as refused:
            graph.memo[key] = str(refused)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            graph.memo[key] = f"flax.linen does not take its fields: {error}"
    return graph.memo[key]  # type: ignore[no-any-return]


def _native_module(graph: Graph, number: int) -> NativeModule:
    node = graph.nodes[number]
    assert node.source is not None
    row = row_for_class(node.source.dialect, decode(node.source.cls))
    if row is None:
        raise RefusedError("it is user code")
    if row.op == "sequential":
        return _sequential(graph, number)
    target = row_for_op("linen", row.op)
    if row.reason or target is None:
        raise RefusedError(row.reason or "flax.linen has no such layer")
    if target.reason:
        raise RefusedError(target.reason)
    return _layer(graph, number, row, target)


def _layer(graph: Graph, number: int, row: Row, target: Row) -> NativeModule:
    values = list(map(_trees.abstract_value, graph.slots))
    made = Plan(graph, number).build(values)
    heads = {place.path[0] for place in row.slots.values()} | {"rngs"}
    own = {
        name: value
        for name, value in vars(made).items()
        if name not in heads and not name.startswith("_pytree__")
    }
    parts, shapes, stream = _parts(graph, number, row, target)
    if stream and row.op != "dropout":
        raise RefusedError("it draws from a stream of its own, which the Linen layer cannot")
    neutral = row.read(own, shapes, None)
    if stream:
        made.rngs = None
    template = construct(row, neutral)
    for name in heads:  # a cache, which no constructor makes
        if isinstance(vars(made).get(name), nnx.Variable) and vars(template).get(name) is None:
            setattr(template, str(name), vars(made)[name])
    if not is_alike(made, template):
        raise RefusedError("it is not as its constructor makes it")
    module = _with_mode(target, target.write(neutral), bool(stream))
    return NativeModule(module=module, places=(*parts, *stream))


_MODES: Mapping[str, tuple[str, type[linen.Module]]] = {
    "batch_norm": ("use_running_average", NNXBatchNorm),
    "dropout": ("deterministic", NNXDropout),
    "einsum": ("einsum_str", NNXEinsum),
}


def _with_mode(row: Row, options: dict[str, Any], has_stream: bool) -> linen.Module:
    """A layer; where NNX says at construction how it is called, calls may still say otherwise."""
    name, cls = _MODES.get(row.op, ("", row.cls))
    if not has_stream and options.get(name) is None and cls is not NNXBatchNorm:
        return row.cls(**options)  # type: ignore[no-any-return]
    more = {"has_stream": has_stream} if cls is NNXDropout else {}
    return cls(**options | {name: None, "at_construction": options[name]} | more)


_Places = list[tuple[Part, tuple[tuple[str, Path], ...]]]


def _parts(
    graph: Graph, number: int, row: Row, target: Row
) -> tuple[_Places, dict[str, tuple[int, ...]], _Places]:
    """The variables of a layer: where they go, their neutral shapes, and those of its stream."""
    names = {(place.collection, place.path): name for name, place in row.slots.items()}
    parts: _Places = []
    stream: _Places = []
    shapes: dict[str, tuple[int, ...]] = {}
    for slot, path in attribute_paths(graph, number).items():
        place = (graph.slots[slot].collection, path)
        if place in STREAM:
            stream.append((Part(path=path, slots=(slot,)), (place,)))
            continue
        name = names.get(place)
        if name is None:
            raise RefusedError(f"it holds {place[0]}/{'/'.join(map(str, path))} besides")
        if not isinstance(graph.slots[slot].type, TensorType) or graph.slots[slot].stack:
            raise RefusedError(f"its {name} is no array of its own")
        shape, held = own_shape(graph.slots[slot]), row.slots[name].parts or (name,)
        axis = row.slots[name].axis % len(shape) if len(held) > 1 else 0
        sizes = (shape[axis] // len(held),) * len(held) if len(held) > 1 else ()
        for each in held:
            shapes[each] = (*shape[:axis], sizes[0], *shape[axis + 1 :]) if sizes else shape
        places = [target.slots[each] for each in held]
        where = tuple((place.collection, place.path) for place in places)
        parts.append((Part(path=path, slots=(slot,), axis=axis, sizes=sizes), where))
    return parts, shapes, stream


def _sequential(graph: Graph, number: int) -> NativeModule:
    (name, items), *more = graph.nodes[number].children
    if name != "layers" or more:
        raise RefusedError("it is not as its constructor makes it")
    node = graph.nodes[items]
    children = dict(node.children)
    static = {key: value for key, value in node.attrs if isinstance(key, int)}
    made: dict[int, linen.Module] = {}
    layers: list[Any] = []
    places: _Places = []
    for index in range(len(children) + len(static)):
        if index in static:
            layers.append(decode(static[index]))
            continue
        child = children[index]
        if child in made:
            layers.append(made[child])
            continue
        native = native_module(graph, child)
        if isinstance(native, str):
            raise RefusedError(f"its layer {index} is hosted: {native}")
        made[child] = native.module
        layers.append(native.module)
        places += [
            (part, tuple((collection, (f"layers_{index}", *path)) for collection, path in targets))
            for part, targets in native.places
        ]
    return NativeModule(module=NNXSequential(layers), places=tuple(places))
