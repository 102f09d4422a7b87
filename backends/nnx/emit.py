"""Emits a graph as NNX, and runs graphs whose root is NNX."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core.scope import in_filter
from flax.nnx import bridge

from linsey import _trees
from linsey._collections import collection_of
from linsey.backends._record import Called
from linsey.backends._runner import SharingRunner
from linsey.backends._share import Session
from linsey.backends.nnx.build import Plan
from linsey.backends.nnx.native import Native, native_root
from linsey.backends.nnx.nodes import is_hosted
from linsey.backends.nnx.share import Blocks
from linsey.ir import EmitError, Graph, Path, Stream, Values, decode, describe


def build(graph: Graph, values: Values | None, *, native: bool = True) -> Any:
    """The NNX module of a graph.

    Args:
        graph: the structure.
        values: its values; None builds an abstract module.
        native: whether Linen layers become NNX's own where they can.

    Raises:
        EmitError: the root is a subclass of ToLinen with a call of its own.
    """
    wrapper = graph.nodes[graph.root].wrapper
    if wrapper is not None and overrides_call(decode(wrapper.cls)):
        raise EmitError(
            f"{describe(wrapper.cls)} changes what ToLinen does in a call; the NNX module alone"
            " would give other numbers",
            path=describe(wrapper.cls),
            fix="Move what its __call__ does into the NNX module, or a Linen module around it.",
        )
    arrays: Sequence[Any] = (
        list(map(_trees.abstract_value, graph.slots)) if values is None else values.arrays
    )
    root = native_root(graph) if native and is_hosted(graph.nodes[graph.root]) else None
    of_root = root if isinstance(root, Native) else None
    return Plan(graph, graph.root, native=native, of_root=of_root).build(arrays)


def overrides_call(cls: type) -> bool:
    """Whether a class is a ToLinen with a call of its own."""
    own = getattr(cls, "linsey_call", bridge.ToLinen.__call__)
    return issubclass(cls, bridge.ToLinen) and cls.__call__ is not own


def emit(graph: Graph, values: Values | None, *, native: bool = True) -> tuple[Any, Any]:
    """Emits a graph as ``(graphdef, state)``; see `linsey.Program.emit`."""
    graphdef, state = nnx.split(build(graph, values, native=native))
    return graphdef, state


def override_streams(graph: Graph, arrays: list[Any], rngs: Mapping[str, Any]) -> list[Any]:
    """The slots with the keys of some streams replaced, and their counters at zero.

    A name that no stream has goes to the streams called ``default``. Where several streams have one
    name, each gets a key of its own: the given one with the stream's number folded in. A stream
    whose key is an array of keys gets the given one split into that shape.

    Raises:
        EmitError: no stream has the name, and none is called default.
    """
    out = list(arrays)
    by_name: dict[str, list[Stream]] = {}
    for stream in graph.streams:
        if stream.derivation == "count":
            by_name.setdefault(stream.name, []).append(stream)
    known = set(by_name)
    for name, key in rngs.items():
        streams = by_name.get(name if name in known else "default")
        if streams is None:
            if name == "params":
                continue
            raise EmitError(
                f"no stream is called {name!r}; there are: {', '.join(sorted(known)) or 'none'}",
                path="rngs",
                fix="Pass keys for these streams only.",
            )
        if name == "params" and name not in known:
            continue
        for number, stream in enumerate(streams):
            assert stream.key is not None
            assert stream.count is not None
            own = _typed(key) if len(streams) == 1 else jax.random.fold_in(_typed(key), number)
            shape = arrays[stream.key].shape
            out[stream.key] = jax.random.split(own, shape) if shape else own
            out[stream.count] = _zeros(shape, own)
    return out


def _zeros(shape: tuple[int, ...], key: Any) -> Any:
    """Counters at zero: under a trace, values of that trace."""
    if shape or isinstance(key, jax.core.Tracer):
        return jax.numpy.zeros(shape, jax.numpy.uint32)
    return _zero()


@functools.lru_cache
def _zero() -> Any:
    with jax.ensure_compile_time_eval():  # one that no trace owns
        return jax.numpy.zeros((), jax.numpy.uint32)


def _typed(key: Any) -> Any:
    is_typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def new_state(
    module: Any,
    known: set[Path],
    box: Callable[[nnx.Variable[Any]], Any] = nnx.Variable.get_raw_value,
) -> dict[str, Any]:
    """The Variables and arrays that a call made, as nested dicts by collection.

    Args:
        module: the module.
        known: the paths of the graph's slots.
        box: what becomes of a Variable.
    """
    extra: dict[str, Any] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        if path in known:
            continue
        is_variable = isinstance(leaf, nnx.Variable)
        holder = extra.setdefault(collection_of(type(leaf)) if is_variable else "arrays", {})
        for name in path[:-1]:
            holder = holder.setdefault(name, {})
        holder[path[-1]] = box(leaf) if isinstance(leaf, nnx.Variable) else leaf
    return extra


class NNXRunner(SharingRunner):
    """Runs a graph whose root is an NNX module."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._plan = Plan(graph, graph.root)
        self._known = {path for slot in graph.slots for path in slot.paths}

    @functools.cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self._graph, self._plan)

    def _call(
        self,
        arrays: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        method: Any,
        rngs: Mapping[str, Any] | None,
        mutable: Any,
        session: Session | None,
    ) -> Called:
        given = list(arrays)
        if rngs:
            given = override_streams(self._graph, given, rngs)
        module = self._plan.build(given)
        with contextlib.nullcontext() if session is None else self._blocks.calls(session, module):
            if method is None or isinstance(method, str):
                output = getattr(module, method or "__call__")(*args, **kwargs)
            else:
                output = method(module, *args, **kwargs)
        after = self._plan.read(module, given)
        if rngs:  # keys that a call brings are the call's own: the stored streams stay
            for stream in self._graph.streams:
                for slot in (stream.key, stream.count):
                    if slot is not None:
                        after[slot] = arrays[slot]
        if mutable is not None:
            after = [
                new if _allows(mutable, slot.collection) else old
                for slot, old, new in zip(self._graph.slots, arrays, after, strict=True)
            ]
        grown = self._plan.has_grown(module)
        extra = new_state(module, self._known) if grown else {}
        return Called(output=output, arrays=after, extra=extra)


def _allows(mutable: Any, collection: str) -> bool:
    return bool(in_filter(mutable, collection))


def runner(graph: Graph) -> NNXRunner:
    """The runner of a graph whose root is an NNX module."""
    return NNXRunner(graph)
