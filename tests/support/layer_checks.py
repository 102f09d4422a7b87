"""What is compared between a Linen module and the NNX module that linsey makes of it."""

from typing import Any

import jax
from compare import assert_same
from flax import nnx
from layer_grid import Call, operations, total

import linsey


def lowered(call: Call) -> linsey.Program:
    return linsey.lower(
        call.module, *call.init, rngs=call.init_keys, variables=call.variables, **call.kwargs
    )


def values_in(model: Any) -> Any:
    return linsey.lower(model).emit("linen")[1]


def check_report(program: linsey.Program) -> None:
    rows = [row for row in program.report().rows if row.path]
    assert rows
    for row in rows:
        assert row.became in ("native", "hosted")
        assert row.became == "native" or row.reason


def check_emitted(call: Call, program: linsey.Program) -> None:
    """The model holds the values, and is lowered to the program that it came from."""
    again = linsey.lower(nnx.merge(*program.emit("nnx")))
    assert again.graph == program.graph
    assert_same(again.emit("linen")[1], dict(call.variables))


def check_operations(call: Call, program: linsey.Program) -> None:
    """The model computes by the very operations of the Linen module."""
    graphdef, state = program.emit("nnx")

    def own(state: Any, args: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return model(*args, rngs=call.keys, **call.kwargs), nnx.state(model)

    def linen(variables: Any, args: Any) -> Any:
        return call.module.apply(
            variables, *args, rngs=call.keys, mutable=call.mutable, **call.kwargs
        )

    found = operations(jax.make_jaxpr(own)(state, call.args))
    expected = operations(jax.make_jaxpr(linen)(dict(call.variables), call.args))
    assert found == expected


def check_eager(call: Call, program: linsey.Program) -> None:
    model = nnx.merge(*program.emit("nnx"))
    found = model(*call.args, rngs=call.keys, mutable=call.mutable or None, **call.kwargs)
    expected, updates = call.module.apply(
        call.variables, *call.args, rngs=call.keys, mutable=call.mutable, **call.kwargs
    )
    assert_same(found, expected)
    sown = updates.pop("intermediates", {})
    assert_same(values_in(model), {**call.variables, **updates})
    assert_same(nnx.to_pure_dict(nnx.state(model)).get("intermediates", {}), sown)


def check_jitted(call: Call, program: linsey.Program) -> None:
    """Outputs, gradients and updates, compiled."""
    mutable = [name for name in call.mutable if name != "intermediates"]

    @jax.jit
    def expected_step(variables: Any, args: Any) -> Any:
        def loss(params: Any) -> Any:
            given = {**variables, "params": params} if params else variables
            made = call.module.apply(given, *args, rngs=call.keys, mutable=mutable, **call.kwargs)
            return total(made[0]), made

        return jax.grad(loss, has_aux=True)(variables.get("params", {}))

    @nnx.jit
    def step(model: Any, args: Any) -> Any:
        def loss(model: Any) -> Any:
            made = model(*args, rngs=call.keys, **call.kwargs)
            return total(made), made

        return nnx.grad(loss, has_aux=True)(model)

    expected_grads, (expected, updates) = expected_step(dict(call.variables), call.args)
    model = nnx.merge(*program.emit("nnx"))
    grads, found = step(model, call.args)
    assert_same(found, expected)
    assert_same(values_in(model), {**call.variables, **updates})
    nnx.update(model, grads)
    assert_same(values_in(model).get("params", {}), expected_grads)
