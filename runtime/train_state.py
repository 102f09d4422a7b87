"""What a train step takes and gives."""

from __future__ import annotations

from typing import Any

import jax

from linsey.ir import Values


class TrainState:
    """What a train step takes and gives: values, and the state of the optimizer.

    A pytree. The optimizer's state is held flat, and given its structure when it is asked for: a
    step pays for neither.

    Args:
        values: a value for every slot.
        opt_state: the state of the optimizer.
    """

    __slots__ = ("leaves", "structure", "values")

    def __init__(self, values: Values, opt_state: Any) -> None:
        self.values = values
        """A value for every slot."""
        leaves, structure = jax.tree.flatten(opt_state)
        self.leaves: tuple[Any, ...] = tuple(leaves)
        """The arrays of the optimizer's state."""
        self.structure = structure
        """Its structure."""

    @classmethod
    def of_leaves(cls, values: Values, leaves: tuple[Any, ...], structure: Any) -> TrainState:
        """A state whose optimizer state is flat already."""
        state = cls.__new__(cls)
        state.values, state.leaves, state.structure = values, leaves, structure
        return state

    @property
    def opt_state(self) -> Any:
        """The state of the optimizer, as optax structures it."""
        return jax.tree.unflatten(self.structure, self.leaves)

    def __repr__(self) -> str:
        return f"TrainState(values={self.values!r}, opt_state={self.opt_state!r})"


jax.tree_util.register_pytree_with_keys(
    TrainState,
    lambda state: (
        (
            (jax.tree_util.GetAttrKey("values"), state.values),
            (jax.tree_util.GetAttrKey("opt_state"), state.opt_state),
        ),
        None,
    ),
    lambda _, children: TrainState(*children),
)
