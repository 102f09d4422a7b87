"""Attribute values: static Python objects as data.

`encode` turns an object into an immutable, hashable value that compares by content, `decode` turns
it back. A value remembers the object it was made from as ``live``, so that inside one process
decoding gives back the very same object; ``live`` takes no part in comparison.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from linsey.ir.errors import LinseyError


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()
"""Marks a value without a live object (one that was loaded, say)."""


def _live() -> Any:
    """The field that remembers the object a value was made from."""
    return field(default=ABSENT, compare=False, repr=False)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EnumValue:
    """A member of an enumeration."""

    cls: AttrValue
    """The enumeration."""
    name: str
    """The member's name."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The member itself."""


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
    """``numpy`` or ``jax``: the library whose array it is."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The array itself."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An instance of a dataclass or of a named tuple, by its fields."""

    cls: AttrValue
    """Its class."""
    fields: tuple[tuple[str, AttrValue], ...]
    """The fields that its constructor takes, by name."""
    share: int | None = None
    """A number that the uses of one object share within one attribute table; None: used once."""
    live: Any = _live()  # noqa: RUF009 - makes a dataclass field
    """The instance itself."""


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

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, types.EllipsisType)
_SEQUENCES: dict[type, str] = {tuple: "tuple", list: "list", set: "set", frozenset: "frozenset"}
_CLOSURE_MAKERS = ("jax", "flax", "optax")
_MAX_DEPTH = 64
_MAX_ARRAY = 4096


@dataclass(frozen=True, slots=True)
class _Identity:
    """Compares an unhashable object by identity, and keeps it alive so that its id lasts."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def resolve(name: str) -> Any:
    """The object that ``package.module:Qualified.name`` names.

    Raises:
        ImportError: the module cannot be imported.
        AttributeError: the module has no such object.

    Example:
        >>> resolve("math:pi")
        3.141592653589793
    """
    module, _, qualname = name.partition(":")
    loaded = sys.modules.get(module) or importlib.import_module(module)
    return operator.attrgetter(qualname)(loaded)


def reference(obj: Any) -> Ref | None:
    """The reference under which `obj` can be imported, or None."""
    module = getattr(obj, "__module__", None)
    qualname = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or "<" in qualname:
        return None
    try:
        found = operator.attrgetter(qualname)(sys.modules[module])
    except (KeyError, AttributeError):
        return None
    return Ref(name=f"{module}:{qualname}", live=obj) if found is obj else None


class Encoder:
    """Encodes the attributes of one graph; it remembers which objects occur more than once.

    Args:
        special: asked first; returns a value for what a frontend knows better (a submodule, say),
            or None.
    """

    def __init__(self, special: Callable[[Any], AttrValue | None] = lambda obj: None) -> None:
        self._special = special
        self._shared: dict[int, tuple[Any, int]] = {}
        self._closures: dict[int, tuple[Any, Call | None]] = {}

    def __call__(self, obj: Any, depth: int = 0) -> AttrValue:
        """Encodes one object; what cannot be data becomes `Live`."""
        if isinstance(obj, _CONSTANTS) and type(obj) in _CONSTANTS:
            return Const(obj)
        if depth > _MAX_DEPTH:
            return _live_value(obj, self, depth)
        value = self._special(obj)
        if value is not None:
            return value
        again = functools.partial(self.__call__, depth=depth + 1)
        kind = _SEQUENCES.get(type(obj))
        if kind is not None:
            items = map(again, obj)
            ordered = sorted(items, key=repr) if kind.endswith("set") else items
            return Sequence(kind=kind, items=tuple(ordered))
        if isinstance(obj, np.dtype):
            return DType(name=obj.name)
        if isinstance(obj, enum.Enum):
            return EnumValue(cls=again(type(obj)), name=obj.name, live=obj)
        named = reference(obj)
        if named is not None:
            return named
        return self._compound(obj, again, depth)

    def _compound(self, obj: Any, again: Callable[[Any], AttrValue], depth: int) -> AttrValue:
        if type(obj) is functools.partial:
            args = tuple(map(again, (obj.func, *obj.args)))
            kwargs = tuple((name, again(arg)) for name, arg in obj.keywords.items())
            return Call(function=again(functools.partial), args=args, kwargs=kwargs, live=obj)
        if isinstance(obj, Mapping):
            pairs = tuple((again(key), again(value)) for key, value in obj.items())
            live = ABSENT if isinstance(obj, dict) else obj
            return Map(cls=again(type(obj)), items=pairs, live=live)
        if isinstance(obj, np.ndarray) or _is_jax_array(obj):
            return _array(obj)
        fields = _constructor_fields(obj)
        if fields is not None:
            encoded = tuple((name, again(value)) for name, value in fields)
            return Instance(cls=again(type(obj)), fields=encoded, share=self._share(obj), live=obj)
        if isinstance(obj, types.FunctionType):
            # Layers share their default initialisers: each is recognised once.
            if id(obj) not in self._closures:
                self._closures[id(obj)] = (obj, _closure_call(obj, again))
            made = self._closures[id(obj)][1]
            if made is not None:
                return made
        return _live_value(obj, self, depth)

    def _share(self, obj: Any) -> int:
        """A number for `obj`, the same each time that this very object is met."""
        return self._shared.setdefault(id(obj), (obj, len(self._shared)))[1]


def _is_jax_array(obj: Any) -> bool:
    """A concrete jax array with numpy data, told without importing jax."""
    return (
        type(obj).__module__.startswith("jaxlib")
        and hasattr(obj, "__array__")
        and hasattr(obj, "is_deleted")
        and not str(obj.dtype).startswith("key<")
    )


def _array(obj: Any) -> AttrValue:
    if obj.size > _MAX_ARRAY or obj.dtype == object:
        return Live(key=_Identity(obj), text=f"array of {obj.size} elements", live=obj)
    host = np.ascontiguousarray(np.asarray(obj))
    return Array(
        dtype=host.dtype.name,
        shape=tuple(obj.shape),
        data=host.tobytes(),
        make="numpy" if isinstance(obj, np.ndarray) else "jax",
        live=obj,
    )


def _constructor_fields(obj: Any) -> list[tuple[str, Any]] | None:
    """The fields from which a dataclass instance or a named tuple can be made again."""
    if isinstance(obj, type):
        return None
    if dataclasses.is_dataclass(obj):
        fields = [f.name for f in dataclasses.fields(obj) if f.init]
        if all(hasattr(obj, name) for name in fields):
            return [(name, getattr(obj, name)) for name in fields]
        return None
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return list(zip(obj._fields, obj, strict=True))
    return None


def _closure_call(fn: types.FunctionType, again: Callable[[Any], AttrValue]) -> Call | None:
    """The call that made a closure of jax, flax or optax, where it can be told for certain.

    The maker is called again with the captured values, and must give a function with the same code
    and captures.
    """
    module = fn.__globals__.get("__name__", "")
    outer, nested, _ = fn.__code__.co_qualname.partition(".<locals>.")
    if not nested or module.split(".")[0] not in _CLOSURE_MAKERS or not fn.__closure__:
        return None
    try:
        maker = operator.attrgetter(outer)(sys.modules[module])
        parameters = inspect.signature(maker).parameters
        captured = {
            name: cell.cell_contents
            for name, cell in zip(fn.__code__.co_freevars, fn.__closure__, strict=True)
        }
        if not captured.keys() <= parameters.keys():
            return None
        made = maker(**captured)
    except Exception:
        return None
    function = reference(maker)
    if function is None or getattr(made, "__code__", None) != fn.__code__:
        return None
    remade = [cell.cell_contents for cell in made.__closure__ or ()]
    if list(map(again, remade)) != list(map(again, captured.values())):
        return None
    kwargs = tuple((name, again(value)) for name, value in captured.items())
    return Call(function=function, kwargs=kwargs, live=fn)


def _live_value(obj: Any, encode: Encoder, depth: int) -> Live:
    text = getattr(obj, "__qualname__", None) or f"{type(obj).__qualname__} object"
    if isinstance(obj, types.FunctionType) and depth < _MAX_DEPTH:
        captured = [cell.cell_contents for cell in obj.__closure__ or () if _is_set(cell)]
        parts = [captured, obj.__defaults__, obj.__kwdefaults__]
        key: Any = (obj.__module__, obj.__code__, *(encode(part, depth + 1) for part in parts))
    else:
        try:
            hash(obj)
            key = obj
        except TypeError:
            key = _Identity(obj)
    return Live(key=key, text=text, live=obj)


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading an empty cell raises
    except ValueError:
        return False
    return True


def encode(obj: Any) -> AttrValue:
    """Encodes one static object as an attribute value.

    Example:
        >>> encode((1, "relu"))
        Sequence(kind='tuple', items=(Const(value=1), Const(value='relu')))
    """
    return Encoder()(obj)


class Decoder:
    """Decodes the attributes of one graph; objects that were one object stay one object.

    Args:
        node: gives the object for a `NodeRef`.
        holes: the objects to put in the place of `Hole` values.
    """

    def __init__(
        self, node: Callable[[int], Any] | None = None, holes: tuple[Any, ...] = ()
    ) -> None:
        self._node = node
        self._holes = holes
        self._shared: dict[int, Any] = {}

    def __call__(self, value: AttrValue) -> Any:
        """Decodes one value.

        Raises:
            LinseyError: the object exists in the process that lowered it only.
            ImportError: a module that the value names cannot be imported.
        """
        live = getattr(value, "live", ABSENT)
        if live is not ABSENT:
            return live
        match value:
            case Const():
                return value.value
            case DType():
                return _dtype(value.name)
            case Ref():
                return resolve(value.name)
            case EnumValue():
                return self(value.cls)[value.name]
            case Sequence():
                return _BUILTINS[value.kind](map(self, value.items))
            case Map():
                pairs = {self(key): self(item) for key, item in value.items}
                cls = self(value.cls)
                return pairs if cls is dict else cls(pairs)
            case Instance():
                return self._instance(value)
            case Call():
                kwargs = {name: self(arg) for name, arg in value.kwargs}
                return self(value.function)(*map(self, value.args), **kwargs)
            case Array():
                return _from_bytes(value)
            case Hole():
                return self._holes[value.index]
            case NodeRef() if self._node is not None:
                return self._node(value.node)
        raise LinseyError(
            f"{describe(value)} exists only in the process that lowered it",
            fix="Use a function or class that can be imported by name.",
        )

    def _instance(self, value: Instance) -> Any:
        if value.share is not None and value.share in self._shared:
            return self._shared[value.share]
        made = self(value.cls)(**{name: self(item) for name, item in value.fields})
        if value.share is not None:
            self._shared[value.share] = made
        return made


_BUILTINS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "set": set,
    "frozenset": frozenset,
}


def _dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        extended: np.dtype[Any] = np.dtype(resolve(f"ml_dtypes:{name}"))
        return extended


def _from_bytes(value: Array) -> Any:
    host = np.frombuffer(value.data, dtype=_dtype(value.dtype)).reshape(value.shape).copy()
    return host if value.make == "numpy" else resolve("jax.numpy:asarray")(host)


def decode(value: AttrValue) -> Any:
    """The object that an attribute value stands for; see `Decoder`.

    Example:
        >>> decode(encode({"axis": (0, 1)}))
        {'axis': (0, 1)}
    """
    return Decoder()(value)


def describe(value: AttrValue) -> str:
    """A short, stable text for a value, as `print` shows it in a graph.

    Example:
        >>> describe(encode([1, None]))
        '[1, None]'
    """
    match value:
        case Const():
            return repr(value.value)
        case DType():
            return value.name
        case Ref():
            return value.name.rpartition(":")[2]
        case EnumValue():
            return f"{describe(value.cls)}.{value.name}"
        case Array():
            return f"{value.make}.{value.dtype}{list(value.shape)}"
        case Sequence():
            inner = ", ".join(map(describe, value.items))
            match value.kind:
                case "tuple":
                    return f"({inner},)" if len(value.items) == 1 else f"({inner})"
                case "list":
                    return f"[{inner}]"
            return f"{value.kind}({{{inner}}})"
        case Map():
            inner = ", ".join(f"{describe(key)}: {describe(item)}" for key, item in value.items)
            return f"{{{inner}}}"
        case Instance():
            return f"{describe(value.cls)}({_describe_fields(value.fields)})"
        case Call():
            arguments = [*map(describe, value.args), _describe_fields(value.kwargs)]
            return f"{describe(value.function)}({', '.join(filter(None, arguments))})"
        case NodeRef():
            return f"%{value.node}"
        case Hole():
            return "*"
        case Template():
            return describe(value.structure)
        case Live():
            return f"<{value.text}>"


def _describe_fields(fields: Iterable[tuple[str, AttrValue]]) -> str:
    return ", ".join(f"{name}={describe(item)}" for name, item in fields)
