"""Where the state of an optimizer lies on a mesh: as the parameters that it belongs to."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from linsey.ir import Values
from linsey.runtime.sharding import spec

Shape = tuple[int, ...]


def state_shardings(state: Any, params: Values, shardings: Values) -> Any:
    """The sharding of each array of an optimizer's state.

    Parameters are `Values`, and so are the parts of the state that follow them (``mu``, ``nu``, a
    trace, accumulated gradients), however deep they lie: they are found by their type and not by
    their names. In such a part, the state of a parameter lies

    * as the parameter, where it has its shape;
    * as the parameter without the axis that was averaged away, for Adafactor's ``v_row`` and
      ``v_col`` and for other state that lacks one axis, where there is no doubt which;
    * as the parameter after a leading axis that is not split, for a history of it (L-BFGS);
    * replicated otherwise, as everything outside such a part (counters, hyper-parameters, keys).

    Args:
        state: the state, or its shapes and dtypes.
        params: the parameters that the optimizer is for, or their shapes and dtypes.
        shardings: the sharding of these slots (there may be more), all on one mesh.

    Returns:
        A pytree of ``NamedSharding`` with the structure of the state.

    Example:
        >>> import jax, optax
        >>> from jax.sharding import PartitionSpec as P
        >>> from linsey.ir import SlotIndex
        >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> index = SlotIndex(("params/w",), ("params",), {})
        >>> params = Values(index, (jax.numpy.ones((4, 2)),))
        >>> shardings = Values(index, (NamedSharding(mesh, P(None, "model")),))
        >>> state = optax.trace(0.9).init(params)
        >>> tuple(state_shardings(state, params, shardings).trace["params/w"].spec)
        (None, 'model')
    """
    import optax

    if not shardings.arrays:
        raise ValueError("there are no shardings, and so no mesh")
    replicated = _on(shardings.arrays[0], ())

    def follow(part: Any, dropped: int | None = None) -> Any:
        """The shardings of a part; ``dropped``: which axis it lacks, 1 for the largest."""
        if isinstance(part, optax.FactoredState):
            return optax.FactoredState(
                count=spread(part.count),
                v_row=spread(part.v_row, 1),
                v_col=spread(part.v_col, 2),
                v=spread(part.v),
            )
        if not isinstance(part, Values):
            return replicated
        return Values(
            part.index,
            tuple(
                _of_slot(value, params[key], shardings[key], replicated, dropped)
                for key, value in part.items()
            ),
        )

    def is_part(node: Any) -> bool:
        return isinstance(node, Values | optax.FactoredState)

    def spread(tree: Any, dropped: int | None = None) -> Any:
        return jax.tree.map(lambda part: follow(part, dropped), tree, is_leaf=is_part)

    return spread(state)


def _of_slot(
    value: Any, param: Any, sharding: NamedSharding, replicated: NamedSharding, dropped: int | None
) -> Any:
    """The shardings of what a state holds for one slot: an array, a hole, or a pytree."""
    shapes = [_shape(leaf) for leaf in jax.tree.leaves(param)]
    leaves = jax.tree.leaves(value)
    treedef: Any = jax.tree.structure(value)  # its methods are not annotated
    if len(leaves) != len(shapes):  # of another structure: only one shape can be meant
        shapes = shapes[:1] * len(leaves) if len(shapes) == 1 else []
    if not shapes:
        return treedef.unflatten([replicated] * len(leaves))
    return treedef.unflatten(
        [
            _of_array(_shape(leaf), shape, sharding, dropped) or replicated
            for leaf, shape in zip(leaves, shapes, strict=True)
        ]
    )


def _shape(leaf: Any) -> Shape:
    return tuple(np.shape(leaf))


def _of_array(
    shape: Shape, param: Shape, sharding: NamedSharding, dropped: int | None
) -> NamedSharding | None:
    """The sharding of one array that belongs to a parameter; None: it follows none of its axes."""
    if shape == param:
        return sharding
    entries = (*sharding.spec, *[None] * (len(param) - len(sharding.spec)))
    if shape[1:] == param:
        return _on(sharding, (None, *entries))
    if len(shape) + 1 != len(param):
        return None
    axes = [axis for axis in range(len(param)) if _without(param, axis) == shape]
    if dropped is not None and len(param) > 1:
        # As optax's factored_dims: of the two largest axes, v_row lacks the largest.
        axes = [axis for axis in axes if axis == np.argsort(param)[-dropped]]
    found = {_without(entries, axis) for axis in axes}
    return _on(sharding, found.pop()) if len(found) == 1 else None


def _without(entries: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    return (*entries[:axis], *entries[axis + 1 :])


def _on(sharding: NamedSharding, entries: tuple[Any, ...]) -> NamedSharding:
    return NamedSharding(sharding.mesh, spec(entries), memory_kind=sharding.memory_kind)


def init_optimizer(optimizer: Any, params: Values, shardings: Values | None) -> Any:
    """The state of an optimizer, born sharded: no device ever holds more than its shards.

    Args:
        optimizer: an optax optimizer.
        params: the parameters that it is for.
        shardings: the sharding of each slot; None: there is no mesh.
    """
    if shardings is None or not shardings.arrays:
        return jax.jit(optimizer.init)(params)
    state = jax.eval_shape(optimizer.init, params)
    where = state_shardings(state, params, shardings)
    return jax.jit(optimizer.init, out_shardings=where)(params)
