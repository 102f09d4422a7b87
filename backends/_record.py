"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from linsey.backends._report import Report
from linsey.ir import Graph


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


@dataclass(kw_only=True)
class SharedCalls:
    """What became of the layers of equal structure in one call of a runner."""

    calls: int = 0
    """How many calls of layers went through a shared trace."""
    traces: int = 0
    """How many traces that took."""
    inlined: int = 0
    """For how many of the calls the traced operations are in the program themselves, and no call of
    a function: one that is called once, or whose gradient would be added up in another order."""


class Runner(Protocol):
    """Runs a graph's root as a pure function of its slots."""

    default_mutable: Any
    """The collections that a call may change when nothing is said; None: all."""
    share_traces: bool
    """Whether layers of equal structure are traced once; False unless somebody sets it. What a call
    gives is the same."""
    shared: SharedCalls
    """What became of such layers in the last call."""

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
    emit: Callable[..., Any]
    """Graph and values (None: abstract) -> the target's pair of static and dynamic. It is passed
    ``native=False`` where everything is to be hosted; a backend that cannot need not take it."""
    runner: Callable[[Graph], Runner]
    """Runs graphs whose root is of this dialect."""
    report: Callable[..., Report] | None = None
    """What becomes of each node of a graph; takes ``native`` as `emit` does. None: it does not
    tell."""
