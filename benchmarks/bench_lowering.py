"""Lowering a Linen module against `jax.eval_shape` of its init."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import linsey

TARGET = 1.3


class MLP(nn.Module):
    depth: int = 4
    width: int = 128

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class ResidualBlock(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        y = nn.Conv(self.width, (3, 3), (self.stride, self.stride), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(self.width, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not train)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), (self.stride, self.stride), use_bias=False)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        for width, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
            x = ResidualBlock(width, stride)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class Block(nn.Module):
    heads: int = 4

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, deterministic=not train)(y)
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dropout(0.1, deterministic=not train)(nn.Dense(x.shape[-1])(nn.gelu(y)))


class Transformer(nn.Module):
    layers: int = 6
    width: int = 64

    @nn.compact
    def __call__(self, tokens: Any, train: bool = False) -> Any:
        x = nn.Embed(100, self.width)(tokens)
        for _ in range(self.layers):
            x = Block()(x, train)
        return nn.Dense(100)(nn.LayerNorm()(x))


class _Step(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return Block()(x), None


class ScannedTransformer(nn.Module):
    layers: int = 6
    width: int = 64

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(100, self.width)(tokens)
        scan = nn.scan(
            nn.remat(_Step),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scan()(x, None)
        return nn.Dense(100)(nn.LayerNorm()(x))


class Wide(nn.Module):
    layers: int = 300

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return sum(nn.Dense(8)(x) for _ in range(self.layers))


def _case(make: Callable[[], nn.Module], x: Any) -> harness.Case:
    key = jax.random.key(0)

    def rival() -> Any:
        module = make()
        # A function of its own each time: jax would not trace `module.init` twice.
        return jax.eval_shape(lambda key, x: module.init(key, x), key, x)

    def check() -> None:
        expected = {
            "/".join(str(part.key) for part in path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(rival())
        }
        slots = linsey.lower(make(), x).graph.slots
        found = {slot.key: f"{slot.type.dtype}{list(slot.type.shape)}" for slot in slots}
        assert found == expected

    return harness.Case(
        ours=lambda: linsey.lower(make(), x), rival=rival, check=check, target=TARGET
    )


_TOKENS = jax.ShapeDtypeStruct((2, 16), jnp.int32)
CASES: dict[str, Callable[[], harness.Case]] = {
    "MLP, 5 layers": lambda: _case(MLP, jax.ShapeDtypeStruct((8, 64), jnp.float32)),
    "ResNet, 6 blocks": lambda: _case(ResNet, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)),
    "transformer, 6 layers": lambda: _case(Transformer, _TOKENS),
    "transformer, 6 layers, nn.scan": lambda: _case(ScannedTransformer, _TOKENS),
    "300 Dense side by side": lambda: _case(Wide, jax.ShapeDtypeStruct((2, 8), jnp.float32)),
}


@pytest.mark.parametrize("name", CASES)
def bench_lowering(benchmark: Any, name: str) -> None:
    harness.under_pytest(benchmark, name, CASES[name](), rounds=9)


if __name__ == "__main__":
    harness.run("linsey.lower against jax.eval_shape(module.init)", CASES, rounds=21)
