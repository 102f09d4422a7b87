"""Frontends: source module -> graph and values."""

from linsey.frontends._encode import FlaxEncoder
from linsey.frontends._private import stands_for, watched_call
from linsey.frontends._record import Frontend, Lowered, Request
from linsey.frontends._session import initializing, note_initialized, was_initialized

__all__ = [
    "FlaxEncoder",
    "Frontend",
    "Lowered",
    "Request",
    "initializing",
    "note_initialized",
    "stands_for",
    "was_initialized",
    "watched_call",
]
