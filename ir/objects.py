"""Plain objects: instances of importable classes whose state is their ``__dict__`` and no more.

Such an object is made again without a constructor: an empty one, and then its attributes. No code
of its class runs.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

from linsey.ir.errors import LinseyError

_FRAMEWORKS = frozenset({"flax", "jax", "jaxlib", "linsey", "numpy", "optax"})
"""Packages whose objects have a meaning of their own: arrays, tracers, modules, devices."""
_OWN_WAY = (
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__"),
    *("__getnewargs_ex__", "__copy__", "__deepcopy__", "__del__"),
)
"""Methods that say that an object is more than its attributes."""
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, or by few C extensions


class _Empty:
    """What the instances of a plain class are laid out like."""


def plain_state(obj: Any) -> dict[str, Any] | None:
    """The attributes of a plain object by name, in the order in which they were set; else None.

    One without attributes is not taken for plain: it may be a mark that code compares by identity.

    Example:
        >>> from fractions import Fraction
        >>> plain_state(Fraction(1, 2)) is None
        True
    """
    if not is_plain(type(obj)):
        return None
    state = object.__getattribute__(obj, "__dict__")
    if type(state) is not dict or not all(type(name) is str for name in state):
        return None
    return state or None


def is_plain(cls: Any) -> bool:
    """Whether the instances of a class are their ``__dict__`` and no more.

    No slots and nothing of C; no ``__new__`` and no pickling or copying of their own, which says
    that there is more to them; not of jax, flax, optax or numpy.
    """
    new: Any = getattr(cls, "__new__", None)
    if not isinstance(cls, type) or new is not object.__new__:
        return False
    if (cls.__basicsize__, cls.__itemsize__) != (_Empty.__basicsize__, _Empty.__itemsize__):
        return False
    for base in cls.__mro__[:-1]:
        if not base.__flags__ & _HEAP_TYPE or base.__module__.partition(".")[0] in _FRAMEWORKS:
            return False
        held = vars(base)
        if any(name in held for name in _OWN_WAY):
            return False
        if any(type(each) is types.MemberDescriptorType for each in held.values()):
            return False  # a slot
    found = [vars(base)["__dict__"] for base in cls.__mro__ if "__dict__" in vars(base)]
    return bool(found) and all(type(each) is types.GetSetDescriptorType for each in found)


@dataclass(frozen=True, slots=True)
class ByState:
    """Makes plain objects of a class from their attributes: the class of their `Instance`.

    Args:
        cls: the class.

    Raises:
        LinseyError: the instances of the class are not plain.

    Example:
        >>> from argparse import Namespace
        >>> ByState(Namespace)(rate=2)
        Namespace(rate=2)
    """

    cls: Any

    def __post_init__(self) -> None:
        if not is_plain(self.cls):
            raise LinseyError(
                "found a class whose objects are more than their attributes, expected one of which"
                " they are all",
                path=f"{getattr(self.cls, '__module__', '')}:{getattr(self.cls, '__name__', '')}",
                fix="Use the version of its package that the file was saved with.",
            )

    def __call__(self, /, **state: Any) -> Any:
        """An object with these attributes."""
        made = object.__new__(self.cls)
        object.__getattribute__(made, "__dict__").update(state)
        return made
