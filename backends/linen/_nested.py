"""Nested dicts of Linen variables, boxes included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax.core import meta

from linsey.ir import Path

MISSING = object()
"""Stands for a variable that is not there."""


def value_in(tree: Any, path: Path) -> Any:
    """What lies at a path of nested dicts, or `MISSING`."""
    for name in path:
        tree = tree.get(name, MISSING) if isinstance(tree, Mapping) else MISSING
    return tree


def with_value(tree: Any, path: Path, value: Any) -> Any:
    """A nested dict with one value replaced inside its box."""
    if path:
        return {**tree, path[0]: with_value(tree[path[0]], path[1:], value)}
    return tree.replace_boxed(value) if isinstance(tree, meta.AxisMetadata) else value


def merged(old: Any, new: Any) -> Any:
    """Two nested dicts as one; where both have a leaf, that of the second."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    return {**old, **{name: merged(old.get(name, {}), value) for name, value in new.items()}}
