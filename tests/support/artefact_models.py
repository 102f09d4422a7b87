"""Models that another process can import, to load what a test has saved."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge


class Block(nn.Module):
    """Dense, statistics, a pytree, a key, a number, an empty array."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        self.variable("state", "key", lambda: jax.random.key(3))
        self.variable("state", "rbg", lambda: jax.random.split(jax.random.key(3, impl="rbg")))
        self.variable("state", "tree", lambda: {"a": jnp.arange(3), "b": (jnp.ones((2, 2)), None)})
        self.variable("state", "empty", lambda: jnp.ones((0, 2)))
        self.variable("state", "steps", lambda: 7)
        return x


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.one = nnx.Linear(8, 8, rngs=rngs)
        self.two = self.one
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.two(self.one(x)))


class Trainer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, tx: Any = None) -> None:
        self.model = Model(rngs)
        self.optimizer = nnx.Optimizer(self.model, tx or optax.adam(1e-2), wrt=nnx.Param)

    def step(self, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda model: jnp.sum(model(x) ** 2))(self.model)
        self.optimizer.update(self.model, grads)
        return loss


def biases(params: Any) -> Any:
    """Which parameters are biases."""
    return jax.tree.map(lambda leaf: leaf.ndim == 1, params)


class Rope:
    """A plain object, as layers hold them that are neither modules nor dataclasses."""

    made = 0

    def __init__(self, size: int, base: float = 10_000.0) -> None:
        Rope.made += 1
        self.size = size
        self.angles = 1.0 / base ** (np.arange(0, size, 2) / size)

    def __call__(self, x: Any) -> Any:
        sin, cos = jnp.sin(self.angles), jnp.cos(self.angles)
        one, two = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


class Turned(nn.Module):
    """Two layers that hold one plain object."""

    rope: Rope
    turn: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8)(self.rope(x))
        return x if self.turn is None else self.turn(x)


class TurnedNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, base: float = 10_000.0) -> None:
        self.rope = Rope(8, base)
        self.dense = nnx.Linear(8, 8, rngs=rngs)
        self.turn = functools.partial(self.rope)

    def __call__(self, x: Any) -> Any:
        return self.turn(self.dense(self.rope(x)))


class TurnedTwice(nn.Module):
    """Linen code around two NNX modules, each of which holds a plain object."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = bridge.to_linen(TurnedNNX, base=10.0)(x)
        return bridge.to_linen(TurnedNNX, base=100.0)(x)


class Sower(nn.Module):
    """Has collections for which flax has no class."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        self.variable("params_axes", "names", lambda: jnp.arange(2))
        self.sow("seen", "x", x)
        return nn.Dense(8)(x)


class Keyed(nn.Module):
    key: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + self.param("w", nn.zeros, (8,)) + jax.random.normal(self.key, (8,))


class Options(nn.Module):
    """Takes arrays and settings in one dict; computes a submodule's field while it is traced."""

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        x = inputs["x"] if inputs["train"] else 2 * inputs["x"]
        return Keyed(jax.random.split(inputs["key"])[0])(x)
