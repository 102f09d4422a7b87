"""Attribute values: static Python objects as data.

`linsey.ir.encode` turns an object into an immutable, hashable value that compares by content,
`linsey.ir.decode` turns it back. A value remembers the object it was made from as ``live``, so that
inside one process decoding gives back the very same object; ``live`` takes no part in comparison.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from linsey.ir import alive


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()
"""Marks a value without a live object (one that was loaded, say)."""


class _Untrusted:
    def __repr__(self) -> str:
        return "UNTRUSTED"


UNTRUSTED = _Untrusted()
"""In place of the live object of a `Ref` that was read from bytes: it must not be imported."""


def _live() -> Any:
    """The field that remembers the object a value was made from."""
    return field(default=ABSENT, compare=False, repr=False)


def _without_live(value: Any) -> tuple[Any, ...]:
    """How a value is pickled: as data, since its live object may not be picklable."""
    kept = {item.name: getattr(value, item.name) for item in fields(value) if item.name != "live"}
    return _make, (type(value), kept)


def _make(cls: Any, kept: dict[str, Any]) -> Any:
    return cls(**kept)


@dataclass(frozen=True, slots=True, eq=False)
class Const:
    """None, a bool, int, float, complex, str, bytes or Ellipsis.

    Unlike in Python, ``1``, ``1.0`` and ``True`` differ, and a NaN equals itself.
    """

    value: Any
    """The constant."""

    def _key(self) -> tuple[type, Any]:
        value = self.value
        return type(value), repr(value) if isinstance(value, float | complex) else value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """A numpy dtype."""

    name: str
    """As ``numpy.dtype.name`` gives it; the extended ones are those of ml_dtypes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """An importable object."""

    name: str
    """``package.module:Qualified.name``."""

    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The object itself."""

    __reduce__ = _without_live


@dataclass(frozen=True, slots=True, kw_only=True)
class EnumValue:
    """A member of an enumeration."""

    cls: AttrValue
    """The enumeration."""
    name: str
    """The member's name."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The member itself."""

    __reduce__ = _without_live


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """A small array, by content."""

    dtype: str
    """Name of its dtype."""
    shape: tuple[int, ...]
    """Its shape."""
    data: bytes
    """Its elements in C order, in this machine's byte order (little-endian)."""
    make: str
    """``jax`` for a jax array, ``numpy`` for a numpy one, else the name of a numpy scalar type."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The array itself."""

    __reduce__ = _without_live


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """A tuple, list, set or frozenset."""

    kind: str
    """Name of the builtin type."""
    items: tuple[AttrValue, ...]
    """The items; those of a set in the order of their representation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A dict or another mapping."""

    cls: AttrValue
    """The mapping's class."""
    items: tuple[tuple[AttrValue, AttrValue], ...]
    """Keys and values, in the mapping's order."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The mapping itself, where it is immutable."""

    __reduce__ = _without_live


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An instance of a dataclass or of a named tuple, by its fields."""

    cls: AttrValue
    """Its class."""
    fields: tuple[tuple[str, AttrValue], ...]
    """The fields that its constructor takes, by name."""
    share: int | None = None
    """A number that the uses of one object share within one attribute table. Inside one value, the
    uses after the first have it and no fields."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The instance itself."""

    __reduce__ = _without_live


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The result of calling something importable: a closure, by the call that made it."""

    function: AttrValue
    """What was called; `functools.partial` for a partial."""
    args: tuple[AttrValue, ...] = ()
    """Positional arguments."""
    kwargs: tuple[tuple[str, AttrValue], ...] = ()
    """Keyword arguments."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The result."""

    __reduce__ = _without_live


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRef:
    """A module of the same graph."""

    node: int
    """Index of the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """The place of an array in a template (the structure of a pytree, or a metadata box)."""

    index: int
    """Which array, counted from 0 in the order of flattening."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The structure of a pytree, or of a metadata box, around its arrays."""

    structure: AttrValue
    """The tree, with a `Hole` for each array."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """Its jax tree definition."""

    __reduce__ = _without_live


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """Something that cannot be data: a lambda, a local class, an open handle.

    Two functions with the same code, closure and defaults are equal, whoever made them.
    """

    key: Any
    """What it is compared by."""
    text: str = field(compare=False)
    """A readable name."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The object itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _found_alive, (alive.token_of(self.live, self.key), self.text)


def _found_alive(token: str, text: str) -> AttrValue:
    """What a pickle holds of a `Live`: the same again in this process, its name elsewhere."""
    found = alive.find(token)
    if found is None:
        return Live(key=("elsewhere", token), text=text)
    return Live(key=found[1], text=text, live=found[0])


AttrValue: TypeAlias = (
    Const
    | DType
    | Ref
    | EnumValue
    | Array
    | Sequence
    | Map
    | Instance
    | Call
    | NodeRef
    | Hole
    | Template
    | Live
)
Attrs: TypeAlias = tuple[tuple[str | int, AttrValue], ...]
_MAX_SHOWN = 4


def describe(value: AttrValue, depth: int = 8) -> str:
    """A short, stable text for a value, as `print` shows it in a graph.

    Args:
        value: the value.
        depth: how many levels to show.

    Example:
        >>> from linsey.ir import encode
        >>> describe(encode([1, None]))
        '[1, None]'
    """
    if depth == 0:
        return "…"
    inner_depth = depth - 1
    match value:
        case Const():
            return repr(value.value)
        case DType():
            return value.name
        case Ref():
            return value.name.rpartition(":")[2]
        case EnumValue():
            return f"{describe(value.cls, inner_depth)}.{value.name}"
        case Array():
            return f"{value.make}.{value.dtype}{list(value.shape)}"
        case Sequence():
            inner = ", ".join(describe(item, inner_depth) for item in value.items)
            match value.kind:
                case "tuple":
                    return f"({inner},)" if len(value.items) == 1 else f"({inner})"
                case "list":
                    return f"[{inner}]"
            return f"{value.kind}({{{inner}}})"
        case Map():
            inner = ", ".join(
                f"{describe(key, inner_depth)}: {describe(item, inner_depth)}"
                for key, item in value.items
            )
            return f"{{{inner}}}"
        case Instance(cls=Call(function=Ref(name="linsey.ir.objects:ByState"), args=(kind,))):
            shown = _describe_fields(value.fields[:_MAX_SHOWN], inner_depth)
            more = ", …" if len(value.fields) > _MAX_SHOWN else ""
            return f"{describe(kind, inner_depth)}({shown}{more})"
        case Instance():
            return (
                f"{describe(value.cls, inner_depth)}({_describe_fields(value.fields, inner_depth)})"
            )
        case Call():
            arguments = [describe(arg, inner_depth) for arg in value.args]
            arguments.append(_describe_fields(value.kwargs, inner_depth))
            return f"{describe(value.function, inner_depth)}({', '.join(filter(None, arguments))})"
        case NodeRef():
            return f"%{value.node}"
        case Hole():
            return "*"
        case Template():
            return describe(value.structure, inner_depth)
        case Live():
            return f"<{value.text}>"


def _describe_fields(fields: Iterable[tuple[str, AttrValue]], depth: int) -> str:
    return ", ".join(f"{name}={describe(item, depth)}" for name, item in fields)
