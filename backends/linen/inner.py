"""Runs an NNX module inside Linen code, with PRNG state that Linen's streams give.

flax stores no PRNG state for such a module: each call makes it from the streams of its scope.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import core, nnx
from flax.core import meta
from flax.nnx import bridge

from linsey import _trees
from linsey.backends import _private
from linsey.backends.linen._nested import MISSING, value_in
from linsey.backends.nnx.build import Plan
from linsey.backends.nnx.nodes import wrapper_slots
from linsey.backends.nnx.objects import rebuild, value_at
from linsey.ir import RNG_COLLECTIONS, EmitError, Graph, Path, format_path


class Inner:
    """An NNX module inside Linen code, where Linen's streams are the only ones.

    Args:
        graph: the graph.
        number: its node there.
    """

    def __init__(self, graph: Graph, number: int) -> None:
        self._graph = graph
        self._plan = Plan(graph, number)
        self._derived = [
            (slot, path) for slot, path in self._plan.slots.items() if self._is_derived(slot)
        ]
        self._in_wrappers = wrapper_slots(graph)
        self._keys: tuple[Any, Any, Any] | None = None

    def _is_derived(self, slot: int) -> bool:
        return self._graph.slots[slot].collection in RNG_COLLECTIONS

    @property
    def is_needed(self) -> bool:
        """Whether there are streams to derive at all."""
        return bool(self._derived)

    def call(
        self, module: bridge.ToLinen, args: Any, kwargs: dict[str, Any], live: Any = None
    ) -> Any:
        """Does what ``ToLinen.__call__`` does, on a module that is built and not constructed.

        Args:
            module: the ToLinen.
            args: positional arguments of the call.
            kwargs: its keyword arguments.
            live: the object to copy; None builds one from the graph.
        """
        values: list[Any] = [None] * len(self._graph.slots)
        derived = {slot for slot, _ in self._derived}
        for slot, path in self._plan.slots.items():
            if slot not in derived:
                values[slot] = self._variable(module, slot, path)
        missing = self._derive(module, values) if self._derived else ()
        if live is None:
            made = self._plan.build(values)
        else:
            made = rebuild(live, {path: values[slot] for slot, path in self._plan.slots.items()})
        checked = [slot for slot in missing if not self._drop_stream(made, slot)]
        method = kwargs.pop("nnx_method", None)
        if method is None or isinstance(method, str):
            method = getattr(type(made), method or "__call__")
        with getattr(module, "linsey_around", contextlib.nullcontext)(made):
            output = method(made, *args, **kwargs)
        if checked:
            after = self._plan.read(made, values, strict=False)
            for slot in checked:
                if after[slot] is not values[slot]:
                    raise EmitError(
                        "the NNX module drew a key, and no PRNG stream was given for it",
                        path=format_path((*module.path, *self._plan.slots[slot][:-1])),
                        fix="Pass rngs= with a key for the stream, as with any Linen module.",
                    )
        if module.scope is not None and module.scope.mutable is not False:
            _private.store_variables(module, made)
        return output

    def _drop_stream(self, made: Any, slot: int) -> bool:
        """Takes a stream that nobody gave away from the ToNNX that holds it.

        A ToNNX draws from all its streams at every call; without it, the Linen code inside says
        itself when it needs one.
        """
        path = self._plan.slots[slot]
        if slot not in self._in_wrappers:
            return False
        holder = value_at(made, path[:-2])
        if path[-2] in vars(holder):
            delattr(holder, str(path[-2]))
        return True

    def _variable(self, module: bridge.ToLinen, slot: int, path: Path) -> Any:
        collection = self._graph.slots[slot].collection
        value = value_in(module.get_variable(collection, str(path[0]), MISSING), path[1:])
        if value is MISSING:
            raise EmitError(
                "the variable is missing",
                path=format_path((collection, *module.path, *path)),
                fix="Pass the variables that init returned, or those of program.emit('linen').",
            )
        while isinstance(value, meta.AxisMetadata):
            value = value.unbox()
        return value

    def _derive(self, module: bridge.ToLinen, values: list[Any]) -> tuple[int, ...]:
        """Fills in the PRNG state that the constructor would make from the scope's streams.

        The constructor runs under jit, where XLA drops all of it but the keys. Gives the counters
        of streams that came from no stream of the scope.
        """
        assert module.scope is not None
        skips = module.skip_rng or not getattr(module, "linsey_takes_rngs", True)
        keys = {} if skips else {name: module.make_rng(name) for name in module.scope.rngs}
        config = (module.nnx_class, module.args, module.kwargs, skips)
        if self._keys is None or not _same(self._keys[0], config):
            make = jax.jit(lambda keys: _rng_state(config, keys))
            with jax.ensure_compile_time_eval():  # kept from call to call: no trace may own it
                self._keys = (config, make, make({}))
        state = self._keys[1](keys) if keys else self._keys[2]
        missing = []
        for slot, path in self._derived:
            # Which streams an nnx.Rngs has follows from those that the call brings.
            found = state.get(path, state.get((*path[:-2], "default", path[-1])))
            values[slot] = _trees.placeholder(self._graph.slots[slot]) if found is None else found
            if found is None or path not in state:
                missing.append(slot)
                continue
            tag = dict(self._graph.slots[slot].metadata).get("tag")
            is_default = tag is not None and getattr(tag, "value", None) == "default"
            is_count = self._graph.slots[slot].collection == "RngCount"
            if is_count and is_default and "default" not in keys and not skips:
                missing.append(slot)
        return tuple(missing)


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    try:
        return bool(first == second)
    except Exception:
        return False


def _rng_state(config: tuple[Any, ...], keys: Mapping[str, Any]) -> dict[Path, Any]:
    """The PRNG state of a module as its constructor makes it, by path."""
    make, args, kwargs, skip_rng = config
    arguments = dict(core.unfreeze(kwargs))
    if not skip_rng:
        arguments["rngs"] = nnx.Rngs(**{"default": 0, **keys})
    with _private.no_parent():  # the Linen modules that it makes are for a ToNNX
        made = make(*args, **arguments)
    return {path: leaf.get_raw_value() for path, leaf in _rng_leaves(made)}


def _rng_leaves(module: Any) -> Any:
    return nnx.to_flat_state(nnx.state(module, nnx.RngState))
