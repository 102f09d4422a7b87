"""Backends: graph and values -> target module and state."""

import importlib
from typing import TYPE_CHECKING, Any

from linsey.backends._record import Backend, Called, Runner, SharedCalls
from linsey.backends._report import Report, ReportRow

if TYPE_CHECKING:
    from linsey.backends._decode import decode_linen
    from linsey.backends._private import folded, no_parent
    from linsey.backends._spec import HostSpec

# Loaded when first used: a program that was exported runs without flax.
_HOME = {
    "HostSpec": "linsey.backends._spec",
    "decode_linen": "linsey.backends._decode",
    "folded": "linsey.backends._private",
    "no_parent": "linsey.backends._private",
}

__all__ = [
    "Backend",
    "Called",
    "HostSpec",
    "Report",
    "ReportRow",
    "Runner",
    "SharedCalls",
    "decode_linen",
    "folded",
    "no_parent",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
