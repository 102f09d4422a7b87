"""The layers of each dialect in neutral terms, shared by frontends and backends."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from linsey._layers.table import Place, RefusedError, Row

__all__ = [
    "Place",
    "RefusedError",
    "Row",
    "base_of",
    "op_of",
    "row_for_class",
    "row_for_op",
    "rows",
]


@functools.cache
def rows(dialect: str) -> Mapping[type, Row]:
    """The rows of a dialect's table, by class; none where linsey knows no layers of it."""
    if dialect == "linen":
        from linsey._layers.linen import ROWS
    elif dialect == "nnx":
        from linsey._layers.nnx import ROWS
    else:
        return {}
    return {row.cls: row for row in ROWS}


def row_for_op(dialect: str, op: str) -> Row | None:
    """The first row of a neutral layer, which is the class to write it as."""
    return next((row for row in rows(dialect).values() if row.op == op), None)


def row_for_class(dialect: str, cls: Any) -> Row | None:
    """The row of a class, or of the class that Linen's transforms lifted; None for user code."""
    return rows(dialect).get(base_of(cls))


def op_of(dialect: str, cls: Any) -> str:
    """The neutral layer that a class is; ``module`` for user code."""
    row = row_for_class(dialect, cls)
    return "module" if row is None else row.op


def base_of(cls: Any) -> Any:
    """The class under those that ``nn.remat``, ``nn.scan`` and the like made of it."""
    while isinstance(cls, type) and cls.__module__ == "flax.linen.transforms":
        cls = cls.__bases__[0]
    return cls
