"""``linsey.bridge.flax12`` in the place of ``flax.nnx.bridge``: the same code, the same bits.

The first part runs each case once with flax's bridge and once with ours. The second holds what ours
does where flax's has a defect.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import flax.nnx.bridge
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compare import assert_same
from flax import core, nnx, serialization, struct
from flax import linen as nn
from flax.core import meta
from flax.nnx import variablelib
from flax.nnx.bridge import wrappers

from linsey.bridge import flax12
from linsey.ir import BridgeError, EmitError, LinseyError

Array = jax.Array
Case = Callable[[ModuleType], Any]

pytestmark = [
    # flax says so of these methods of every NNX module, whichever bridge is around it.
    pytest.mark.filterwarnings(r"ignore:\s*Using 'Module\.(sow|perturb)\(:DeprecationWarning"),
]

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
KEY = jax.random.key(0)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


# --------------------------------------------------------------------------------------
# what is compared


def described(value: Any) -> Any:
    """All that a user sees of a result, as a pytree of arrays and texts."""
    if isinstance(value, nnx.State):
        return {"State": {repr(path): described(leaf) for path, leaf in nnx.to_flat_state(value)}}
    if isinstance(value, nnx.Variable):
        known = value.get_metadata()
        return {
            "Variable": type(value).__qualname__,
            "metadata": {key: described(known[key]) for key in sorted(known)},
            "value": described(value.get_raw_value()),
        }
    if isinstance(value, meta.AxisMetadata):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, flax.nnx.bridge.NNXMeta):
            # flax 0.12.8 also stores what every Variable must have; 0.12.12 no longer does.
            required = nnx.Variable.required_metadata
            own = {key: entry for key, entry in value.metadata.items() if key not in required}
            fields["metadata"] = own
        return {
            "box": type(value).__qualname__,
            "spec": described(value.get_partition_spec()) if _has_spec(value) else "",
            **{name: described(entry) for name, entry in fields.items()},
        }
    if isinstance(value, Mapping):
        kind = "FrozenDict" if isinstance(value, core.FrozenDict) else "dict"
        return {kind: {repr(key): described(entry) for key, entry in value.items()}}
    if isinstance(value, jax.sharding.PartitionSpec):
        return str(value)
    if isinstance(value, tuple | list):
        return {type(value).__name__: [described(entry) for entry in value]}
    if isinstance(value, jax.Array):
        return {"array": value, "weak_type": bool(getattr(value, "weak_type", False))}
    if isinstance(value, np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return {type(value).__name__: value}
    if value is None or isinstance(value, bool | int | float | str):
        return {type(value).__name__: str(value)}
    return getattr(value, "__qualname__", type(value).__qualname__)


def _has_spec(box: meta.AxisMetadata[Any]) -> bool:
    return hasattr(box, "get_partition_spec") and hasattr(box.value, "ndim")


def facts(model: Any) -> dict[str, Any]:
    """What an NNX model holds: paths, classes, metadata and values."""
    state = nnx.state(model)
    return {"state": described(state), "pure": described(nnx.to_pure_dict(state))}


@contextlib.contextmanager
def fresh_registry() -> Iterator[None]:
    """What is registered inside is forgotten afterwards."""
    saved = dict(variablelib.VariableTypeCache)
    try:
        yield
    finally:
        variablelib.VariableTypeCache.clear()
        variablelib.VariableTypeCache.update(saved)


@pytest.fixture
def _registry() -> Iterator[None]:
    with fresh_registry():
        yield


def assert_as_flax(case: Case) -> None:
    results = []
    for bridge in (flax.nnx.bridge, flax12):
        with fresh_registry():
            results.append(described(case(bridge)))
    expected, found = results
    assert_same(found, expected)


CASES: list[Case] = []


def same(case: Case) -> Case:
    """A case of `test_it_is_as_with_flax`."""
    CASES.append(case)
    return case


def _mesh(*names: str) -> Any:
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh((1,) * len(names), names, axis_types=kinds)


def in_mesh(case: Case) -> Case:
    """A case that runs and is read under a mesh: flax makes no annotated Variable elsewhere."""

    @functools.wraps(case)
    def run(bridge: ModuleType) -> Any:
        with jax.set_mesh(_mesh("in", "out")):
            return described(case(bridge))

    return run


# --------------------------------------------------------------------------------------
# Linen modules, to wrap


class Mlp(nn.Module):
    width: int = 5

    @nn.compact
    def __call__(self, x: Array, scale: float = 1.0) -> Array:
        return nn.Dense(2)(nn.relu(nn.Dense(self.width)(x))) * scale


class WithSetup(nn.Module):
    def setup(self) -> None:
        self.encoder = nn.Dense(4)
        self.layers = [nn.Dense(4), nn.Dense(4)]
        self.heads = {"a": nn.Dense(2), "b": nn.Dense(2)}

    def encode(self, x: Array) -> Array:
        return self.encoder(x)

    def decode(self, h: Array, head: str = "a") -> Array:
        return self.heads[head](h)

    def __call__(self, x: Array) -> Array:
        h = self.encode(x)
        for layer in self.layers:
            h = nn.tanh(layer(h))
        return self.decode(h) + self.decode(h, head="b")


class Noisy(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = False) -> Array:
        h = nn.Dropout(self.rate, deterministic=deterministic)(nn.Dense(8)(x))
        return h + nn.Dense(8)(h)


class DrawsParams(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x + jax.random.normal(self.make_rng("params"), x.shape)


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        count = self.variable("counter", "count", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            count.value += 1
        return x * count.value


class Reads(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(), (3, 2))
        shift = self.variable("shifts", "shift", lambda: jnp.full((2,), 0.5, jnp.bfloat16))
        table = self.variable("tables", "table", lambda: np.arange(2, dtype=np.int8))
        return x @ kernel + shift.value * table.value


class TupleValue(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        pair = self.variable("pairs", "pair", lambda: (jnp.ones((3,)), jnp.zeros(())))
        return x * pair.value[0] + pair.value[1]


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.Dense(2)(x)
        self.sow("intermediates", "h", h)
        self.sow("losses", "penalty", jnp.sum(h**2), reduce_fn=jnp.add, init_fn=lambda: 0.0)
        return h


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        zeros = nn.with_logical_partitioning(
            nn.initializers.zeros, ("features",), rules=(("features", "out"),)
        )
        return nn.Dense(2, kernel_init=init, bias_init=zeros)(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        class Block(nn.Module):
            @nn.compact
            def __call__(self, h: Array, _: None) -> tuple[Array, None]:
                return nn.tanh(nn.Dense(3)(h)), None

        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="blocks")(x, None)[0]


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        ensemble = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
            axis_size=2,
        )  # fmt: skip
        return ensemble(2)(x)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = nn.Dense(3)
        return dense(nn.tanh(dense(x)))


def _tokens() -> Array:
    return jnp.array([[0, 2, 1], [1, 1, 0]])


def _images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 4, 4, 3)).astype(np.float32)


LINEN: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "dense": (lambda: nn.Dense(2), (X,), {}),
    "dense_of_bfloat16": (lambda: nn.Dense(2, dtype=jnp.bfloat16), (X,), {}),
    "mlp": (Mlp, (X,), {"scale": 2.0}),
    "setup_with_lists_and_dicts": (WithSetup, (X,), {}),
    "sequential": (lambda: nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), (X,), {}),
    "conv": (lambda: nn.Conv(2, (3, 3)), (_images(),), {}),
    "embed": (lambda: nn.Embed(3, 2), (_tokens(),), {}),
    "layer_norm": (nn.LayerNorm, (X,), {}),
    "group_norm": (lambda: nn.GroupNorm(1), (X,), {}),
    "batch_norm_in_eval": (lambda: nn.BatchNorm(use_running_average=True), (X,), {}),
    "dropout": (Noisy, (X,), {}),
    "dropout_switched_off": (Noisy, (X,), {"deterministic": True}),
    "draws_from_params": (DrawsParams, (X,), {}),
    "custom_collections": (Reads, (X,), {}),
    "a_tuple_as_value": (TupleValue, (X,), {}),
    "partitioned": (Partitioned, (X,), {}),
    "scanned": (Scanned, (X,), {}),
    "vmapped": (Vmapped, (X,), {}),
    "shared": (Shared, (X,), {}),
    "attention": (lambda: nn.MultiHeadDotProductAttention(2, qkv_features=4), (X[None],), {}),
    "lstm": (lambda: nn.RNN(nn.LSTMCell(2)), (X[None],), {}),
    "weight_norm": (lambda: nn.WeightNorm(nn.Dense(2)), (X,), {}),
    "frozen_by_remat": (lambda: nn.remat(Mlp)(), (X,), {}),
}


def wrapped(bridge: ModuleType, name: str, rngs: Any = None) -> tuple[Any, Any, Any]:
    make, args, kwargs = LINEN[name]
    rngs = nnx.Rngs(0, dropout=1) if rngs is None else rngs
    return bridge.ToNNX(make(), rngs=rngs), args, kwargs


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_module_has_the_values_outputs_and_gradients_of_flax(name: str) -> None:
    def case(bridge: ModuleType) -> Any:
        model, args, kwargs = wrapped(bridge, name)
        seen = [facts(model)]
        model.lazy_init(*args, **kwargs)
        seen.append(facts(model))
        seen += [model(*args, **kwargs), facts(model)]

        def loss(model: Any) -> Array:
            return jnp.sum(model(*args, **kwargs).astype(jnp.float32) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        seen += [value, gradients, facts(model)]
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        merged = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf * 2, params), rest)
        return [*seen, params, merged(*args, mutable=True, **kwargs), facts(merged)]

    assert_as_flax(in_mesh(case) if name == "partitioned" else case)


RNGS: dict[str, Callable[[], Any]] = {
    "default": lambda: nnx.Rngs(0),
    "params": lambda: nnx.Rngs(params=0),
    "params_and_dropout": lambda: nnx.Rngs(params=0, dropout=1),
    "default_and_dropout": lambda: nnx.Rngs(0, dropout=1),
    "default_and_params": lambda: nnx.Rngs(0, params=3),
    "typed_keys": lambda: nnx.Rngs(params=jax.random.key(4), dropout=jax.random.key(5)),
    "key": lambda: jax.random.key(0),
    "raw_key": lambda: jax.random.PRNGKey(0),
    "used_rngs": lambda: _used(nnx.Rngs(0, dropout=1)),
}


def _used(rngs: nnx.Rngs) -> nnx.Rngs:
    rngs.params()
    rngs.dropout()
    return rngs


@pytest.mark.parametrize("rngs", RNGS)
def test_initial_values_are_those_of_flax_for_rngs_given_as(rngs: str) -> None:
    def case(bridge: ModuleType) -> Any:
        given = RNGS[rngs]()
        model = bridge.ToNNX(Mlp(), rngs=given)
        seen = [facts(model), facts(given) if isinstance(given, nnx.Rngs) else None]
        model.lazy_init(X)
        return [*seen, facts(model), model(X), facts(model)]

    assert_as_flax(case)


@pytest.mark.parametrize("rngs", [name for name in RNGS if "dropout" in name])
def test_dropout_masks_are_those_of_flax_for_rngs_given_as(rngs: str) -> None:
    def case(bridge: ModuleType) -> Any:
        model = bridge.ToNNX(Noisy(), rngs=RNGS[rngs]()).lazy_init(X)
        return [model(X), model(X), facts(model), model(X, rngs=nnx.Rngs(dropout=9)), facts(model)]

    assert_as_flax(case)


@same
def rngs_of_a_call_leave_the_own_streams_alone(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Noisy(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
    given = nnx.Rngs(7, dropout=8)
    return [model(X, rngs=given), model(X, rngs=given), facts(given), facts(model), model(X)]


@same
def rngs_of_a_call_may_be_a_key(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(DrawsParams(), rngs=nnx.Rngs(0)).lazy_init(X)
    return [model(X, rngs=jax.random.key(3)), model(X, rngs=jax.random.PRNGKey(3)), facts(model)]


@same
def no_rngs_are_needed_where_nothing_draws(bridge: ModuleType) -> Any:
    class Free(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return x * self.variable("scales", "scale", jnp.ones, (3,)).value

    model = bridge.ToNNX(Free()).lazy_init(X)
    return [model.to_nnx__rngs, model(X), facts(model)]


@same
def a_reseed_repeats_the_first_call(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Noisy(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
    nnx.reseed(model, dropout=2)
    outputs = [model(X), model(X)]
    nnx.reseed(model, dropout=2)
    return [*outputs, model(X), facts(model)]


@same
def the_streams_can_be_replaced(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Noisy(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
    model.to_nnx__rngs = nnx.Rngs(dropout=5)
    return [model(X), facts(model)]


@same
def lazy_init_twice_draws_new_values(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Mlp(), rngs=nnx.Rngs(0))
    seen = []
    for _ in range(2):
        assert bridge.lazy_init(model, X) is model
        seen.append(facts(model))
    return seen


# ToNNX: methods, arguments, mutable


@same
def methods_are_called_by_name_by_function_and_as_attributes(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(WithSetup(), rngs=nnx.Rngs(0)).lazy_init(X)
    h = model.encode(X)
    return [
        h,
        model(X, method="encode"),
        model(X, method=WithSetup.encode),
        model.decode(h, head="b"),
        model(h, "b", method="decode"),
        facts(model),
    ]


@same
def lazy_init_of_a_method_makes_what_the_method_needs(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(WithSetup(), rngs=nnx.Rngs(0))
    bridge.lazy_init(model.encode, X)
    return [facts(model), model.encode(X)]


@same
def lazy_init_of_a_method_of_an_nnx_module_reaches_inside(bridge: ModuleType) -> Any:
    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.parts = nnx.List([bridge.ToNNX(nn.Dense(3), rngs=rngs) for _ in range(2)])
            self.named = nnx.Dict(head=bridge.ToNNX(Mlp(), rngs=rngs))
            self.bias = nnx.Param(jax.random.normal(rngs.params(), (2,)))

        def encode(self, x: Array, factor: float = 1.0) -> Array:
            for part in self.parts:
                x = part(x) * factor
            return self.named["head"](x) + self.bias

    model = Outer(nnx.Rngs(0))
    bridge.lazy_init(model.encode, X, factor=2.0)
    return [facts(model), model.encode(X), facts(model)]


@same
def keyword_arguments_reach_the_module(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Noisy(), rngs=nnx.Rngs(0, dropout=1))
    model.lazy_init(X, deterministic=True)
    return [model(x=X, deterministic=True), model(X, True), model(X), facts(model)]


@same
def modules_of_two_inputs_and_pytree_outputs(bridge: ModuleType) -> Any:
    cell = nn.LSTMCell(2)
    carry = (jnp.zeros((4, 2)), jnp.ones((4, 2)))
    model = bridge.ToNNX(cell, rngs=nnx.Rngs(0)).lazy_init(carry, X)
    return [model(carry, X), facts(model)]


@pytest.mark.parametrize("mutable", ["counter", ["counter"], True, core.DenyList("params")])
def test_a_counter_counts_as_with_flax_where_mutable_is(mutable: Any) -> None:
    def case(bridge: ModuleType) -> Any:
        model = bridge.ToNNX(Counter(), rngs=nnx.Rngs(0)).lazy_init(X)
        outputs = [model(X, mutable=mutable) for _ in range(3)]
        return [*outputs, facts(model)]

    assert_as_flax(case)


@same
def batch_norm_trains_with_mutable(bridge: ModuleType) -> Any:
    module = nn.BatchNorm(use_running_average=False, momentum=0.5)
    model = bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(X)
    outputs = [model(X * k, mutable=["batch_stats"]) for k in (1, 2)]
    return [*outputs, facts(model)]


@same
def one_call_sows_with_mutable(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Sows(), rngs=nnx.Rngs(0)).lazy_init(X)
    return [model(X, mutable=["intermediates"]), nnx.state(model, nnx.Param, nnx.Intermediate)]


@same
def a_call_may_add_variables(bridge: ModuleType) -> Any:
    class Late(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            if not self.is_initializing() and self.is_mutable_collection("cache"):
                self.put_variable("cache", "last", x)
            return x if self.get_variable("cache", "last") is None else x * 2

    model = bridge.ToNNX(Late(), rngs=nnx.Rngs(0)).lazy_init(X)
    return [model(X, mutable=["cache"]), facts(model)]


@same
def attention_decodes_with_a_cache(bridge: ModuleType) -> Any:
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=4, decode=True)
    model = bridge.ToNNX(attention, rngs=nnx.Rngs(0)).lazy_init(X[None])
    outputs = [model(X[None, i : i + 1], mutable=["cache"]) for i in range(2)]
    return [*outputs, facts(model)]


@same
def variables_can_be_assigned_from_outside(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)).lazy_init(X)
    model.kernel = nnx.Param(jnp.ones((3, 2)))
    first = model(X)
    model.bias[...] += 1
    nnx.update(model, {"kernel": jnp.full((3, 2), 2.0)})
    return [first, model(X), facts(model)]


@same
def types_of_variables_are_those_of_the_collections(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Reads(), rngs=nnx.Rngs(0)).lazy_init(X)
    kinds = [nnx.Param, nnx.variable_type_from_name("shifts"), nnx.RngState]
    return [nnx.state(model, kind) for kind in kinds]


@same
def a_registered_class_is_the_class_of_its_collection(bridge: ModuleType) -> Any:
    @nnx.register_variable_name("shifts")
    class Shift(nnx.Variable):
        pass

    model = bridge.ToNNX(Reads(), rngs=nnx.Rngs(0)).lazy_init(X)
    assert type(model.shift) is Shift
    return [facts(model), model(X)]


@same
def the_wrapped_module_and_its_streams_are_attributes(bridge: ModuleType) -> Any:
    module = nn.Dense(2)
    model = bridge.ToNNX(module, rngs=nnx.Rngs(0))
    assert model.to_nnx__module is module
    return [facts(model.to_nnx__rngs), isinstance(model, nnx.Module), model.to_nnx__module.features]


@same
def the_old_names_of_both_warn(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0))
    with pytest.warns(DeprecationWarning, match="is deprecated. Please use") as caught:
        found = [model.module is model.to_nnx__module, model.rngs is model.to_nnx__rngs]
    return [found, [str(one.message) for one in caught], [one.category for one in caught]]


@same
def an_unknown_attribute_is_an_attribute_error(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    return [hasattr(model, "nothing"), hasattr(model, "kernel"), getattr(model, "nothing", 3)]


# ToNNX under the transforms of NNX


@same
def jit_of_a_wrapped_module(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Noisy(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)

    @nnx.jit
    def call(model: Any, x: Array) -> Array:
        return model(x)

    return [call(model, X), call(model, X), facts(model)]


@same
def jit_of_lazy_init(bridge: ModuleType) -> Any:
    @nnx.jit
    def create(x: Array) -> Any:
        return bridge.lazy_init(bridge.ToNNX(Mlp(), rngs=nnx.Rngs(0)), x)

    model = create(X)
    return [facts(model), model(X)]


@same
def shapes_without_values(bridge: ModuleType) -> Any:
    def create() -> Any:
        return bridge.ToNNX(Mlp(), rngs=nnx.Rngs(0)).lazy_init(X)

    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(create)))


@same
def an_optimizer_trains_a_wrapped_module(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Mlp(), rngs=nnx.Rngs(0)).lazy_init(X)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Array:
        loss, grads = nnx.value_and_grad(lambda model: jnp.sum(model(X) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    return [step(model, optimizer), step(model, optimizer), facts(model), facts(optimizer)]


@same
def vmap_makes_and_runs_an_ensemble(bridge: ModuleType) -> Any:
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0, None))
    def create(rngs: nnx.Rngs, x: Array) -> Any:
        return bridge.ToNNX(Mlp(), rngs=rngs).lazy_init(x)

    model = create(nnx.Rngs(0), X)
    outputs = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(model, X)
    return [facts(model), outputs]


@same
def vmap_around_lazy_init_of_an_outer_module(bridge: ModuleType) -> Any:
    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.inner = bridge.ToNNX(nn.Dense(2), rngs=rngs)

        def __call__(self, x: Array) -> Array:
            @nnx.split_rngs(splits=2)
            @nnx.vmap(in_axes=(0, None), axis_size=2)
            def run(inner: Any, x: Array) -> Array:
                return inner(x)

            return run(self.inner, x)

    model = bridge.lazy_init(Outer(nnx.Rngs(0)), X)
    return [facts(model), model(X), facts(model)]


@same
def scan_runs_over_stacked_layers(bridge: ModuleType) -> Any:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0, None))
    def create(rngs: nnx.Rngs, x: Array) -> Any:
        return bridge.ToNNX(nn.Dense(3), rngs=rngs).lazy_init(x)

    model = create(nnx.Rngs(0), X)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer: Any, x: Array) -> Array:
        return jnp.tanh(layer(x))

    return [run(model, X), facts(model)]


@same
def remat_and_grad(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Noisy(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)

    def loss(model: Any) -> Array:
        return jnp.sum(nnx.remat(lambda model, x: model(x))(model, X) ** 2)

    return [nnx.grad(loss)(model), facts(model)]


@same
def cond_and_while_take_a_wrapped_module(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)).lazy_init(X)
    picked = nnx.cond(True, lambda m, x: m(x), lambda m, x: x, model, X)
    looped = nnx.fori_loop(0, 2, lambda _, carry: (carry[0], carry[0](carry[1])), (model, X))
    return [picked, looped[1], facts(model)]


@same
@in_mesh
def partitions_of_linen_are_sharding_metadata(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Partitioned(), rngs=nnx.Rngs(0))
    model.lazy_init(X)
    specs = nnx.get_partition_spec(nnx.state(model))
    return [facts(model), nnx.to_pure_dict(specs), model(X)]


# --------------------------------------------------------------------------------------
# NNX modules, to wrap


class NnxMlp(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs, scale: float = 1.0):
        self.first = nnx.Linear(3, width, rngs=rngs)
        self.second = nnx.Linear(width, 2, rngs=rngs)
        self.scale = scale

    def encode(self, x: Array) -> Array:
        return nnx.relu(self.first(x))

    def decode(self, h: Array, shift: float = 0.0) -> Array:
        return self.second(h) * self.scale + shift

    def __call__(self, x: Array, shift: float = 0.0) -> Array:
        return self.decode(self.encode(x), shift)


class Layers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.heads = nnx.Dict(a=nnx.Linear(3, 2, rngs=rngs))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = self.dropout(jnp.tanh(layer(x)))
        return self.heads["a"](x)


class ManyKinds(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 2)))
        self.lora = nnx.LoRA(3, 1, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, use_running_average=False, momentum=0.5, rngs=rngs)
        self.cache = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, x: Array) -> Array:
        self.cache[...] += 1
        return self.norm(x @ self.w + self.lora(x))


class Tied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.a = nnx.Linear(3, 3, rngs=rngs)
        self.b = self.a

    def __call__(self, x: Array) -> Array:
        return self.b(self.a(x))


class NnxCounts(nnx.Module):
    def __init__(self) -> None:
        self.count = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, x: Array) -> Array:
        self.count[...] += 1
        return x * self.count[...]


class NnxSows(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = self.linear(x)
        self.sow(nnx.Intermediate, "y", y)
        self.total = nnx.Intermediate(jnp.sum(y))
        return y


class NnxSharded(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
        self.kernel = nnx.Param(init(rngs.params(), (3, 2)))
        self.bias = nnx.Param(jnp.zeros((2,)), note="kept")

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel + self.bias


NNX: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = {
    "linear": (nnx.Linear, (3, 2), {}, X),
    "linear_by_keywords": (nnx.Linear, (), {"in_features": 3, "out_features": 2}, X),
    "mlp": (NnxMlp, (4,), {"scale": 2.0}, X),
    "lists_dicts_and_dropout": (Layers, (), {}, X),
    "many_kinds_of_variables": (ManyKinds, (), {}, X),
    "tied": (Tied, (), {}, X),
    "conv": (nnx.Conv, (3, 2), {"kernel_size": (3, 3)}, _images()),
    "embed": (nnx.Embed, (3, 2), {}, _tokens()),
    "layer_norm": (nnx.LayerNorm, (3,), {}, X),
    "dropout": (nnx.Dropout, (0.5,), {}, X),
    "gru": (nnx.GRUCell, (3, 2), {}, (jnp.ones((4, 2)), X)),
    "attention": (nnx.MultiHeadAttention, (2, 3, 4), {"decode": False}, X[None]),
    "sows": (NnxSows, (), {}, X),
    "factory": (lambda rngs: nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.relu), (), {}, X),
}


def to_linen(bridge: ModuleType, case: str, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    make, args, kwargs, inputs = NNX[case]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return bridge.to_linen(make, *args, **kwargs, **options), inputs


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_module_has_the_variables_outputs_and_updates_of_flax(name: str) -> None:
    def case(bridge: ModuleType) -> Any:
        model, inputs = to_linen(bridge, name)
        output, variables = model.init_with_output(KEYS, *inputs)
        rngs = {"dropout": jax.random.key(2)}
        seen = [output, variables, model.apply(variables, *inputs, rngs=rngs)]
        for mutable in (True, ["batch_stats", "cache"], "intermediates", core.DenyList("params")):
            seen.append(model.apply(variables, *inputs, rngs=rngs, mutable=mutable))
        return seen

    assert_as_flax(case)


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_module_inside_linen_code_is_as_with_flax(name: str) -> None:
    def case(bridge: ModuleType) -> Any:
        class Outer(nn.Module):
            @nn.compact
            def __call__(self, *inputs: Array) -> Any:
                named, _ = to_linen(bridge, name, name="named")
                return to_linen(bridge, name)[0](*inputs), named(*inputs)

        _, inputs = to_linen(bridge, name)
        output, variables = Outer().init_with_output(KEYS, *inputs)
        rngs = {"dropout": jax.random.key(2)}
        return [output, variables, Outer().apply(variables, *inputs, rngs=rngs, mutable=True)]

    assert_as_flax(case)


@pytest.mark.parametrize("name", NNX)
def test_gradients_of_an_nnx_module_are_those_of_flax(name: str) -> None:
    def case(bridge: ModuleType) -> Any:
        model, inputs = to_linen(bridge, name)
        variables = model.init(KEYS, *inputs)

        @jax.jit
        def loss(params: Any, rest: Any) -> Array:
            rngs = {"dropout": jax.random.key(2)}
            output = model.apply({"params": params, **rest}, *inputs, rngs=rngs)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(output))

        params = variables.get("params", {})
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        return jax.value_and_grad(loss)(params, rest)

    assert_as_flax(case)


KEY_FORMS: dict[str, Callable[[], Any]] = {
    "key": lambda: jax.random.key(0),
    "raw_key": lambda: jax.random.PRNGKey(0),
    "params_only": lambda: {"params": jax.random.key(0)},
    "params_and_dropout": lambda: KEYS,
    "default_only": lambda: {"default": jax.random.key(3)},
    "raw_keys": lambda: {"params": jax.random.PRNGKey(0), "dropout": jax.random.PRNGKey(1)},
}


@pytest.mark.parametrize("keys", KEY_FORMS)
def test_initial_variables_are_those_of_flax_for_keys_given_as(keys: str) -> None:
    def case(bridge: ModuleType) -> Any:
        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x: Array) -> Array:
                return nn.Dense(2)(x) + bridge.to_linen(NnxMlp, 4, name="inner")(x)

        model = bridge.to_linen(NnxMlp, 4)
        seen = [model.init(KEY_FORMS[keys](), X)]
        if keys != "default_only":
            seen.append(Outer().init(KEY_FORMS[keys](), X))
        return [*seen, jax.jit(model.init)(KEY_FORMS[keys](), X)]

    assert_as_flax(case)


# ToLinen: options


@same
def no_rngs_are_passed_with_skip_rng(bridge: ModuleType) -> Any:
    model = bridge.ToLinen(NnxCounts, skip_rng=True)
    variables = model.init(KEY, X)
    output, updates = model.apply(variables, X, mutable="cache")
    return [variables, output, updates, model.apply({**variables, **updates}, X)]


@same
def the_class_and_its_arguments_are_fields(bridge: ModuleType) -> Any:
    model = bridge.ToLinen(nnx.Linear, args=(3, 2), kwargs={"use_bias": False}, name="mine")
    fields = [model.nnx_class, model.args, dict(model.kwargs), model.skip_rng, model.name]
    same_by_value = model == bridge.ToLinen(
        nnx.Linear, args=(3, 2), kwargs={"use_bias": False}, name="mine"
    )
    made = bridge.to_linen(nnx.Linear, 3, out_features=2)
    return [fields, same_by_value, made.args, made.kwargs, made.out_features, model.init(KEY, X)]


@same
@in_mesh
def metadata_fn_none_gives_bare_values(bridge: ModuleType) -> Any:
    model = bridge.to_linen(NnxSharded, metadata_fn=None)
    variables = model.init(KEY, X)
    return [variables, model.apply(variables, X, mutable=True)]


@struct.dataclass
class OwnBox(nn.Partitioned):
    """A box of a user."""


def own_box(variable: nnx.Variable[Any]) -> Any:
    names = variable.get_metadata("out_sharding", ()) or (None,) * variable.ndim
    return OwnBox(variable.get_value(), names=names)


@same
@in_mesh
def metadata_fn_of_a_user_makes_the_boxes(bridge: ModuleType) -> Any:
    model = bridge.to_linen(NnxSharded, metadata_fn=own_box)
    variables = model.init(KEY, X)
    return [variables, nn.get_partition_spec(variables), model.apply(variables, X)]


@same
@in_mesh
def sharded_and_annotated_variables_are_boxed_in_nnx_meta(bridge: ModuleType) -> Any:
    model = bridge.to_linen(NnxSharded)
    variables = model.init(KEY, X)
    boxes = [variables["params"]["kernel"], variables["params"]["bias"]]
    assert all(isinstance(box, flax.nnx.bridge.NNXMeta) for box in boxes)
    return [
        variables,
        nn.get_partition_spec(variables),
        nn.unbox(variables),
        model.apply(variables, X),
        model.apply(nn.unbox(variables), X),
        model.apply(variables, X, mutable=True),
        [box.to_nnx_variable() for box in boxes],
        [box.replace_boxed(box.value * 2) for box in boxes],
    ]


@same
@in_mesh
def with_partitioning_gives_the_boxes_of_linen(bridge: ModuleType) -> Any:
    init = bridge.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
    model = bridge.to_linen(nnx.Linear, 3, 2, kernel_init=init)
    variables = model.init(KEY, X)
    assert type(variables["params"]["kernel"]) is nn.Partitioned
    kernel = nnx.Linear(3, 2, kernel_init=init, rngs=nnx.Rngs(0)).kernel
    return [variables, nn.get_partition_spec(variables), model.apply(variables, X), kernel]


@same
def nnx_meta_can_be_made_by_hand(bridge: ModuleType) -> Any:
    box = bridge.NNXMeta(nnx.Param, jnp.ones((3, 2)), {"note": 1})
    doubled = jax.tree.map(lambda leaf: leaf * 2, box)
    assert isinstance(doubled, bridge.NNXMeta)
    return [box, doubled, box.unbox(), box.to_nnx_variable(), box.replace(value=jnp.zeros(2))]


# ToLinen: methods and ways of use


@same
def methods_of_the_nnx_module(bridge: ModuleType) -> Any:
    model = bridge.to_linen(NnxMlp, 4)
    variables = model.init(KEY, X)
    h = model.apply(variables, X, nnx_method="encode")
    return [
        h,
        model.apply(variables, X, nnx_method=NnxMlp.encode),
        model.apply(variables, h, 2.0, nnx_method="decode"),
        model.apply(variables, h, shift=2.0, nnx_method=NnxMlp.decode),
        model.apply(variables, X, shift=1.0),
        model.init(KEY, X, nnx_method="encode"),
        model.bind(variables).encode(X),
        model.bind(variables)(X),
    ]


@same
def methods_of_a_child_in_linen_code(bridge: ModuleType) -> Any:
    class Outer(nn.Module):
        def setup(self) -> None:
            self.mlp = bridge.to_linen(NnxMlp, 4)

        def __call__(self, x: Array) -> Array:
            return self.mlp(x)

        def twice(self, x: Array) -> Array:
            return self.mlp.decode(self.mlp.encode(x), shift=0.5)

    model = Outer()
    variables = model.init(KEY, X)
    seen = [variables, model.apply(variables, X, method="twice")]
    return [*seen, model.apply(variables, X, method=Outer.twice), model.bind(variables).twice(X)]


@same
def a_shared_child_draws_another_mask_at_each_call(bridge: ModuleType) -> Any:
    class Outer(nn.Module):
        def setup(self) -> None:
            self.dropout = bridge.to_linen(nnx.Dropout, 0.5)

        def __call__(self, x: Array) -> Any:
            return self.dropout(x), self.dropout(x)

    x = jnp.ones((8, 8))
    variables = Outer().init(KEYS, x)
    rngs = {"dropout": jax.random.key(5)}
    return [Outer().apply(variables, x, rngs=rngs), Outer().apply(variables, x, rngs=rngs)]


@same
def variables_of_every_container_are_taken(bridge: ModuleType) -> Any:
    model = bridge.to_linen(NnxMlp, 4)
    variables = model.init(KEY, X)
    frozen = core.freeze(variables)
    as_numpy = jax.tree.map(np.asarray, variables)
    return [model.apply(v, X) for v in (variables, frozen, as_numpy)]


@same
def init_of_a_mutable_subset(bridge: ModuleType) -> Any:
    model = bridge.to_linen(ManyKinds)
    return [model.init(KEYS, X, mutable=["params"]), model.init(KEYS, X, mutable="batch_stats")]


@same
def shapes_of_variables_without_values(bridge: ModuleType) -> Any:
    model = bridge.to_linen(ManyKinds)
    lazy = model.lazy_init(KEYS, jax.ShapeDtypeStruct(X.shape, X.dtype))
    return [jax.eval_shape(model.init, KEYS, X), lazy]


@same
def jit_and_vmap_of_apply(bridge: ModuleType) -> Any:
    model = bridge.to_linen(NnxMlp, 4)
    keys = jax.random.split(KEY, 2)
    stacked = jax.vmap(model.init, in_axes=(0, None))(keys, X)
    outputs = jax.vmap(model.apply, in_axes=(0, None))(stacked, X)
    return [stacked, outputs, jax.jit(model.apply)(model.init(KEY, X), X)]


@same
def vmap_of_linen(bridge: ModuleType) -> Any:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            stacked = nn.vmap(
                bridge.ToLinen, variable_axes={"params": 0}, split_rngs={"params": True}
            )
            return stacked(nnx.Linear, args=(3, 2))(x)

    output, variables = Outer().init_with_output(KEY, X)
    return [output, variables, Outer().apply(variables, X)]


@same
def vmap_of_linen_with_dropout_and_batch_stats(bridge: ModuleType) -> Any:
    class Noise(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.dropout(self.norm(x))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            stacked = nn.vmap(
                bridge.ToLinen,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=None,
                axis_size=2,
            )
            return stacked(Noise, name="noise")(x)

    output, variables = Outer().init_with_output(KEYS, X)
    rngs = {"dropout": jax.random.key(5)}
    return [output, variables, Outer().apply(variables, X, rngs=rngs, mutable=["batch_stats"])]


@same
def scan_of_linen(bridge: ModuleType) -> Any:
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Array, _: None) -> tuple[Array, Array]:
            x = self.dropout(jnp.tanh(self.linear(x)))
            return x, jnp.sum(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Any:
            stacked = nn.scan(
                bridge.ToLinen,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=3,
            )
            return stacked(Layer, name="layers")(x, None)

    output, variables = Outer().init_with_output(KEYS, X)

    def loss(variables: Any) -> Array:
        rngs = {"dropout": jax.random.key(5)}
        return jnp.sum(Outer().apply(variables, X, rngs=rngs)[0] ** 2)

    return [output, variables, jax.value_and_grad(loss)(variables)]


@same
def remat_and_jit_of_linen(bridge: ModuleType) -> Any:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = nn.remat(bridge.ToLinen)(nnx.Linear, args=(3, 3), name="a")(x)
            return nn.jit(bridge.ToLinen)(nnx.Linear, args=(3, 2), name="b")(jnp.tanh(x))

    output, variables = Outer().init_with_output(KEY, X)
    grads = jax.grad(lambda v: jnp.sum(Outer().apply(v, X) ** 2))(variables)
    return [output, variables, Outer().apply(variables, X), grads]


@same
def variables_of_a_call_are_stored_where_the_collection_is_mutable(bridge: ModuleType) -> Any:
    model = bridge.to_linen(NnxSows)
    variables = model.init(KEY, X)
    first = model.apply(variables, X, mutable=["intermediates"])
    none = bridge.to_linen(nnx.Linear, 3, 2)
    return [variables, first, none.apply(none.init(KEY, X), X, mutable=["intermediates"])]


@same
def an_own_variable_class_names_its_collection(bridge: ModuleType) -> Any:
    class Inertia(nnx.Variable):
        pass

    @nnx.register_variable_name("tables")
    class Table(nnx.Param):
        pass

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.momentum = Inertia(jnp.zeros((3,)))
            self.table = Table(jnp.ones((3,)))

        def __call__(self, x: Array) -> Array:
            self.momentum[...] = self.momentum[...] * 0.5 + x[0]
            return x * self.table[...]

    model = bridge.to_linen(Model)
    variables = model.init(KEY, X)
    return [variables, model.apply(variables, X, mutable=["Inertia"]), model.apply(variables, X)]


@same
def intercepted_and_captured_as_any_linen_module(bridge: ModuleType) -> Any:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return bridge.to_linen(nnx.Linear, 3, 2, name="inner")(x)

    variables = Outer().init(KEY, X)
    return Outer().apply(variables, X, mutable=["intermediates"], capture_intermediates=True)


# to_linen_class, as flax needs it: derived from


def linen_class_of(bridge: ModuleType, *args: Any, **kwargs: Any) -> Any:
    return getattr(bridge, "to_linen_class", wrappers.to_linen_class)(*args, **kwargs)


@same
def a_derived_linen_class_takes_the_arguments_of_the_nnx_class(bridge: ModuleType) -> Any:
    class Mlp(linen_class_of(bridge, NnxMlp, scale=3.0)):
        pass

    class Outer(nn.Module):
        def setup(self) -> None:
            self.mlp = Mlp(width=4)

        def __call__(self, x: Array) -> Array:
            return (
                self.mlp(x)
                + Mlp(width=4, scale=1.0, parent=None).init(KEY, X)["params"]["first"]["bias"].sum()
            )

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return Mlp((4,), {"scale": 2.0}, name="named")(x) + Mlp(width=2)(x)

    alone = Mlp(width=4)
    return [
        alone.init(KEY, X),
        alone.apply(alone.init(KEY, X), X),
        alone.kwargs,
        Outer().init_with_output(KEY, X),
        Compact().init_with_output(KEY, X),
        Mlp.__name__,
    ]


@same
@in_mesh
def a_derived_linen_class_keeps_metadata_fn_and_skip_rng(bridge: ModuleType) -> Any:
    class Sharded(linen_class_of(bridge, NnxSharded, base_metadata_fn=own_box)):
        pass

    class Counts(linen_class_of(bridge, NnxCounts, base_skip_rng=True)):
        pass

    return [Sharded().init(KEY, X), Counts().init_with_output(KEY, X)]


# functional


@same
def functional_modules(bridge: ModuleType) -> Any:
    model = bridge.functional(NnxMlp)(4, scale=2.0)
    assert isinstance(model, bridge.Functional)
    assert model.graphdef is None
    state = model.init(rngs=nnx.Rngs(0))
    output, (graphdef, new_state) = model.apply(state)(X)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    again, _ = model.apply(params, rest)(X)
    encoded, _ = model.apply(state).encode(X)
    merged = nnx.merge(graphdef, new_state)
    fields = [model.module_type, model.args, model.kwargs]
    return [fields, state, output, new_state, again, encoded, merged(X)]


@same
def functional_modules_without_rngs_and_under_jit(bridge: ModuleType) -> Any:
    model = bridge.functional(NnxCounts)()
    state = model.init()

    @jax.jit
    def step(state: nnx.State, x: Array) -> Any:
        output, (_, state) = model.apply(state)(x)
        return output, state

    first, state = step(state, X)
    second, state = step(state, X)
    return [first, second, state]


# bridge.Module


@same
def to_nnx_in_a_compact_bridge_module(bridge: ModuleType) -> Any:
    class Model(bridge.Module):
        @bridge.compact
        def __call__(self, x: Array) -> Array:
            w = self.param("w", nnx.initializers.normal(), (3, 3))
            self.inner = bridge.ToNNX(nn.Dense(2), self.scope.rngs)
            bridge.interop_initializing(self, self.inner)
            return self.inner(x @ w)

    bridge = with_interop(bridge)
    model = Model()
    variables = model.init(0, X)
    return [variables, model.apply(variables, X), model.apply(variables, X, mutable=["params"])]


def with_interop(bridge: ModuleType) -> Any:
    """The bridge, and what `linen_in_bridge_mdl` of flax does after it made its ToNNX."""

    def initializing(parent: Any, module: Any) -> None:
        wrappers._set_initializing(module, parent.is_initializing())

    return types.SimpleNamespace(**vars(bridge), interop_initializing=initializing)


@same
def to_nnx_in_the_setup_of_a_bridge_module(bridge: ModuleType) -> Any:
    class Model(bridge.Module):
        def setup(self) -> None:
            self.inner = bridge.linen_in_bridge_mdl(nn.Dense(2))
            self.norm = bridge.linen_in_bridge_mdl(nn.BatchNorm(False, momentum=0.5))

        def __call__(self, x: Array) -> Array:
            return self.norm(self.inner(x))

    model = Model()
    variables = model.init(0, X)
    return [variables, model.apply(variables, X, mutable=["batch_stats"])]


@same
def both_kinds_of_modules_in_a_bridge_module(bridge: ModuleType) -> Any:
    class Model(bridge.Module):
        @bridge.compact
        def __call__(self, x: Array) -> Array:
            x = bridge.linen_in_bridge_mdl(nn.Dense(3))(x)
            x = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Dropout(0.5, rngs=rngs), name="drop")(x)
            return bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(3, 2, rngs=rngs))(x)

    model = Model()
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(rngs, X)
    rngs = {**rngs, "dropout": jax.random.key(3)}
    again = model.apply(variables, X, rngs=rngs, mutable=True)
    return [variables, again, model.apply(variables, X, rngs=rngs)]


# less usual ways of use


@same
def classes_derived_from_the_wrappers(bridge: ModuleType) -> Any:
    class Doubles(bridge.ToNNX):
        def __call__(self, x: Array, **kwargs: Any) -> Any:
            return super().__call__(x * 2, **kwargs)

        def shifted(self, x: Array) -> Array:
            return self(x) + 1

    class Scales(bridge.ToLinen):
        factor: float = 2.0

        @nn.compact
        def __call__(self, x: Array, **kwargs: Any) -> Any:
            return super().__call__(x * self.factor, **kwargs)

    model = Doubles(nn.Dense(2), nnx.Rngs(0)).lazy_init(X)
    linen = Scales(nnx.Linear, (3, 2))
    output, variables = linen.init_with_output(KEY, X)
    applied = [linen.apply(variables, X), linen.apply(variables, X, mutable=True)]
    return [facts(model), model(X), model.shifted(X), output, variables, applied]


@same
def fields_that_were_set_stay_set_in_train_and_eval(bridge: ModuleType) -> Any:
    frozen = bridge.ToNNX(nn.BatchNorm(use_running_average=True), rngs=nnx.Rngs(0)).lazy_init(X)
    noisy = bridge.ToNNX(nn.Dropout(0.5, deterministic=False), rngs=nnx.Rngs(0, dropout=1))
    noisy.lazy_init(X)
    seen = []
    for model in (frozen, noisy):
        model.train()
        seen.append(model(X))
        model.eval()
        seen += [model(X), facts(model)]
    return seen


@same
def copies_of_a_model(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Noisy(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
    copied = copy.deepcopy(model)
    return [copied(X), copied(X), facts(copied), facts(model)]


@same
def sown_values_can_be_popped(bridge: ModuleType) -> Any:
    model = bridge.ToNNX(Sows(), rngs=nnx.Rngs(0)).lazy_init(X)
    model(X, mutable=["intermediates"])
    popped = nnx.pop(model, nnx.Intermediate)
    output = model(X * 2, mutable=["intermediates"])
    return [popped, output, nnx.state(model, nnx.Intermediate)]


@same
def perturbations(bridge: ModuleType) -> Any:
    class Perturbed(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return self.perturb("delta", nn.Dense(2)(x))

    class PerturbedNnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.perturb("delta", self.linear(x))

    model = bridge.ToNNX(Perturbed(), rngs=nnx.Rngs(0)).lazy_init(X)
    linen = bridge.to_linen(PerturbedNnx)
    variables = linen.init(KEY, X)
    return [facts(model), model(X), variables, linen.apply(variables, X, mutable=True)]


VALUES: dict[str, Any] = {
    "a_dict": {"a": np.ones(2), "b": {"c": np.zeros(1)}},
    "a_list": [np.ones(2), np.ones(1)],
    "none": None,
    "an_int": 3,
    "a_float": 2.5,
}


@pytest.mark.parametrize("value", VALUES)
def test_the_value_of_a_linen_variable_may_be(value: str) -> None:
    class Holds(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            held = self.variable("things", "thing", lambda: VALUES[value])
            return x * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(held.value))

    def case(bridge: ModuleType) -> Any:
        model = bridge.ToNNX(Holds(), rngs=nnx.Rngs(0)).lazy_init(X)
        return [facts(model), model(X), model(X, mutable=True), facts(model)]

    assert_as_flax(case)


@same
def odd_names(bridge: ModuleType) -> Any:
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            for name in ("a/b", "0", "a.b", "_private", "class", "value", "kernel "):
                x = x * self.param(name, nn.initializers.normal(), (3,))
            return x

    model = bridge.ToNNX(Odd(), rngs=nnx.Rngs(0)).lazy_init(X)
    return [facts(model), model(X)]


@same
def linen_code_may_hold_a_wrapped_linen_module(bridge: ModuleType) -> Any:
    class Outer(nn.Module):
        inner: Any

        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(2)(self.inner(x))

    inner = bridge.ToNNX(Mlp(3), rngs=nnx.Rngs(0)).lazy_init(X)
    model = Outer(inner)
    variables = model.init(KEY, X)
    return [variables, model.apply(variables, X), facts(inner)]


@same
def arguments_that_cannot_be_hashed(bridge: ModuleType) -> Any:
    class Model(nnx.Module):
        def __init__(self, sizes: Any, options: Any, act: Any, rngs: nnx.Rngs):
            pairs = itertools.pairwise(sizes)
            self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs, **options) for a, b in pairs])
            self.act = act

        def __call__(self, x: Array) -> Array:
            for layer in self.layers:
                x = self.act(layer(x))
            return x

    seen = []
    for factor in (2, 3):
        model = bridge.to_linen(
            Model, [3, 4, 2], options={"use_bias": factor == 2}, act=lambda x, k=factor: x * k
        )
        variables = model.init(KEY, X)
        seen += [variables, model.apply(variables, X), jax.jit(model.apply)(variables, X)]
    return seen


@same
def a_partial_class_and_a_sequence(bridge: ModuleType) -> Any:
    layers = [bridge.to_linen(functools.partial(nnx.Linear, 3, 4)), nn.relu]
    model = nn.Sequential([*layers, bridge.to_linen(nnx.Linear, 4, 2)])
    variables = model.init(KEY, X)
    return [variables, model.apply(variables, X)]


@same
def streams_of_every_kind_at_apply(bridge: ModuleType) -> Any:
    class Draws(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.fork = rngs.fork()
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.w = nnx.Param(jax.random.normal(rngs.params(), (3,)))
            self.rngs = rngs

        def __call__(self, x: Array) -> Array:
            x = self.dropout(x) * self.w + jax.random.normal(self.fork.dropout(), (3,))
            return x + jax.random.normal(self.rngs.params(), (3,))

    model = bridge.to_linen(Draws)
    output, variables = model.init_with_output(KEYS, X)
    seen = [output, variables]
    for rngs in (KEYS, {**KEYS, "default": jax.random.key(9)}, {**KEYS, "noise": KEY}):
        seen += [model.apply(variables, X, rngs=rngs), model.apply(variables, X, rngs=rngs)]
    dropout = bridge.to_linen(nnx.Dropout, 0.5)
    x = jnp.ones((4, 4))
    held = dropout.init(KEYS, x)
    return [*seen, dropout.apply(held, x, rngs={"default": jax.random.key(3)})]


@same
def values_that_are_pytrees_and_attributes_that_a_call_changes(bridge: ModuleType) -> Any:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.w = nnx.Param({"a": jnp.ones(3), "b": (jnp.zeros(3),)})
            self.empty = nnx.Param(None)
            self.calls = 0

        def __call__(self, x: Array) -> Array:
            self.calls += 1
            return (x * self.w["a"] + self.w["b"][0]) * self.calls

    model = bridge.to_linen(Model)
    variables = model.init(KEY, X)
    with warnings.catch_warnings():
        # flax takes the leaves of such a value for variables that the module does not know.
        if bridge is not flax12:
            warnings.filterwarnings("ignore", "Found unknown module paths")
        outputs = [model.apply(variables, X, mutable=mutable) for mutable in (False, True)]
        return [variables, *outputs, model.apply(variables, X)]


@same
@in_mesh
def variables_are_serialised(bridge: ModuleType) -> Any:
    model = bridge.to_linen(NnxSharded)
    variables = model.init(KEY, X)
    data = serialization.to_bytes(variables)
    return [serialization.to_state_dict(variables), serialization.from_bytes(variables, data)]


@same
def a_table_of_the_module(bridge: ModuleType) -> Any:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(2)(bridge.to_linen(NnxMlp, 4)(x))

    return [bridge.to_linen(NnxMlp, 4).tabulate(KEY, X), Outer().tabulate(KEY, X)]


@same
def functions_of_the_linen_module(bridge: ModuleType) -> Any:
    model = bridge.to_linen(NnxMlp, 4)
    variables = model.init(KEY, X)
    return [
        model.apply(variables, X, method=lambda module, x: module(x) * 2),
        model.apply(variables, X, method=bridge.ToLinen.__call__),
        model.apply(variables, method=lambda module: module.variables),
        model.apply(variables, X, mutable=["intermediates"], capture_intermediates=True),
    ]


@same
def linen_code_that_counts_in_a_bridge_module(bridge: ModuleType) -> Any:
    class Model(bridge.Module):
        def setup(self) -> None:
            self.counter = bridge.ToNNX(Counter(), self.scope.rngs)
            self.sows = bridge.ToNNX(Sows(), self.scope.rngs)
            for module in (self.counter, self.sows):
                wrappers._set_initializing(module, self.is_initializing())

        def __call__(self, x: Array) -> Array:
            return self.sows(self.counter(x))

    model = Model()
    variables = model.init(0, X)
    return [variables, model.apply(variables, X, mutable=["counter"])]


# mixed


@same
@in_mesh
def three_levels_with_nnx_outside(bridge: ModuleType) -> Any:
    class Inner(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
            self.w = nnx.Param(init(rngs.params(), (3, 6)))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.dropout(x @ self.w)

    class Middle(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            init = nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), ("wide", None), rules=(("wide", "out"),)
            )
            b = self.param("b", init, (4, 6))
            return bridge.to_linen(Inner, name="dot")(x) + b

    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.inner = bridge.ToNNX(Middle(), rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.inner(x)

    model = bridge.lazy_init(Outer(nnx.Rngs(default=1, dropout=2)), X)
    grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model)
    return [facts(model), model(X), model(X), grads, facts(model)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_it_is_as_with_flax(case: Case) -> None:
    assert_as_flax(case)


# --------------------------------------------------------------------------------------
# sowing modules, where nobody asks for what they sow


def _sower(bridge: ModuleType, *, features: int = 3) -> Any:
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = nn.Dense(features)(x)
            self.sow("intermediates", "h", x)
            return x

    model = bridge.ToNNX(Sower(), rngs=nnx.Rngs(0)).lazy_init(X)
    model.to_nnx__rngs = None  # drawing in a closure is refused, whatever is wrapped
    return model


SOWERS: dict[str, Callable[[Any], Any]] = {
    "a_jit_closes_over": lambda model: jax.jit(lambda x: model(x))(X),
    "a_gradient_by_inputs_closes_over": lambda model: jax.grad(lambda x: jnp.sum(model(x)))(
        jnp.asarray(X)
    ),
    "a_vmap_over_inputs_closes_over": lambda model: jax.vmap(lambda x: model(x))(jnp.asarray(X)),
    "nnx_jit_takes": lambda model: nnx.jit(lambda model, x: model(x))(model, X),
    "nnx_grad_and_remat_take": lambda model: nnx.grad(
        lambda model: jnp.sum(nnx.remat(lambda model, x: model(x))(model, X))
    )(model),
    "nnx_cond_takes": lambda model: nnx.cond(
        True, lambda model, x: model(x), lambda model, x: x, model, jnp.asarray(X)
    ),
    "nnx_fori_loop_takes": lambda model: nnx.fori_loop(
        0, 2, lambda _, carry: (carry[0], carry[0](carry[1])), (model, jnp.asarray(X))
    )[1],
    "nnx_vmap_broadcasts": lambda model: nnx.vmap(
        lambda model, x: model(x), in_axes=(None, 0)
    )(model, jnp.asarray(X)),
    "a_scan_carries_the_state_of": lambda model: _scanned_state(model),
}  # fmt: skip


def _scanned_state(model: Any) -> Array:
    graphdef, state = nnx.split(model)

    def body(carry: Any, _: None) -> Any:
        state, x = carry
        model = nnx.merge(graphdef, state)
        x = model(x)
        return (nnx.state(model), x), None

    (_, output), _ = jax.lax.scan(body, (state, jnp.asarray(X)), None, length=2)
    return output


@pytest.mark.parametrize("use", SOWERS)
def test_outputs_are_those_of_flax_where_a_module_sows_and(use: str) -> None:
    assert_as_flax(lambda bridge: SOWERS[use](_sower(bridge)))


@pytest.mark.parametrize("use", ["nnx_vmap_broadcasts", "a_scan_carries_the_state_of"])
def test_mutable_false_is_the_default_of_flax_where_sown_values_are_in_the_way(use: str) -> None:
    # Once they are part of the state, a call keeps them; this is how it does not.
    class Quiet(nnx.Module):
        def __init__(self, inner: Any):
            self.inner = inner

        def __call__(self, x: Array) -> Array:
            return self.inner(x, mutable=False)

    def case(bridge: ModuleType) -> Any:
        model = _sower(bridge)
        if bridge is flax12:
            model(X)
        return SOWERS[use](Quiet(model))

    assert_as_flax(case)


# --------------------------------------------------------------------------------------
# the face itself


def _public() -> dict[str, Any]:
    names = {k: v for k, v in vars(flax.nnx.bridge).items() if not k.startswith("_")}
    return {
        name: value
        for name, value in names.items()
        if not inspect.ismodule(value) or name == "initializers"
    }


def test_every_public_name_of_flax_is_exported() -> None:
    assert set(flax12.__all__) >= set(_public())
    for name in flax12.__all__:
        assert hasattr(flax12, name)


OWN_OF_FLAX = (
    "AttrPriority", "Module", "Scope", "compact", "current_context", "current_module",
    "initializers", "linen_in_bridge_mdl", "nnx_in_bridge_mdl",
)  # fmt: skip


@pytest.mark.parametrize("name", OWN_OF_FLAX)
def test_what_linsey_has_no_business_with_is_flax_s_own(name: str) -> None:
    assert getattr(flax12, name) is getattr(flax.nnx.bridge, name)


CALLABLES = [
    *sorted(name for name, value in _public().items() if callable(value)),
    "Functional.apply",
    "Functional.init",
    "NNXMeta.add_axis",
    "NNXMeta.get_partition_spec",
    "NNXMeta.remove_axis",
    "NNXMeta.replace_boxed",
    "NNXMeta.to_nnx_variable",
    "NNXMeta.unbox",
    "ToLinen.__call__",
    "ToLinen.apply",
    "ToLinen.init",
    "ToNNX.__call__",
    "ToNNX.lazy_init",
]


@pytest.mark.parametrize("name", CALLABLES)
def test_the_signature_is_that_of_flax(name: str) -> None:
    theirs, ours = flax.nnx.bridge, flax12
    for part in name.split("."):
        theirs, ours = getattr(theirs, part), getattr(ours, part)
    assert_signature(ours, theirs)


def test_the_signature_of_to_linen_class_is_that_of_flax() -> None:
    assert_signature(flax12.to_linen_class, wrappers.to_linen_class)
    theirs, ours = (
        type("Derived", (make(nnx.Linear),), {})
        for make in (wrappers.to_linen_class, flax12.to_linen_class)
    )
    assert_signature(ours.__init__, theirs.__init__)


def assert_signature(ours: Any, theirs: Any) -> None:
    """Asserts that what flax takes is taken, in the same way; more may follow."""
    found, expected = inspect.signature(ours).parameters, inspect.signature(theirs).parameters

    def by_position(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [name for name, one in parameters.items() if one.kind in kinds]
        # Linen puts the last two after all fields of a class; they are given by keyword.
        return [name for name in names if name not in ("parent", "name")]

    assert by_position(found)[: len(by_position(expected))] == by_position(expected)
    any_name = inspect.Parameter.VAR_KEYWORD
    takes_any = any(one.kind is any_name for one in found.values())
    for name, one in expected.items():
        if one.kind is any_name or (name in ("parent", "name") and takes_any):
            assert takes_any
            continue
        assert found[name].kind == one.kind
        if not callable(one.default):  # to_linen_var, of which each has its own
            assert found[name].default == one.default


def test_instances_are_instances_of_the_classes_of_flax() -> None:
    model = flax12.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0))
    assert isinstance(model, flax.nnx.bridge.ToNNX)
    assert isinstance(flax12.to_linen(nnx.Linear, 3, 2), flax.nnx.bridge.ToLinen)
    assert issubclass(flax12.NNXMeta, flax.nnx.bridge.NNXMeta)
    assert issubclass(flax12.Functional, flax.nnx.bridge.Functional)


# --------------------------------------------------------------------------------------
# checkpoints


class Nested(nnx.Module):
    def __init__(self, bridge: ModuleType, rngs: nnx.Rngs):
        self.blocks = nnx.List([bridge.ToNNX(nn.Dense(3), rngs=rngs) for _ in range(2)])
        self.noisy = bridge.ToNNX(Noisy(), rngs=rngs)
        self.norm = bridge.ToNNX(nn.BatchNorm(use_running_average=True), rngs=rngs)
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (8,)))

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return self.norm(self.noisy(x)) * self.scale


def _nested(bridge: ModuleType, seed: int) -> Any:
    return bridge.lazy_init(Nested(bridge, nnx.Rngs(seed, dropout=seed + 1)), X)


BOTH_WAYS = pytest.mark.parametrize(
    ("writer", "reader"),
    [(flax.nnx.bridge, flax12), (flax12, flax.nnx.bridge)],
    ids=["from_flax_to_linsey", "from_linsey_to_flax"],
)


@BOTH_WAYS
def test_an_orbax_checkpoint_of_a_model_loads(
    writer: ModuleType, reader: ModuleType, tmp_path: Any
) -> None:
    written, model = _nested(writer, 0), _nested(reader, 7)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(written)))
    checkpointer.wait_until_finished()

    state = nnx.state(model)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "model", abstract))
    nnx.update(model, state)
    for _ in range(2):
        assert_same(model(X), written(X))
    assert_same(described(nnx.state(model)), described(nnx.state(written)))


@BOTH_WAYS
def test_an_orbax_checkpoint_of_an_abstract_model_loads(
    writer: ModuleType, reader: ModuleType, tmp_path: Any
) -> None:
    written = _nested(writer, 0)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "state", nnx.split(written)[1])
    checkpointer.wait_until_finished()

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: _nested(reader, 7)))
    restored = checkpointer.restore(tmp_path / "state", abstract)
    model = nnx.merge(graphdef, restored)
    for _ in range(2):
        assert_same(model(X), written(X))


@BOTH_WAYS
def test_a_pure_dict_of_a_model_loads(writer: ModuleType, reader: ModuleType) -> None:
    written, model = _nested(writer, 0), _nested(reader, 7)
    nnx.update(model, nnx.to_pure_dict(nnx.state(written)))
    assert_same(model(X), written(X))


@BOTH_WAYS
@pytest.mark.parametrize(
    "name", ["setup_with_lists_and_dicts", "custom_collections", "partitioned"]
)
def test_the_state_of_one_model_is_that_of_the_other(
    writer: ModuleType, reader: ModuleType, name: str
) -> None:
    def run() -> None:
        written, args, kwargs = wrapped(writer, name)
        model, _, _ = wrapped(reader, name, nnx.Rngs(7, dropout=8))
        for one in (written, model):
            one.lazy_init(*args, **kwargs)
        nnx.update(model, nnx.state(written))
        assert_same(model(*args, **kwargs), written(*args, **kwargs))

    in_mesh(lambda _: run())(writer)


class HoldsArrays(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.table = jnp.arange(2.0)

    def __call__(self, x: Array) -> Array:
        return self.linear(x) + self.table


@BOTH_WAYS
@pytest.mark.parametrize("name", [*NNX, "sharded"])
def test_linen_variables_of_one_bridge_are_applied_by_the_other(
    writer: ModuleType, reader: ModuleType, name: str
) -> None:
    def run() -> None:
        (one, inputs), (other, _) = (_to_linen(bridge, name) for bridge in (writer, reader))
        variables = one.init(KEYS, *inputs)
        rngs = {"dropout": jax.random.key(2)}
        expected = one.apply(variables, *inputs, rngs=rngs, mutable=True)
        found = other.apply(variables, *inputs, rngs=rngs, mutable=True)
        assert_same(described(nn.unbox(found)), described(nn.unbox(expected)))

    in_mesh(lambda _: run())(writer)


def _to_linen(bridge: ModuleType, name: str) -> tuple[Any, tuple[Any, ...]]:
    return (bridge.to_linen(NnxSharded), (X,)) if name == "sharded" else to_linen(bridge, name)


def test_linen_variables_of_flax_with_bare_arrays_are_applied() -> None:
    expected = flax.nnx.bridge.to_linen(HoldsArrays)
    with fresh_registry():
        variables = expected.init(KEY, X)
        found = flax12.to_linen(HoldsArrays).apply(variables, X)
        assert_same(found, expected.apply(variables, X))


@BOTH_WAYS
def test_an_orbax_checkpoint_of_linen_variables_loads(
    writer: ModuleType, reader: ModuleType, tmp_path: Any
) -> None:
    (one, inputs), (other, _) = (to_linen(bridge, "mlp") for bridge in (writer, reader))
    written = one.init(KEY, *inputs)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "variables", written)
    checkpointer.wait_until_finished()
    abstract = jax.eval_shape(other.init, jax.random.key(9), *inputs)
    restored = checkpointer.restore(tmp_path / "variables", abstract)
    assert_same(other.apply(restored, *inputs), one.apply(written, *inputs))


# --------------------------------------------------------------------------------------
# what is mended: ToNNX


def as_pure_linen(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What Linen itself computes, with the values of a ToNNX whose rngs is KEY."""
    variables = module.init(nnx.Rngs(params=KEY).params(), *args, **kwargs)
    return module.apply(variables, *args, **kwargs)


class SameNameTwice(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.ones, (3, 2))
        mean = self.variable("ema", "kernel", lambda: jnp.full((3, 2), 2.0))
        return x @ (kernel + mean.value)


def test_two_collections_may_have_a_variable_of_one_path() -> None:
    model = flax12.ToNNX(SameNameTwice(), rngs=KEY).lazy_init(X)
    assert_same(model(X), as_pure_linen(SameNameTwice(), X))
    names = {name: type(getattr(model, name)).__name__ for name in ("kernel", "kernel__ema")}
    assert names == {"kernel": "Param", "kernel__ema": "ema"}
    merged = nnx.merge(*nnx.split(model))
    assert_same(merged(X), model(X))
    model.kernel__ema[...] *= 0
    assert_same(model(X), X @ jnp.ones((3, 2)))


@pytest.mark.parametrize("name", ["rngs", "module", "lazy_init", "sow", "eval", "train", "scope"])
def test_a_linen_child_may_be_called(name: str) -> None:
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(2, name=name)(x)

    model = flax12.ToNNX(Parent(), rngs=KEY).lazy_init(X)
    assert_same(model(X), as_pure_linen(Parent(), X))
    assert_same(nnx.clone(model)(X), model(X))
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == 2


@pytest.mark.parametrize("name", ["rngs", "module", "lazy_init", "sow", "eval", "train", "scope"])
def test_a_linen_parameter_may_be_called(name: str) -> None:
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return x * self.param(name, nn.initializers.normal(), (3,))

    model = flax12.ToNNX(Scaled(), rngs=KEY).lazy_init(X)
    model.train()
    model.eval()
    assert_same(model(X), as_pure_linen(Scaled(), X))
    assert_same(nnx.merge(*nnx.split(model))(X), model(X))


def test_captured_intermediates_leave_the_call_alone() -> None:
    model = flax12.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)).lazy_init(X)
    y = model(X, mutable=["intermediates"], capture_intermediates=True)
    assert "__call__" not in vars(model)
    assert_same(jax.tree.leaves(nnx.state(model, nnx.Intermediate)), [y])
    assert_same(model(X), y)


def test_what_a_call_sows_is_kept_without_mutable_and_does_not_grow() -> None:
    model = flax12.ToNNX(Sows(), rngs=nnx.Rngs(0)).lazy_init(X)
    for factor in (1, 2, 3):
        y = model(factor * X)
        assert_same(model.h.get_value(), (y,))
        assert_same(model.penalty.get_value(), jnp.add(0.0, jnp.sum(y**2)))


def test_what_a_call_sows_with_mutable_does_not_grow() -> None:
    model = flax12.ToNNX(Sows(), rngs=nnx.Rngs(0)).lazy_init(X)
    for factor in (1, 2, 3):
        y = model(factor * X, mutable=["intermediates", "losses"])
        assert_same(model.h.get_value(), (y,))


def test_batch_norm_trains_with_no_ceremony() -> None:
    module = nn.BatchNorm(use_running_average=False, momentum=0.5)
    variables = module.init(KEY, X)
    model = flax12.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(X)
    for factor in (1, 2):
        expected, updates = module.apply(variables, factor * X, mutable=["batch_stats"])
        variables = {**variables, **updates}
        assert_same(model(factor * X), expected)
        assert_same(model.mean.get_value(), variables["batch_stats"]["mean"])
        assert_same(model.var.get_value(), variables["batch_stats"]["var"])


def test_batch_norm_trains_under_jit_and_in_a_step() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(2)(nn.BatchNorm(use_running_average=False, momentum=0.5)(x))

    models = [
        flax12.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X),
        flax.nnx.bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X),
    ]

    def step(model: Any, **options: Any) -> Any:
        def loss(model: Any) -> Array:
            return jnp.sum(model(X, **options) ** 2)

        return nnx.jit(nnx.value_and_grad(loss))(model)

    for _ in range(2):
        assert_same(described(step(models[0])), described(step(models[1], mutable=["batch_stats"])))
        assert_same(facts(models[0]), facts(models[1]))


def test_equal_models_with_lambdas_compile_once() -> None:
    traced = []

    @nnx.jit
    def call(model: Any, x: Array) -> Array:
        traced.append(x)
        return model(x)

    for seed in range(3):
        module = nn.Sequential([nn.Dense(2), lambda x: x * 2])
        call(flax12.ToNNX(module, rngs=nnx.Rngs(seed)).lazy_init(X), X)
    assert len(traced) == 1


def test_a_stream_that_linen_needs_and_nobody_gave_is_an_error() -> None:
    model = flax12.ToNNX(Noisy(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
    with pytest.raises(BridgeError, match="a PRNG stream is missing; there are: none"):
        model(X, rngs={})
    with pytest.raises(BridgeError, match="a PRNG stream is missing"):
        flax12.ToNNX(nn.Dense(2)).lazy_init(X)


def test_a_call_before_lazy_init_says_what_to_do() -> None:
    with pytest.raises(BridgeError, match=r"called before lazy_init(.|\n)*bridge\.lazy_init\("):
        flax12.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0))(X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flax12.ToNNX(nn.Dense), "found the class Dense, expected an instance"),
        (lambda: flax12.ToNNX(nnx.Linear), "found the class Linear, expected an instance"),
        (lambda: flax12.to_linen(nn.Dense, 2), "found the class Dense, which is a Linen module"),
        (lambda: flax12.lazy_init(nnx.Linear, X), "found the class Linear, expected an instance"),
        (lambda: flax12.lazy_init(3), "found int, which is neither"),
    ],
)
def test_a_mistaken_argument_is_a_typed_error(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        make()


# --------------------------------------------------------------------------------------
# what is mended: ToLinen


class CountsConstructions(nnx.Module):
    made = 0

    def __init__(self, rngs: nnx.Rngs):
        type(self).made += 1
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 2)))

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel


@pytest.mark.parametrize("keys", [{}, {"params": KEY}, {"noise": KEY}], ids=str)
def test_no_initializer_runs_at_apply(keys: Any) -> None:
    model = flax12.to_linen(CountsConstructions)
    variables = model.init(KEY, X)
    program = str(jax.make_jaxpr(lambda v, x: model.apply(v, x, rngs=keys))(variables, X))
    assert "dot_general" in program
    assert "random_bits" not in program


def test_the_constructor_does_not_run_per_apply() -> None:
    class Counted(CountsConstructions):
        made = 0

    model = flax12.to_linen(Counted)
    variables = model.init(KEY, X)
    model.apply(variables, X)
    made = Counted.made
    for mutable in (False, True, ["params"]):
        model.apply(variables, X, mutable=mutable)
    jax.jit(model.apply)(variables, X)
    flax12.to_linen(Counted).apply(variables, X)
    assert Counted.made == made
    assert made <= 2  # the values at init, and the structure, which is kept for the next apply


class NeedsValues(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 2)))
        self.largest = float(jnp.max(jnp.ones(2)) + 0 * self.kernel[0, 0])

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel * self.largest


def test_abstract_init_says_whether_the_structure_is_found_without_values() -> None:
    variables = flax12.to_linen(NeedsValues).init(KEY, X)
    concrete = flax12.to_linen(NeedsValues, abstract_init=False)
    assert_same(concrete.apply(variables, X), X @ variables["params"]["kernel"])
    seen = []

    class Watched(CountsConstructions):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            seen.append(isinstance(self.kernel.get_raw_value(), jax.core.Tracer))

    given = {"params": {"kernel": jnp.ones((3, 2))}}
    flax12.to_linen(Watched, abstract_init=True).apply(given, X)
    flax12.to_linen(Watched, abstract_init=False).apply(given, X)
    assert seen == [True, False]


@pytest.mark.parametrize("mutable", [False, True])
def test_a_stream_that_nnx_needs_and_nobody_gave_is_an_error(mutable: bool) -> None:
    model = flax12.to_linen(nnx.Dropout, 0.5)
    variables = model.init(KEYS, X)
    with pytest.raises(LinseyError, match="no PRNG stream was given"):
        model.apply(variables, X, mutable=mutable)
    with pytest.raises(BridgeError, match="a PRNG stream is missing; given: params"):
        model.init({"params": KEY}, X)


def test_no_stream_is_needed_where_dropout_is_off() -> None:
    model = flax12.to_linen(nnx.Dropout, 0.5)
    variables = model.init(KEYS, X)
    assert_same(model.apply(variables, X, deterministic=True), X)


def test_a_missing_variable_is_a_typed_error_with_its_path() -> None:
    model = flax12.to_linen(NnxMlp, 4)
    variables = model.init(KEY, X)
    less = {"params": {"first": variables["params"]["first"]}}
    with pytest.raises(EmitError, match=r"at params/second/\w+: the variable is missing"):
        model.apply(less, X)
    with pytest.raises(EmitError, match="the variable is missing"):
        model.apply({}, X)


def test_a_variable_of_another_shape_is_a_typed_error_with_its_path() -> None:
    model = flax12.to_linen(nnx.Linear, 3, 2)
    variables = model.init(KEY, X)
    wrong = {"params": {**variables["params"], "bias": jnp.ones((1,))}}
    with pytest.raises(EmitError, match=r"at params/bias: found the shape \(1,\), expected"):
        model.apply(wrong, X)


def test_variables_that_no_module_has_are_not_passed_over_in_silence() -> None:
    model = flax12.to_linen(nnx.Linear, 3, 2)
    variables = model.init(KEY, X)
    more = {"params": {**variables["params"], "extra": jnp.ones(2)}}
    with pytest.warns(UserWarning, match="extra"):
        output = model.apply(more, X)
    assert_same(output, model.apply(variables, X))


class HoldsLinen(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([flax12.ToNNX(nn.Dense(3), rngs=rngs) for _ in range(2)])
        self.head = flax12.ToNNX(Mlp(), rngs=rngs)
        self.norm = flax12.ToNNX(nn.BatchNorm(False, momentum=0.5), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return self.norm(self.head(x))


def test_to_nnx_inside_to_linen_has_variables_that_count() -> None:
    model = flax12.to_linen(HoldsLinen)
    output, variables = model.init_with_output(KEY, X)
    assert sorted(variables) == ["batch_stats", "params"]
    assert sorted(variables["params"]) == ["blocks", "head", "norm"]
    found, updates = model.apply(variables, X, mutable=["batch_stats"])
    assert_same(found, output)
    changed = jax.tree.map(jnp.zeros_like, variables["params"])
    assert not np.any(model.apply({**variables, "params": changed}, X, mutable=True)[0])
    grads = jax.grad(lambda v: jnp.sum(model.apply(v, X, mutable=True)[0] ** 3))(variables)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads["params"]["blocks"]))
    before, after = variables["batch_stats"], updates["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert not np.array_equal(before["norm"]["mean"], after["norm"]["mean"])


def test_to_nnx_inside_to_linen_inside_linen_inside_to_nnx() -> None:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(2)(flax12.to_linen(HoldsLinen, name="inner")(x))

    model = flax12.ToNNX(Outer(), rngs=nnx.Rngs(0)).lazy_init(X)
    assert sorted(model.inner) == ["blocks", "head", "norm"]
    variables = Outer().init(jax.random.key(1), X)
    expected, _ = Outer().apply(variables, X, mutable=["batch_stats"])
    nnx.update(model, {**variables["params"]})
    assert_same(model(X), expected)


def test_a_child_that_is_called_twice_is_initialised_once() -> None:
    class Outer(nn.Module):
        def setup(self) -> None:
            self.child = flax12.to_linen(nnx.Linear, 3, 3)

        def __call__(self, x: Array) -> Array:
            return self.child(self.child(x))

    output, variables = Outer().init_with_output(KEY, X)
    assert_same(Outer().apply(variables, X), output)


def test_a_class_keeps_its_own_structure_beside_one_of_its_name() -> None:
    def make(count: int) -> type[nnx.Module]:
        class Model(nnx.Module):
            def __init__(self, rngs: nnx.Rngs):
                self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(count)])

            def __call__(self, x: Array) -> Array:
                for layer in self.layers:
                    x = layer(x)
                return x * count

        return Model

    for count in (1, 2, 3):
        model = flax12.to_linen(make(count))
        output, variables = model.init_with_output(KEY, X)
        assert len(variables["params"]["layers"]) == count
        assert_same(model.apply(variables, X), output)


def test_what_the_constructor_reads_elsewhere_is_not_stale() -> None:
    class Model(nnx.Module):
        scale = 1.0
        width = 2

        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, type(self).width, rngs=rngs)
            self.scale = type(self).scale

        def __call__(self, x: Array) -> Array:
            return self.linear(x) * self.scale

    for scale, width in ((1.0, 2), (3.0, 2), (3.0, 4)):
        Model.scale, Model.width = scale, width
        model = flax12.to_linen(Model)
        output, variables = model.init_with_output(KEY, X)
        assert_same(model.apply(variables, X), output)


def test_a_numpy_attribute_is_no_obstacle() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.table = np.arange(2.0, dtype=np.float32)

        def __call__(self, x: Array) -> Array:
            return self.linear(x) + self.table

    model = flax12.to_linen(Model)
    output, variables = model.init_with_output(KEY, X)
    assert_same(model.apply(variables, X), output)


@pytest.mark.usefixtures("_registry")
def test_what_a_variable_does_when_it_is_read_is_done_once() -> None:
    @nnx.register_variable_name("doubled")
    class Doubled(nnx.Variable):
        def get_value(self, **options: Any) -> Any:
            return super().get_value(**options) * 2

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.w = Doubled(jnp.ones((3,)))

        def __call__(self, x: Array) -> Array:
            return x * self.w.get_value()

    model = flax12.to_linen(Model)
    expected = Model(nnx.Rngs(0))(X)
    output, variables = model.init_with_output(KEY, X)
    for _ in range(2):
        assert_same(output, expected)
        output, variables = model.apply(variables, X, mutable=True)


def test_the_class_of_to_linen_class_can_be_called_itself() -> None:
    Linear = flax12.to_linen_class(nnx.Linear, out_features=2)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return Linear(in_features=2, name="b")(Linear((3,), {"use_bias": False}, name="a")(x))

    expected = flax12.to_linen(nnx.Linear, 3, 2).init(KEY, X)
    assert_same(Linear(in_features=3).init(KEY, X), expected)
    shapes = jax.tree.map(lambda leaf: leaf.shape, Outer().init(KEY, X)["params"])
    assert shapes == {"a": {"kernel": (3, 2)}, "b": {"bias": (2,), "kernel": (2, 2)}}


# --------------------------------------------------------------------------------------
# what is mended: partitions


def test_nnx_meta_names_the_axis_that_a_transform_adds_and_removes() -> None:
    box = flax12.NNXMeta(nnx.Param, jnp.ones((3, 2)), {"out_sharding": ("in", "out")})
    added = box.add_axis(0, {nn.PARTITION_NAME: "layers"})
    assert added.metadata["out_sharding"] == ("layers", "in", "out")
    assert added.get_partition_spec() == jax.sharding.PartitionSpec("layers", "in", "out")
    assert added.remove_axis(0, {nn.PARTITION_NAME: "layers"}).metadata == box.metadata
    last = box.add_axis(2, {nn.PARTITION_NAME: None})
    assert last.metadata["out_sharding"] == ("in", "out", None)


@pytest.mark.parametrize("lift", ["vmap", "scan"])
def test_stacked_layers_have_the_partitions_of_pure_linen(lift: str) -> None:
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
            self.kernel = nnx.Param(init(rngs.params(), (3, 3)))

        def __call__(self, x: Array, _: Any = None) -> Any:
            return x @ self.kernel if lift == "vmap" else (x @ self.kernel, None)

    class LinenLayer(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: Any = None) -> Any:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            y = x @ self.param("kernel", init, (3, 3))
            return y if lift == "vmap" else (y, None)

    class Stack(nn.Module):
        layer: Any
        args: tuple[Any, ...]

        @nn.compact
        def __call__(self, x: Array) -> Any:
            options: dict[str, Any] = {
                "variable_axes": {"params": 0},
                "split_rngs": {"params": True},
                "metadata_params": {nn.PARTITION_NAME: "layers"},
            }
            if lift == "vmap":
                options |= {"in_axes": None, "axis_size": 2}
                return nn.vmap(self.layer, **options)(*self.args, name="layers")(x)
            stacked = nn.scan(self.layer, length=2, **options)
            return stacked(*self.args, name="layers")(x, None)[0]

    with jax.set_mesh(_mesh("layers", "in", "out")):
        models = [Stack(flax12.ToLinen, (Layer,)), Stack(LinenLayer, ())]
        specs = [nn.get_partition_spec(model.init(KEY, X)) for model in models]
        shapes = jax.eval_shape(models[0].init, KEY, X)
        assert nn.get_partition_spec(shapes) == specs[1]
    assert specs[0] == specs[1]
    kernel = specs[0]["params"]["layers"]["kernel"]
    assert kernel == jax.sharding.PartitionSpec("layers", "in", "out")


def test_shapes_of_partitioned_parameters_under_a_mesh() -> None:
    with jax.set_mesh(_mesh("in", "out")):
        shapes = jax.eval_shape(flax12.to_linen(NnxSharded).init, KEY, X)
        spec = nn.get_partition_spec(shapes)["params"]["kernel"]
    assert nn.unbox(shapes)["params"]["kernel"].shape == (3, 2)
    assert spec == jax.sharding.PartitionSpec("in", "out")


def test_annotated_parameters_need_no_mesh() -> None:
    variables = flax12.to_linen(NnxSharded).init(KEY, X)
    spec = nn.get_partition_spec(variables)["params"]["kernel"]
    assert spec == jax.sharding.PartitionSpec("in", "out")
    model = flax12.ToNNX(Partitioned(), rngs=KEY).lazy_init(X)
    assert model.Dense_0["kernel"].out_sharding == ("in", "out")
    assert_same(model(X), as_pure_linen(Partitioned(), X))
