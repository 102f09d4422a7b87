"""What stands for an object of a class that is not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax

from linsey.ir import AttrValue, Call, Const, Instance, Map, Ref, Sequence
from linsey.ir.attributes import UNTRUSTED


class Fields(Mapping[str, Any]):
    """The fields of an object whose class is not installed, or of a package that is not trusted.

    A stored program returns one in the place of a model's own output class, and takes one in the
    place of an argument. A pytree; a field is an attribute and an item.

    Args:
        name: the name of the class.
        fields: the fields.

    Example:
        >>> import jax
        >>> output = Fields("Output", logits=1.0, hidden=None)
        >>> output.logits, output["logits"], list(output)
        (1.0, 1.0, ['logits', 'hidden'])
        >>> jax.tree.map(lambda leaf: leaf + 1, output)
        Output(logits=2.0, hidden=None)
    """

    def __init__(self, name: str, /, **fields: Any) -> None:
        self._name = name
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key]

    def __getattr__(self, key: str) -> Any:
        if not key.startswith("_") and key in self._fields:
            return self._fields[key]
        raise AttributeError(f"{self._name} has no field {key!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        inner = ", ".join(f"{key}={value!r}" for key, value in self._fields.items())
        return f"{self._name}({inner})"


def _flatten(fields: Fields) -> tuple[list[tuple[Any, Any]], tuple[str, tuple[str, ...]]]:
    keyed = [(jax.tree_util.GetAttrKey(key), value) for key, value in fields.items()]
    return keyed, (fields._name, tuple(fields))


def _unflatten(form: tuple[str, tuple[str, ...]], values: Any) -> Fields:
    name, keys = form
    return Fields(name, **dict(zip(keys, values, strict=True)))


jax.tree_util.register_pytree_with_keys(Fields, _flatten, _unflatten)
_MAKE = Ref(name=f"{__name__}:Fields")


def standing_in(value: AttrValue) -> AttrValue:
    """A value with `Fields` for the objects of classes that are not there; nothing is imported."""
    match value:
        case Sequence():
            return replace(value, items=tuple(map(standing_in, value.items)))
        case Map():
            items = tuple((standing_in(key), standing_in(item)) for key, item in value.items)
            if not _is_missing(value.cls):
                return replace(value, items=items)
            if all(isinstance(key, Const) and isinstance(key.value, str) for key, _ in items):
                named = tuple((key.value, item) for key, item in items if isinstance(key, Const))
                return _fields(value.cls, named)
            return Map(cls=Ref(name="builtins:dict"), items=items)
        case Instance():
            named = tuple((name, standing_in(item)) for name, item in value.fields)
            if _is_missing(value.cls):
                return _fields(value.cls, named)
            return replace(value, fields=named)
        case Call():
            args = tuple(map(standing_in, value.args))
            named = tuple((name, standing_in(item)) for name, item in value.kwargs)
            if not _is_missing(value.function):
                return replace(value, args=args, kwargs=named)
            if named and not args:
                return _fields(value.function, named)
            return Sequence(kind="tuple", items=(*args, *(item for _, item in named)))
    return value


def _fields(cls: AttrValue, named: tuple[tuple[str, AttrValue], ...]) -> Call:
    assert isinstance(cls, Ref)
    name = cls.name.rpartition(":")[2].rpartition(".")[2]
    return Call(function=_MAKE, args=(Const(name),), kwargs=named)


def _is_missing(cls: AttrValue) -> bool:
    """Whether a class is of a package that is not trusted, or not installed."""
    if not isinstance(cls, Ref):
        return False
    package = cls.name.partition(":")[0].partition(".")[0]
    return cls.live is UNTRUSTED or not _is_installed(package)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
