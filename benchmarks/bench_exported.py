"""Exported programs beside the source they came from: time of a call, of a step, and of loading.

Both are executables of linsey; they take turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from flax import linen as nn

import linsey


class Block(nn.Module):
    """A transformer block."""

    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        h = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(h))


class Model(nn.Module):
    """A few of them."""

    width: int
    blocks: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.blocks):
            x = Block(self.width)(x)
        return x


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main(width: int, blocks: int, rounds: int) -> None:
    """Prints medians and ratios."""
    x = jax.random.normal(jax.random.key(0), (4, 64, width))
    program = linsey.lower(Model(width, blocks), x).init(0)
    path = Path(tempfile.mkdtemp()) / "model.linsey"
    plain = _seconds(lambda: program.save(path) or 0)
    saved = _seconds(lambda: program.save(path, export="__call__", dynamic="b, t, _") or 0)
    print(f"save {plain:.2f} s, with the export {saved:.2f} s", end=", ")
    loaded = linsey.load(path, trust=["__main__"])
    print(f"the program has {loaded.exports[0].nbytes / 1024:.0f} KiB")
    exes = {"source": loaded.compile(exported=False), "exported": loaded.compile()}
    values: Any = loaded.values
    values = linsey.Values(values.index, values.arrays)

    def loss(model: Any, x: Any) -> Any:
        return (model(x) ** 2).mean()

    times: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in exes} for what in ("first call", "call", "first step", "step")
    }
    states, steps = {}, {}
    for name, exe in exes.items():
        steps[name] = exe.train(loss, optax.adam(1e-3))
        states[name] = steps[name].init(values=values)
        times["first call"][name].append(_seconds(lambda exe=exe: exe(values, x)[0]))

    def step(name: str) -> Any:
        states[name], value = steps[name](states[name], x)
        return value

    for name in exes:
        times["first step"][name].append(_seconds(lambda name=name: step(name)))
    for _ in range(rounds):
        for name, exe in exes.items():
            times["call"][name].append(_seconds(lambda exe=exe: exe(values, x)[0]))
            times["step"][name].append(_seconds(lambda name=name: step(name)))
    for what, found in times.items():
        source, exported = (statistics.median(found[name]) for name in ("source", "exported"))
        print(
            f"  {what}: source {source:.4f} s, exported {exported:.4f} s: {exported / source:.2f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    main(options.width, options.blocks, options.rounds)
