"""Reading and writing by Orbax: the one file that knows how it lays arrays out."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from linsey.ir import CheckpointError, LinseyError, TensorType
from linsey.runtime._leaves import NUMBERS, host_dtype, is_key, key_impl, leaf_name
from linsey.runtime.checkpoint._document import Stored, damaged, foreign, parse
from linsey.runtime.checkpoint._report import Source

_VALUES, _STATE, _GRAPH = "values", "state", "graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An array to read."""

    source: Source
    """What it is."""
    sharding: Sharding
    """Where it goes."""


@contextlib.contextmanager
def translated(path: str, what: str) -> Iterator[None]:
    """Makes a `CheckpointError` of any error of Orbax."""
    try:
        yield
    except LinseyError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{what}: {_short(error)}",
            path=path,
            fix="The error that caused this one says more; complete checkpoints are as they were.",
        ) from error


def _short(error: Exception) -> str:
    """The first line of an error without its middle; tensorstore's go on for pages."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def folder(path: str | os.PathLike[str]) -> epath.Path:
    """A path as Orbax wants it: absolute, a local one or a URL such as ``gs://bucket/run``."""
    found = epath.Path(path)
    return found if "://" in os.fspath(path) else found.expanduser().absolute()


def save_args(
    arrays: Mapping[str, Any], state: Mapping[str, Any], document: dict[str, Any]
) -> ocp.args.Composite:
    """What Orbax is to write: the values and the state by name, and the document.

    Raises:
        CheckpointError: a leaf cannot be saved.
    """
    items: dict[str, Any] = {_GRAPH: ocp.args.JsonSave(document)}
    for item, leaves in ((_VALUES, arrays), (_STATE, state)):
        # Orbax refuses arrays without elements; the document says all there is to say of them.
        kept = {name: _on_disk(name, leaf) for name, leaf in leaves.items() if np.size(leaf)}
        if kept:
            items[item] = ocp.args.PyTreeSave(kept)
    return ocp.args.Composite(**items)


def _on_disk(name: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        if jax.process_count() > 1 and leaf.is_fully_addressable:
            raise CheckpointError(
                "found an array that lies in one process, expected one over the devices of all",
                path=name,
                fix="Place it with out_shardings=NamedSharding(mesh, PartitionSpec()) under jit.",
            )
        return leaf
    # A copy: the writing goes on while the caller may change the array.
    array = np.array(leaf)
    if array.dtype == object:
        raise CheckpointError(
            f"{leaf} does not fit into 64 bits", path=name, fix="Save it as a float."
        )
    return array


def reader(*items: str) -> ocp.Checkpointer:
    """Reads and writes one checkpoint at a time."""
    handlers: dict[str, Any] = {item: ocp.PyTreeCheckpointHandler() for item in items}
    handlers[_GRAPH] = ocp.JsonCheckpointHandler()
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def write(path: epath.Path, args: ocp.args.Composite) -> None:
    """Writes one checkpoint, and returns when it is complete."""
    with translated(os.fspath(path), "the checkpoint could not be written"):
        reader(_VALUES, _STATE).save(path, args=args)


def describe(path: str | os.PathLike[str]) -> Stored:
    """What a checkpoint holds; reads no array.

    Raises:
        CheckpointError: there is none, it is not complete, not linsey's, or damaged.
    """
    found = folder(path)
    name = os.fspath(found)
    if not found.exists():
        raise CheckpointError(
            "found no checkpoint", path=name, fix="Give the folder of one, such as run/1000."
        )
    if not (found / _GRAPH).exists():
        raise foreign(name)
    with _unreadable(name):
        read = reader().restore(found, args=ocp.args.Composite(**{_GRAPH: ocp.args.JsonRestore()}))
    stored = parse(name, read[_GRAPH])
    _check(stored)
    return stored


@contextlib.contextmanager
def _unreadable(path: str) -> Iterator[None]:
    try:
        yield
    except LinseyError:
        raise
    except Exception as error:
        raise damaged(path, _short(error)) from error


def _check(stored: Stored) -> None:
    """Checks that Orbax knows of all arrays that the document names, each of its shape.

    Raises:
        CheckpointError: it does not.
    """
    values = {
        leaf_name(key, place): kind
        for key, slot in stored.slots.items()
        for place, kind in slot.types.items()
    }
    state = {f"state{place}": kind for place, kind in (stored.state or {}).items()}
    named = {_VALUES: values, _STATE: state}
    expected = {
        item: {name: kind for name, kind in kinds.items() if math.prod(kind.shape)}
        for item, kinds in named.items()
    }
    items = [item for item, kinds in expected.items() if kinds]
    with _unreadable(stored.path):
        metadata = reader(*items).metadata(folder(stored.path)).item_metadata
    for item in items:
        found = metadata.get(item)
        arrays = {} if found is None else found.tree
        for name, kind in expected[item].items():
            if name not in arrays:
                raise damaged(stored.path, f"the array {name!r} is not there")
            shape = tuple(arrays[name].shape)
            if shape != kind.shape and not (
                is_key(kind) and shape[: len(kind.shape)] == kind.shape
            ):
                raise damaged(stored.path, f"{name!r} has the shape {shape}, not {kind.shape}")


def read(path: str, targets: Sequence[Target]) -> list[Any]:
    """Reads arrays, each straight into its sharding.

    Raises:
        CheckpointError: one cannot be read.
    """
    found: dict[int, Any] = {}
    pending: dict[int, Target] = {}
    for number, target in enumerate(targets):
        if math.prod(target.source.wanted.shape):
            pending[number] = target
        else:
            found[number] = _empty(target)
    while pending:
        # Once each; what was one slot when it was saved, and is two now, is read again.
        batch = {target.source.name: number for number, target in reversed(pending.items())}
        found |= _read_once(path, {number: pending.pop(number) for number in batch.values()})
    return [found[number] for number in range(len(targets))]


def _read_once(path: str, targets: Mapping[int, Target]) -> dict[int, Any]:
    items: dict[str, dict[str, Target]] = {}
    for target in targets.values():
        item = _STATE if target.source.slot < 0 else _VALUES
        items.setdefault(item, {})[target.source.name] = target
    args = {
        item: ocp.args.PyTreeRestore(
            item=dict.fromkeys(by_name, 0),
            restore_args={name: _restore_args(target) for name, target in by_name.items()},
            partial_restore=True,
        )
        for item, by_name in items.items()
    }
    with _unreadable(path):
        read = reader(*items).restore(folder(path), args=ocp.args.Composite(**args))
    return {
        number: _finished(read[_STATE if target.source.slot < 0 else _VALUES], target)
        for number, target in targets.items()
    }


def _restore_args(target: Target) -> ocp.RestoreArgs:
    kind = target.source.wanted
    if _is_host(kind):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    if is_key(kind):
        # Orbax knows the implementation; shape and dtype would be those of the key data.
        return ocp.ArrayRestoreArgs(sharding=target.sharding)
    return ocp.ArrayRestoreArgs(
        sharding=target.sharding, global_shape=kind.shape, dtype=host_dtype(kind.dtype)
    )


def _is_host(kind: TensorType) -> bool:
    """Whether it stays on the host: a Python number, or 64 bits that jax would cut to 32."""
    if kind.dtype in NUMBERS:
        return True
    return not is_key(kind) and jax.dtypes.canonicalize_dtype(host_dtype(kind.dtype)) != host_dtype(
        kind.dtype
    )


def _finished(arrays: Mapping[str, Any], target: Target) -> Any:
    array, kind = arrays[target.source.name], target.source.wanted
    if kind.dtype in NUMBERS:
        return NUMBERS[kind.dtype](array.item())
    return array.astype(host_dtype(kind.dtype)) if _is_host(kind) else array


def _empty(target: Target) -> Any:
    """An array without elements."""
    kind = target.source.wanted
    if is_key(kind):
        keys = jax.random.split(jax.random.key(0, impl=key_impl(kind)), kind.shape)
        return jax.device_put(keys, target.sharding)
    array = np.zeros(kind.shape, host_dtype(kind.dtype))
    if _is_host(kind):
        return array
    return jax.make_array_from_callback(kind.shape, target.sharding, lambda at: array[at])
