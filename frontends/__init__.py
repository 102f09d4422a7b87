"""Frontends: source module -> graph and values."""

from linsey.frontends._encode import FlaxEncoder
from linsey.frontends._private import watched_call
from linsey.frontends._record import Frontend, Lowered, Request

__all__ = ["FlaxEncoder", "Frontend", "Lowered", "Request", "watched_call"]
