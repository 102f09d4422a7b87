"""Frontends: source module -> graph and values."""

from linsey.frontends._record import Frontend, Lowered, Request

__all__ = ["Frontend", "Lowered", "Request"]
