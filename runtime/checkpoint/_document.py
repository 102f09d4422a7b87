"""What a checkpoint says of itself: a JSON document beside the arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linsey import _trees
from linsey.ir import CheckpointError, Graph, Slot, TensorType, format_path, summary
from linsey.runtime._leaves import NUMBERS, Types, leaf_type, leaves

FORMAT = "linsey.checkpoint"
# 1: the slots with their names and arrays, the leaves of the state, the graph.
VERSION = 1

_FLOATS_8 = ("e4m3fn", "e4m3b11fnuz", "e4m3fnuz", "e5m2", "e5m2fnuz", "e3m4", "e8m0fnu")
# What Orbax can write; tensorstore knows neither uint4 nor float8_e4m3, for example.
DTYPES = frozenset(
    {
        *NUMBERS,
        *("bool", "complex64", "complex128"),
        *("int2", "int4", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "float4_e2m1fn"),
        *(f"float8_{name}" for name in _FLOATS_8),
        *_trees.KEY_IMPLS,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSlot:
    """A slot as a checkpoint holds it."""

    collection: str
    """Its collection."""
    names: tuple[str, ...]
    """All its names, the one it is stored by first."""
    types: Types
    """The types of its arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a checkpoint holds."""

    path: str
    """Its folder."""
    slots: dict[str, StoredSlot]
    """Its slots by the name they are stored by."""
    state: Types | None
    """The types of the pytree saved beside the values; None: there was none."""

    def find(self, slot: Slot) -> str | None:
        """The name by which a slot is stored: its own, or another one of a tied slot."""
        names = slot_names(slot)
        if names[0] in self.slots:
            return names[0]
        wanted = set(names)
        return next((key for key, each in self.slots.items() if wanted & set(each.names)), None)


def slot_names(slot: Slot) -> tuple[str, ...]:
    """All names of a slot, the canonical one first."""
    return tuple(format_path((slot.collection, *path)) for path in slot.paths)


def types(value: Any, name: str) -> Types:
    """The types of the arrays of a value or of a pytree.

    Args:
        value: the value.
        name: what it is called in errors.

    Raises:
        CheckpointError: a leaf is neither an array nor a number, or of a dtype that Orbax cannot
            write.
    """
    found: Types = {}
    for place, leaf in leaves(value).items():
        kind = leaf_type(leaf, f"{name}{place}", CheckpointError)
        if kind.dtype not in DTYPES:
            raise CheckpointError(
                f"found an array of dtype {kind.dtype}, which Orbax cannot write",
                path=f"{name}{place}",
                fix="Cast it before saving, to uint8 for example.",
            )
        found[place] = kind
    return found


def document(graph: Graph, kept: Mapping[str, Types], state: Types | None) -> dict[str, Any]:
    """The document of a checkpoint.

    Args:
        graph: the graph.
        kept: the types of each slot that is saved, by its name.
        state: the types of the pytree saved beside the values, or None.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "slots": {
            key: {
                "collection": slot.collection,
                "names": list(slot_names(slot)),
                "types": _types_to_json(kept[key]),
            }
            for slot in graph.slots
            if (key := slot.key) in kept
        },
        "state": None if state is None else _types_to_json(state),
        "graph": summary.to_json(graph),
    }


def _types_to_json(kinds: Types) -> dict[str, Any]:
    return {
        place: {"dtype": kind.dtype, "shape": list(kind.shape)} for place, kind in kinds.items()
    }


def parse(path: str, data: Any) -> Stored:
    """Reads what `document` made.

    Raises:
        CheckpointError: it is not such a document, or of a version that is not known.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise foreign(path)
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"found version {data.get('version')!r} of linsey's checkpoints, expected {VERSION}",
            path=path,
            fix="Read it with the version of linsey that wrote it.",
        )
    try:
        slots = {
            key: StoredSlot(
                collection=str(each["collection"]),
                names=tuple(map(str, each["names"])),
                types=_types_of_json(each["types"]),
            )
            for key, each in data["slots"].items()
        }
        state = None if data["state"] is None else _types_of_json(data["state"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its list of slots is not readable: {error!r}") from error
    return Stored(path=path, slots=slots, state=state)


def _types_of_json(data: Mapping[str, Any]) -> Types:
    return {
        place: TensorType(shape=tuple(map(int, kind["shape"])), dtype=str(kind["dtype"]))
        for place, kind in data.items()
    }


def foreign(path: str) -> CheckpointError:
    """The error for a folder that linsey did not write."""
    return CheckpointError(
        "found a folder that is no checkpoint of linsey",
        path=path,
        fix="Give the folder of one checkpoint, such as run/1000; what another program wrote, read"
        " with that program.",
    )


def damaged(path: str, what: str) -> CheckpointError:
    """The error for a checkpoint of linsey that is not whole."""
    return CheckpointError(
        f"the checkpoint is damaged: {what}",
        path=path,
        fix="Restore another step or another copy, and remove this one.",
    )
