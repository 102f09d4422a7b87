"""While NNX code runs to initialise the Linen modules inside: what has been initialised already."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from linsey.frontends import _private


class _Session(threading.local):
    ready: dict[int, Any] | None = None


_session = _Session()


def was_initialized(module: Any) -> bool:
    """Whether the initialisation that runs now has come to this module before."""
    return _session.ready is not None and id(module) in _session.ready


def note_initialized(module: Any) -> None:
    """Notes that the initialisation that runs now has come to this module."""
    if _session.ready is not None:
        _session.ready[id(module)] = module  # held, so that no other object gets its id


@contextlib.contextmanager
def initializing(module: Any) -> Iterator[None]:
    """Inside the block, a call of the module initialises every ToNNX in it that it reaches."""
    previous = _session.ready
    _session.ready = {} if previous is None else previous
    _private.set_initializing(module, True)
    try:
        yield
    finally:
        _private.set_initializing(module, False)
        _session.ready = previous
