"""Calls with arrays apart from static arguments, written without linsey."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def split_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Any], Callable[[list[Any]], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arrays of a call, and a function that makes its args and kwargs from other arrays."""
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))
    is_static = [not hasattr(leaf, "dtype") for leaf in leaves]
    dynamic = [leaf for leaf, static in zip(leaves, is_static, strict=True) if not static]

    def merge(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        together = [
            leaf if static else next(rest) for leaf, static in zip(leaves, is_static, strict=True)
        ]
        return jax.tree.unflatten(tree, together)

    return dynamic, merge
