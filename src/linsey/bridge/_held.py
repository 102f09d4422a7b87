"""A Linen module as a static attribute of an NNX module."""

from __future__ import annotations

from typing import Any

from flax import linen

from linsey.backends import decode_linen
from linsey.frontends import FlaxEncoder


class HeldModule:
    """An unbound Linen module that compares by what it is made of.

    A Linen module compares its fields, and two lambdas are never equal: two graphdefs of the same
    model would differ, and every function of them would be compiled again. Here functions compare
    by code, and the closures that jax and flax make by the call that made them. So it can also be
    pickled.

    Args:
        module: the module.
    """

    __slots__ = ("_data", "_hash", "module")

    def __init__(self, module: linen.Module) -> None:
        self.module = module
        self._data: Any = None
        self._hash: int | None = None

    @property
    def data(self) -> Any:
        """The module as an attribute value of the graph."""
        if self._data is None:
            self._data = FlaxEncoder().module(self.module)
        return self._data

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeldModule):
            return NotImplemented
        return self.module is other.module or bool(self.data == other.data)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self.data)
        return self._hash

    def __repr__(self) -> str:
        return repr(self.module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _held, (self.data,)


def _held(data: Any) -> HeldModule:
    return HeldModule(decode_linen(data))
