"""A compiled program's call against a bare `jax.jit` over the same flat tuple of arrays.

Both run the same traced computation, made by the same runner, so what differs is Python per call.
Where the call has state, the bare function returns what the executable does: the output, and the
whole flat tuple for the next call. Beside it stands a bare function that returns the changed arrays
alone and leaves putting them in place to its caller.
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

TARGET = 1.2


class LinenSlots(nn.Module):
    """As many scalars as wanted; half of them counters where the call has state."""

    slots: int
    stateful: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        states = self.slots // 2 if self.stateful else 0
        for number in range(self.slots - states):
            x = x + self.param(f"w_{number}", nn.initializers.ones, ())
        for number in range(states):
            count = self.variable("batch_stats", f"n_{number}", jnp.zeros, ())
            if not self.is_initializing():
                count.value = count.value + 1.0
        return x


class NNXSlots(nnx.Module):
    """The same in NNX."""

    def __init__(self, slots: int, stateful: bool) -> None:
        states = slots // 2 if stateful else 0
        self.weights = nnx.List([nnx.Param(jnp.ones(())) for _ in range(slots - states)])
        self.counts = nnx.List([nnx.BatchStat(jnp.zeros(())) for _ in range(states)])

    def __call__(self, x: Any) -> Any:
        for weight in self.weights:
            x = x + weight[...]
        for count in self.counts:
            count[...] = count[...] + 1.0
        return x


def _case(dialect: str, slots: int, stateful: bool) -> harness.Case:
    x = jnp.ones((8,))
    if dialect == "linen":
        program = linsey.lower(LinenSlots(slots, stateful), x).init(0)
    else:
        program = linsey.lower(NNXSlots(slots, stateful))
    values = program.values
    assert values is not None
    assert len(values) == slots
    exe = program.compile()
    runner = plugins.load("linsey.backends", dialect).runner(program.graph)

    def changed_only(arrays: tuple[Any, ...], x: Any) -> Any:
        called = runner(arrays, (x,), {}, method=None, rngs=None, mutable=None)
        pairs = zip(arrays, called.arrays, strict=True)
        return called.output, tuple(new for old, new in pairs if new is not old)

    def bare(arrays: tuple[Any, ...], x: Any) -> Any:
        called = runner(arrays, (x,), {}, method=None, rngs=None, mutable=None)
        return called.output, tuple(called.arrays)

    jitted, arrays = jax.jit(changed_only), values.arrays
    rival = jax.jit(bare) if stateful else jitted

    def check() -> None:
        output, after = exe(values, x)
        expected, changed = jitted(arrays, x)
        harness.assert_equal(output, expected)
        new = [b for a, b in zip(arrays, after.arrays, strict=True) if a is not b]
        harness.assert_equal(tuple(new), changed)
        assert len(changed) == (slots // 2 if stateful else 0)

    return harness.Case(
        ours=lambda: exe(values, x)[0],
        rival=lambda: rival(arrays, x)[0],
        check=check,
        target=TARGET,
        others={"bare, changed only": lambda: jitted(arrays, x)[0]} if stateful else {},
    )


def _cases() -> dict[str, Callable[[], harness.Case]]:
    cases: dict[str, Callable[[], harness.Case]] = {}
    for dialect in ("linen", "nnx"):
        for slots in (4, 64, 1024):
            for stateful in (False, True):
                change = f"{slots // 2 if stateful else 0} change"
                cases[f"{dialect}, {slots} slots, {change}"] = (
                    lambda d=dialect, n=slots, s=stateful: _case(d, n, s)
                )
    return cases


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def bench_call(benchmark: Any, name: str) -> None:
    harness.under_pytest(benchmark, name, CASES[name](), rounds=9)


if __name__ == "__main__":
    harness.run("exe(values, x) against a bare jax.jit", CASES, rounds=51)
