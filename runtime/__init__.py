"""The runtime: runs a graph under jit on a flat tuple of slots."""

from collections.abc import Iterable

import jax

from linsey.ir import SlotIndex, Values
from linsey.runtime.executable import Executable
from linsey.runtime.plan import Plan
from linsey.runtime.train_state import TrainState
from linsey.runtime.training import TrainStep


def _flatten(values: Values) -> tuple[tuple[object, ...], SlotIndex]:
    return values.arrays, values.index


def _flatten_with_keys(
    values: Values,
) -> tuple[tuple[tuple[jax.tree_util.DictKey, object], ...], SlotIndex]:
    keyed = ((jax.tree_util.DictKey(key), value) for key, value in values.items())
    return tuple(keyed), values.index


def _unflatten(index: SlotIndex, arrays: Iterable[object]) -> Values:
    return Values(index, tuple(arrays))


# Here and not in linsey.ir, which does not know jax.
jax.tree_util.register_pytree_with_keys(Values, _flatten_with_keys, _unflatten, _flatten)

__all__ = ["Executable", "Plan", "TrainState", "TrainStep", "Values"]
