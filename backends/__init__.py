"""Backends: graph and values -> target module and state."""

from linsey.backends._decode import abstract_value, decode_linen
from linsey.backends._private import no_parent
from linsey.backends._record import Backend, Called, Runner, SharedCalls
from linsey.backends._spec import HostSpec

__all__ = [
    "Backend",
    "Called",
    "HostSpec",
    "Runner",
    "SharedCalls",
    "abstract_value",
    "decode_linen",
    "no_parent",
]
