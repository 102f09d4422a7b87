"""Python's cyclic garbage collector, paused while many small objects are made that all stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Inside the block the collector rests; afterwards it does what it did before.

    It starts after so many new objects, and looks at all that there are. Reading a graph of 100,000
    nodes makes millions, none of which is garbage: it would take as long as the reading itself.

    Example:
        >>> import gc
        >>> with paused():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
