"""The defects of flax's bridge: one check each, which fails with it and passes with ours.

A check takes the bridge and knows nothing of its state layout. When flax mends one of these, the
first test says so.
"""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import flax.nnx.bridge
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

import linsey.bridge
from linsey.ir import LinseyError

Array = jax.Array

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def _arrays(model: Any, kind: Any) -> list[Array]:
    return jax.tree.leaves(nnx.state(model, kind))


# --------------------------------------------------------------------------------------
# ToNNX inside ToLinen


class HoldsLinen(nnx.Module):
    def __init__(self, wrap: Callable[..., Any], rngs: nnx.Rngs):
        self.linen = wrap(nn.Dense(2), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linen(x)


def to_nnx_inside_to_linen_has_variables(bridge: ModuleType) -> None:
    model = bridge.to_linen(HoldsLinen, bridge.ToNNX)
    variables = model.init(jax.random.key(0), X)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(variables.get("params", {})))
    assert shapes == [(2,), (3, 2)]
    assert model.apply(variables, X).shape == (4, 2)


# --------------------------------------------------------------------------------------
# one path in two collections


class SameNameTwice(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.ones, (3, 2))
        mean = self.variable("ema", "kernel", lambda: jnp.full((3, 2), 2.0))
        return x @ (kernel + mean.value)


def one_path_in_two_collections_is_legal(bridge: ModuleType) -> None:
    module = SameNameTwice()
    model = bridge.lazy_init(bridge.ToNNX(module, rngs=nnx.Rngs(0)), X)
    assert_same(model(X), module.apply(module.init(jax.random.key(0), X), X))


# --------------------------------------------------------------------------------------
# the constructor at apply


class CountsConstructions(nnx.Module):
    made = 0

    def __init__(self, rngs: nnx.Rngs):
        type(self).made += 1
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 2)))

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel


def the_constructor_never_runs_at_apply(bridge: ModuleType) -> None:
    class Counted(CountsConstructions):
        made = 0

    model = bridge.to_linen(Counted)
    variables = model.init(jax.random.key(0), X)
    assert Counted.made == 1
    model.apply(variables, X)
    jax.jit(model.apply)(variables, X)
    model.apply(variables, X, mutable=True)
    model.apply(variables, X, rngs={"params": jax.random.key(1)})
    assert Counted.made == 1


def no_initializer_runs_at_apply(bridge: ModuleType) -> None:
    model = bridge.to_linen(CountsConstructions)
    variables = model.init(jax.random.key(0), X)
    program = str(jax.make_jaxpr(lambda v, x: model.apply(v, x))(variables, X))
    assert "dot_general" in program
    assert "random_bits" not in program


def abstract_init_is_not_ignored(bridge: ModuleType) -> None:
    def program(**options: Any) -> str:
        model = bridge.to_linen(CountsConstructions, **options)
        variables = model.init(jax.random.key(0), X)
        return str(jax.make_jaxpr(lambda v, x: model.apply(v, x))(variables, X))

    refused = ""
    try:
        found = program(abstract_init=True)
    except TypeError as error:  # refused, as any argument that the class does not know
        refused, found = str(error), ""
    assert "abstract_init" in refused or "random_bits" not in found


# --------------------------------------------------------------------------------------
# partitioned parameters under a mesh


class Partitioned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        self.kernel = nnx.Param(init(rngs.params(), (3, 2)))

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel


def _mesh(*names: str) -> Any:
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh((1,) * len(names), names, axis_types=kinds)


def shapes_have_partitions_under_a_mesh(bridge: ModuleType) -> None:
    with jax.set_mesh(_mesh("model")):
        shapes = jax.eval_shape(bridge.to_linen(Partitioned).init, jax.random.key(0), X)
        spec = nn.get_partition_spec(shapes)["params"]["kernel"]
    assert nn.unbox(shapes)["params"]["kernel"].shape == (3, 2)
    assert spec == jax.sharding.PartitionSpec(None, "model")


def shapes_have_partitions_after_the_mesh_is_left(bridge: ModuleType) -> None:
    with jax.set_mesh(_mesh("model")):
        shapes = jax.eval_shape(bridge.to_linen(Partitioned).init, jax.random.key(0), X)
    spec = nn.get_partition_spec(shapes)["params"]["kernel"]
    assert spec == jax.sharding.PartitionSpec(None, "model")


def lifted_axes_are_named_in_the_partition(bridge: ModuleType) -> None:
    # flax #5589
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            stacked = nn.vmap(
                bridge.ToLinen,
                variable_axes={"params": 0, "nnx": None},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=2,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stacked(Partitioned, name="dots")(x)

    with jax.set_mesh(_mesh("model", "layers")):
        variables = Stack().init(jax.random.key(0), X)
        spec = nn.get_partition_spec(variables)["params"]["dots"]["kernel"]
    assert spec == jax.sharding.PartitionSpec("layers", None, "model")


# --------------------------------------------------------------------------------------
# dropout without keys


def apply_without_keys_never_repeats_a_mask(bridge: ModuleType) -> None:
    model = bridge.to_linen(nnx.Dropout, rate=0.5)
    x = jnp.ones((8, 8))
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    try:
        first, second = model.apply(variables, x), model.apply(variables, x)
    except LinseyError:
        return  # as pure Linen does
    assert not np.array_equal(first, second)


# --------------------------------------------------------------------------------------
# sow, and batch norm in train mode


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        self.sow("intermediates", "total", jnp.sum(x))
        return x


def sow_needs_no_mutable(bridge: ModuleType) -> None:
    model = bridge.lazy_init(bridge.ToNNX(Sows(), rngs=nnx.Rngs(0)), X)
    model(X)
    sown = _arrays(model, nnx.Intermediate)
    assert len(sown) == 1
    assert_same(sown, [jnp.sum(X)])


def sow_keeps_the_last_call_only(bridge: ModuleType) -> None:
    model = bridge.lazy_init(bridge.ToNNX(Sows(), rngs=nnx.Rngs(0)), X)
    for factor in (1, 2, 3):
        model(factor * X, mutable=["intermediates"])
        sown = _arrays(model, nnx.Intermediate)
        assert len(sown) == 1
        assert_same(sown, [jnp.sum(factor * X)])


def batch_norm_trains_without_mutable(bridge: ModuleType) -> None:
    module = nn.BatchNorm(use_running_average=False, momentum=0.5)
    variables = module.init(jax.random.key(0), X)
    expected, updates = module.apply(variables, X, mutable=["batch_stats"])
    model = bridge.lazy_init(bridge.ToNNX(module, rngs=nnx.Rngs(0)), X)
    assert_same(model(X), expected)
    assert_same(_arrays(model, nnx.BatchStat), jax.tree.leaves(updates))


# --------------------------------------------------------------------------------------
# names


def _child_may_be_called(name: str) -> Callable[[ModuleType], None]:
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(2, name=name)(x)

    def check(bridge: ModuleType) -> None:
        module = Parent()
        variables = module.init(jax.random.key(0), X)
        with warnings.catch_warnings():
            # flax says of some of these names that they are deprecated, before they fail
            warnings.simplefilter("ignore", DeprecationWarning)
            model = bridge.lazy_init(bridge.ToNNX(module, rngs=jax.random.key(0)), X)
            assert_same(model(X), module.apply(variables, X))

    return check


class ParamCalledEval(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x * self.param("eval", nn.initializers.ones, (3,))


def a_parameter_may_be_called_eval(bridge: ModuleType) -> None:
    model = bridge.lazy_init(bridge.ToNNX(ParamCalledEval(), rngs=nnx.Rngs(0)), X)
    model.eval()
    assert_same(model(X), X)


def captured_intermediates_leave_the_call_alone(bridge: ModuleType) -> None:
    model = bridge.lazy_init(bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)), X)
    y = model(X, mutable=["intermediates"], capture_intermediates=True)
    assert "__call__" not in vars(model)
    assert_same(_arrays(model, nnx.Intermediate), [y])
    assert_same(model(X), y)


# --------------------------------------------------------------------------------------
# two Variable classes with one name


def _class_with_a_name_in_use() -> type[nnx.Variable[Any]]:
    return type("DefectsParamTwin", (nnx.Variable,), {})


class TwoOfOneName(nnx.Module):
    def __init__(self, first: Any, second: Any, rngs: nnx.Rngs):
        self.kernel = first(jnp.ones((3,)))
        self.other = second(jnp.ones((3,)))

    def __call__(self, x: Array) -> Array:
        return x * self.kernel * self.other


def two_classes_of_one_name_are_told_apart_in_the_error(bridge: ModuleType) -> None:
    first, second = _class_with_a_name_in_use(), _class_with_a_name_in_use()
    model = bridge.to_linen(TwoOfOneName, first, second)
    try:
        model.init(jax.random.key(0), X)
    except ValueError as error:
        message = str(error)
    else:
        message = "nothing was raised"
    assert "DefectsParamTwin" in message
    assert "{" not in message


# --------------------------------------------------------------------------------------
# lambdas and compiling again


def _linen_with_a_lambda() -> nn.Module:
    return nn.Sequential([nn.Dense(2), lambda x: x * 2])


class WithLambda(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.activation = lambda x: x * 2

    def __call__(self, x: Array) -> Array:
        return self.activation(self.linear(x))


def equal_to_nnx_with_lambdas_have_equal_graphdefs(bridge: ModuleType) -> None:
    first, second = (
        nnx.graphdef(bridge.ToNNX(_linen_with_a_lambda(), rngs=nnx.Rngs(0)).lazy_init(X))
        for _ in range(2)
    )
    assert first == second
    assert hash(first) == hash(second)


def equal_to_nnx_with_lambdas_compile_once(bridge: ModuleType) -> None:
    traced = []

    @nnx.jit
    def call(model: Any, x: Array) -> Array:
        traced.append(x)
        return model(x)

    for seed in range(3):
        call(bridge.ToNNX(_linen_with_a_lambda(), rngs=nnx.Rngs(seed)).lazy_init(X), X)
    assert len(traced) == 1


def equal_functionals_with_lambdas_compile_once(bridge: ModuleType) -> None:
    traced = []

    def call(graphdef: Any, state: Any, x: Array) -> Array:
        traced.append(x)
        return nnx.merge(graphdef, state)(x)

    jitted = jax.jit(call, static_argnums=0)
    for seed in range(3):
        model = bridge.functional(WithLambda)()
        state = model.init(rngs=nnx.Rngs(seed))
        jitted(model.graphdef, state, X)
    assert len(traced) == 1


# --------------------------------------------------------------------------------------
# pickle


def _restored(graphdef: Any) -> Any:
    restored = pickle.loads(pickle.dumps(graphdef))
    assert restored == graphdef
    assert hash(restored) == hash(graphdef)
    return restored


def a_graphdef_of_an_lstm_cell_pickles(bridge: ModuleType) -> None:
    model = bridge.functional(nnx.LSTMCell)(3, 2)
    state = model.init(rngs=nnx.Rngs(0))
    carry = (jnp.zeros((4, 2)), jnp.ones((4, 2)))
    expected = nnx.merge(model.graphdef, state)(carry, X)
    assert_same(nnx.merge(_restored(model.graphdef), state)(carry, X), expected)


def a_graphdef_of_an_optimizer_pickles(bridge: ModuleType) -> None:
    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model = bridge.functional(nnx.Optimizer)(linear, optax.adamw(0.1), wrt=nnx.Param)
    state = model.init()

    def updated(graphdef: Any) -> Any:
        own, optimizer = nnx.clone(linear), nnx.merge(graphdef, state, copy=True)
        optimizer.update(own, jax.tree.map(jnp.ones_like, nnx.state(own, nnx.Param)))
        return nnx.to_pure_dict(nnx.state((own, optimizer)))

    assert_same(updated(_restored(model.graphdef)), updated(model.graphdef))


def a_graphdef_of_a_linen_module_pickles(bridge: ModuleType) -> None:
    model = bridge.ToNNX(_linen_with_a_lambda(), rngs=nnx.Rngs(0)).lazy_init(X)
    graphdef, state = nnx.split(model)
    assert_same(nnx.merge(_restored(graphdef), state)(X), model(X))


def a_graphdef_of_an_initializer_made_by_a_call_pickles(bridge: ModuleType) -> None:
    module = nn.Dense(2, kernel_init=nn.initializers.normal(0.5))
    model = bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(X)
    graphdef, state = nnx.split(model)
    assert_same(nnx.merge(_restored(graphdef), state)(X), model(X))


def a_graphdef_of_a_local_class_pickles(bridge: ModuleType) -> None:
    class Local(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.linear(x)

    model = bridge.functional(Local)()
    state = model.init(rngs=nnx.Rngs(0))
    restored = nnx.merge(_restored(model.graphdef), state)
    assert type(restored) is Local
    assert_same(restored(X), nnx.merge(model.graphdef, state)(X))


def a_graphdef_of_a_local_linen_class_pickles(bridge: ModuleType) -> None:
    class Local(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(2)(x)

    model = bridge.ToNNX(Local(), rngs=nnx.Rngs(0)).lazy_init(X)
    graphdef, state = nnx.split(model)
    assert_same(nnx.merge(_restored(graphdef), state)(X), model(X))


# --------------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class Defect:
    check: Callable[[ModuleType], None]
    """Passes with a bridge that has not the defect."""
    error: type[Exception]
    """What the check raises with flax's."""
    match: str
    """What that error says."""
    name: str = ""
    """Name of the test, where it is not that of the check."""


DEFECTS = (
    Defect(to_nnx_inside_to_linen_has_variables, AssertionError, r"assert \[\] =="),
    Defect(one_path_in_two_collections_is_legal, ValueError, "duplicate variable path"),
    Defect(the_constructor_never_runs_at_apply, AssertionError, "made"),
    Defect(no_initializer_runs_at_apply, AssertionError, "random_bits"),
    Defect(abstract_init_is_not_ignored, AssertionError, "random_bits"),
    Defect(shapes_have_partitions_under_a_mesh, TypeError, "must be a `NamedSharding`"),
    Defect(shapes_have_partitions_after_the_mesh_is_left, ValueError, "mesh context .* required"),
    Defect(lifted_axes_are_named_in_the_partition, AssertionError, "layers"),
    Defect(apply_without_keys_never_repeats_a_mask, AssertionError, "not True"),
    Defect(sow_needs_no_mutable, AssertionError, "0 == 1"),
    Defect(sow_keeps_the_last_call_only, AssertionError, "2 == 1"),
    Defect(batch_norm_trains_without_mutable, Exception, "immutable"),
    Defect(
        _child_may_be_called("rngs"),
        AssertionError,
        "expected Mapping; got",
        "a_child_may_be_called_rngs",
    ),
    Defect(
        _child_may_be_called("module"),
        AssertionError,
        "expected Mapping; got",
        "a_child_may_be_called_module",
    ),
    Defect(a_parameter_may_be_called_eval, TypeError, "not callable"),
    Defect(captured_intermediates_leave_the_call_alone, AssertionError, "__call__"),
    Defect(two_classes_of_one_name_are_told_apart_in_the_error, AssertionError, "DefectsParamTwin"),
    Defect(equal_to_nnx_with_lambdas_have_equal_graphdefs, AssertionError, "=="),
    Defect(equal_to_nnx_with_lambdas_compile_once, AssertionError, "3 == 1"),
    Defect(equal_functionals_with_lambdas_compile_once, AssertionError, "3 == 1"),
    Defect(a_graphdef_of_an_lstm_cell_pickles, Exception, "pickle"),
    Defect(a_graphdef_of_an_optimizer_pickles, Exception, "pickle"),
    Defect(a_graphdef_of_a_linen_module_pickles, Exception, "pickle"),
    Defect(a_graphdef_of_an_initializer_made_by_a_call_pickles, Exception, "pickle"),
    Defect(a_graphdef_of_a_local_class_pickles, Exception, "pickle"),
    Defect(a_graphdef_of_a_local_linen_class_pickles, Exception, "pickle"),
)

_each = pytest.mark.parametrize(
    "defect", DEFECTS, ids=[defect.name or defect.check.__name__ for defect in DEFECTS]
)


@_each
def test_flax_still_has_the_defect(defect: Defect) -> None:
    with pytest.raises(defect.error, match=defect.match):
        defect.check(flax.nnx.bridge)


@_each
def test_linsey_has_not(defect: Defect) -> None:
    defect.check(linsey.bridge)
