"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from linsey.ir import Graph, Values


@dataclass(frozen=True, kw_only=True)
class Called:
    """What one call of a runner gives."""

    output: Any
    """What the method returned."""
    arrays: list[Any]
    """The value of every slot afterwards, in slot order; an unchanged one is the very object that
    was passed in."""
    extra: dict[str, Any] = field(default_factory=dict)
    """State that the call made and no slot holds (sown values): collection -> nested dict."""


class Runner(Protocol):
    """Runs a graph's root as a pure function of its slots."""

    default_mutable: Any
    """The collections that a call may change when nothing is said; None: all."""

    def __call__(
        self,
        arrays: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        method: Any,
        rngs: Mapping[str, Any] | None,
        mutable: Any,
    ) -> Called:
        """Calls a method.

        Args:
            arrays: a value per slot, in slot order.
            args: positional arguments.
            kwargs: keyword arguments.
            method: name of the method, or a function of the module.
            rngs: keys by stream, or None.
            mutable: the collections that may change; None means the source's default.
        """


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way from the graph into one kind of target.

    Registered under the entry-point group ``linsey.backends``.
    """

    name: str
    """Name of the dialect."""
    emit: Callable[[Graph, Values | None], Any]
    """Graph and values (None: abstract) -> the target's pair of static and dynamic."""
    runner: Callable[[Graph], Runner]
    """Runs graphs whose root is of this dialect."""
