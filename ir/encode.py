"""Turns static Python objects into attribute values."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from linsey.ir.attributes import (
    ABSENT,
    Array,
    AttrValue,
    Call,
    Const,
    DType,
    EnumValue,
    Instance,
    Live,
    Map,
    Ref,
    Sequence,
)
from linsey.ir.closures import closure_call, multi_steps_fields, reference, tuple_call
from linsey.ir.objects import ByState, plain_state

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, types.EllipsisType)
_SEQUENCES: dict[type, str] = {tuple: "tuple", list: "list", set: "set", frozenset: "frozenset"}
_MAX_DEPTH = 64
_MAX_ARRAY = 4096
_MAX_VALUES = 100_000
_MAX_STATE = 10_000


class _TooLarge(Exception):
    """One value would be made of more values than are taken for data."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """Compares an unhashable object by identity, and keeps it alive so that its id lasts."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


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
        self._open: set[int] = set()
        self._met: set[int] = set()
        self._left = _MAX_VALUES
        self._opaque: dict[int, Any] = {}
        self._is_inside = False
        self._is_apart = False

    def __call__(self, obj: Any, depth: int = 0) -> AttrValue:
        """Encodes one object; what cannot be data becomes `Live`."""
        if isinstance(obj, _CONSTANTS) and type(obj) in _CONSTANTS:
            return Const(obj)
        if depth == 0:
            return self._whole(obj)
        self._left -= 1
        if self._left < 0:
            raise _TooLarge
        if depth > _MAX_DEPTH:
            return _live_value(obj, self, depth)
        value = self._special(obj)
        if value is not None:
            return value
        again = functools.partial(self.__call__, depth=depth + 1)
        kind = _SEQUENCES.get(type(obj))
        if kind is not None:
            if kind.endswith("set"):
                return Sequence(kind=kind, items=tuple(sorted(self._of_set(obj, again), key=repr)))
            return Sequence(kind=kind, items=tuple(map(again, obj)))
        if isinstance(obj, np.dtype):
            return DType(name=obj.name)
        if isinstance(obj, enum.Enum):
            return EnumValue(cls=again(type(obj)), name=obj.name, live=obj)
        named = reference(obj)
        if named is not None:
            return named
        return self._compound(obj, again, depth)

    def _whole(self, obj: Any) -> AttrValue:
        self._met.clear()
        self._left = _MAX_VALUES
        try:
            return self(obj, 1)
        except _TooLarge:
            return Live(key=_Identity(obj), text=f"large {type(obj).__qualname__}", live=obj)

    def _compound(self, obj: Any, again: Callable[[Any], AttrValue], depth: int) -> AttrValue:
        if type(obj) is functools.partial:
            args = tuple(map(again, (obj.func, *obj.args)))
            kwargs = tuple((name, again(arg)) for name, arg in obj.keywords.items())
            return Call(function=again(functools.partial), args=args, kwargs=kwargs, live=obj)
        if type(obj) is collections.defaultdict:
            args = (again(obj.default_factory), again(dict(obj)))
            return Call(function=again(collections.defaultdict), args=args)
        if type(obj) in (range, slice):
            return Call(
                function=again(type(obj)),
                args=tuple(map(again, (obj.start, obj.stop, obj.step))),
                live=obj,
            )
        placed = _placed(obj)
        if placed is not None:
            name, parts = placed
            function = Ref(name=f"linsey._meshes:{name}")
            return Call(function=function, args=tuple(map(again, parts)), live=obj)
        if isinstance(obj, Mapping):
            pairs = tuple((again(key), again(value)) for key, value in obj.items())
            live = ABSENT if type(obj) is dict else obj
            return Map(cls=again(type(obj)), items=pairs, live=live)
        if isinstance(obj, np.ndarray | np.generic) or _is_jax_array(obj):
            return _array(obj)
        with self._apart():
            made = tuple_call(obj, again)
        if made is not None:
            return made
        fields = _constructor_fields(obj)
        if fields is None:
            fields = multi_steps_fields(obj, again)
        if fields is not None:
            return self._instance(obj, fields, again)
        if isinstance(obj, types.FunctionType):
            # Layers share their default initialisers: each is recognised once.
            if id(obj) not in self._closures:
                with self._apart():
                    self._closures[id(obj)] = (obj, closure_call(obj, again))
            made = self._closures[id(obj)][1]
            if made is not None:
                return made
        if isinstance(obj, types.MethodType):
            bound = self._method(obj, again)
            if bound is not None:
                return bound
        return self._plain(obj, again) or _live_value(obj, self, depth)

    def _of_set(self, items: Any, again: Callable[[Any], AttrValue]) -> list[AttrValue]:
        """The items of a set. Objects get their numbers in an order that hashes do not decide."""
        if not self._is_apart and any(type(item) not in _CONSTANTS for item in items):
            each = Encoder(self._special)
            each._is_apart = True
            keys = []
            for item in items:
                each._shared.clear()
                keys.append(repr(each(item)))
            numbered = sorted(zip(keys, items, strict=True), key=lambda pair: pair[0])
            items = [item for _, item in numbered]
        return list(map(again, items))

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Inside the block, objects that the value holds elsewhere are given with all fields.

        What is encoded there may only be compared, or be kept for another value.
        """
        met, self._met = self._met, set()
        try:
            yield
        finally:
            self._met = met

    def _method(self, obj: types.MethodType, again: Callable[[Any], AttrValue]) -> Call | None:
        """A method of an object that is data; None for those of modules, which are nodes."""
        function = reference(obj.__func__)
        if function is None or self._special(obj.__self__) is not None:
            return None
        owner = again(obj.__self__)
        if isinstance(owner, Live):
            return None
        maker = Ref(name="types:MethodType", live=types.MethodType)
        return Call(function=maker, args=(function, owner), live=obj)

    def _plain(self, obj: Any, again: Callable[[Any], AttrValue]) -> AttrValue | None:
        """A plain object by its state, where all of that is data; None for others."""
        state = None if id(obj) in self._opaque else plain_state(obj)
        cls = None if state is None else reference(type(obj))
        if state is None or cls is None:
            return None
        by_state = Ref(name="linsey.ir.objects:ByState", live=ByState)
        made_by = Call(function=by_state, args=(cls,), live=ByState(type(obj)))
        is_outer, left, met = not self._is_inside, self._left, set(self._met)
        budget = min(left, _MAX_STATE) if is_outer else left
        self._is_inside, self._left = True, budget
        value: Instance | Live | None = None
        try:
            value = self._instance(obj, list(state.items()), again, made_by)
        except _TooLarge:
            if not is_outer:
                raise
        finally:
            if is_outer:
                self._is_inside, self._left = False, left - (budget - max(self._left, 0))
        if value is not None and not _holds_live(value):
            return value
        self._opaque[id(obj)] = obj
        self._met = met
        if is_outer:
            self._left = left
        return None

    def _instance(
        self,
        obj: Any,
        fields: list[tuple[str, Any]],
        again: Callable[[Any], AttrValue],
        cls: AttrValue | None = None,
    ) -> Instance | Live:
        """An instance by its fields; met again inside one value, by its number alone."""
        share = self._share(obj)
        if share in self._open:  # it holds itself
            return Live(key=("cycle", share), text=type(obj).__qualname__, live=obj)
        if share in self._met:
            return Instance(cls=cls or again(type(obj)), fields=(), share=share, live=obj)
        self._open.add(share)
        try:
            encoded = tuple((name, again(value)) for name, value in fields)
        finally:
            self._open.discard(share)
        self._met.add(share)
        return Instance(cls=cls or again(type(obj)), fields=encoded, share=share, live=obj)

    def _share(self, obj: Any) -> int:
        """A number for `obj`, the same each time that this very object is met."""
        return self._shared.setdefault(id(obj), (obj, len(self._shared)))[1]


def _holds_live(value: Any) -> bool:
    """Whether a part of a value is what cannot be data."""
    if isinstance(value, tuple):
        return any(map(_holds_live, value))
    if isinstance(value, Live):
        return True
    if not dataclasses.is_dataclass(value):
        return False
    return any(
        _holds_live(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if field.name != "live"
    )


def _is_jax_array(obj: Any) -> bool:
    """A concrete jax array with numpy data, told without importing jax."""
    return (
        type(obj).__module__.startswith("jaxlib")
        and hasattr(obj, "__array__")
        and hasattr(obj, "is_deleted")
        and not str(obj.dtype).startswith("key<")
    )


def _placed(obj: Any) -> tuple[str, tuple[Any, ...]] | None:
    """For a mesh or a sharding of jax, told without importing it: what makes it, and from what."""
    if type(obj).__module__.partition(".")[0] not in ("jax", "jaxlib"):
        return None
    match type(obj).__name__:
        case "Mesh":
            ids = tuple(device.id for device in obj.devices.flat)
            return "mesh", (*_axes(obj), ids)
        case "AbstractMesh":
            device = getattr(obj, "abstract_device", None)
            kind = device and (device.device_kind, device.num_cores, device.platform)
            return "mesh", (*_axes(obj), (), *((kind,) if kind else ()))
        case "NamedSharding":
            return "named_sharding", (obj.mesh, obj.spec, obj.memory_kind)
        case "P" | "PartitionSpec":
            return "partition_spec", (tuple(obj), obj.unreduced, obj.reduced)
        case "UnconstrainedSingleton":
            return "unconstrained", ()
    return None


def _axes(mesh: Any) -> tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]]:
    names = tuple(mesh.axis_names)
    sizes = tuple(int(mesh.shape[name]) for name in names)
    return names, sizes, tuple(kind.name for kind in mesh.axis_types)


def _maker(obj: Any) -> str:
    if _is_jax_array(obj):
        return "jax"
    return "numpy" if isinstance(obj, np.ndarray) else type(obj).__name__


def _array(obj: Any) -> AttrValue:
    if obj.size > _MAX_ARRAY or obj.dtype == object:
        return Live(key=_Identity(obj), text=f"array of {obj.size} elements", live=obj)
    host = np.ascontiguousarray(np.asarray(obj))
    return Array(
        dtype=host.dtype.name,
        shape=tuple(obj.shape),
        data=host.tobytes(),
        make=_maker(obj),
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
