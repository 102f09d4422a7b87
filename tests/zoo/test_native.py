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
from zoo_runs import LINEN, linen_run

import linsey

if importlib.util.find_spec("transformers") is None:
    pytest.skip("the extra `zoo` is not installed", allow_module_level=True)

pytestmark = pytest.mark.zoo

NAMES = [entry.name for entry in LINEN]

# They say how an array is laid out, and compute nothing.
RELABELLING = {"reshape", "broadcast_in_dim", "squeeze"}


def variables_of(graphdef: Any, *states: Any) -> Any:
    """The Linen variables that an emitted model holds."""
    return linsey.lower(nnx.merge(graphdef, *states)).emit("linen")[1]


def loss(output: Any) -> Any:
    """A number that depends on all that a call gives."""
    leaves = [leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in leaves)


@pytest.mark.parametrize("name", NAMES)
def test_eager_calls(name: str) -> None:
    run = linen_run(name)
    expected, updates = run.apply(run.variables, run.args, run.kwargs)
    for native in (True, False):
        graphdef, state = run.program.emit("nnx", native=native)
        assert_same(variables_of(graphdef, state), run.variables)
        model = nnx.merge(graphdef, state)
        assert_same(run.call(model, run.args, run.kwargs), expected)
        after = linsey.lower(model).emit("linen")[1]
        assert_same({each: after[each] for each in updates}, updates)


@pytest.mark.parametrize("name", NAMES)
def test_jitted_gradients(name: str) -> None:
    """With the output and the state after the call."""
    run = linen_run(name)

    def source(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        output, updates = run.apply({**rest, "params": params}, args, kwargs)
        return loss(output), (output, updates)

    params = run.variables["params"]
    rest = {name: tree for name, tree in run.variables.items() if name != "params"}
    graphdef, weights, others = nnx.split(nnx.merge(*run.program.emit("nnx")), nnx.Param, ...)

    def emitted(weights: Any, others: Any, args: Any, kwargs: Any) -> Any:
        # nnx.merge takes the Variables themselves, and those of another trace cannot change.
        model = nnx.merge(graphdef, weights, jax.tree.map(lambda leaf: leaf, others))
        output = run.call(model, args, kwargs)
        return loss(output), (output, nnx.state(model))

    wanted, (expected, updates) = jax.jit(jax.grad(source, has_aux=True))(
        params, rest, run.args, run.kwargs
    )
    grads, (output, state) = jax.jit(jax.grad(emitted, has_aux=True))(
        weights, others, run.args, run.kwargs
    )
    assert_same(output, expected)
    assert_same(variables_of(graphdef, grads, others)["params"], wanted)
    after = variables_of(graphdef, state)
    assert_same({each: after[each] for each in updates}, updates)


def operations(jaxpr: Any) -> Iterator[str]:
    """The names of all operations of a jaxpr, and of those inside them, but for relabelling."""
    for equation in jaxpr.eqns:
        if equation.primitive.name not in RELABELLING:
            yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


@pytest.mark.parametrize("name", NAMES)
def test_xla_is_given_the_same_operations(name: str) -> None:
    run = linen_run(name)
    graphdef, state = run.program.emit("nnx")

    def emitted(state: Any, args: Any, kwargs: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return run.call(model, args, kwargs), nnx.state(model)

    found = jax.make_jaxpr(emitted)(state, run.args, run.kwargs)
    expected = jax.make_jaxpr(run.apply)(run.variables, run.args, run.kwargs)
    assert Counter(operations(found.jaxpr)) == Counter(operations(expected.jaxpr))


def test_share() -> None:
    """Of the leaf layers of all models, 95 in 100 at least are NNX's; a hosted one says why."""
    rows = [row for name in NAMES for row in linen_run(name).program.report() if row.is_layer]
    assert all(row.reason for row in rows if row.became != "native")
    assert sum(row.became == "native" for row in rows) >= 0.95 * len(rows)
