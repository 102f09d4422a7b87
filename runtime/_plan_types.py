"""What a plan says: plain data, without the counting."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from linsey.ir import UNCONSTRAINED, Axis, Rules

JSON_VERSION = 1
"""Version of what `Plan.to_json` gives. Entries may be added within a version; one that goes, or
that changes its meaning, makes a new version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The bytes of one collection."""

    name: str
    """The collection; ``optimizer`` for the state of an optimizer."""
    slots: int
    """How many slots (or arrays) it has."""
    whole: int
    """Bytes of the unsharded arrays."""
    per_device: int
    """Bytes on a device: of each slot, its largest shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Slots that are alike but for the numbers in their names, as those of unrolled layers are."""

    name: str
    """The name of the slot; of several, with ``*`` for the numbers."""
    example: str
    """The name of one of them."""
    slots: int
    """How many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicated:
    """Slots of which several devices hold the same part."""

    group: Group
    """The slots."""
    type: str
    """Type of each, unsharded."""
    axes: tuple[Axis, ...]
    """Where their axes lie on the mesh; empty: nowhere."""
    over: tuple[str, ...]
    """The axes of the mesh that do not split them, those of size 1 left out."""
    copies: int
    """How many devices hold the same part."""
    per_device: int
    """Bytes of one slot on a device."""
    least: int
    """The same if the axes in `over` split it too, as far as they divide its sizes evenly."""

    @property
    def factor(self) -> float:
        """By how much the memory could shrink."""
        return self.per_device / self.least if self.least else 1.0

    @property
    def saved(self) -> int:
        """Bytes on a device that could be saved, for all the slots together."""
        return (self.per_device - self.least) * self.group.slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Uneven:
    """An axis that its mesh axes do not divide: counted with padding, and refused by `compile`."""

    group: Group
    """The slots."""
    axis: int
    """Position of the axis in the array."""
    size: int
    """Its size."""
    parts: int
    """Into how many parts it is to be split."""
    on: Axis
    """The mesh axes that it lies on."""
    reason: str
    """What put it there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmapped:
    """A logical axis name that no rule mentions; its axes stay replicated."""

    name: str
    """The name."""
    slots: int
    """How many slots have it."""
    example: str
    """One of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedRule:
    """A rule that places no axis of any slot. It may still place activations."""

    rule: tuple[str, Axis]
    """The rule."""
    reason: str
    """Why it places none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A partition that cannot be used; its slots are counted as replicated."""

    group: Group
    """The slots."""
    message: str
    """What is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What each device of a mesh would hold; ``print`` shows it as tables."""

    mesh: tuple[tuple[str, int], ...]
    """The axes of the mesh: name and size."""
    rules: Rules | None
    """The rules that were given, or else those in force; None: neither."""
    collections: tuple[Share, ...]
    """Bytes by collection, in the order of the slots."""
    optimizer: Share | None
    """Bytes of the optimizer's state; None when no optimizer was given."""
    replicated: tuple[Replicated, ...]
    """Slots that stay replicated, in full or over some axes; those that could save most first."""
    uneven: tuple[Uneven, ...]
    """Axes that are not split evenly."""
    unmapped: tuple[Unmapped, ...]
    """Names that no rule mentions."""
    unused_rules: tuple[UnusedRule, ...]
    """Rules that place no slot."""
    unused_axes: tuple[str, ...]
    """Axes of the mesh on which no slot lies."""
    problems: tuple[Problem, ...]
    """Partitions that do not fit their slots or the mesh, and types of unknown size."""

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(size for _, size in self.mesh)

    @property
    def shares(self) -> tuple[Share, ...]:
        """The collections, and the optimizer where there is one."""
        return self.collections if self.optimizer is None else (*self.collections, self.optimizer)

    @property
    def per_device(self) -> int:
        """Bytes on a device, the optimizer's included."""
        return sum(share.per_device for share in self.shares)

    @property
    def whole(self) -> int:
        """Bytes of the unsharded arrays, the optimizer's included."""
        return sum(share.whole for share in self.shares)

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``linsey plan --help`` says what is in it."""
        size = {
            "whole": self.whole,
            "per_device": self.per_device,
            "all_devices": self.per_device * self.devices,
        }
        data = {"version": JSON_VERSION, **_plain(self), "devices": self.devices, "bytes": size}
        data["mesh"] = dict(self.mesh)
        for entry, each in zip(data["replicated"], self.replicated, strict=True):
            entry.update(factor=each.factor, saved=each.saved)
        return data

    def __str__(self) -> str:
        from linsey.runtime._text import format_plan

        return format_plan(self)


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON data."""
    if value is UNCONSTRAINED:
        return repr(value)
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in names}
    return value
