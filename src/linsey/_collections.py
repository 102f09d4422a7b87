"""Collections and variable classes: the one place where either follows from the other.

Shared by frontends and backends; needs flax.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.core import meta

EPHEMERAL = frozenset({"cache", "intermediates", "perturbations"})
"""The collections whose variables no checkpoint holds."""


def collection_of(kind: type[nnx.Variable[Any]]) -> str:
    """The collection of a variable class: its registered name, or its own."""
    try:
        return nnx.variable_name_from_type(kind)
    except ValueError:
        return kind.__name__


def kind_of_collection(collection: str) -> type[nnx.Variable[Any]]:
    """The variable class of a collection; flax makes and keeps one for a name that is new."""
    return nnx.variable_type_from_name(collection, allow_register=True)


def unboxed(value: Any) -> Any:
    """The value inside Linen's metadata boxes.

    Unlike ``box.unbox()``, with no sharding constraint.
    """
    while isinstance(value, meta.AxisMetadata):
        value = value.value if hasattr(value, "value") else value.unbox()
    return value
