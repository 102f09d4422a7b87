"""What a train step takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from linsey.ir import SlotIndex, Values
from linsey.runtime.packing import Packing, packed, unpacked


@dataclass(frozen=True, slots=True)
class Form:
    """What the flat arrays of a train state are."""

    index: SlotIndex
    """The names of the slots, which come first."""
    structure: Any
    """The structure of the optimizer's state, whose arrays follow."""
    packing: Packing | None = None
    """Which of all these share buffers, or None."""


class TrainState:
    """What a train step takes and gives: values, and the state of the optimizer.

    A pytree. It is held flat, as the jit of a step takes it, and given its structure when it is
    asked for: a step pays for neither.

    Args:
        values: a value for every slot.
        opt_state: the state of the optimizer.
    """

    __slots__ = ("_arrays", "form", "stored")

    def __init__(self, values: Values, opt_state: Any) -> None:
        leaves, structure = jax.tree.flatten(opt_state)
        self.form = Form(values.index, structure)
        """What ``stored`` is."""
        self.stored: tuple[Any, ...] = (*values.arrays, *leaves)
        """What a step takes and gives back."""
        self._arrays: tuple[Any, ...] | None = None

    @classmethod
    def of_stored(cls, form: Form, stored: tuple[Any, ...]) -> TrainState:
        """A state that is flat already."""
        state = cls.__new__(cls)
        state.form, state.stored, state._arrays = form, stored, None
        return state

    def packed(self, packing: Packing | None) -> TrainState:
        """The same state with other slots in shared buffers."""
        if packing == self.form.packing:
            return self
        form = Form(self.form.index, self.form.structure, packing)
        stored = self.arrays if packing is None else packed(packing, self.arrays)
        return TrainState.of_stored(form, stored)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """A value for every slot, and the arrays of the optimizer's state."""
        if self.form.packing is None:
            return self.stored
        if self._arrays is None:
            self._arrays = unpacked(self.form.packing, self.stored)
        return self._arrays

    @property
    def values(self) -> Values:
        """A value for every slot."""
        return Values(self.form.index, self.arrays[: len(self.form.index.keys)])

    @property
    def opt_state(self) -> Any:
        """The state of the optimizer, as optax structures it."""
        leaves = self.arrays[len(self.form.index.keys) :]
        return jax.tree.unflatten(self.form.structure, leaves)

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
