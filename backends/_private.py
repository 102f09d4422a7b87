"""Every private name of flax that the backends touch, each with its reason.

Seen in flax 0.12.8 and 0.12.12.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
from flax import config
from flax.core.scope import LazyRng
from flax.linen import module as linen_module
from flax.nnx import graphlib, pytreelib
from flax.nnx.bridge import ToLinen

# NNX keeps the trace in which an object may change in this attribute; objects that are built from a
# graph need one of their own.
PytreeState = pytreelib.PytreeState

# For graph nodes of types that a user registered: how to make an empty one and fill it.
get_node_impl_for_type = graphlib.get_node_impl_for_type
get_node_impl = graphlib.get_node_impl
GraphNodeImpl = graphlib.GraphNodeImpl


def to_linen_call() -> Any:
    """The function of ``ToLinen.__call__`` below Linen's wrapper, as an interceptor sees it."""
    return getattr(ToLinen.__call__, "__wrapped__", None)


def store_variables(wrapper: ToLinen, module: Any) -> None:
    """Stores an NNX module's state in the scope of its ToLinen, as flax itself does."""
    wrapper._update_variables(module)


@functools.lru_cache
def _fold(count: int, separated: bool) -> Any:
    return jax.jit(lambda key: LazyRng.create(key, count).as_jax_rng())


def folded(key: Any, count: int) -> Any:
    """The key that Linen's root scope gives for the draw number `count` from a stream.

    Compiled: most of the time of Linen's own goes into dispatch, and under a trace into tracing.
    """
    return _fold(count, bool(config.flax_fix_rng_separator))(key)


@contextlib.contextmanager
def no_parent() -> Iterator[None]:
    """Inside the block, Linen modules are made unbound, whatever module is being called.

    Linen finds the parent of a new module on this stack; there is no public way to say "none" for
    the modules inside its hyper-parameters.
    """
    stack = linen_module._context.module_stack
    stack.append(None)
    try:
        yield
    finally:
        stack.pop()


def is_watched() -> bool:
    """Whether somebody intercepts Linen's methods, captures intermediates or tabulates."""
    context = linen_module._context
    stacks = (linen_module._global_interceptor_stack, context.capture_stack)
    frozen = bool(config.flax_return_frozendict)  # then updates are to be frozen
    return any(len(stack) > 0 for stack in stacks) or bool(context.call_info_stack) or frozen
