"""Every private name of flax that the backends touch, each with its reason.

Seen in flax 0.12.8 and 0.12.12.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import config
from flax.core import scope
from flax.core.scope import LazyRng
from flax.linen import module as linen_module
from flax.nnx import Variable, graphlib, pytreelib
from flax.nnx.bridge import ToLinen
from jax import extend
from jax.interpreters.partial_eval import DynamicJaxprTracer

# NNX keeps the trace in which an object may change in this attribute; objects that are built from a
# graph need one of their own.
PytreeState = pytreelib.PytreeState

# For graph nodes of types that a user registered: how to make an empty one and fill it.
get_node_impl_for_type = graphlib.get_node_impl_for_type
get_node_impl = graphlib.get_node_impl
GraphNodeImpl = graphlib.GraphNodeImpl


@functools.cache
def written_as_linen(kind: Any) -> type[Variable[Any]]:
    """A type of Variables that take what is written to them as it is, as Linen's scopes do.

    NNX casts it to the dtype that was there, and its BatchNorm stops gradients through statistics
    that it could write in place, which it asks ``_can_update`` for.
    """

    def set_value(self: Variable[Any], value: Any, *, index: Any = ...) -> None:
        assert index is ...
        object.__setattr__(self, "_raw_value", value)

    body = {"__slots__": (), "_can_update": property(lambda _: False), "set_value": set_value}
    return type(kind.__name__, (kind,), body)


def to_linen_call() -> Any:
    """The function of ``ToLinen.__call__`` below Linen's wrapper, as an interceptor sees it."""
    return getattr(ToLinen.__call__, "__wrapped__", None)


def store_variables(wrapper: ToLinen, module: Any) -> None:
    """Stores an NNX module's state in the scope of its ToLinen, as flax itself does."""
    wrapper._update_variables(module)


@functools.lru_cache(maxsize=1 << 10)
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


# `inline=True` of jax.jit meant this one until jax 0.11: operations go into the outer program while
# it is traced, with no new rule applied to them.
_inline: Any = getattr(jax, "Inline", None)
INLINE: Any = True if _inline is None else _inline.JAX_EARLY


def current_trace() -> Any:
    """The trace that jax is in; flax compares it in the same way."""
    return extend.core.get_opaque_trace_state(convention="flax")  # type: ignore[no-untyped-call]


def are_staged(arrays: Iterable[Any]) -> bool:
    """Whether operations on arrays go into a program as they are, with no transform between."""
    kinds = {type(array) for array in arrays if isinstance(array, jax.core.Tracer)}
    return kinds == {DynamicJaxprTracer}


def inlined(jaxpr: Any, chosen: frozenset[int]) -> Callable[..., Any]:
    """A traced program, in which some calls of jitted functions become part of it when it runs.

    Args:
        jaxpr: the program.
        chosen: the numbers of the equations that are these calls.
    """
    equations = [
        eqn.replace(params={**eqn.params, "inline": INLINE}) if number in chosen else eqn
        for number, eqn in enumerate(jaxpr.eqns)
    ]
    core: Any = extend.core
    changed = core.ClosedJaxpr(jaxpr.jaxpr.replace(eqns=equations), jaxpr.consts)
    return core.jaxpr_as_fun(changed)  # type: ignore[no-any-return]


def count_interceptors() -> int:
    """How many method interceptors of Linen are at work."""
    return len(linen_module._global_interceptor_stack)


def is_own_method(module: Any, name: str, called: Any) -> bool:
    """Whether an intercepted call is of the method that `name` gives: no super call, no function.

    Args:
        module: the module.
        name: the name of what was called.
        called: the ``orig_method`` of the interceptor's context.
    """
    found = getattr(type(module), name, None)
    return getattr(found, "__wrapped__", None) is called.func


def fold_number(data: tuple[str | int, ...]) -> int:
    """The number that Linen folds into a key for a scope path and a counter.

    As in ``flax.core.scope._fold_in_static``, which folds it in at once.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    for part in data:
        if config.flax_fix_rng_separator:
            digest.update(b"\00")
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            digest.update(part.to_bytes((part.bit_length() + 7) // 8, "big"))
    return int.from_bytes(digest.digest()[:4], "big")


class Draws:
    """Gives keys to the scopes of a module of which only the place below it is known.

    The numbers to fold in, which depend on the path of the whole, are inputs of its trace.

    Args:
        words: the numbers, in the order of the draws.
    """

    def __init__(self, words: Any) -> None:
        self._words = words
        self._numbers: dict[tuple[Any, ...], int] = {}

    @property
    def made(self) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        """Stream, and path and counter below the module, of each draw."""
        return tuple((data[0].stream, data[1:]) for data in self._numbers)

    def rng(self, stream: str, key: Any) -> LazyRng:
        """What a scope holds for a stream; only inside `apart`."""
        return LazyRng(key, (_Above(self, stream),))  # type: ignore[arg-type]

    def fold_in(self, key: Any, data: tuple[Any, ...]) -> Any:
        """A key; a transform may trace the same draw again."""
        number = self._numbers.setdefault(data, len(self._numbers))
        return jax.random.fold_in(key, self._words[min(number, self._words.shape[0] - 1)])


@dataclasses.dataclass(frozen=True)
class _Above:
    """Stands for the part of a path that is above a module."""

    draws: Draws
    stream: str


# LazyRng folds by this function; scopes make LazyRngs themselves, so that no subclass can stand in.
_fold_in_static: Any = scope._fold_in_static


def _fold_in(key: Any, data: Any) -> Any:
    if data and isinstance(data[0], _Above):
        return data[0].draws.fold_in(key, tuple(data))
    return _fold_in_static(key, data)


class _Read:
    """Stands for an attribute of a class and tells when code reads it that is not flax's own."""

    def __init__(self, name: str, own: Any, reads: list[str]) -> None:
        self._name = name
        self._own = own
        self._reads = reads
        self._thread = threading.get_ident()

    def __get__(self, obj: Any, cls: Any = None) -> Any:
        if obj is None:
            return self._own
        reader = str(sys._getframe(1).f_globals.get("__name__", ""))
        if not reader.startswith(("flax.", "linsey.")) and threading.get_ident() == self._thread:
            self._reads.append(self._name)
        if hasattr(self._own, "__get__"):
            return self._own.__get__(obj, cls)
        return vars(obj).get(self._name, self._own)

    def __set__(self, obj: Any, value: Any) -> None:
        if hasattr(self._own, "__set__"):
            self._own.__set__(obj, value)
        else:
            vars(obj)[self._name] = value


_apart = threading.RLock()


@contextlib.contextmanager
def apart(module: Any) -> Iterator[list[str]]:
    """Inside the block, a copy of a Linen module can run in a scope that has no parent.

    Gives a list, to which the names of attributes are added that tell the user's code where the
    module stands: what such code computes may differ from place to place.

    Args:
        module: the module; only for its own class are the name and the parent watched.
    """
    reads: list[str] = []
    watched = [
        *((scope.Scope, name) for name in ("path", "debug_path", "path_text", "name", "parent")),
        *((type(module), name) for name in ("path", "name", "parent")),
        (linen_module.Module, "path"),
    ]
    with _apart, contextlib.ExitStack() as stack:
        for owner, name in dict.fromkeys(watched):
            read = _Read(name, inspect.getattr_static(owner, name, None), reads)
            stack.enter_context(_replaced(owner, name, read))
        stack.enter_context(_replaced(scope, "_fold_in_static", _fold_in))
        yield reads


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name, value)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is value:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
