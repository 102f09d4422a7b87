"""What a frontend is and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from linsey.ir import Graph, Values


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `linsey.lower`."""

    source: Any
    """What is lowered."""
    args: tuple[Any, ...] = ()
    """Sample inputs, arrays or ShapeDtypeStructs."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Sample keyword inputs."""
    rngs: Any = None
    """PRNG keys in any of the forms that `linsey.lower` takes, or None."""
    variables: Any = None
    """Values in the source's own form, or None."""
    method: Any = None
    """The method to lower by, a name or a function; None: the call."""


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What lowering gives."""

    graph: Graph
    """The structure."""
    values: Values | None = None
    """The values, where they were at hand."""
    init: Callable[[Any], Values] | None = None
    """Gives concrete values from PRNG keys, the very numbers of the source's own initialisation;
    None when the source cannot be initialised again."""


@dataclass(frozen=True, kw_only=True)
class Frontend:
    """A way from one kind of source into the graph.

    Registered under the entry-point group ``linsey.frontends``.
    """

    name: str
    """Name of the dialect: the ``source.dialect`` of its nodes."""
    accepts: Callable[[Any], bool]
    """Whether it lowers this object. Called with anything; must not raise and must be cheap."""
    lower: Callable[[Request], Lowered]
    """Does it."""
