"""Initial values of a Linen program by NNX's derivation of keys.

As if the model had been written with NNX's layers: each draws its keys from the streams of one
``nnx.Rngs``, parameter by parameter, in the order of the graph. What hosted code initialises itself
gets keys that are drawn first, as in ``nnx.bridge.ToNNX``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from linsey._collections import unboxed
from linsey._lifts import Lifts
from linsey.backends.nnx.native import Native, maker, native_layer, native_root
from linsey.backends.nnx.nodes import is_hosted
from linsey.backends.nnx.objects import value_at
from linsey.ir import Graph, StackAxis, Values, node_paths
from linsey.ir.ops import OPS


def initial_values(
    graph: Graph, rngs: nnx.Rngs, initialize: Callable[[dict[str, Any]], Values]
) -> Values:
    """The values of a graph by NNX's derivation.

    Args:
        graph: the graph of a Linen module.
        rngs: the streams to draw from; they advance.
        initialize: Linen's own initialisation, given keys by stream.
    """
    natives = list(_natives(graph))
    taken = {slot for native in natives for part in native.parts for slot in part.slots}
    values = initialize({name: rngs[name]() for name in _names(rngs)})
    found: dict[str, Any] = {}
    for native in natives:
        first = graph.slots[native.parts[0].slots[0]] if native.parts else None
        stack = () if first is None else first.stack
        made = _made(native, rngs, stack)
        for part in native.parts:
            value = value_at(made, part.path).get_raw_value()
            axes = graph.slots[part.slots[0]].stack
            pieces = part.split(_placed(value, axes))
            found.update(
                (graph.slots[slot].key, piece)
                for slot, piece in zip(part.slots, pieces, strict=True)
            )
    assert len(found) == len(taken)
    return values.replace(found)


def _names(rngs: nnx.Rngs) -> list[str]:
    names = list(dict(rngs.items()))
    return [name for name in names if name != "default"] + (
        ["params"] if "default" in names and "params" not in names else []
    )


def _natives(graph: Graph) -> Any:
    for number, node in enumerate(graph.nodes):
        if node.source is None or node.source.dialect != "linen" or not is_hosted(node):
            continue
        found = native_root(graph) if number == graph.root else native_layer(graph, number)
        if isinstance(found, Native):
            yield found


def _made(native: Native, rngs: nnx.Rngs, stack: tuple[StackAxis, ...]) -> Any:
    """The layer as its constructor makes it; with the stacked axes in front."""
    inits = {
        name: _plain(value)
        for name, value in native.own.items()
        if name in native.source.ignored and name.endswith("_init")
    }
    make = maker(native.target, native.neutral, inits)
    for axis in reversed(stack):
        make = nnx.split_rngs(splits=axis.length)(nnx.vmap(make, in_axes=(0,), out_axes=0))
    return make(rngs)


def _plain(init: Any) -> Any:
    """An initialiser that gives no box."""
    return None if init is None else lambda *args: unboxed(init(*args))


def _placed(value: Any, axes: tuple[StackAxis, ...]) -> Any:
    if not axes:
        return value
    inner = jax.vmap(lambda each: _placed(each, axes[1:]))(value)
    return jnp.moveaxis(inner, 0, axes[0].axis)


def give_streams(graph: Graph, model: Any, rngs: nnx.Rngs) -> None:
    """Gives each layer of a model that draws keys a stream of its own, as its constructor does.

    Below a lifted transform no stream can advance by itself: there Linen's streams stay.
    """
    lifts = Lifts(graph)
    for number, path in node_paths(graph).items():
        node = graph.nodes[number]
        if number == graph.root or not is_hosted(node) or lifts.around(path):
            continue
        native = None if node.op not in OPS else native_layer(graph, number)
        if isinstance(native, Native) and _draws(native.neutral):
            layer = value_at(model, path)
            layer.rngs = rngs[getattr(layer, "rng_collection", "dropout")].fork()


def _draws(neutral: Mapping[str, Any]) -> bool:
    return bool(neutral.get("rate", neutral.get("dropout_rate", 0.0)))
