"""Models that another process can import, to load what a test has saved."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx


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
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.model = Model(rngs)
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-2), wrt=nnx.Param)

    def step(self, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda model: jnp.sum(model(x) ** 2))(self.model)
        self.optimizer.update(self.model, grads)
        return loss
