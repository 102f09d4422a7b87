"""Symbolic sizes: what a call makes of them, and whether constraints hold.

The expressions are those of ``jax.export.symbolic_shape``: sums, products and powers of names and
whole numbers, ``mod``, ``floordiv``, ``max`` and ``min``; a constraint compares two of them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Dims: TypeAlias = tuple[int | str, ...]
"""Sizes of axes: numbers, and expressions of symbolic sizes such as ``b`` or ``2*b + 1``."""

_MAX_LENGTH = 200
_MAX_POWER = 8
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, power: _power(base, power),
    ast.Eq: operator.eq,
    ast.GtE: operator.ge,
    ast.LtE: operator.le,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mod": operator.mod,
    "floordiv": operator.floordiv,
    "max": max,
    "min": min,
}


def evaluate(text: str, sizes: Mapping[str, int]) -> int:
    """An expression with these sizes; a constraint gives whether it holds.

    Raises:
        ValueError: it cannot be read.
        KeyError: a name has no size.

    Example:
        >>> evaluate("mod(b, 8) + 2*t", {"b": 12, "t": 3})
        10
        >>> evaluate("b >= 2", {"b": 1})
        False
    """
    return _value(_parsed(text).body, sizes, text)  # type: ignore[no-any-return]


def check(text: str) -> None:
    """Checks that an expression or constraint can be read.

    Raises:
        ValueError: it cannot.
    """
    with contextlib.suppress(ZeroDivisionError):
        evaluate(text, dict.fromkeys(names(text), 1))


@functools.lru_cache
def _parsed(text: str) -> ast.Expression:
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"an expression of {len(text)} characters is too long")
    try:
        return ast.parse(text.strip().replace("^", "**"), mode="eval")  # jax writes powers so
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} cannot be read") from error


def _power(base: int, power: int) -> int:
    if not 0 <= power <= _MAX_POWER:
        raise ValueError(f"found the power {power}, expected at most {_MAX_POWER}")
    return base**power  # type: ignore[no-any-return]


def names(text: str) -> set[str]:
    """The symbolic sizes in an expression.

    Example:
        >>> sorted(names("mod(b, 8) + t"))
        ['b', 't']
    """
    found = {node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name)}
    return found - set(_FUNCTIONS)


def _value(node: ast.AST, sizes: Mapping[str, int], text: str) -> Any:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, sizes, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            pair = _value(left, sizes, text), _value(right, sizes, text)
            return _OPERATORS[type(op)](*pair)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            pair = _value(left, sizes, text), _value(right, sizes, text)
            return _OPERATORS[type(op)](*pair)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(arg, sizes, text) for arg in args))
    raise ValueError(f"{text!r} is no expression of sizes")


def solve(pairs: Sequence[tuple[str, int]]) -> dict[str, int] | str:
    """The symbolic sizes for which expressions have these values.

    Args:
        pairs: expressions and the sizes found.

    Returns:
        The size of each name; or what contradicts, in words.

    Example:
        >>> solve([("b", 4), ("2*b + t", 11)])
        {'b': 4, 't': 3}
        >>> solve([("b", 4), ("2*b", 9)])
        '2*b is 8 for b = 4, found 9'
    """
    sizes: dict[str, int] = {}
    left = sorted(pairs, key=lambda pair: not pair[0].isidentifier())
    while left:
        later = []
        for text, size in left:
            unknown = names(text) - set(sizes)
            if len(unknown) > 1:
                later.append((text, size))
                continue
            if unknown:
                sizes[unknown.pop()] = _root(text, size, sizes)
            value = evaluate(text, sizes)
            if value != size:
                given = ", ".join(f"{name} = {sizes[name]}" for name in sorted(names(text)))
                if text.isidentifier():
                    return f"{text} is {value} elsewhere, found {size}"
                return f"{text} is {value} for {given}, found {size}"
        if len(later) == len(left):
            return f"{later[0][0]} = {later[0][1]} does not tell its parts"
        left = later
    small = [name for name, size in sizes.items() if size < 1]
    return f"{small[0]} is {sizes[small[0]]}, expected 1 or more" if small else sizes


def _root(text: str, size: int, sizes: Mapping[str, int]) -> int:
    """The whole number for which an expression linear in one unknown name comes nearest a size."""
    (unknown,) = names(text) - set(sizes)
    at_zero = evaluate(text, {**sizes, unknown: 0})
    slope = evaluate(text, {**sizes, unknown: 1}) - at_zero
    return (size - at_zero) // slope if slope else 0


def shape_text(dtype: str, dims: Dims) -> str:
    """A type with symbolic sizes.

    Example:
        >>> shape_text("float32", ("b", 3))
        'float32[b,3]'
    """
    return f"{dtype}[{','.join(map(str, dims))}]"
