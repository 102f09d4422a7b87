"""Forward calls and donated train steps against a bare `jax.jit` over flat lists of arrays.

The model has as many small slots as wanted, so that what is measured is the work per slot on the
host. The optimizer is SGD with momentum: twice as many arrays as slots go in and out. The bare step
is the same computation over flat tuples, which the caller keeps. Beside it: Linen's dict of
variables, `nnx.jit`, `nnx.cached_partial`, and flax's two bridges.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import linsey

TARGET = 1.1
SIZES = (4, 64, 256, 1024)
WIDTH = 8
X = jnp.linspace(-1.0, 1.0, WIDTH)
OPTIMIZER = optax.sgd(1e-3, momentum=0.9)


def _identity(key: Any, shape: tuple[int, int]) -> Any:
    return jnp.eye(*shape)


class LinenSlots(nn.Module):
    """As many small matrices as wanted: XLA compiles a step with 1,024 of them in seconds."""

    slots: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for number in range(self.slots):
            x = x @ self.param(f"w_{number:04}", _identity, (WIDTH, WIDTH))
        return x


class NNXSlots(nnx.Module):
    """The same in NNX."""

    def __init__(self, slots: int, rngs: Any = None) -> None:
        self.weights = nnx.List([nnx.Param(jnp.eye(WIDTH)) for _ in range(slots)])

    def __call__(self, x: Any) -> Any:
        for weight in self.weights:
            x = x @ weight[...]
        return x


def _loss(y: Any) -> Any:
    return jnp.mean(y**2)


class Stepper:
    """A step that keeps its state, as a training loop does; `fresh` begins again."""

    def __init__(
        self, step: Callable[[Any, Any], tuple[Any, Any]], init: Callable[[], Any]
    ) -> None:
        self._step, self._init, self._state = step, init, init()

    def __call__(self) -> Any:
        self._state, loss = self._step(self._state, X)
        return loss

    def fresh(self) -> Stepper:
        return Stepper(self._step, self._init)


def _plain_step(call: Callable[[Any, Any], Any], params: Any) -> Stepper:
    """A donated train step over a pytree of parameters."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, x: Any) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: _loss(call(p, x)))(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def init() -> Any:
        own = jax.tree.map(jnp.copy, params)
        return own, OPTIMIZER.init(own)

    return Stepper(step, init)


def _nnx_step(model: Any, *, cached: bool) -> Callable[[], Any]:
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: _loss(m(x)))(model)
        optimizer.update(model, grads)
        return loss

    if cached:
        kept = nnx.cached_partial(step, model, optimizer)
        return lambda: kept(X)
    return lambda: step(model, optimizer, X)


def _train_case(slots: int) -> harness.Case:
    module = LinenSlots(slots)
    variables = module.init(jax.random.key(0), X)
    program = linsey.lower(module, X, variables=variables)
    keys = program.values.keys()
    flat = tuple(program.values.arrays)

    def ours(**options: Any) -> Stepper:
        train = program.compile(**options).train(lambda model, x: _loss(model(x)), OPTIMIZER)
        return Stepper(train, lambda: train.init(values=program.values))

    def bare(arrays: tuple[Any, ...], x: Any) -> Any:
        named = {key.split("/")[1]: value for key, value in zip(keys, arrays, strict=True)}
        return module.apply({"params": named}, x)

    to_nnx = nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)), X)
    to_linen = nnx.bridge.to_linen(NNXSlots, slots)
    in_linen = to_linen.init(jax.random.key(0), X)
    rest = {name: tree for name, tree in in_linen.items() if name != "params"}

    one, rival, packed = ours(), _plain_step(bare, flat), ours(pack=True)

    def check() -> None:
        first, second, third = one.fresh(), rival.fresh(), packed.fresh()
        for _ in range(3):
            expected = second()
            harness.assert_equal(first(), expected)
            harness.assert_equal(third(), expected)

    return harness.Case(
        ours=one,
        rival=rival,
        check=check,
        target=TARGET,
        others={
            "pack=True": packed,
            "Linen dict": _plain_step(lambda p, x: module.apply(p, x), variables),
            "nnx.jit": _nnx_step(NNXSlots(slots), cached=False),
            "cached_partial": _nnx_step(NNXSlots(slots), cached=True),
            "flax ToNNX": _nnx_step(to_nnx, cached=False),
            "flax ToLinen": _plain_step(
                lambda p, x: to_linen.apply({"params": p, **rest}, x), in_linen["params"]
            ),
        },
    )


def _forward_case(slots: int) -> harness.Case:
    module = LinenSlots(slots)
    variables = module.init(jax.random.key(0), X)
    program = linsey.lower(module, X, variables=variables)
    values = program.values
    exe, packed = program.compile(), program.compile(pack=True)
    stored = packed.place(values)
    keys, flat = values.keys(), tuple(values.arrays)

    @jax.jit
    def bare(arrays: tuple[Any, ...], x: Any) -> Any:
        named = {key.split("/")[1]: value for key, value in zip(keys, arrays, strict=True)}
        return module.apply({"params": named}, x)

    linen = jax.jit(module.apply)
    model = NNXSlots(slots)
    called = nnx.jit(lambda model, x: model(x))
    cached = nnx.cached_partial(called, model)
    to_nnx = nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)), X)
    to_linen = nnx.bridge.to_linen(NNXSlots, slots)
    in_linen = to_linen.init(jax.random.key(0), X)
    linen_called = jax.jit(to_linen.apply)

    def check() -> None:
        expected = bare(flat, X)
        harness.assert_equal(exe(values, X)[0], expected)
        harness.assert_equal(packed(stored, X)[0], expected)

    return harness.Case(
        ours=lambda: exe(values, X)[0],
        rival=lambda: bare(flat, X),
        check=check,
        target=TARGET,
        others={
            "pack=True": lambda: packed(stored, X)[0],
            "Linen dict": lambda: linen(variables, X),
            "nnx.jit": lambda: called(model, X),
            "cached_partial": lambda: cached(X),
            "flax ToNNX": lambda: called(to_nnx, X),
            "flax ToLinen": lambda: linen_called(in_linen, X),
        },
    )


CASES: dict[str, Callable[[], harness.Case]] = {
    f"{what}, {slots} slots": functools.partial(make, slots)
    for what, make in (("forward", _forward_case), ("train step", _train_case))
    for slots in SIZES
}


@pytest.mark.parametrize("name", CASES)
def bench_train(benchmark: Any, name: str) -> None:
    harness.under_pytest(benchmark, name, CASES[name](), rounds=9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of the names of cases")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    chosen = {name: make for name, make in CASES.items() if options.only in name}
    harness.run("Calls and train steps by slots", chosen, rounds=options.rounds)
