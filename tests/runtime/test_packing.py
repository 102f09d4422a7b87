"""pack=True: fewer arrays, the same numbers, wherever the program is called."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_same
from flax import linen as nn

import linsey
from linsey.runtime.packing import PackedValues

X = np.sin(np.arange(24, dtype=np.float32)).reshape(8, 3)
KEYS = {"dropout": jax.random.key(7)}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            x = nn.Dense(4)(x)
            x = nn.BatchNorm(use_running_average=False)(x)
            x = nn.Dropout(0.2, deterministic=False)(nn.gelu(x))
        big = self.param("big", nn.initializers.normal(), (4, 1 << 13))
        return x @ big[:, :5]


PROGRAM = linsey.lower(Net(), X, rngs={"params": 0, **KEYS})


def loss(model: Any, x: Any) -> Any:
    return jnp.mean((model(x) - 1.0) ** 2)


def test_small_slots_share_buffers_and_large_ones_do_not() -> None:
    plain, packed = PROGRAM.compile().init(0), PROGRAM.compile(pack=True).init(0)
    assert isinstance(packed, PackedValues)
    # The large one, and a buffer for each collection.
    assert len(jax.tree.leaves(packed)) == 3 < len(jax.tree.leaves(plain))
    assert packed.keys() == plain.keys()
    for key, value in plain.items():
        assert_same(packed[key], value)
    assert_same(packed.select("batch_stats"), plain.select("batch_stats"))


@pytest.mark.parametrize("donate", [False, True])
def test_calls(donate: bool) -> None:
    plain, packed = PROGRAM.compile(donate=donate), PROGRAM.compile(donate=donate, pack=True)
    values, stored = plain.init(0), packed.init(0)
    for _ in range(3):
        y, values = plain(values, X, rngs=KEYS)
        z, stored = packed(stored, X, rngs=KEYS)
        assert_same(z, y)
        assert isinstance(stored, PackedValues)
    for key, value in values.items():
        assert_same(stored[key], value)


def _in_jit(exe: Any) -> Any:
    return jax.jit(lambda values: exe(values, X, rngs=KEYS))(exe.init(0))


def _in_scan(exe: Any) -> Any:
    def body(values: Any, _: Any) -> Any:
        y, values = exe(values, X, rngs=KEYS)
        return values, y

    return jax.jit(lambda values: jax.lax.scan(body, values, None, length=3)[::-1])(exe.init(0))


def _gradients(exe: Any) -> Any:
    (value, _), grads, values = jax.jit(exe.value_and_grad(loss))(exe.init(0), X, rngs=KEYS)
    return (value, grads), values


@pytest.mark.parametrize("run", [_in_jit, _in_scan, _gradients])
def test_inside_a_trace(run: Callable[[Any], Any]) -> None:
    y, values = run(PROGRAM.compile())
    z, stored = run(PROGRAM.compile(pack=True))
    assert_same(z, y)
    for key, value in values.items():
        assert_same(stored[key], value)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_train_steps(accumulate: int) -> None:
    found = []
    for pack in (False, True):
        exe = PROGRAM.compile(pack=pack)
        step = exe.train(loss, optax.adamw(1e-2), accumulate=accumulate)
        state, losses = step.init(0), []
        for _ in range(3):
            state, value = step(state, X, rngs=KEYS)
            losses.append(value)
        found.append((losses, dict(state.values.items()), jax.tree.leaves(state.opt_state)))
        count = len(state.stored)
    assert_same(found[1], found[0])
    assert count < 10 < len(jax.tree.leaves(state))


def test_values_that_are_not_numbers_do_not_stop_a_step() -> None:
    """What keeps the call apart from the packing looks at a value, and must not depend on it."""
    exe = PROGRAM.compile(pack=True)
    values = exe.init(0)
    broken = exe.place(jax.tree.map(lambda leaf: leaf * jnp.nan, values))
    y, after = exe(broken, X, rngs=KEYS)
    assert np.isnan(y).all()
    mean = after["batch_stats/BatchNorm_0/mean"]
    assert np.isnan(mean).all()


class Quantised(nn.Module):
    """Slots that cannot be packed: a pytree, an empty array, whole numbers."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        made = {"q": jnp.ones((3, 2), jnp.int8), "scale": jnp.full((2,), 0.5)}
        tree = self.variable("quantised", "kernel", lambda: made)
        empty = self.variable("quantised", "rest", lambda: jnp.zeros((0,)))
        counts = [self.variable("counts", f"n_{i}", jnp.zeros, (), jnp.int32) for i in range(2)]
        if not self.is_initializing():
            for count in counts:
                count.value += 1
        return x @ tree.value["q"] * tree.value["scale"] + empty.value.sum()


def test_slots_that_are_not_packed() -> None:
    program = linsey.lower(Quantised(), X)
    plain, packed = program.compile(), program.compile(pack=True)
    y, values = plain(plain.init(0), X)
    z, stored = packed(packed.init(0), X)
    assert_same(z, y)
    assert_same(dict(stored.items()), dict(values.items()))
