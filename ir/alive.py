"""Objects that cannot be data, found again by a pickle that is read in the process that wrote it.

The only state in `linsey.ir` that outlives a call: a lambda or a local class has no name to be
found by, and inside one process (a deep copy, a queue between threads) it need not be lost.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Hashable
from typing import Any

_process = uuid.uuid4().hex
_tokens: dict[tuple[int, Hashable], str] = {}
_entries: dict[str, tuple[Any, Any]] = {}


def token_of(obj: Any, key: Hashable) -> str:
    """A token for an object and what it compares by.

    It is good as long as the object lives; empty where none can be given.
    """
    place = (id(obj), key)
    token = _tokens.get(place, "")
    if token and _entries[token][0]() is obj:
        return token
    token = f"{_process}:{uuid.uuid4().hex}"

    def forget(_: Any) -> None:
        _entries.pop(token, None)
        if _tokens.get(place) == token:
            del _tokens[place]

    try:
        held = weakref.ref(obj, forget)
    except TypeError:
        return ""
    _tokens[place] = token
    _entries[token] = held, key
    return token


def find(token: str) -> tuple[Any, Any] | None:
    """The object of a token and its key; None when it is gone, or lives in another process."""
    held, key = _entries.get(token, (lambda: None, None))
    found = held()
    return None if found is None else (found, key)
