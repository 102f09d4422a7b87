"""Backends: graph and values -> target module and state."""

from linsey.backends._record import Backend, Called, Runner

__all__ = ["Backend", "Called", "Runner"]
