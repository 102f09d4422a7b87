"""Collections and variable classes: the one place where either follows from the other.

Shared by frontends and backends; needs flax.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.core import meta

from linsey.ir import BridgeError

EPHEMERAL = frozenset({"cache", "intermediates", "perturbations"})
"""The collections whose variables no checkpoint holds."""


def collection_of(kind: type[nnx.Variable[Any]]) -> str:
    """The collection of a variable class: its registered name, or its own."""
    try:
        return nnx.variable_name_from_type(kind)
    except ValueError:
        return kind.__name__


def register(kind: type[nnx.Variable[Any]], where: str) -> str:
    """The collection of a variable class, which from now on is that of no other class.

    Args:
        kind: the class.
        where: path of a variable of it, for the error.

    Raises:
        BridgeError: another class has the name.
    """
    try:
        return nnx.variable_name_from_type(kind, allow_register=True)
    except ValueError:
        other = nnx.variable_type_from_name(kind.__name__)
        raise BridgeError(
            f"two Variable classes are called {kind.__name__!r}: {_shown(kind)} and"
            f" {_shown(other)}; one collection cannot hold both",
            path=where,
            fix=f"Name the collection of one: bridge.register_variable_name_type_pair('other',"
            f" {kind.__name__}).",
        ) from None


def _shown(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


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
