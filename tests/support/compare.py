"""Comparison bit for bit, with the path of the first difference."""

from typing import Any

import jax
import numpy as np


def _bits(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same(found: Any, expected: Any) -> None:
    """Asserts that two pytrees have the same structure, and leaves of the same type and bits."""
    found_leaves, found_tree = jax.tree.flatten(found)
    expected_leaves, expected_tree = jax.tree.flatten(expected)
    assert found_tree == expected_tree
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(expected)[0]]
    for path, leaf, other in zip(paths, found_leaves, expected_leaves, strict=True):
        where = jax.tree_util.keystr(path)
        if not hasattr(other, "dtype"):
            assert type(leaf) is type(other), f"{where}: {type(leaf)} is not {type(other)}"
        if isinstance(other, jax.ShapeDtypeStruct):
            assert leaf == other, f"{where}: {leaf} is not {other}"
            continue
        first, second = _bits(leaf), _bits(other)
        found_type, expected_type = (first.dtype, first.shape), (second.dtype, second.shape)
        assert found_type == expected_type, f"{where}: {found_type} is not {expected_type}"
        assert first.tobytes() == second.tobytes(), f"{where}: {first} is not {second}"
