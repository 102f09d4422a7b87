"""Where a checkpoint and a program differ, from their descriptions alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax.numpy as jnp

from linsey.ir import CheckpointError, Slot, TensorType
from linsey.runtime._leaves import NUMBERS, Types, leaf_name, slot_types
from linsey.runtime.checkpoint._document import Stored

DTypes: TypeAlias = Any
"""None; a dtype; a mapping from collection to dtype; or a function that gives a dtype or None for
the name of a slot."""
DTypeOf: TypeAlias = Callable[[Slot], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Where a checkpoint and a program differ, slot by slot.

    Example:
        >>> report = Report(path="run/1000", missing=("params/bias",))
        >>> report.is_clean
        False
        >>> print(report)
        run/1000: 1 missing
          missing: params/bias
    """

    path: str
    """Folder of the checkpoint."""
    missing: tuple[str, ...] = ()
    """What the program has and the checkpoint has not."""
    extra: tuple[str, ...] = ()
    """What the checkpoint has and the program has not."""
    shape: tuple[tuple[str, str, str], ...] = ()
    """Name, type found and type expected, where the shapes differ."""
    dtype: tuple[tuple[str, str, str], ...] = ()
    """Name, type found and type expected, where only the dtypes differ."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing differs."""
        return not (self.missing or self.extra or self.shape or self.dtype)

    def __str__(self) -> str:
        lists: dict[str, Iterable[str]] = {
            "missing": self.missing,
            "extra": self.extra,
            "shape": [f"{name}: found {old}, expected {new}" for name, old, new in self.shape],
            "dtype": [f"{name}: found {old}, expected {new}" for name, old, new in self.dtype],
        }
        counts = [f"{len(list(lines))} {kind}" for kind, lines in lists.items() if lines]
        head = f"{self.path}: {', '.join(counts) or 'no difference'}"
        body = [f"  {kind}: {line}" for kind, lines in lists.items() for line in lines]
        return "\n".join((head, *body))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where one array comes from and what it becomes."""

    name: str
    """Its name in the checkpoint."""
    place: str
    """Its place in the slot's value, or in the state."""
    found: TensorType
    """What is stored."""
    wanted: TensorType
    """What it becomes: of another dtype where one was asked for."""
    slot: int = -1
    """The slot of the program; -1 for the state."""


@dataclass
class Comparison:
    """Collects the sources of a restore and what stands in its way."""

    path: str
    sources: list[Source] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    shape: list[tuple[str, str, str]] = field(default_factory=list)
    dtype: list[tuple[str, str, str]] = field(default_factory=list)

    def report(self) -> Report:
        """What was found so far."""
        return Report(
            path=self.path,
            missing=tuple(self.missing),
            extra=tuple(self.extra),
            shape=tuple(self.shape),
            dtype=tuple(self.dtype),
        )

    def slots(
        self,
        stored: Stored,
        slots: Mapping[int, Slot],
        dtype_of: DTypeOf,
        collections: tuple[str, ...] | None,
        ignore_extra: bool,
    ) -> None:
        """Compares slots, by position, with what is stored of these collections (None: of all)."""
        used: set[str] = set()
        for position, slot in slots.items():
            key = stored.find(slot)
            if key is None:
                self.missing.append(slot.key)
                continue
            used.add(key)
            found, expected = stored.slots[key].types, slot_types(slot)
            self.extra += [leaf_name(slot.key, at) for at in found if at not in expected]
            for place, kind in expected.items():
                name = leaf_name(slot.key, place)
                wanted = self._leaf(name, found.get(place), kind, dtype_of(slot))
                if wanted is not None:
                    self.sources.append(
                        Source(
                            name=leaf_name(key, place),
                            place=place,
                            found=found[place],
                            wanted=wanted,
                            slot=position,
                        )
                    )
        self.extra += [
            key
            for key, each in stored.slots.items()
            if key not in used
            and not ignore_extra
            and (collections is None or each.collection in collections)
        ]

    def state(self, stored: Stored, target: Types) -> None:
        """Compares the pytree saved beside the values with what is asked for."""
        found = stored.state or {}
        self.extra += [f"state{at}" for at in found if at not in target]
        for place, kind in target.items():
            wanted = self._leaf(f"state{place}", found.get(place), kind, None)
            if wanted is not None:
                self.sources.append(
                    Source(name=f"state{place}", place=place, found=found[place], wanted=wanted)
                )

    def _leaf(
        self, name: str, found: TensorType | None, expected: TensorType, dtype: str | None
    ) -> TensorType | None:
        """What an array becomes, or None when it is not what is expected."""
        if found is None:
            self.missing.append(name)
        elif found.shape != expected.shape:
            self.shape.append((name, str(found), str(expected)))
        elif dtype is not None and is_floating(found.dtype) and is_floating(expected.dtype):
            return TensorType(shape=found.shape, dtype=dtype)
        elif found.dtype == expected.dtype or _is_number_of(found, expected):
            return found
        else:
            self.dtype.append((name, str(found), str(expected)))
        return None


def is_floating(dtype: str) -> bool:
    """Whether arrays of a dtype can be cast; a Python float takes the dtype of what it meets."""
    return dtype.startswith(("float", "bfloat")) and dtype != "float"


def _is_number_of(found: TensorType, expected: TensorType) -> bool:
    """Whether one is a Python number and the other the array that jit makes of it."""
    pairs = ((found.dtype, expected.dtype), (expected.dtype, found.dtype))
    return any(
        number in NUMBERS and array.startswith(NUMBERS[number].__name__) for number, array in pairs
    )


def dtype_finder(dtypes: DTypes, collections: Iterable[str]) -> DTypeOf:
    """The dtype that was asked for each slot.

    Raises:
        CheckpointError: one of them is no floating dtype, or a collection is not known.
    """
    if isinstance(dtypes, Mapping):
        unknown = set(dtypes) - set(collections)
        if unknown:
            raise CheckpointError(
                f"no slot is in the collection {min(unknown)!r}; there are:"
                f" {', '.join(sorted(set(collections)))}",
                path="dtype",
                fix="Name one of these collections.",
            )
        by_name = {name: _floating(dtype) for name, dtype in dtypes.items()}
        return lambda slot: by_name.get(slot.collection)
    if callable(dtypes) and not isinstance(dtypes, type):
        ask = dtypes
        return lambda slot: _floating(ask(slot.key))
    one = _floating(dtypes)
    return lambda slot: one


def _floating(dtype: Any) -> str | None:
    if dtype is None:
        return None
    try:
        name = str(jnp.dtype(dtype))
    except TypeError:
        name = str(dtype)
    if not is_floating(name):
        raise CheckpointError(
            f"found {name}, expected a floating dtype",
            path="dtype",
            fix='Ask for one such as "bfloat16"; slots that are not floating keep their dtype.',
        )
    return name
