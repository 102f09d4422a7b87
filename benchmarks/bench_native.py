"""Linen models emitted with NNX's own layers inside, against the models themselves.

Three of each: an eager call, a trace, and a call under `jax.jit`. `hosted` is the same model,
emitted with ``native=False``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import pytest
from bench_lowering import Block
from flax import linen as nn
from flax import nnx

import linsey

TARGET = 1.3


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(4):
            x = nn.relu(nn.Dense(64)(x))
        return x


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width in (8, 16, 16):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Model:
    """A model in both forms.

    Args:
        module: the Linen model.
        x: its input.
        mutable: the collections that a call changes.
    """

    def __init__(self, module: nn.Module, x: Any, mutable: tuple[str, ...] = ()) -> None:
        self.x = x
        self._module = module
        self._mutable: Any = list(mutable) or False
        self.variables = module.init(jax.random.key(0), x)
        self.native = linsey.to_nnx(module, x, variables=self.variables)
        self.hosted = linsey.to_nnx(module, x, variables=self.variables, native=False)

    def apply(self, variables: Any, x: Any) -> Any:
        """Output and changed collections of the Linen model."""
        made = self._module.apply(variables, x, mutable=self._mutable)
        return made if self._mutable else (made, {})

    def pure(self, model: Any) -> tuple[Any, Any]:
        """An emitted model as a function of its state, and that state."""
        graphdef, state = nnx.split(model)

        def call(state: Any, x: Any) -> Any:
            made = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
            y = made(x)
            return y, nnx.state(made, nnx.Not(nnx.Param))

        return call, state

    def check(self) -> None:
        """Raises unless both forms give the same."""
        expected = self.apply(self.variables, self.x)[0]
        harness.assert_equal(nnx.clone(self.native)(self.x), expected)
        call, state = self.pure(self.native)
        expected = jax.jit(self.apply)(self.variables, self.x)[0]
        harness.assert_equal(jax.jit(call)(state, self.x)[0], expected)


def _eager(model: Model) -> harness.Case:
    return harness.Case(
        ours=lambda: model.native(model.x),
        rival=lambda: model.apply(model.variables, model.x)[0],
        check=model.check,
        target=TARGET,
        others={"hosted": lambda: model.hosted(model.x)},
    )


def _trace(model: Model) -> harness.Case:
    native, state = model.pure(model.native)
    hosted, hosted_state = model.pure(model.hosted)

    def trace(function: Any, *args: Any) -> Callable[[], Any]:
        # A function of its own each time, which jit has not seen.
        def once() -> None:
            jax.jit(lambda *given: function(*given)).trace(*args)

        return once

    return harness.Case(
        ours=trace(native, state, model.x),
        rival=trace(model.apply, model.variables, model.x),
        check=model.check,
        target=TARGET,
        others={"hosted": trace(hosted, hosted_state, model.x)},
    )


def _jitted(model: Model) -> harness.Case:
    native, state = model.pure(model.native)
    ours, rival = jax.jit(native), jax.jit(model.apply)
    hosted, hosted_state = model.pure(model.hosted)
    other = jax.jit(hosted)
    return harness.Case(
        ours=lambda: ours(state, model.x),
        rival=lambda: rival(model.variables, model.x),
        check=model.check,
        target=None,
        others={"hosted": lambda: other(hosted_state, model.x)},
    )


MODELS: dict[str, Callable[[], Model]] = {
    "MLP of 4 Dense": lambda: Model(MLP(), jnp.ones((8, 64))),
    "transformer block": lambda: Model(Block(), jnp.ones((2, 16, 64))),
    "CNN with BatchNorm": lambda: Model(CNN(), jnp.ones((4, 16, 16, 3)), ("batch_stats",)),
}
WAYS = {"eager": _eager, "trace": _trace, "jitted": _jitted}
CASES: dict[str, Callable[[], harness.Case]] = {
    f"{way}: {name}": lambda make=make, case=case: case(make())
    for way, case in WAYS.items()
    for name, make in MODELS.items()
}


@pytest.mark.parametrize("name", CASES)
def bench_native(benchmark: Any, name: str) -> None:
    harness.under_pytest(benchmark, name, CASES[name](), rounds=9)


if __name__ == "__main__":
    harness.run("Linen models with NNX's layers inside, against the models themselves", CASES)
