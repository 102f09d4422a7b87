"""What a function or a class is called, and which call made a closure of jax, flax or optax."""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from linsey.ir import _optax
from linsey.ir.attributes import AttrValue, Call, Ref

_MAKERS = ("jax", "flax", "optax")
_MAX_FLAGS = 2
_MAX_PAIRS = 10_000
_Again: TypeAlias = Callable[[Any], AttrValue]
_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


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


def closure_call(fn: types.FunctionType, again: _Again) -> Call | None:
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
        found = _found(maker, fn, [fn], again)
    except ValueError:  # a variable that is captured before it has a value
        return None
    return None if found is None else _call(maker, found, fn, again)


def tuple_call(obj: Any, again: _Again) -> Call | None:
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
    if functions[0].__code__.co_qualname == _optax.INJECTED:
        return _injected(obj, again)
    try:
        captured = [value for fn in functions for value in _captured(fn).values()]
        # Of two makers, one of which calls the other with a lambda of its own, the outer one.
        within = [value for value in captured if isinstance(value, types.FunctionType)]
        for maker in dict.fromkeys(map(_maker, (*within, *functions))):
            if maker is not None:
                found = _found(maker, obj, [*functions, *within], again)
                if found is not None:
                    return _call(maker, found, obj, again)
    except ValueError:
        return None
    return None


def _injected(obj: Any, again: _Again) -> Call | None:
    """The two calls that made an ``optax.inject_hyperparams(...)(...)``."""
    maker = _maker(obj[0])
    function = None if maker is None else reference(maker)
    if function is None:
        return None
    try:
        outer, inner = _optax.injected(obj[0])
        made = maker(**outer)(**inner)
    except Exception:
        return None
    if not _is_same(made, obj, again, set()):
        return None
    first = Call(function=function, kwargs=tuple((k, again(v)) for k, v in outer.items()))
    return Call(function=first, kwargs=tuple((k, again(v)) for k, v in inner.items()), live=obj)


def multi_steps_fields(obj: Any, again: _Again) -> list[tuple[str, Any]] | None:
    """The arguments that make an ``optax.MultiSteps`` again, by name; None for other objects.

    Args:
        obj: any object.
        again: encodes a value.
    """
    if not _optax.is_multi_steps(obj):
        return None
    try:
        fields = _optax.multi_steps(obj)
        made = type(obj)(**fields)
    except Exception:
        return None
    return list(fields.items()) if _is_same(made, obj, again, set()) else None


def _call(maker: Any, arguments: _Arguments, obj: Any, again: _Again) -> Call | None:
    function = reference(maker)
    if function is None:
        return None
    args, kwargs = arguments
    return Call(
        function=function,
        args=tuple(map(again, args)),
        kwargs=tuple((name, again(value)) for name, value in kwargs.items()),
        live=obj,
    )


def _found(
    maker: Any, obj: Any, functions: list[types.FunctionType], again: _Again
) -> _Arguments | None:
    """The arguments with which a maker makes an object again; None where there are none."""
    if reference(maker) is None:
        return None
    for args, kwargs in _candidates(maker, obj, functions):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = maker(*args, **kwargs)
        except Exception:
            continue
        if _is_same(made, obj, again, set()):
            return args, kwargs
    return None


def _candidates(maker: Any, obj: Any, functions: list[types.FunctionType]) -> Iterator[_Arguments]:
    """The arguments that a maker may have been called with, told from what its closures hold."""
    try:
        parameters = inspect.signature(maker).parameters
    except (TypeError, ValueError):
        return
    captured = _of_maker(maker, functions)
    parts = _parts(obj, captured)
    if parts is not None:
        yield parts, {}
        return
    is_strict = maker.__module__.partition(".")[0] != "optax"
    if is_strict and not captured.keys() <= parameters.keys():
        return
    own = [fn for fn in functions if _maker(fn) is maker]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    kinds = [parameter.kind for parameter in parameters.values()]
    if kinds == [inspect.Parameter.VAR_POSITIONAL]:  # optax.named_chain
        lists = [value for value in captured.values() if type(value) is list]
        args = tuple(lists[0]) if len(lists) == 1 else ()
    for name, value in captured.items():
        kind = parameters[name].kind if name in parameters else None
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args = tuple(value)
        elif kind is not None:
            kwargs[name] = value
    # A maker may also pass an argument on as a default of what it makes (dtype, say).
    for fn in own if isinstance(obj, types.FunctionType) else ():
        for name, parameter in inspect.signature(fn, follow_wrapped=False).parameters.items():
            if name in parameters and parameter.default is not parameter.empty:
                kwargs.setdefault(name, parameter.default)
    yield args, kwargs
    if is_strict:
        return
    # What it only passed on is held by what others made for it.
    passed = {
        name: value
        for name, value in _of_maker(None, functions).items()
        if name in parameters and name not in kwargs
    }
    if passed and not args:
        yield (), {**kwargs, **passed}
    # What a flag did to other variables is seen when it is tried.
    flags = [
        name
        for name, parameter in parameters.items()
        if type(parameter.default) is bool and name not in kwargs
    ]
    for values in itertools.product((True, False), repeat=len(flags[:_MAX_FLAGS])):
        if values:
            yield args, {**kwargs, **dict(zip(flags, values, strict=False))}


def _of_maker(maker: Any, functions: Iterable[types.FunctionType]) -> dict[str, Any]:
    """What functions that a maker made captured, and what those did that they captured.

    Args:
        maker: the maker; None: any.
        functions: where to begin.
    """
    captured: dict[str, Any] = {}
    left, seen = list(functions), set()
    while left:
        fn = left.pop(0)
        if id(fn) in seen or (maker is not None and _maker(fn) is not maker):
            continue
        seen.add(id(fn))
        held = _captured(fn)
        for name, value in held.items():
            captured.setdefault(name, value)
        left += [value for value in held.values() if isinstance(value, types.FunctionType)]
    return captured


def _parts(obj: Any, captured: dict[str, Any]) -> tuple[Any, ...] | None:
    """The tuples whose fields closures captured, one list for each field; None for others."""
    names = [f"{field}_fns" for field in getattr(obj, "_fields", ())]
    if not names or set(captured) != set(names):
        return None
    fields = [captured[name] for name in names]
    if not all(type(each) in (tuple, list) and len(each) == len(fields[0]) for each in fields):
        return None
    return tuple(type(obj)(*part) for part in zip(*fields, strict=True))


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


def _is_same(made: Any, old: Any, again: _Again, met: set[tuple[int, int]]) -> bool:
    """Whether two functions have the same code, captures and defaults, or two values the same data.

    Args:
        made: what a maker gave.
        old: what it is compared with.
        again: encodes a value.
        met: the pairs that are compared already, of which one is inside the other.
    """
    if made is old or (id(made), id(old)) in met:
        return True
    if type(made) is not type(old) or len(met) > _MAX_PAIRS:
        return False
    met.add((id(made), id(old)))
    if isinstance(old, types.FunctionType):
        if made.__code__ != old.__code__ or made.__globals__ is not old.__globals__:
            return False
        first, second = (
            (*_captured(fn).values(), fn.__defaults__, fn.__kwdefaults__) for fn in (made, old)
        )
        pairs = zip(first, second, strict=True)
    elif type(old) in (tuple, list) or hasattr(old, "_fields"):
        if len(made) != len(old):
            return False
        pairs = zip(made, old, strict=True)
    elif type(old) is dict:
        if list(map(again, made)) != list(map(again, old)):
            return False
        pairs = zip(made.values(), old.values(), strict=True)
    elif type(old).__module__.partition(".")[0] == "optax" and hasattr(old, "__dict__"):
        pairs = zip((vars(made),), (vars(old),), strict=True)
    else:
        return again(made) == again(old)
    return all(_is_same(one, other, again, met) for one, other in pairs)
