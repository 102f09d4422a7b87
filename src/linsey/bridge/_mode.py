"""``train()`` and ``eval()`` of a ToNNX: how they reach the modules inside."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from flax import linen


def with_mode(
    module: linen.Module, method: Any, mode: Mapping[str, Any], args: Any, kwargs: Any
) -> dict[str, Any]:
    """The keyword arguments, with those of ``train()`` and ``eval()`` that the method takes."""
    name = method or "__call__"
    function = getattr(type(module), name) if isinstance(name, str) else name
    try:
        bound = inspect.signature(function).bind_partial(module, *args)
    except TypeError:
        return dict(kwargs)  # the call itself says what is wrong with them
    # Where it is a field too, that is what is set: see `setting`.
    taken = set(inspect.signature(function).parameters) - set(_fields(module))
    wanted = {k: v for k, v in mode.items() if k in taken and k not in bound.arguments}
    return {**wanted, **kwargs}


class _Active(threading.local):
    mode: Mapping[str, Any] = MappingProxyType({})


_active = _Active()


def current_mode() -> Mapping[str, Any]:
    """The mode of the ToNNX whose call runs now."""
    return _active.mode


@contextlib.contextmanager
def setting(mode: Mapping[str, Any], *, first: bool) -> Iterator[None]:
    """Inside the block, modules have the fields that a mode sets: Linen ones, and NNX ones in them.

    What a call says goes before the mode, as in NNX.

    Args:
        mode: values by field.
        first: whether the mode goes before what a module was made with; otherwise it fills only
            what was left open.
    """
    previous = _active.mode
    wanted = {**previous, **mode}
    if first:
        _active.mode = wanted
    try:
        with linen.intercept_methods(_interceptor(wanted, first=first)):
            yield
    finally:
        _active.mode = previous


def _interceptor(mode: Mapping[str, Any], *, first: bool) -> Any:
    def intercept(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        fields = _fields(module)
        taken = inspect.signature(context.orig_method).parameters if fields else {}
        names = list(taken)
        said = {name for name, value in kwargs.items() if value is not None}
        said.update(name for name, value in zip(names, args, strict=False) if value is not None)
        wanted = {
            name: value
            for name, value in mode.items()
            if name in fields and name not in said and (first or getattr(module, name) is None)
        }
        before = {name: getattr(module, name) for name in wanted}
        for name, value in wanted.items():
            object.__setattr__(module, name, value)
        try:
            return run(*args, **kwargs)
        finally:
            for name, value in before.items():
                object.__setattr__(module, name, value)

    return intercept


def _fields(module: linen.Module) -> Mapping[str, Any]:
    return getattr(type(module), "__dataclass_fields__", {})
