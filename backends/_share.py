"""Calls layers of equal structure through one trace.

A model of 48 equal blocks, called one after the other, is traced 48 times. Here the first call of a
block is traced to a function of its values and arguments, and the others call that function. What
the model gives stays the same, bit for bit, gradients included: see `_must_inline`.

A call that cannot go through such a function is made as it always was.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from linsey import _trees
from linsey.backends import _private
from linsey.backends._parts import (
    Layout,
    Result,
    UnshareableError,
    is_same,
    static_key,
    take_apart,
)
from linsey.backends._record import Called, SharedCalls

_MARK = "shared layer"
WORDS = 32
"""How many numbers a shared function can take that differ from call to call."""


class Session:
    """The shared traces of one call of a runner.

    They live as long as the call is traced: what a block closes over, and what it is told by a
    context (a mesh, logical axis rules), cannot be that of another call.

    Made inside the trace of the whole call.
    """

    def __init__(self) -> None:
        self.count = SharedCalls()
        self.is_busy = False
        """Whether a block is being traced: the calls inside it are its own."""
        self._functions: dict[Hashable, Any] = {}
        self._refused: set[Hashable] = set()
        self._trace = _private.current_trace()

    @property
    def is_nested(self) -> bool:
        """Whether the current trace is that of a transform inside the call."""
        return bool(_private.current_trace() != self._trace)

    def call(
        self,
        key: Hashable,
        name: str,
        body: Callable[..., Any],
        given: Any,
        words: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Gives ``body(given)``, by an earlier trace where there is one.

        Args:
            key: what `body` depends on besides `given`.
            name: shown in the traced program.
            body: a function of a pytree; it may run now, and for other calls with an equal key and
                equal static parts of `given` it may not.
            given: a pytree; arrays are the inputs of the trace, all else belongs to the key.
            words: where `body` takes numbers that differ from call to call and are known when it
                was traced: from what it gives, with shapes for arrays, `WORDS` numbers of uint32.
                They are its second argument.

        Raises:
            UnshareableError: the call has to be made without sharing.
        """
        layout, arrays = take_apart(given)
        early = self.is_nested
        key = (key, layout, early, static_key(linen.get_logical_axis_rules()))
        try:
            if key in self._refused:
                raise UnshareableError("it failed before")
        except TypeError as error:
            raise UnshareableError(f"no key: {error}") from error
        if not _private.are_staged(arrays):
            raise UnshareableError("a transform differentiates or maps it here")
        function = self._functions.get(key)
        if function is None:
            takes_words = words is not None
            function = self._function(name, body, layout, takes_words, early)
            self._functions[key] = function
        self.is_busy = True
        try:
            extra: tuple[Any, ...] = ()
            if words is not None:
                shape = _trees.shape_struct((WORDS,), np.uint32)
                traced = function.eval_shape(shape, *arrays)  # a call later, jax has it still
                extra = (words(traced.restored(arrays)),)
            result = function(*extra, *arrays)
        except Exception as error:
            # Made again without sharing, it raises the error that belongs to it, if any.
            self._refused.add(key)
            del self._functions[key]
            raise UnshareableError(str(error)) from error
        finally:
            self.is_busy = False
        self.count.calls += 1
        return result.restored(arrays)

    def close(self) -> None:
        """Forgets the traces, and what they close over."""
        self._functions.clear()

    def _function(
        self, name: str, body: Callable[..., Any], layout: Layout, takes_words: bool, early: bool
    ) -> Any:
        def run(*inputs: Any) -> Result:
            self.count.traces += 1
            extra, arrays = inputs[:takes_words], inputs[takes_words:]
            return Result.of(body(layout.filled(arrays), *extra), arrays)

        run.__name__ = run.__qualname__ = f"{name} ({_MARK})"
        inline: Any = _private.INLINE if early else False
        return jax.jit(run, inline=inline)


def can_share(*trees: Any) -> bool:
    """Whether a call with these arguments is traced, by jit and by nothing else.

    Operations that are run at once, or go through a transform, are not those of a jitted function.
    """
    return _private.are_staged(jax.tree.leaves(trees))


def run(
    call: Callable[[Session, Any], Called], arrays: Sequence[Any], rest: Any
) -> tuple[Called, SharedCalls]:
    """Makes a runner's call with shared traces.

    The whole call is traced by itself, so that what is made of each block can depend on how the
    rest of the call uses what the block used.

    Args:
        call: the call, given a session and the pytree ``(arrays, rest)``.
        arrays: a value per slot.
        rest: a pytree of what else the call takes.
    """
    layout, inputs = take_apart((list(arrays), rest), strict=False)
    counts: list[SharedCalls] = []

    def traced(*inner: Any) -> Result:
        session = Session()
        counts.append(session.count)
        try:
            called = call(session, layout.filled(inner))
        finally:
            session.close()
        return Result.of((called.output, called.arrays, called.extra), inner, strict=False)

    jitted: Any = jax.jit(traced, inline=_private.INLINE)
    trace = jitted.trace(*inputs)
    count = counts[-1]
    chosen = _must_inline(trace.jaxpr)
    if chosen:
        count.inlined = len(chosen)
        new = _private.inlined(trace.jaxpr, chosen)(*inputs)
        result = jax.tree.unflatten(jax.tree.structure(trace.out_info), new)
    else:
        result = jitted(*inputs)
    output, after, extra = result.restored(inputs)
    kept = [old if is_same(old, new) else new for old, new in zip(arrays, after, strict=True)]
    return Called(output=output, arrays=kept, extra=extra), count


_LINEAR = frozenset(
    {"add", "add_any", "sub", "neg", "dot_general", "conv_general_dilated", "reshape", "squeeze"}
    | {"transpose", "broadcast_in_dim", "convert_element_type", "reduce_sum", "slice", "mul"}
    | {
        "concatenate",
        "gather",
        "dynamic_slice",
        "select_n",
        "copy",
        "jit",
        "pjit",
        "custom_vjp_call",
    }
)
"""Primitives whose derivative uses the tangent of an operand once."""


def _must_inline(jaxpr: Any) -> frozenset[int]:
    """The calls of shared functions in a program that have to become part of it.

    A gradient adds up the cotangents of a value in the reverse order of its uses, and floating
    point addition is not associative. A called function adds up those of its own uses first. That
    is the same sum unless the value has uses after the call, and more than one in it. A function
    that is called once only has no use for being one.
    """
    chosen = set()
    shared = [
        (number, eqn)
        for number, eqn in enumerate(jaxpr.eqns)
        if str(eqn.params.get("name", "")).endswith(f"({_MARK})")
    ]
    times: dict[int, int] = {}
    for _, eqn in shared:
        times[id(eqn.params["jaxpr"])] = times.get(id(eqn.params["jaxpr"]), 0) + 1
    at = dict(shared)
    once: dict[int, list[bool]] = {}
    later = {id(atom) for atom in jaxpr.jaxpr.outvars}
    for number in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[number]
        if number in at:
            inner = eqn.params["jaxpr"]
            simple = once.setdefault(id(inner), _used_once(getattr(inner, "jaxpr", inner)))
            moved = any(
                id(atom) in later and not is_simple and jnp.issubdtype(atom.aval.dtype, jnp.inexact)
                for atom, is_simple in zip(eqn.invars, simple, strict=True)
            )
            if moved or times[id(inner)] == 1:
                chosen.add(number)
        later.update(map(id, eqn.invars))
    return frozenset(chosen)


def _used_once(jaxpr: Any) -> list[bool]:
    """For each input, whether its cotangent is no sum."""
    uses: dict[int, int] = {}
    for atom in jaxpr.outvars:
        uses[id(atom)] = uses.get(id(atom), 0) + 1
    for eqn in jaxpr.eqns:
        weight = 1 if eqn.primitive.name in _LINEAR else 2
        for atom in eqn.invars:
            uses[id(atom)] = uses.get(id(atom), 0) + weight
    return [uses.get(id(variable), 0) < 2 for variable in jaxpr.invars]
