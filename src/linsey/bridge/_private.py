"""Every private name of flax that the bridge touches, each with its reason.

Seen in flax 0.12.8 and 0.12.12.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from flax import core, linen
from flax.linen import module as linen_module
from jax._src.core import trace_state_clean


def is_initializing(module: Any) -> bool:
    """Whether an NNX object is in a `lazy_init`."""
    return bool(module._pytree__state.initializing)


def is_eager() -> bool:
    """Whether no trace is at work; jax has no public way to ask."""
    return bool(trace_state_clean())


def can_change(module: Any) -> bool:
    """Whether an NNX object was made in the current trace: only there may it be changed."""
    return bool(module._pytree__state.trace_state.is_valid())


def current_scope() -> Any:
    """The scope of the Linen module whose method runs now, or None."""
    stack = linen_module._context.module_stack
    return stack[-1].scope if stack and stack[-1] is not None else None


def unbound(module: linen.Module) -> linen.Module:
    """A copy of a Linen module, and of those in its fields, that is no child of another."""
    copy: linen.Module = module.clone(parent=None, name=None, _deep_clone=True)
    return copy


def init_onto(
    module: linen.Module,
    variables: Mapping[str, Any],
    rngs: Mapping[str, Any],
    mutable: Any,
    method: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Any, Any]:
    """``Module.init_with_output`` that keeps the variables that are there already.

    The public one starts from none; the flag that makes a call an initialisation can be given only
    to the functional core.
    """

    def run(scope: Any) -> Any:
        bound = module.clone(parent=scope, _deep_clone=True)
        if method is None or isinstance(method, str):
            return getattr(bound, method or "__call__")(*args, **kwargs)
        return getattr(method, "__func__", method)(bound, *args, **kwargs)

    made: tuple[Any, Any] = core.apply(run, mutable=mutable, flags={"initializing": True})(
        variables, rngs=rngs
    )
    return made


class _Sown(threading.local):
    seen: set[tuple[str, tuple[str, ...]]] | None = None


_sown = _Sown()
_flax_sow: Any = linen.Module.sow


@functools.wraps(_flax_sow)
def _sow(self: Any, col: str, name: str, *args: Any, **kwargs: Any) -> Any:
    if _sown.seen is not None and self.scope is not None:
        _sown.seen.add((col, (*self.scope.path, name)))
    return _flax_sow(self, col, name, *args, **kwargs)


# Which variables are sown is told by nothing that flax stores, and a sown value must not be given
# to the next call, which would add to it. The method does what it did, and takes a note.
linen.Module.sow = _sow  # type: ignore[method-assign]


@contextlib.contextmanager
def watching_sow() -> Iterator[set[tuple[str, tuple[str, ...]]]]:
    """Collects what this thread's Linen code sows inside the block: collection and path."""
    previous, seen = _sown.seen, set[tuple[str, tuple[str, ...]]]()
    _sown.seen = seen
    try:
        yield seen
    finally:
        _sown.seen = previous
