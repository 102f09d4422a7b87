"""Values that the two APIs keep apart or joined go over and come back as they were."""

import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

from linsey._layers import rows
from linsey.backends.nnx.native import Part

JOINED = [
    (name, place)
    for row in rows("nnx").values()
    for name, place in row.slots.items()
    if place.parts
]


def test_the_kernels_of_an_optimized_lstm_are_joined_as_nnx_joins_them() -> None:
    """With the values that the map gives, the two cells compute the same, run eagerly."""
    cell, x = nn.OptimizedLSTMCell(3), jnp.ones((2, 4))
    carry = (jnp.full((2, 3), 0.3), jnp.full((2, 3), -0.2))
    variables = cell.init(nnx.Rngs(0).params(), carry, x)
    source, target = (rows(name) for name in ("linen", "nnx"))
    other = nnx.OptimizedLSTMCell(4, 3, rngs=nnx.Rngs(1))
    for place in target[nnx.OptimizedLSTMCell].slots.values():
        values = []
        for name in place.parts:
            value = variables["params"]
            for key in source[nn.OptimizedLSTMCell].slots[name].path:
                value = value[key]
            values.append(value)
        part = Part(path=place.path, slots=(0, 1, 2, 3), axis=values[0].ndim - 1, sizes=(3,) * 4)
        holder = getattr(other, str(place.path[0]))
        getattr(holder, str(place.path[1])).set_value(part.join(values))
    assert_same(other(carry, x), cell.apply(variables, carry, x))


@pytest.mark.parametrize("stacked", [None, 0, 1], ids=str)
@pytest.mark.parametrize("name", [name for name, _ in JOINED])
def test_joined_values_come_apart_again(name: str, stacked: int | None) -> None:
    place = dict(JOINED)[name]
    random = np.random.default_rng(0)
    shape = [3] if name.endswith("bias") else [4, 3]
    if stacked is not None:
        shape.insert(min(stacked, len(shape) - 1), 5)
    values = [random.standard_normal(shape).astype(np.float32) for _ in place.parts]
    part = Part(path=place.path, slots=(0, 1, 2, 3), axis=len(shape) - 1, sizes=(3,) * len(values))
    assert_same(part.split(part.join(values)), [jnp.asarray(value) for value in values])
