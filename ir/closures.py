"""What a function or a class is called, and which call made a closure of jax, flax or optax."""

from __future__ import annotations

import inspect
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

from linsey.ir.attributes import AttrValue, Call, Ref

_MAKERS = ("jax", "flax", "optax")


def reference(obj: Any) -> Ref | None:
    """The reference under which `obj` can be imported, or None."""
    module = getattr(obj, "__module__", None)
    qualname = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or "<" in qualname:
        return None
    # Some types of the interpreter say builtins and live in types: NoneType, FunctionType …
    for place in (module, "types") if module == "builtins" else (module,):
        try:
            found = operator.attrgetter(qualname)(sys.modules[place])
        except (KeyError, AttributeError):
            continue
        if found is obj:
            return Ref(name=f"{place}:{qualname}", live=obj)
    return None


def closure_call(fn: types.FunctionType, again: Callable[[Any], AttrValue]) -> Call | None:
    """The call that made a closure of jax, flax or optax, where it can be told for certain.

    The maker is called again with the captured values, and must give a function with the same code
    and captures.

    Args:
        fn: the closure.
        again: encodes a value.
    """
    maker = _maker(fn)
    if maker is None or not fn.__closure__:
        return None
    try:
        parameters = inspect.signature(maker).parameters
        captured = _captured(fn)
        if not captured.keys() <= parameters.keys():
            return None
        # A maker may also pass an argument on as a default of what it makes (dtype, say).
        for name, parameter in inspect.signature(fn, follow_wrapped=False).parameters.items():
            if name in parameters and parameter.default is not parameter.empty:
                captured.setdefault(name, parameter.default)
        made = maker(**captured)
    except Exception:
        return None
    if not _is_same(made, fn, again):
        return None
    function = reference(maker)
    kwargs = tuple((name, again(value)) for name, value in captured.items())
    return None if function is None else Call(function=function, kwargs=kwargs, live=fn)


def tuple_call(obj: Any, again: Callable[[Any], AttrValue]) -> Call | None:
    """The call that made a named tuple of closures, as optax's transformations are.

    What the closures captured, taken together, are the arguments; of a maker that takes any number
    of such tuples (``optax.chain``), they captured the fields of these.

    Args:
        obj: any object.
        again: encodes a value.
    """
    if not isinstance(obj, tuple) or not hasattr(obj, "_fields"):
        return None
    functions = [fn for fn in obj if isinstance(fn, types.FunctionType)]
    if not functions or len(functions) != len(obj):
        return None
    for maker in dict.fromkeys(map(_maker, functions)):
        function = None if maker is None else reference(maker)
        if maker is None or function is None:
            continue
        try:
            captured: dict[str, Any] = {}
            for fn in functions:
                captured |= _captured(fn) if _maker(fn) is maker else {}
            args, kwargs = _arguments(obj, captured)
            made = maker(*args, **kwargs)
        except Exception:
            continue
        pairs = zip(made, obj, strict=True) if type(made) is type(obj) else ()
        if pairs and all(_is_same(new, old, again) for new, old in pairs):
            return Call(
                function=function,
                args=tuple(map(again, args)),
                kwargs=tuple((name, again(value)) for name, value in kwargs.items()),
                live=obj,
            )
    return None


def _arguments(obj: Any, captured: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = [f"{field}_fns" for field in obj._fields]
    if set(captured) != set(names):
        return (), captured
    parts = zip(*(captured[name] for name in names), strict=True)
    return tuple(type(obj)(*part) for part in parts), {}


def _maker(fn: types.FunctionType) -> Any:
    """The function of jax, flax or optax inside which a function was made, or None."""
    module = fn.__globals__.get("__name__", "")
    outer, nested, _ = fn.__code__.co_qualname.partition(".<locals>.")
    if not nested or module.split(".")[0] not in _MAKERS:
        return None
    try:
        return operator.attrgetter(outer)(sys.modules[module])
    except (AttributeError, KeyError):
        return None


def _captured(fn: types.FunctionType) -> dict[str, Any]:
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def _is_same(made: Any, fn: Any, again: Callable[[Any], AttrValue]) -> bool:
    """Whether two functions have the same code, captures and defaults."""
    if made is fn:
        return True
    if getattr(made, "__code__", None) != fn.__code__:
        return False
    first, second = _captured(made), _captured(fn)
    if all(first[name] is second[name] for name in first):
        return bool(again([made.__defaults__]) == again([fn.__defaults__]))
    parts = [[list(first.values()), made.__defaults__], [list(second.values()), fn.__defaults__]]
    return bool(again(parts[0]) == again(parts[1]))
