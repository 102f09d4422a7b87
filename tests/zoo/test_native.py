"""Linen models that nobody here wrote, with NNX's own layers in them: the same numbers."""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compare import assert_same
from flax import nnx
from zoo_runs import LINEN, LinenRun, linen_run

import linsey

if importlib.util.find_spec("transformers") is None:
    pytest.skip("the extra `zoo` is not installed", allow_module_level=True)

pytestmark = pytest.mark.zoo

NAMES = [entry.name for entry in LINEN]

# They change how an array is written down and no number; XLA drops them.
RELABELLING = {"reshape", "broadcast_in_dim", "squeeze", "expand_dims"}


def variables_of(graphdef: Any, *states: Any) -> Any:
    """The Linen variables that an emitted model holds."""
    return linsey.lower(nnx.merge(graphdef, *states)).emit("linen")[1]


def loss(output: Any) -> Any:
    """A number that depends on all that a call gives."""
    leaves = [leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in leaves)


@pytest.mark.parametrize("name", NAMES)
def test_eager(name: str) -> None:
    run = linen_run(name)
    expected, updates = run.apply(run.variables, run.args, run.kwargs)
    graphdef, state = run.program.emit("nnx")
    assert_same(variables_of(graphdef, state), run.variables)
    model = nnx.merge(graphdef, state)
    assert_same(run.call(model, run.args, run.kwargs), expected)
    after = linsey.lower(model).emit("linen")[1]
    assert_same({each: after[each] for each in updates}, updates)


@pytest.mark.parametrize("name", NAMES)
def test_jitted_with_gradients(name: str) -> None:
    run = linen_run(name)
    params, rest = run.variables["params"], dict(run.variables)
    del rest["params"]

    def source(params: Any, args: Any, kwargs: Any) -> Any:
        output, updates = run.apply({**rest, "params": params}, args, kwargs)
        return loss(output), (output, updates)

    graphdef, weights, others = nnx.split(nnx.merge(*run.program.emit("nnx")), nnx.Param, ...)

    def emitted(weights: Any, args: Any, kwargs: Any) -> Any:
        model = nnx.merge(graphdef, weights, others)
        output = run.call(model, args, kwargs)
        return loss(output), (output, nnx.state(model))

    grads, (expected, updates) = jax.jit(jax.grad(source, has_aux=True))(
        params, run.args, run.kwargs
    )
    found_grads, (found, state) = jax.jit(jax.grad(emitted, has_aux=True))(
        weights, run.args, run.kwargs
    )
    assert_same(found, expected)
    assert_same(variables_of(graphdef, found_grads, others)["params"], grads)
    after = variables_of(nnx.graphdef(nnx.merge(graphdef, state)), state)
    assert_same({each: after[each] for each in updates}, updates)


def operations(jaxpr: Any) -> Iterator[str]:
    """The names of all operations of a jaxpr and of those inside, without the relabelling ones."""
    for equation in jaxpr.eqns:
        if equation.primitive.name not in RELABELLING:
            yield equation.primitive.name
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from operations(inner)


@pytest.mark.parametrize("name", NAMES)
def test_operations(name: str) -> None:
    """XLA is given the same operations, as many of each kind, as by the source."""
    run = linen_run(name)
    graphdef, state = run.program.emit("nnx")

    def emitted(state: Any, args: Any, kwargs: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return run.call(model, args, kwargs), nnx.state(model)

    found = jax.make_jaxpr(emitted)(state, run.args, run.kwargs)
    expected = jax.make_jaxpr(run.apply)(run.variables, run.args, run.kwargs)
    assert Counter(operations(found.jaxpr)) == Counter(operations(expected.jaxpr))


def test_share() -> None:
    """Over the whole zoo, 95 of 100 leaf layers at least; what is hosted says why."""
    rows = [row for name in NAMES for row in linen_run(name).program.report() if row.is_layer]
    assert all(row.reason for row in rows if row.became != "native")
    assert sum(row.became == "native" for row in rows) >= 0.95 * len(rows)
