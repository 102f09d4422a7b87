"""What the runners of both dialects do alike."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from linsey.backends._record import Called, SharedCalls
from linsey.backends._share import Session, can_share, run
from linsey.ir import Graph


class SharingRunner(abc.ABC):
    """A `linsey.backends.Runner` that can trace layers of equal structure once."""

    default_mutable: Any = None

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.share_traces = False
        self.shared = SharedCalls()

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
        """See `linsey.backends.Runner`."""
        self.shared = SharedCalls()
        if not self.share_traces or not can_share(arrays, args, kwargs, rngs):
            return self._call(arrays, args, kwargs, method, rngs, mutable, None)

        def call(session: Session, given: Any) -> Called:
            arrays, (args, kwargs, rngs) = given
            return self._call(arrays, args, kwargs, method, rngs, mutable, session)

        called, self.shared = run(call, arrays, (args, dict(kwargs), rngs))
        return called

    @abc.abstractmethod
    def _call(
        self,
        arrays: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        method: Any,
        rngs: Mapping[str, Any] | None,
        mutable: Any,
        session: Session | None,
    ) -> Called:
        """Makes the call; with a session, calls of equal layers go to it."""
