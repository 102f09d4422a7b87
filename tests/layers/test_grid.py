"""Each Linen layer, with each of its fields, gives Linen's numbers as NNX's own or hosted."""

from typing import Any

import jax
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx
from layer_grid import (
    IS_FULL,
    ROWS,
    Call,
    Point,
    call_of,
    draw,
    operations,
    points,
    total,
    unknown_fields,
)

import linsey

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")

ALIASES = (nn.MultiHeadAttention, nn.SelfAttention)
POINTS = [point for cls in ROWS for point in points(cls, is_full=IS_FULL)]


def is_run(point: Point) -> bool:
    """Whether a point is compiled and run, or its operations are only counted."""
    if point.label == "default" or not IS_FULL:
        return point.label == "default" and point.cls not in ALIASES
    is_large = ROWS[point.cls].op == "multi_head_attention"
    return point.seed % 3 == 0 if is_large else True


def name_of(point: Point) -> str:
    return f"{point.cls.__name__}-{point.label}"


@pytest.mark.parametrize("cls", ROWS, ids=lambda cls: cls.__name__)
def test_the_grid_knows_every_field(cls: type[nn.Module]) -> None:
    assert unknown_fields(cls) == []


def lowered(call: Call) -> linsey.Program:
    return linsey.lower(
        call.module, *call.init, rngs=call.init_keys, variables=call.variables, **call.kwargs
    )


def values_in(model: Any) -> Any:
    return linsey.lower(model).emit("linen")[1]


def check_report(point: Point, program: linsey.Program) -> None:
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


def check_operations(point: Point, call: Call, program: linsey.Program) -> None:
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
    if point.cls is nn.OptimizedLSTMCell:  # whose kernels Linen joins at each call
        names = [name for name in expected if found.get(name, 0) < expected[name]]
        assert set(names) <= {"add", "concatenate", "split"}
        expected |= {name: found.get(name, 0) for name in names}
    assert {n: c for n, c in found.items() if c} == {n: c for n, c in expected.items() if c}


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


def check(point: Point, *, with_numbers: bool) -> None:
    call = call_of(point, is_scanned=True)
    program = lowered(call)
    check_report(point, program)
    check_operations(point, call, program)
    if with_numbers:
        check_emitted(call, program)
        check_jitted(call, program)
        call = call_of(point, is_scanned=False)
        check_eager(call, lowered(call))


@pytest.mark.parametrize("point", POINTS, ids=name_of)
def test_one_value(point: Point) -> None:
    check(point, with_numbers=is_run(point))


@pytest.mark.parametrize("seed", range(8 if IS_FULL else 1))
@pytest.mark.parametrize("cls", ROWS, ids=lambda cls: cls.__name__)
def test_several_values(cls: type[nn.Module], seed: int) -> None:
    point = draw(cls, seed)
    try:
        check(point, with_numbers=is_run(point))
    except Exception as error:
        error.add_note(name_of(point))
        raise
