"""Linen layers that come out as NNX's own give Linen's numbers, at any depth, bit for bit."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx
from linen_cases import CASES, LinenCase

import linsey

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*float8.*:UserWarning", "ignore:.*deprecated.*:DeprecationWarning"
)

LEAVES = [
    case for case in CASES if case.covers and case.mutable in (False, ("batch_stats",), ("cache",))
]


class Around(nn.Module):
    """User code around a layer."""

    layer: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


class Scanned(nn.Module):
    """A layer in user code, as the body of a scan over three steps with values of their own."""

    layer: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def body(module: Any, carry: Any, _: Any) -> Any:
            return carry, self.layer()(*args, **kwargs)

        scan = nn.scan(
            body,
            variable_axes={"params": 1, "batch_stats": 0, "cache": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return scan(self, None, None)[1]


def lowered(case: LinenCase, module: nn.Module) -> tuple[Any, linsey.Program]:
    args, kwargs = case.init_inputs
    keys = case.keys(case.init_rngs)
    variables = module.init(keys, *args, **kwargs)
    return variables, linsey.lower(module, *args, rngs=keys, **kwargs).init(keys)


@pytest.mark.parametrize("case", LEAVES, ids=lambda case: case.name)
def test_a_layer_in_user_code(case: LinenCase) -> None:
    if case.method is not None:
        return
    module = Around(case.build())
    variables, program = lowered(case, module)
    keys = case.keys(case.call_rngs)

    def apply(variables: Any) -> Any:
        made = module.apply(variables, *case.args, rngs=keys, mutable=case.mutable, **case.kwargs)
        return (made, {}) if case.mutable is False else made

    expected, updates = apply(variables)
    model = nnx.merge(*program.emit("nnx"))
    assert linsey.lower(model).graph == program.graph
    assert_same(model(*case.args, rngs=keys, mutable=case.mutable, **case.kwargs), expected)
    after = linsey.lower(model)
    _, found = after.emit("linen")
    assert_same({name: found[name] for name in updates}, updates)

    @nnx.jit
    def jitted(model: Any) -> Any:
        return model(*case.args, rngs=keys, mutable=case.mutable, **case.kwargs)

    model = nnx.merge(*program.emit("nnx"))
    assert_same(jitted(model), jax.jit(apply)(variables)[0])


class Normalised(nn.Module):
    """A normalisation that is trained."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))


def test_gradients_flow_through_new_running_statistics() -> None:
    """As in Linen; ``nnx.BatchNorm`` by itself stops them."""
    module, x = Normalised(), jax.random.normal(jax.random.key(0), (8, 3))
    variables = module.init(jax.random.key(0), x)

    def of_source(params: Any) -> Any:
        _, updates = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        stats = updates["batch_stats"]["BatchNorm_0"]
        return (stats["mean"] ** 2).sum() + stats["var"].sum()

    def of_model(model: Any) -> Any:
        model(x)
        norm = model.BatchNorm_0
        assert type(norm) is nnx.BatchNorm
        assert type(norm.mean) is nnx.BatchStat
        return (norm.mean[...] ** 2).sum() + norm.var[...].sum()

    expected = jax.grad(of_source)(variables["params"])
    found = nnx.grad(of_model)(linsey.to_nnx(module, x, variables=variables))
    assert_same(found["Dense_0"]["kernel"][...], expected["Dense_0"]["kernel"])
    assert expected["Dense_0"]["kernel"].any()
