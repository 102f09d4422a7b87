"""Turns attribute values back into Python objects."""

from __future__ import annotations

import functools
import importlib
import operator
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from linsey.ir.attributes import (
    ABSENT,
    UNTRUSTED,
    Array,
    AttrValue,
    Call,
    Const,
    DType,
    EnumValue,
    Hole,
    Instance,
    Map,
    NodeRef,
    Ref,
    Sequence,
    describe,
)
from linsey.ir.encode import encode
from linsey.ir.errors import LinseyError


def resolve(name: str) -> Any:
    """The object that ``package.module:Qualified.name`` names.

    Raises:
        ImportError: the module cannot be imported.
        AttributeError: the module has no such object.
        LinseyError: what is found there belongs to another package: ``jax._src.config:os.system``
            is not jax's.

    Example:
        >>> resolve("math:pi")
        3.141592653589793
    """
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
        if isinstance(found, types.ModuleType):
            raise LinseyError(
                f"{part} is a module, expected something that is defined in {module}",
                path=name,
                fix="Name it by the module that defines it.",
            )
    owner = getattr(found, "__module__", None)
    package = module.partition(".")[0]
    is_foreign = isinstance(owner, str) and owner.partition(".")[0] not in (
        *(package, *_SAME.get(package, ())),
    )
    # What linsey imports from itself would lead from what may be named to what may not.
    if is_foreign or (package == "linsey" and owner not in (None, module)):
        raise LinseyError(
            f"found an object of {owner}, expected one of {package}",
            path=name,
            fix="Name it by the module that defines it.",
        )
    return found


_SAME = {"jax": ("jaxlib",), "types": ("builtins",), "ml_dtypes": ("numpy",)}
"""Packages some of whose objects say that they are of another one."""


class Decoder:
    """Decodes the attributes of one graph; objects that were one object stay one object.

    Args:
        node: gives the object for a `NodeRef`.
        holes: the objects to put in the place of `Hole` values.
    """

    def __init__(
        self, node: Callable[[int], Any] | None = None, holes: tuple[Any, ...] = ()
    ) -> None:
        self._node = node
        self._holes = holes
        self._shared: dict[int, Any] = {}

    def __call__(self, value: AttrValue) -> Any:
        """Decodes one value.

        Raises:
            LinseyError: the object exists in the process that lowered it only; or what the value
                names cannot be imported.
        """
        live = getattr(value, "live", ABSENT)
        if live is UNTRUSTED:
            raise LinseyError(
                "the file names it, and its package is not trusted",
                path=value.name,  # type: ignore[union-attr]
                fix="If the file comes from where you trust it, load it with trust=[its package].",
            )
        if live is not ABSENT:
            return live
        match value:
            case Const():
                return value.value
            case DType():
                return _dtype(value.name)
            case Ref():
                return _imported(value.name)
            case EnumValue():
                cls = self(value.cls)
                members = [cls[name] for name in value.name.split("|")]
                return functools.reduce(operator.or_, members)
            case Sequence():
                return _BUILTINS[value.kind](map(self, value.items))
            case Map():
                pairs = {self(key): self(item) for key, item in value.items}
                made = self(value.cls)
                return pairs if made is dict else made(pairs)
            case Instance():
                return self._instance(value)
            case Call():
                kwargs = {name: self(arg) for name, arg in value.kwargs}
                return self(value.function)(*map(self, value.args), **kwargs)
            case Array():
                return _from_bytes(value)
            case Hole():
                return self._holes[value.index]
            case NodeRef() if self._node is not None:
                return self._node(value.node)
        raise LinseyError(
            f"{describe(value)} exists only in the process that lowered it",
            fix="Use a function or class that can be imported by name.",
        )

    def field(self, cls: Any, name: str, value: AttrValue) -> Any:
        """Decodes the value of a class's field.

        A closure that its default is, too (an initialiser), is that very object: a value that was
        read from bytes knows only the call, and what another call makes is not equal.
        """
        if isinstance(value, Call) and value.live is ABSENT and value == _default(cls, name):
            return cls.__dataclass_fields__[name].default
        return self(value)

    def _instance(self, value: Instance) -> Any:
        if value.share is not None and value.share in self._shared:
            return self._shared[value.share]
        cls = self(value.cls)
        made = cls(**{name: self.field(cls, name, item) for name, item in value.fields})
        if value.share is not None:
            self._shared[value.share] = made
        return made


@functools.cache
def _default(cls: Any, name: str) -> AttrValue | None:
    """The default of a dataclass's field, as data."""
    field = getattr(cls, "__dataclass_fields__", {}).get(name)
    return None if field is None else encode(field.default)


_BUILTINS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "set": set,
    "frozenset": frozenset,
}


def _imported(name: str) -> Any:
    try:
        return resolve(name)
    except (ImportError, AttributeError) as error:
        raise LinseyError(
            f"it cannot be imported: {error}",
            path=name,
            fix="Install its package, or put its folder on the path. What a script defines"
            " (__main__) has to move into a module.",
        ) from error


def _dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        extended: np.dtype[Any] = np.dtype(resolve(f"ml_dtypes:{name}"))
        return extended


def _from_bytes(value: Array) -> Any:
    host = np.frombuffer(value.data, dtype=_dtype(value.dtype)).reshape(value.shape).copy()
    if value.make == "jax":
        return resolve("jax.numpy:asarray")(host)
    return host if value.make == "numpy" else host[()]


def decode(value: AttrValue) -> Any:
    """The object that an attribute value stands for; see `Decoder`.

    Example:
        >>> from linsey.ir import encode
        >>> decode(encode({"axis": (0, 1)}))
        {'axis': (0, 1)}
    """
    return Decoder()(value)
