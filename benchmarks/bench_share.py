"""Tracing and lowering with layers of equal structure traced once, against the source API.

A stack of unrolled pre-norm transformer blocks, in Linen and in NNX, is traced and lowered by the
source API, by linsey, and by linsey with shared traces; then its gradient is. Nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import linsey
from linsey import plugins

WIDTH = 16


class LinenBlock(nn.Module):
    """Attention and an MLP, each after a norm and beside a residual."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y, y)
        y = nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(y))


class LinenStack(nn.Module):
    """Blocks one after the other."""

    depth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.depth):
            x = LinenBlock()(x)
        return nn.LayerNorm()(x)


class NNXBlock(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.second_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(self.second_norm(x))))


class NNXStack(nnx.Module):
    """Blocks one after the other."""

    def __init__(self, depth: int, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _case(dialect: str, depth: int, gradient: bool) -> harness.Case:
    x = jax.random.normal(jax.random.key(0), (2, 8, WIDTH))
    if dialect == "linen":
        source: Any = LinenStack(depth)
        program = linsey.lower(source, x).init(0)
        given: Any = source.init(jax.random.key(0), x)
        api: Callable[..., Any] = source.apply
    else:
        source = NNXStack(depth, nnx.Rngs(0))
        program = linsey.lower(source)
        graphdef, given = nnx.split(source)

        def api(state: Any, x: Any) -> Any:
            return nnx.merge(graphdef, state)(x)

    assert program.values is not None
    arrays = program.values.arrays
    backend = plugins.load("linsey.backends", dialect)

    def running(share: bool) -> Callable[..., Any]:
        runner = backend.runner(program.graph)
        runner.share_traces = share

        def run(arrays: Any, x: Any) -> Any:
            return runner(arrays, (x,), {}, method=None, rngs=None, mutable=None).output

        return run

    def jitted(function: Callable[..., Any]) -> Any:
        fresh = jax.jit(lambda *given: function(*given))  # traced anew each time
        if not gradient:
            return fresh
        return jax.jit(jax.grad(lambda *given: jnp.sum(jnp.sin(fresh(*given)))))

    shared, plain = running(True), running(False)

    def check() -> None:
        harness.assert_equal(jitted(shared)(arrays, x), jitted(plain)(arrays, x))

    return harness.Case(
        ours=lambda: jitted(shared).lower(arrays, x) and None,
        rival=lambda: jitted(api).lower(given, x) and None,
        check=check,
        target=0.25 if depth == 48 else None,
        others={"not shared": lambda: jitted(plain).lower(arrays, x) and None},
    )


CASES: dict[str, Callable[[], harness.Case]] = {
    f"{dialect}, {depth} blocks, {'gradient' if gradient else 'forward'}": (
        lambda d=dialect, n=depth, g=gradient: _case(d, n, g)
    )
    for dialect in ("linen", "nnx")
    for depth, gradient in ((12, False), (48, False), (12, True))
}


@pytest.mark.parametrize("name", CASES)
def bench_share(benchmark: Any, name: str) -> None:
    harness.under_pytest(benchmark, name, CASES[name](), rounds=3)


if __name__ == "__main__":
    harness.run("Trace and lower with shared traces, against the source API", CASES, rounds=5)
