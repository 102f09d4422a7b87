"""A graph in figures and as plain JSON data: what ``linsey lower`` prints."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from linsey.ir.analysis import node_paths, shared_nodes, tied_slots
from linsey.ir.attributes import Attrs, AttrValue, describe
from linsey.ir.graph import (
    Axis,
    Graph,
    Node,
    Signature,
    Slot,
    TensorType,
    TreeType,
    Unconstrained,
    ValueType,
)
from linsey.ir.paths import Path, format_path
from linsey.ir.text import describe_class

Json: TypeAlias = dict[str, Any]

# What jax makes of a Python number, and the size of one typed PRNG key by its implementation.
_PYTHON_NUMBERS = {"bool": 1, "int": 4, "float": 4, "complex": 8}
_KEYS = {"key<fry>": 8, "key<rbg>": 16, "key<urbg>": 16}

# As jax prints them: f32 in float32[3,4] is f32[3,4].
_SHORT = {"bf": "bfloat", "f": "float", "i": "int", "u": "uint", "c": "complex"}
_SHORT_DTYPE = re.compile(r"(bf|[fiuc])(\d+(?:_\w+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """The slots that one lifted transform stacks."""

    owner: Path
    """Path of the node whose call runs the transform; empty for the root."""
    name: str | None
    """Partition name of the axis, or None."""
    length: int
    """Size of the axis."""
    slots: int
    """How many slots have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A graph in figures."""

    layers: tuple[tuple[str, int], ...]
    """Class and number of nodes, in the order of the graph; containers are not layers."""
    collections: tuple[tuple[str, int, int | None], ...]
    """Name, slots and bytes of each collection; None where a dtype's size is not known."""
    streams: tuple[tuple[str, str, str], ...]
    """Name, derivation and use of each stream, each combination once."""
    shared: tuple[tuple[int, tuple[Path, ...]], ...]
    """Each node with several places, and these; one below each of its parents."""
    tied: tuple[int, ...]
    """The slots with several paths."""
    stacked: tuple[Stacked, ...]
    """The stacked parts."""


def summarize(graph: Graph) -> Summary:
    """Counts what is in a graph."""
    layers = Counter(
        _class(node) for node in graph.nodes if node.source is not None and node.op != "container"
    )
    sizes: dict[str, tuple[int, int | None]] = {}
    for slot in graph.slots:
        count, total = sizes.get(slot.collection, (0, 0))
        size = nbytes(slot.type)
        sizes[slot.collection] = (
            count + 1,
            None if total is None or size is None else total + size,
        )
    streams = dict.fromkeys((each.name, each.derivation, each.use) for each in graph.streams)
    stacked = Counter(
        (axis.owner, axis.name, axis.length) for slot in graph.slots for axis in slot.stack
    )
    places = _places(graph)
    return Summary(
        layers=tuple(layers.items()),
        collections=tuple((name, *figures) for name, figures in sizes.items()),
        streams=tuple(streams),
        shared=tuple((number, tuple(places[number])) for number in shared_nodes(graph)),
        tied=tied_slots(graph),
        stacked=tuple(
            Stacked(owner=owner, name=name, length=length, slots=count)
            for (owner, name, length), count in stacked.items()
        ),
    )


def _class(node: Node) -> str:
    assert node.source is not None
    return f"{node.source.dialect}.{describe_class(node.source.cls)}"


def _places(graph: Graph) -> dict[int, list[Path]]:
    """Where each node is found: one path for each parent that holds it as a child."""
    first = node_paths(graph)
    places: dict[int, list[Path]] = {number: [] for number in range(len(graph.nodes))}
    for number, path in sorted(first.items(), key=lambda item: len(item[1])):
        for name, child in graph.nodes[number].children:
            places[child].append((*path, name))
    return places


def nbytes(kind: ValueType) -> int | None:
    """The bytes of a value, or None when the size of a dtype is not known.

    Example:
        >>> nbytes(TensorType(shape=(3, 4), dtype="bfloat16"))
        24
    """
    if isinstance(kind, TreeType):
        sizes = [nbytes(leaf) for leaf in kind.leaves]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    size = _PYTHON_NUMBERS.get(kind.dtype, _KEYS.get(kind.dtype))
    if size is None:
        try:
            size = np.dtype(getattr(ml_dtypes, kind.dtype, kind.dtype)).itemsize
        except TypeError:
            return None
    return size * math.prod(kind.shape)


def parse_type(text: str) -> TensorType:
    """The type that a text such as ``f32[8,28,28,1]`` stands for.

    Args:
        text: a dtype as jax prints it (``f32``, ``bf16``, ``i8``, ``c64`` …) or by its full name,
            and the shape in brackets.

    Raises:
        ValueError: the form or the dtype is not known.

    Example:
        >>> print(parse_type("bf16[2, 3]"), parse_type("int8[]"))
        bfloat16[2,3] int8[]
    """
    match = re.fullmatch(r"\s*(\w+)\s*\[\s*((?:\d+\s*(?:,\s*\d+\s*)*,?)?)\s*\]\s*", text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a type; expected one such as f32[8,28,28,1] or i32[]")
    name, sizes = match.groups()
    short = _SHORT_DTYPE.fullmatch(name)
    full = f"{_SHORT[short[1]]}{short[2]}" if short else name
    try:
        dtype = np.dtype(getattr(ml_dtypes, full, full))
    except TypeError:
        dtype = None
    # numpy knows codes of its own, such as `f8` for float64; those are not meant.
    if dtype is None or dtype.name != full:
        raise ValueError(
            f"{name!r} is not a dtype; expected one such as f32, bf16, i32, u8 or bool"
        )
    shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    return TensorType(shape=shape, dtype=full)


def to_json(graph: Graph) -> Json:
    """A graph as JSON data; the help of ``linsey lower`` says what is in it."""
    summary = summarize(graph)
    known = [size for _, _, size in summary.collections if size is not None]
    return {
        "root": graph.root,
        "nodes": [_node(number, node) for number, node in enumerate(graph.nodes)],
        "slots": [_slot(number, slot) for number, slot in enumerate(graph.slots)],
        "streams": [
            {
                "id": number,
                "name": stream.name,
                "derivation": stream.derivation,
                "use": stream.use,
                "key": stream.key,
                "count": stream.count,
            }
            for number, stream in enumerate(graph.streams)
        ],
        "signatures": list(map(_signature, graph.signatures)),
        "empty": list(map(format_path, graph.empty)),
        "summary": {
            "nodes": len(graph.nodes),
            "slots": len(graph.slots),
            "bytes": sum(known) if len(known) == len(summary.collections) else None,
            "layers": dict(summary.layers),
            "collections": {
                name: {"slots": count, "bytes": size} for name, count, size in summary.collections
            },
            "streams": list(dict.fromkeys(name for name, _, _ in summary.streams)),
            "shared": [
                {"node": number, "paths": list(map(format_path, paths))}
                for number, paths in summary.shared
            ],
            "tied": list(summary.tied),
            "stacked": [
                {
                    "owner": format_path(part.owner),
                    "name": part.name,
                    "length": part.length,
                    "slots": part.slots,
                }
                for part in summary.stacked
            ],
        },
    }


def _node(number: int, node: Node) -> Json:
    wrapper = node.wrapper
    return {
        "id": number,
        "op": node.op,
        "source": None if node.source is None else _source(node.source.dialect, node.source.cls),
        "attrs": _attrs(node.attrs),
        "children": _named(node.children, "node"),
        "slots": _named(node.slots, "slot"),
        "streams": _named(node.streams, "stream"),
        "signatures": list(map(_signature, node.signatures)),
        "wrapper": None
        if wrapper is None
        else {
            "class": _qualified(wrapper.cls),
            "attrs": _attrs(wrapper.attrs),
            "children": _named(wrapper.children, "node"),
            "slots": _named(wrapper.slots, "slot"),
        },
    }


def _source(dialect: str, cls: AttrValue) -> Json:
    return {"dialect": dialect, "class": _qualified(cls)}


def _qualified(cls: AttrValue) -> str:
    """``package.module:Name`` for what can be imported, else a readable name."""
    name = getattr(cls, "name", None)
    return name if isinstance(name, str) else describe(cls)


def _attrs(attrs: Attrs) -> Json:
    return {format_path((name,)): describe(value) for name, value in attrs}


def _named(items: tuple[tuple[str | int, int], ...] | tuple[tuple[str, int], ...], of: str) -> Any:
    return [{"name": format_path((name,)), of: number} for name, number in items]


def _slot(number: int, slot: Slot) -> Json:
    return {
        "id": number,
        "key": slot.key,
        "collection": slot.collection,
        "paths": list(map(format_path, slot.paths)),
        "kind": None if slot.kind is None else _qualified(slot.kind),
        "type": _type(slot.type),
        "bytes": nbytes(slot.type),
        "partition": None if slot.partition is None else list(map(_axis, slot.partition.axes)),
        "stack": [
            {
                "axis": axis.axis,
                "length": axis.length,
                "name": axis.name,
                "owner": format_path(axis.owner),
            }
            for axis in slot.stack
        ],
        "lifetime": slot.lifetime,
        "raw": slot.raw,
        "mirrors": slot.mirrors,
        "metadata": _attrs(slot.metadata),
        "box": None if slot.box is None else describe(slot.box),
    }


def _axis(axis: Axis) -> Any:
    return axis.value if isinstance(axis, Unconstrained) else axis


def _type(kind: ValueType) -> Json:
    if isinstance(kind, TreeType):
        return {"tree": describe(kind.structure), "leaves": list(map(_type, kind.leaves))}
    return {"dtype": kind.dtype, "shape": list(kind.shape)}


def _signature(signature: Signature) -> Json:
    return {
        "method": signature.method,
        "inputs": [
            {"name": name, "type": _type(value)}
            if isinstance(value, TensorType | TreeType)
            else {"name": name, "value": describe(value)}
            for name, value in signature.inputs
        ],
        "output": None if signature.output is None else _type(signature.output),
    }
