"""Modules hosted in the other API and called eagerly, against the modules themselves.

`empty Linen module` says what `Module.apply` itself costs: its rival does nothing but add 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import pytest
from bench_lowering import MLP as LinenMLP
from bench_lowering import Block as LinenBlock
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import linsey

TARGET = 1.3


class MLP(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(4)])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(64, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 64, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Train(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.norm(self.linear(x)))


class Linear(nnx.Linear):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        super().__init__(64, 64, rngs=rngs)


_STATE = ["batch_stats", "RngCount"]


def _nnx_in_linen(make: Any, x: Any, *, train: bool = False) -> harness.Case:
    model = make(rngs=nnx.Rngs(0))
    module, variables = linsey.to_linen(model)
    flax_module = bridge.to_linen(make)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    flax_variables = flax_module.init(keys, x)
    mutable: Any = _STATE if train else False

    def ours() -> Any:
        return module.apply(variables, x, mutable=mutable)

    def flax_bridge() -> Any:
        rngs = {"dropout": keys["dropout"]} if train else None
        return flax_module.apply(flax_variables, x, mutable=mutable, rngs=rngs)

    def check() -> None:
        expected = nnx.clone(model)(x)
        output = ours()
        harness.assert_equal(output[0] if train else output, expected)

    return harness.Case(
        ours=ours,
        rival=lambda: model(x),
        check=check,
        target=TARGET,
        others={"flax's ToLinen": flax_bridge},
    )


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


def _linen_in_nnx(module: nn.Module, x: Any, *, train: bool = False) -> harness.Case:
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = module.init(keys, x)
    model = linsey.to_nnx(module, x, variables=variables, native=False)
    flax_model = bridge.lazy_init(bridge.ToNNX(module, rngs=nnx.Rngs(**keys)), x)
    rngs = {"dropout": keys["dropout"]} if train else None
    mutable: Any = ["batch_stats"] if train else False

    def rival() -> Any:
        return module.apply(variables, x, rngs=rngs, mutable=mutable)

    def check() -> None:
        output = rival()
        expected = output[0] if train else output
        fresh = linsey.to_nnx(module, x, variables=variables, native=False)
        harness.assert_equal(fresh(x, rngs=rngs), expected)

    flax_rngs = nnx.Rngs(**keys) if train else None

    def flax_bridge() -> Any:
        return flax_model(x, rngs=flax_rngs, mutable=mutable)

    return harness.Case(
        ours=lambda: model(x, rngs=rngs),
        rival=rival,
        check=check,
        target=TARGET,
        others={"flax's ToNNX": flax_bridge},
    )


class _Empty(nn.Module):
    def __call__(self, x: Any) -> Any:
        return x + 1


def _apply_alone(x: Any) -> harness.Case:
    module = _Empty()
    return harness.Case(
        ours=lambda: module.apply({}, x),
        rival=lambda: x + 1,
        check=lambda: harness.assert_equal(module.apply({}, x), x + 1),
        target=None,
    )


CASES: dict[str, Callable[[], harness.Case]] = {
    "empty Linen module (no linsey)": lambda: _apply_alone(jnp.ones((8, 64))),
    "NNX in Linen: Linear": lambda: _nnx_in_linen(Linear, jnp.ones((8, 64))),
    "NNX in Linen: MLP, 4 layers": lambda: _nnx_in_linen(MLP, jnp.ones((8, 64))),
    "NNX in Linen: transformer block": lambda: _nnx_in_linen(Block, jnp.ones((2, 16, 64))),
    "NNX in Linen: BatchNorm, Dropout, train": lambda: _nnx_in_linen(
        Train, jnp.ones((8, 64)), train=True
    ),
    "Linen in NNX: Dense": lambda: _linen_in_nnx(nn.Dense(64), jnp.ones((8, 64))),
    "Linen in NNX: MLP, 5 layers": lambda: _linen_in_nnx(LinenMLP(), jnp.ones((8, 64))),
    "Linen in NNX: transformer block": lambda: _linen_in_nnx(LinenBlock(), jnp.ones((2, 16, 64))),
    "Linen in NNX: BatchNorm, Dropout, train": lambda: _linen_in_nnx(
        Scaled(), jnp.ones((8, 64)), train=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def bench_hosting(benchmark: Any, name: str) -> None:
    harness.under_pytest(benchmark, name, CASES[name](), rounds=9)


if __name__ == "__main__":
    harness.run("Hosted modules called eagerly, against the modules themselves", CASES)
