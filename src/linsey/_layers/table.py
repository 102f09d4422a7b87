"""What a row of a dialect's table of layers says, and how a layer is read and written by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from linsey.ir import Path
from linsey.ir.ops import OPS, REQUIRED, Op, Shape


class RefusedError(Exception):
    """A layer cannot be written in another dialect; the message is the reason in its report."""


def same(value: Any) -> Any:
    """The value: for a field that means the same in both."""
    return value


def class_of(module: Any, name: str) -> type:
    """A class of flax, or an empty one of that name where the installed flax has none."""
    return getattr(module, name, None) or type(name, (), {})


Shapes = Mapping[str, Shape]
"""Shapes of variables by neutral name, without stacked axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """How one neutral field is written in a dialect."""

    name: str
    """Its neutral name."""
    own: str
    """Its name in the dialect."""
    read: Callable[[Any], Any] = same
    """From the dialect's value to the neutral one."""
    write: Callable[[Any], Any] = same
    """Back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a dialect keeps a neutral variable."""

    collection: str
    """Its collection."""
    path: Path
    """Its path below the layer."""
    parts: tuple[str, ...] = ()
    """The neutral variables of which it is made, one after the other; empty: it is one itself."""
    axis: int = -1
    """The axis by which the parts are joined, of the array without stacked axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How one class of a dialect is written in neutral terms."""

    op: str
    """The neutral layer."""
    cls: type
    """The class; subclasses are user code."""
    fields: tuple[Field, ...] = ()
    """Its fields that are neutral ones."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Its fields that no other dialect has, with the only values that others can follow."""
    ignored: frozenset[str] = frozenset()
    """Its fields that change no call: initialisers, and what follows from other fields."""
    slots: Mapping[str, Place] = field(default_factory=dict)
    """Where its variables lie, by neutral name."""
    infer: Callable[[Mapping[str, Any], Shapes, Shape | None], Mapping[str, Any]] | None = None
    """The neutral fields that follow from its other fields, the shapes of its variables, and that
    of its first input, where that is known."""
    make: Mapping[str, Any] = field(default_factory=dict)
    """What its constructor takes besides."""
    check: Callable[[Mapping[str, Any]], None] | None = None
    """Raises `RefusedError` for neutral fields that this class computes in another way."""
    implied: frozenset[str] = frozenset()
    """The neutral fields that are told by its variables alone."""
    set_after: Mapping[str, str] = field(default_factory=dict)
    """Attributes that its constructor changes, with the neutral fields that they are set to."""
    methods: frozenset[str] = frozenset({"__call__"})
    """The methods that compute the same in every dialect that has a row."""
    reason: str = ""
    """Why no layer of another dialect computes the same; empty: one does."""
    limits: tuple[str, ...] = ()
    """In words, when else a layer of this class is hosted: what `infer` and `check` refuse."""
    since: str = ""
    """The flax that first has the class; empty: all that linsey works with."""

    @property
    def neutral(self) -> Op:
        """The neutral layer."""
        return OPS[self.op]

    def read(
        self, own: Mapping[str, Any], shapes: Shapes, inputs: Shape | None = None
    ) -> dict[str, Any]:
        """The neutral fields of a layer of this class.

        Args:
            own: its fields.
            shapes: the shapes of its variables by neutral name, without stacked axes.
            inputs: the shape of its first input, where that is known.

        Raises:
            RefusedError: a field has no neutral counterpart, or the shapes are not those that the
                fields ask for.
        """
        if self.reason:
            raise RefusedError(self.reason)
        by_own = {each.own: each for each in self.fields}
        found: dict[str, Any] = {}
        for name, value in own.items():
            if name in by_own:
                found[by_own[name].name] = by_own[name].read(value)
            elif name in self.fixed:
                if not _is(value, self.fixed[name]):
                    raise RefusedError(f"{name}={_shown(value)} has no counterpart")
            elif name not in self.ignored:
                raise RefusedError(f"linsey does not know the field {name}")
        if self.infer is not None:
            found.update(self.infer(found, shapes, inputs))
        neutral = {**self.neutral.fields, **found}
        missing = [name for name, value in neutral.items() if value is REQUIRED]
        if missing:
            raise RefusedError(f"its {', '.join(missing)} cannot be told")
        expected = self.neutral.shapes(neutral)
        if expected != dict(shapes):
            raise RefusedError(
                f"its variables are {_shapes(shapes)}; its fields ask for {_shapes(expected)}"
            )
        return neutral

    def write(self, neutral: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this class for a neutral layer.

        Raises:
            RefusedError: a neutral field has a value that this class cannot follow.
        """
        if self.reason:
            raise RefusedError(self.reason)
        if self.check is not None:
            self.check(neutral)
        by_name = {each.name: each for each in self.fields}
        for name, value in neutral.items():
            default = self.neutral.fields[name]
            if name in by_name or name in self.implied or default is REQUIRED:
                continue
            if not _is(value, default):
                raise RefusedError(f"{self.cls.__name__} has no {name}, which is {_shown(value)}")
        return {
            each.own: each.write(neutral[each.name]) for each in self.fields if each.name in neutral
        }


def _is(value: Any, expected: Any) -> bool:
    if value is expected:
        return True
    try:
        return type(value) is type(expected) and bool(value == expected)
    except Exception:
        return False


def _shown(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)}"
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else repr(value)


def _shapes(shapes: Shapes) -> str:
    return ", ".join(f"{name}{list(shape)}" for name, shape in sorted(shapes.items())) or "none"


def fields(*names: str, **renamed: str) -> tuple[Field, ...]:
    """Fields that mean the same in a dialect as in neutral terms.

    Args:
        names: those with the same name.
        renamed: neutral name = own name.
    """
    return (
        *(Field(name=name, own=name) for name in names),
        *(Field(name=name, own=own) for name, own in renamed.items()),
    )


def params(*names: str, **renamed: str) -> dict[str, Place]:
    """Variables of the collection ``params``: neutral name and own path with slashes."""
    places = {name: name for name in names} | renamed
    return {
        name: Place(collection="params", path=tuple(path.split("/")))
        for name, path in places.items()
    }
