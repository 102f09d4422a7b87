"""The format field by field: which tables a file has, and what stands in their columns.

A change here owes a new version, which a test computes: a new table or field a minor one, any other
change a major one. The page docs/format.md says what the kinds mean.
"""

from __future__ import annotations

from dataclasses import dataclass

# 1.0: the first.
VERSION = (1, 0)
"""``(major, minor)`` of what is written. Every minor version of a supported major one is read."""
OLDEST = (1, 0)
"""The oldest version that is read."""

VALUES = (
    *("Const", "DType", "Ref", "EnumValue", "Array", "Sequence", "Map"),
    *("Instance", "Call", "NodeRef", "Hole", "Template", "Live"),
)
"""The tables of attribute values: wherever one of them may stand, all may."""
_VALUE = "|".join(VALUES)
_TYPE = "TensorType|TreeType"

SCHEMA: dict[str, dict[str, str]] = {
    "Path": {"parent": "path", "key": "key"},
    "Const": {"type": "text", "data": "bytes"},
    "DType": {"name": "text"},
    "Ref": {"name": "text"},
    "EnumValue": {"cls": _VALUE, "name": "text"},
    "Array": {"dtype": "text", "shape": "[int]", "data": "bytes", "make": "text"},
    "Sequence": {"kind": "text", "items": f"[{_VALUE}]"},
    "Map": {"cls": _VALUE, "items": f"[{_VALUE}, {_VALUE}]"},
    "Instance": {"cls": _VALUE, "fields": f"[text, {_VALUE}]", "share": "int?"},
    "Call": {"function": _VALUE, "args": f"[{_VALUE}]", "kwargs": f"[text, {_VALUE}]"},
    "NodeRef": {"node": "node"},
    "Hole": {"index": "int"},
    "Template": {"structure": _VALUE},
    "Live": {"text": "text"},
    "Attrs": {"items": f"[key, {_VALUE}]"},
    "TensorType": {"shape": "[int]", "dtype": "text"},
    "TreeType": {"structure": "Template", "leaves": "[TensorType]"},
    "Axis": {"kind": "text", "names": "[text]"},
    "Partition": {
        "axes": "[Axis]",
        "logical": "bool",
        "spec": _VALUE,
        "rules": _VALUE,
        "mesh": _VALUE,
    },
    "StackAxis": {"axis": "int", "length": "int", "name": "text?", "owner": "path"},
    "Source": {"dialect": "text", "cls": _VALUE},
    "Signature": {
        "method": "text",
        "inputs": f"[text, {_TYPE}|{_VALUE}]",
        "output": f"{_TYPE}?",
    },
    "Wrapper": {
        "cls": _VALUE,
        "attrs": "attrs",
        "children": "[key, node]",
        "slots": "[key, slot]",
    },
    "Slot": {
        "collection": "text",
        "paths": "[path]",
        "kind": f"{_VALUE}?",
        "type": _TYPE,
        "partition": "Partition?",
        "stack": "[StackAxis]",
        "lifetime": "text",
        "raw": "bool",
        "mirrors": "slot?",
        "metadata": "attrs",
        "box": "Template?",
    },
    "Stream": {
        "name": "text",
        "derivation": "text",
        "use": "text",
        "key": "slot?",
        "count": "slot?",
    },
    "Node": {
        "op": "text",
        "source": "Source?",
        "attrs": "attrs",
        "children": "[key, node]",
        "slots": "[key, slot]",
        "streams": "[text, stream]",
        "signatures": "[Signature]",
        "wrapper": "Wrapper?",
    },
    "Graph": {"root": "node", "empty": "[path]"},
}
"""Kind of each field, by table. Tables before ``Slot`` hold what is written once however often it
occurs."""

ROWS = ("Slot", "Stream", "Node", "Graph")
"""The tables whose rows stand for themselves, in the order of the graph."""
INDICES = {"node": "Node", "slot": "Slot", "stream": "Stream"}
"""The kinds that are the number of a row, and the table that it is in."""
_SIMPLE = frozenset({"int", "bool", "text", "bytes", "key", *INDICES})
_EMPTY = {"path": "Path", "attrs": "Attrs"}
"""The kinds that may be empty, and the table of those that are not."""
CHOICES: dict[tuple[str, str], frozenset[str]] = {
    ("Sequence", "kind"): frozenset({"tuple", "list", "set", "frozenset"}),
    ("Slot", "lifetime"): frozenset({"persistent", "ephemeral"}),
    ("Stream", "derivation"): frozenset({"path", "count"}),
    ("Stream", "use"): frozenset({"init", "call"}),
}
"""The fields that hold one of a few texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What stands in one column."""

    kind: str
    """``int``, ``node``, ``slot``, ``stream``, ``bool``, ``text``, ``bytes``, ``key``, ``path``,
    ``attrs`` or ``ref``."""
    optional: bool = False
    """Whether it may be None."""
    tables: tuple[str, ...] = ()
    """For ``ref``, ``path`` and ``attrs``, the tables that it may point into."""

    @property
    def holds_values(self) -> bool:
        """Whether attribute values stand in it, which may hold others."""
        return VALUES[0] in self.tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of a table."""

    name: str
    """Its name: that of the dataclass's field."""
    is_list: bool
    """Whether it holds any number of items."""
    items: tuple[Item, ...]
    """One item, or several that go together."""


def _item(text: str) -> Item:
    name = text.removesuffix("?")
    if name in _EMPTY:
        return Item(kind=name, optional=True, tables=(_EMPTY[name],))
    if name in _SIMPLE:
        return Item(kind=name, optional=text != name)
    return Item(kind="ref", optional=text != name, tables=tuple(name.split("|")))


def _field(name: str, kind: str) -> Field:
    is_list = kind.startswith("[")
    return Field(name=name, is_list=is_list, items=tuple(map(_item, kind.strip("[]").split(", "))))


FIELDS: dict[str, tuple[Field, ...]] = {
    table: tuple(_field(name, kind) for name, kind in fields.items())
    for table, fields in SCHEMA.items()
}
"""The schema, taken apart."""
OBJECTS = tuple(table for table in SCHEMA if table not in ROWS)
"""The tables of what is written once."""
CODES = {table: code for code, table in enumerate(OBJECTS)}
"""Their numbers within this version; a file has names."""
