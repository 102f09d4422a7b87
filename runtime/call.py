"""One traced call under jit, with donation and with shardings."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh

from linsey.runtime import sharding
from linsey.runtime.inputs import check_fit

Traced = Callable[[tuple[Any, ...], tuple[Any, ...], Any], tuple[Any, dict[int, Any] | None]]
"""Slots, arrays of the arguments, and keys -> the output, and the slots that changed."""


class Call:
    """A call whose jit donates the slots that change, and knows where slots lie.

    The Python code is traced once: an inner jit tells which slots change, and the outer one, which
    donates them, gets the trace that jax kept. It is inlined there, so that what is compiled is
    what a plain jit compiles.

    Args:
        traced: the call.
        arrays: values of the slots, or their shapes and dtypes.
        dynamic: arrays of the arguments, or their shapes and dtypes.
        keys: the keys of the call.
        donate: whether the memory of the slots that change may be reused.
        mesh: the mesh, or None.
        slots: the sharding of each slot, or None.
        inputs: the sharding of each of ``dynamic``, None for one that stays where it is.
    """

    def __init__(
        self,
        traced: Traced,
        arrays: tuple[Any, ...],
        dynamic: tuple[Any, ...],
        keys: Any,
        *,
        donate: bool,
        mesh: Mesh | None = None,
        slots: tuple[Any, ...] | None = None,
        inputs: tuple[Any, ...] | None = None,
    ) -> None:
        self._inner = cast(Any, jax.jit(traced, inline=True))  # its eval_shape is not annotated
        self._donate = donate
        self._mesh = mesh
        self._slots = slots
        self._inputs = inputs
        self._count = len(arrays)
        self._changed: tuple[int, ...] = ()
        known = arrays if slots is None else tuple(map(_typed, arrays, slots))
        self._arrange(self._inner.eval_shape(known, dynamic, keys)[1])

    def _arrange(self, changed: Mapping[int, Any] | None) -> None:
        """Makes the outer jit for a call that changes these slots."""
        self._changed = tuple(sorted({*self._changed, *(changed or ())}))
        kept = tuple(sorted(set(range(self._count)) - set(self._changed)))
        order = {slot: position for position, slot in enumerate((*self._changed, *kept))}
        places = tuple(order[slot] for slot in range(self._count))
        self._take, self._leave, self._merge = map(_getter, (self._changed, kept, places))

        def outer(given: tuple[Any, ...], rest: tuple[Any, ...], dynamic: Any, keys: Any) -> Any:
            together = (*given, *rest)
            arrays = self._merge(together)
            if self._mesh is not None and sharding.is_explicit(self._mesh):
                arrays = _resharded(arrays, self._slots or ())
                dynamic = _resharded(dynamic, self._inputs or (None,) * len(dynamic))
            output, new = self._inner(arrays, dynamic, keys)
            more = set(new or ()) - set(self._changed)
            if more:
                raise _MoreChanged(dict.fromkeys(more))
            return output, tuple((new or {}).get(slot, arrays[slot]) for slot in self._changed)

        options: dict[str, Any] = {"donate_argnums": 0} if self._donate else {}
        if self._slots is not None:
            slots = self._slots
            inputs = self._inputs
            if inputs is None or all(each is None for each in inputs):
                inputs = None
            options["in_shardings"] = (self._take(slots), self._leave(slots), inputs, None)
            options["out_shardings"] = (None, self._take(slots))
        self._jitted = jax.jit(outer, **options)

    def __call__(self, arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
        """The output, and the slots afterwards: the very tuple where none changes."""
        rest = self._leave(arrays)
        try:
            output, changed = self._jitted(self._take(arrays), rest, dynamic, keys)
        except _MoreChanged as more:  # other shapes than before
            self._arrange(more.slots)
            return self(arrays, dynamic, keys)
        except ValueError:
            placed = self._placed(arrays, dynamic, keys)
            if placed is None:
                raise
            return self(*placed)
        return output, self._merge((*changed, *rest)) if changed else arrays

    def _placed(self, arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
        """What was passed, moved to where it belongs; None when all of it lay right."""
        if self._slots is None or self._mesh is None:
            return None
        wanted = self._inputs or (None,) * len(dynamic)
        for value, where in zip(dynamic, wanted, strict=True):
            if where is not None:
                check_fit(value, where)
        before = (arrays, dynamic, keys)
        put = sharding.put(arrays, self._slots), sharding.put(dynamic, wanted), keys
        after = sharding.near(put, self._mesh)
        leaves = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        return None if all(old is new for old, new in leaves) else after

    def lower(self, arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
        """The call lowered and not compiled, a `jax.stages.Lowered`."""
        return self._jitted.lower(self._take(arrays), self._leave(arrays), dynamic, keys)


class PlainCall:
    """The same with neither donation nor shardings: only what changes is an output.

    Args:
        traced: the call.
    """

    def __init__(self, traced: Traced) -> None:
        self.jitted = jax.jit(traced)

    def __call__(self, arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
        """See `Call`."""
        output, changed = self.jitted(arrays, dynamic, keys)
        return output, updated(arrays, changed) if changed else arrays

    def lower(self, arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
        """See `Call`."""
        return self.jitted.lower(arrays, dynamic, keys)


def updated(arrays: tuple[Any, ...], changed: Mapping[int, Any]) -> tuple[Any, ...]:
    """Values with those that changed in their places."""
    after = list(arrays)
    for slot, value in changed.items():
        after[slot] = value
    return tuple(after)


def changes(old: Sequence[Any], new: Sequence[Any]) -> dict[int, Any]:
    """The values that are not the very objects they were, by position."""
    return {
        position: after
        for position, (before, after) in enumerate(zip(old, new, strict=True))
        if after is not before
    }


class _MoreChanged(Exception):
    """A trace changes slots that an earlier one, for other shapes, did not."""

    def __init__(self, slots: dict[int, None]) -> None:
        super().__init__()
        self.slots = slots


def _getter(slots: tuple[int, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    if len(slots) > 1:
        return operator.itemgetter(*slots)
    return lambda arrays: tuple(arrays[slot] for slot in slots)


def _typed(value: Any, where: Any) -> Any:
    """A value as shape, dtype and sharding."""
    make: Any = jax.ShapeDtypeStruct  # its constructor is not annotated
    return jax.tree.map(
        lambda leaf: (
            make(leaf.shape, leaf.dtype, sharding=where)
            if hasattr(leaf, "shape") and not isinstance(leaf, jax.core.Tracer)
            else leaf
        ),
        value,
    )


def _resharded(values: tuple[Any, ...], wanted: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values with the shardings in their types, as explicit axes need it."""
    reshard: Any = jax.sharding.reshard  # not annotated
    return tuple(
        value if where is None else reshard(value, where)
        for value, where in zip(values, wanted, strict=True)
    )
