"""Tables of columns as a graph."""

from __future__ import annotations

import collections
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from linsey.ir import attributes, graph
from linsey.ir.attributes import ABSENT, UNTRUSTED, Const, Live, Ref
from linsey.ir.codec._columns import offsets, unpack_blobs, unpack_ints
from linsey.ir.codec._limits import Limits
from linsey.ir.codec._schema import CHOICES, CODES, FIELDS, INDICES, OBJECTS, Field, Item
from linsey.ir.graph import UNCONSTRAINED, Axis, Graph

Ints = np.ndarray[Any, np.dtype[np.int64]]
_CLASSES: dict[str, Any] = {
    name: getattr(attributes, name, None) or getattr(graph, name, None) for name in FIELDS
}


class Reader:
    """Reads the tables of one file; everything is checked before it is used.

    Args:
        tables: the tables.
        trusts: whether what a `Ref` names may ever be imported; None: all may.

    Raises:
        ValueError, KeyError, TypeError: they are not those of a graph.
    """

    def __init__(self, tables: dict[str, Any], trusts: Callable[[str], bool] | None = None) -> None:
        self._tables = tables
        self._trusts = trusts
        self._texts = [
            str(each, "utf-8", "surrogatepass") for each in unpack_blobs(tables["texts"])
        ]
        names, order = tables["objects"]
        codes = unpack_ints(order)
        _check_below(codes, len(names))
        # By the numbers of this version; a table that it does not know is -1.
        known = np.array([*(CODES.get(name, -1) for name in names), -1], dtype=np.int64)
        self._kinds: Ints = known[codes]
        self._ids = {table: np.flatnonzero(self._kinds == code) for table, code in CODES.items()}
        self._counts = {table: self._count(table) for table in FIELDS}
        self._objects: list[Any] = []
        self._limits = Limits()

    def _count(self, table: str) -> int:
        found = self._tables.get(table, {"rows": 0})["rows"]
        if type(found) is not int or found < 0:
            raise ValueError(f"the number of rows of {table} is not one")
        if table in CODES and found != len(self._ids[table]):
            raise ValueError(f"{table} has not as many rows as there are such objects")
        return found

    def graph(self) -> Graph:
        """The graph."""
        makers = [self._maker(table) for table in OBJECTS]
        rows = [0] * len(OBJECTS)
        for kind in self._kinds.tolist():
            if kind < 0:  # nothing that this version knows may point here
                self._limits.value(())
                self._objects.append(None)
            else:
                held, make = makers[kind]
                self._limits.value(held(rows[kind]))
                self._objects.append(make(rows[kind]))
                rows[kind] += 1
        slots, streams, nodes = (self._rows(table) for table in ("Slot", "Stream", "Node"))
        if self._counts["Graph"] != 1:
            raise ValueError("there is not one graph in it")
        whole = {field.name: self._whole("Graph", field, 1)[0] for field in FIELDS["Graph"]}
        return Graph(nodes=nodes, slots=slots, streams=streams, **whole)

    def unknown(self) -> Iterator[str]:
        """The fields and tables that this version does not know."""
        for table, content in self._tables.items():
            if table in ("texts", "objects"):
                continue
            if table not in FIELDS:
                yield table
                continue
            names = {field.name for field in FIELDS[table]}
            found = {
                column.rpartition(".")[0] or column.rstrip("#") for column in content["columns"]
            }
            yield from (f"{table}.{name}" for name in sorted(found - names))

    def _column(self, table: str, name: str) -> Any:
        return self._tables[table]["columns"][name]

    def _rows(self, table: str) -> tuple[Any, ...]:
        """The rows of a table that no other one points into."""
        cls, count = _CLASSES[table], self._counts[table]
        if not count:
            return ()
        columns = {field.name: self._whole(table, field, count) for field in FIELDS[table]}
        rows = tuple([object.__new__(cls) for _ in range(count)])
        for name, column in columns.items():
            # Field by field, which is several times faster than a call of the class for each row.
            # None of these classes checks anything in its constructor.
            collections.deque(map(getattr(cls, name).__set__, rows, column), maxlen=0)
        return rows

    def _whole(self, table: str, field: Field, count: int) -> Sequence[Any]:
        """A field of all rows, once all objects are there."""
        ends, items = self._parts(table, field, count)
        objects = self._objects
        columns = [
            values
            if absent is _EAGER
            else [objects[number] if number >= 0 else absent for number in values]
            for values, absent in items
        ]
        flat = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        if ends is None:
            return flat
        return [tuple(flat[start:end]) for start, end in itertools.pairwise(ends)]

    def _maker(self, table: str) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
        """For a row of objects: the attribute values that it holds, and the object."""
        count = self._counts[table]
        if not count:
            return _nothing, _nothing
        getters: dict[str, Callable[[int], Any]] = {}
        held: list[tuple[Any, list[int]]] = []
        for field in FIELDS[table]:
            ends, items = self._parts(table, field, count)
            getters[field.name] = self._getter(ends, items)
            for item, (values, _) in zip(field.items, items, strict=True):
                if item.holds_values:
                    held.append((ends, values))
        return _holder(held), self._make(table, getters)

    def _parts(
        self, table: str, field: Field, count: int
    ) -> tuple[list[int] | None, list[tuple[Any, Any]]]:
        """Of a list where each row's items begin, and each column of items."""
        owners = self._ids.get(table)
        several = len(field.items) > 1
        names = [f"{field.name}.{n}" if several else field.name for n in range(len(field.items))]
        if not field.is_list:
            return None, [
                self._item(table, field, item, self._column(table, name), owners, count)
                for item, name in zip(field.items, names, strict=True)
            ]
        counts = unpack_ints(self._column(table, f"{field.name}#"))
        if len(counts) != count:
            raise ValueError(f"{table}.{field.name} has not one entry a row")
        data = [self._column(table, name) for name in names]
        total = len(unpack_ints(data[0]))
        ends = offsets(counts, total)
        owners = None if owners is None else np.repeat(owners, counts)
        return ends, [
            self._item(table, field, item, column, owners, total)
            for item, column in zip(field.items, data, strict=True)
        ]

    def _item(
        self, table: str, field: Field, item: Item, data: Any, owners: Ints | None, count: int
    ) -> tuple[Any, Any]:
        """One column: its values and `_EAGER`; or objects by number, and what stands for none."""
        if item.kind == "bytes":
            blobs = unpack_blobs(data)
            if len(blobs) != count:
                raise ValueError(f"{table}.{field.name} has not as many entries as it should")
            return blobs, _EAGER
        column = unpack_ints(data)
        if len(column) != count:
            raise ValueError(f"{table}.{field.name} has not as many entries as it should")
        match item.kind:
            case "bool":
                _check_below(column, 2)
                return list(map(bool, column.tolist())), _EAGER
            case "key":
                _check_below(column[column % 2 == 0] // 2, len(self._texts))
                return [self._key(number) for number in column.tolist()], _EAGER
            case "text":
                _check_below(column, len(self._texts) + item.optional)
                texts: list[Any] = [None, *self._texts] if item.optional else self._texts
                found = [texts[number] for number in column.tolist()]
                choices = CHOICES.get((table, field.name))
                if choices is not None and not choices.issuperset(found):
                    raise ValueError(f"{table}.{field.name} is none of {sorted(choices)}")
                return found, _EAGER
            case "ref" | "path" | "attrs":
                column = column - item.optional
                self._check_refs(column, item, owners)
                return column.tolist(), (() if item.kind != "ref" else None)
        if item.kind in INDICES:
            _check_below(column, self._counts[INDICES[item.kind]] + item.optional)
        numbers: list[Any] = column.tolist()
        if item.optional:
            return [None if number == 0 else number - (number > 0) for number in numbers], _EAGER
        return numbers, _EAGER

    def _key(self, number: int) -> str | int:
        half = number >> 1
        if not number & 1:
            return self._texts[half]
        return half >> 1 if not half & 1 else -(half >> 1) - 1

    def _check_refs(self, column: Ints, item: Item, owners: Ints | None) -> None:
        if not len(column):
            return
        end = len(self._kinds) if owners is None else owners
        if int(column.min()) < -int(item.optional) or not bool(np.all(column < end)):
            raise ValueError("a row points to one that does not come before it")
        allowed = np.zeros(len(OBJECTS) + 1, dtype=bool)
        allowed[[CODES[table] for table in item.tables]] = True
        if not bool(np.all(allowed[self._kinds[column[column >= 0]]])):
            raise ValueError("a row points to one of a kind that cannot stand there")

    def _getter(self, ends: list[int] | None, items: list[tuple[Any, Any]]) -> Any:
        objects = self._objects

        def at(values: Any, absent: Any) -> Callable[[int], Any]:
            if absent is _EAGER:
                return values.__getitem__  # type: ignore[no-any-return]
            return lambda n: objects[values[n]] if values[n] >= 0 else absent

        gets = [at(*item) for item in items]
        if ends is None:
            return gets[0]
        if len(gets) == 1:
            only = gets[0]
            return lambda row: tuple(map(only, range(ends[row], ends[row + 1])))
        first, second = gets
        return lambda row: tuple([(first(n), second(n)) for n in range(ends[row], ends[row + 1])])

    def _make(self, table: str, get: dict[str, Callable[[int], Any]]) -> Callable[[int], Any]:
        match table:
            case "Path":
                return lambda row: self._path(get["parent"](row), get["key"](row))
            case "Const":
                return lambda row: Const(_constant(get["type"](row), get["data"](row)))
            case "Attrs":
                return get["items"]
            case "Axis":
                return lambda row: _axis(get["kind"](row), get["names"](row))
            case "Ref":
                return lambda row: self._ref(get["name"](row))
            case "Live":
                return lambda row: Live(key=("left out", get["text"](row)), text=get["text"](row))
        cls = _CLASSES[table]
        return lambda row: cls(**{name: value(row) for name, value in get.items()})

    def _ref(self, name: str) -> Ref:
        is_trusted = self._trusts is None or self._trusts(name)
        return Ref(name=name, live=ABSENT if is_trusted else UNTRUSTED)

    def _path(self, parent: tuple[str | int, ...], key: str | int) -> tuple[str | int, ...]:
        self._limits.path(len(parent) + 1)
        return (*parent, key)


_EAGER = object()
"""Marks a column whose values are at hand before any object is."""


def _nothing(row: int) -> tuple[()]:
    return ()


def _holder(held: list[tuple[list[int] | None, list[int]]]) -> Callable[[int], Any]:
    if not held:
        return _nothing
    return lambda row: [
        number
        for ends, values in held
        for number in (values[row : row + 1] if ends is None else values[ends[row] : ends[row + 1]])
    ]


def _check_below(column: Ints, end: int) -> None:
    if len(column) and (int(column.min()) < 0 or int(column.max()) >= end):
        raise ValueError("a column points to what is not there")


def _axis(kind: str, names: tuple[str, ...]) -> Axis:
    match kind, len(names):
        case "unconstrained", 0:
            return UNCONSTRAINED
        case "none", 0:
            return None
        case "name", 1:
            return names[0]
        case "names", _:
            return names
    raise ValueError(f"an axis of kind {kind!r} with {len(names)} names")


def _constant(kind: str, data: bytes) -> Any:
    match kind, len(data):
        case "none", 0:
            return None
        case "ellipsis", 0:
            return ...
        case "bool", 1 if data in (b"\0", b"\1"):
            return data == b"\1"
        case "int", size if size:
            return int.from_bytes(data, "little", signed=True)
        case "float", 8:
            return struct.unpack("<d", data)[0]
        case "complex", 16:
            return complex(*struct.unpack("<dd", data))
        case "str", _:
            return str(data, "utf-8", "surrogatepass")
        case "bytes", _:
            return data
    raise ValueError(f"a constant of type {kind!r} in {len(data)} bytes")
