"""A graph as tables of columns."""

from __future__ import annotations

import itertools
import operator
import struct
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from linsey.ir.attributes import Const, Live
from linsey.ir.codec._columns import pack_blobs, pack_ints
from linsey.ir.codec._limits import MAX_PATH, Limits
from linsey.ir.codec._schema import CODES, FIELDS, INDICES, OBJECTS, Field, Item
from linsey.ir.errors import FormatError
from linsey.ir.graph import UNCONSTRAINED, Axis, Graph
from linsey.ir.paths import Path

Row = tuple[Any, ...]


class Writer:
    """Collects the rows of all tables; what occurs again is written once.

    Args:
        leave_out: whether what cannot be data is written by its name alone.
    """

    def __init__(self, *, leave_out: bool) -> None:
        self._leave_out = leave_out
        self._texts: dict[str, int] = {}
        self._rows: dict[str, list[Row]] = {table: [] for table in OBJECTS}
        self._order: list[int] = []
        self._ids: dict[str, dict[Row, int]] = {table: {} for table in OBJECTS}
        self._paths: dict[Path, int] = {}
        self._constants: dict[tuple[type, Any], int] = {}
        self._seen: dict[int, tuple[Any, int]] = {}
        self._limits = Limits()
        self._encode: dict[str, Callable[[Any], Any]] = {
            **dict.fromkeys(("int", *INDICES), operator.index),
            "bool": int,
            "bytes": lambda value: value,
            "text": self._text,
            "key": self._key,
            "path": self._path,
            "attrs": self._attrs,
            "ref": self._object,
        }
        self._fields = {
            table: tuple((field.name, self._field(field)) for field in FIELDS[table])
            for table in OBJECTS
        }

    def tables(self, graph: Graph) -> dict[str, Any]:
        """The tables of a graph, without those that are empty."""
        rows = {
            "Slot": graph.slots,
            "Stream": graph.streams,
            "Node": graph.nodes,
            "Graph": (graph,),
        }
        sizes = {table: len(held) for table, held in rows.items()}
        tables: dict[str, Any] = {}
        for table, held in rows.items():
            columns: dict[str, Any] = {}
            for field in FIELDS[table]:
                entries = list(map(operator.attrgetter(field.name), held))
                for column, item, values in _spread(field, entries):
                    columns[column] = _packed(item, self._column(item, values), sizes)
            if held:
                tables[table] = {"rows": len(held), "columns": columns}
        for table, own in self._rows.items():
            columns = {}
            for field, values_of in zip(FIELDS[table], zip(*own, strict=True), strict=bool(own)):
                for column, item, values in _spread(field, values_of):
                    columns[column] = _packed(item, values, sizes)
            if own:
                tables[table] = {"rows": len(own), "columns": columns}
        tables["texts"] = pack_blobs(list(map(text_bytes, self._texts)))
        tables["objects"] = [list(OBJECTS), pack_ints(self._order)]
        return tables

    def _column(self, item: Item | None, values: Sequence[Any]) -> Sequence[Any]:
        """Encodes many values at once: this is where the time goes in large graphs."""
        if item is None:
            return values
        texts, paths, seen = self._texts, self._paths, self._seen
        match item.kind:
            case "text" if not item.optional:
                return [texts.setdefault(text, len(texts)) for text in values]
            case "key":
                return [
                    2 * texts.setdefault(key, len(texts)) if type(key) is str else self._key(key)
                    for key in values
                ]
            case "path":
                return [paths.get(path) or self._path(path) for path in values]
            case "ref" if not item.optional:
                return [
                    held[1] if (held := seen.get(id(obj))) is not None else self._object(obj)
                    for obj in values
                ]
        return list(map(self._item(item), values))

    def _field(self, field: Field) -> Callable[[Any], Any]:
        encoders = tuple(map(self._item, field.items))
        if not field.is_list:
            return encoders[0]
        if len(encoders) == 1:
            only = encoders[0]
            return lambda values: tuple([only(value) for value in values])
        first, second = encoders
        return lambda pairs: tuple([(first(one), second(two)) for one, two in pairs])

    def _item(self, item: Item) -> Callable[[Any], Any]:
        encode = self._encode[item.kind]
        if not item.optional or item.kind in ("path", "attrs"):
            return encode
        # None is 0; a negative number stays as it is.
        return lambda value: 0 if value is None else (lambda n: n + (n >= 0))(encode(value))

    def _text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def _key(self, key: str | int) -> int:
        """Twice the number of a text; or, odd, twice an integer folded so that it is positive."""
        if isinstance(key, str):
            return 2 * self._text(key)
        number = operator.index(key)
        return 2 * (2 * number if number >= 0 else -2 * number - 1) + 1

    def _path(self, path: Path) -> int:
        paths, known = self._paths, len(path) - 1
        if known > MAX_PATH:
            self._limits.path(len(path))
        while known > 0 and path[:known] not in paths:
            known -= 1
        number = paths.get(path[:known], 0)
        for end in range(max(known, 0), len(path)):
            self._limits.path(end + 1)
            number = self._intern("Path", (number, self._key(path[end]))) + 1
            paths[path[: end + 1]] = number
        return number

    def _attrs(self, attrs: Any) -> int:
        if not attrs:
            return 0
        items = tuple([(self._key(key), self._object(value)) for key, value in attrs])
        return self._intern("Attrs", (items,)) + 1

    def _constant(self, value: Any) -> int:
        kind = type(value)
        key = (kind, repr(value) if kind not in _HASHED else value)
        number = self._constants.get(key)
        if number is None:
            name, data = constant_bytes(value)
            number = self._constants[key] = self._intern("Const", (self._text(name), data))
        return number

    def _object(self, obj: Any) -> int:
        if type(obj) is Const:
            return self._constant(obj.value)
        seen = self._seen.get(id(obj))
        if seen is None:
            seen = self._seen[id(obj)] = obj, self._new(obj)  # kept, so that its id stays its own
        return seen[1]

    def _new(self, obj: Any) -> int:
        if obj is UNCONSTRAINED or obj is None or isinstance(obj, str | tuple):
            kind, names = _axis(obj)
            return self._intern("Axis", (self._text(kind), tuple(map(self._text, names))))
        if type(obj) is Live and not self._leave_out:
            raise FoundLiveError
        table = type(obj).__name__
        fields = self._fields.get(table, ())
        if table not in CODES:
            raise FormatError(
                f"found {table}, expected an attribute value or a part of a graph",
                fix="Make attribute values with linsey.ir.encode.",
            )
        return self._intern(table, tuple([encode(getattr(obj, name)) for name, encode in fields]))

    def _intern(self, table: str, row: Row) -> int:
        ids = self._ids[table]
        number = ids.get(row)
        if number is None:
            number = ids[row] = len(self._order)
            self._limits.value(_refs(table, row) if table in _HOLDING else ())
            self._rows[table].append(row)
            self._order.append(CODES[table])
        return number


class FoundLiveError(Exception):
    """The graph holds something that cannot be data."""


def _axis(axis: Axis) -> tuple[str, tuple[str, ...]]:
    if axis is UNCONSTRAINED:
        return "unconstrained", ()
    if axis is None:
        return "none", ()
    return ("name", (axis,)) if isinstance(axis, str) else ("names", axis)


_HASHED = frozenset({type(None), bool, int, str, bytes, types.EllipsisType})
"""The types of constants that compare as their bytes do."""
_FLOAT = struct.Struct("<d")
_COMPLEX = struct.Struct("<dd")


def constant_bytes(value: Any) -> tuple[str, bytes]:
    """The type and the bytes of a constant; every NaN has the same."""
    match value:
        case None:
            return "none", b""
        case bool():
            return "bool", bytes([value])
        case int():
            return "int", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        case float():
            return "float", _FLOAT.pack(_one_nan(value))
        case complex():
            return "complex", _COMPLEX.pack(_one_nan(value.real), _one_nan(value.imag))
        case str():
            return "str", text_bytes(value)
        case bytes():
            return "bytes", value
        case types.EllipsisType():
            return "ellipsis", b""
    raise FormatError(
        f"a constant of type {type(value).__name__} cannot be written",
        fix="Make attribute values with linsey.ir.encode.",
    )


def text_bytes(text: str) -> bytes:
    """A text in UTF-8; a lone surrogate, which Python allows, as three bytes."""
    return text.encode("utf-8", "surrogatepass")


def _one_nan(value: float) -> float:
    return value if value == value else float("nan")


def _refs(table: str, row: Row) -> Iterable[int]:
    """The attribute values that a row holds."""
    for (value, items), entry in zip(_VALUE_ITEMS[table], row, strict=True):
        if not items:
            continue
        if value:
            for held in entry:
                yield from (held[n] for n in items) if type(held) is tuple else (held,)
        else:
            yield entry


def _value_items(field: Field) -> tuple[bool, tuple[int, ...]]:
    held = tuple(n for n, item in enumerate(field.items) if item.holds_values)
    return field.is_list, held


_VALUE_ITEMS = {table: tuple(map(_value_items, FIELDS[table])) for table in OBJECTS}
_HOLDING = {table for table, items in _VALUE_ITEMS.items() if any(held for _, held in items)}


def _spread(
    field: Field, entries: Sequence[Any]
) -> Iterator[tuple[str, Item | None, Sequence[Any]]]:
    """The columns of a field: name, what stands in it (None for counts), and the entries."""
    flat = entries
    if field.is_list:
        yield f"{field.name}#", None, list(map(len, entries))
        flat = list(itertools.chain.from_iterable(entries))
    if len(field.items) == 1:
        yield field.name, field.items[0], flat
        return
    for number, item in enumerate(field.items):
        yield f"{field.name}.{number}", item, [held[number] for held in flat]


def _packed(item: Item | None, values: Sequence[Any], sizes: Mapping[str, int]) -> Any:
    """A column as bytes.

    Raises:
        IndexError: one of its numbers is not that of a row.
    """
    if item is not None and item.kind == "bytes":
        return pack_blobs(values)
    if item is not None and item.kind in INDICES and values:
        end = sizes[INDICES[item.kind]] + item.optional
        if not 0 <= min(values) <= max(values) < end:
            raise IndexError
    return pack_ints(values)
