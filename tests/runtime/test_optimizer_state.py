"""The state of an optimizer lies as its parameters do, and steps equal flax and optax by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_same
from flax import linen as nn
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import linsey
from linsey import Values
from linsey.runtime.optimizer_state import init_optimizer, state_shardings
from linsey.runtime.train_state import TrainState
from linsey.runtime.training import TrainStep

RULES = (("batch", "data"), ("embed", "data"), ("mlp", "model"))
SPECS = {
    "params/wide/bias": P("model"),
    "params/wide/kernel": P("data", "model"),
    "params/square/bias": P("data"),
    "params/square/kernel": P("model", "data"),
    "params/plain/bias": P(),
    "params/plain/kernel": P(),
}
X = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
INIT = {"params": jax.random.key(0)}


def dense(features: int, names: tuple[str, str] | None, name: str) -> nn.Dense:
    kernel, bias = nn.initializers.lecun_normal(), nn.initializers.zeros
    if names is not None:
        kernel = nn.with_logical_partitioning(kernel, names)
        bias = nn.with_logical_partitioning(bias, names[1:])
    return nn.Dense(features, kernel_init=kernel, bias_init=bias, name=name)


class Net(nn.Module):
    """A wide kernel, a square one that is split the other way round, and one without names."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.gelu(dense(16, ("embed", "mlp"), "wide")(x))
        x = nn.gelu(dense(16, ("mlp", "embed"), "square")(x))
        return dense(4, None, "plain")(x)


PROGRAM = linsey.lower(Net(), X, rngs=INIT)


def mesh_of(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def on_mesh() -> Any:
    return PROGRAM.compile(mesh=mesh_of(), rules=RULES)


def squares(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x) - y) ** 2)


def is_matrix(tree: Any) -> Any:
    """Works on any pytree of parameters."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def labels(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", tree)


def warm_up() -> Any:
    return optax.linear_schedule(1e-3, 1e-2, 5)


# Each is made where it is used: some make arrays, and no device is to be asked for at import.
OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adam bfloat16": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "adamw schedule": lambda: optax.adamw(warm_up(), mask=is_matrix),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "lion": lambda: optax.lion(1e-2),
    "ema": lambda: optax.chain(optax.scale(-1e-2), optax.ema(0.9)),
    "masked": lambda: optax.masked(optax.adam(1e-2), is_matrix),
    "partition": lambda: optax.partition(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2, momentum=0.9)}, labels
    ),
    "multi steps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=warm_up()),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8, momentum=0.9),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1)),
    "if finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
    "schedule free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "d-adaptation": lambda: optax.contrib.dadapt_adamw(1.0),
    "momo": lambda: optax.contrib.momo(1e-2),
}


def nested(values: Any) -> Any:
    """The parameters as flax nests them, in place of each `Values` in a tree."""

    def one(part: Any) -> Any:
        if not isinstance(part, Values):
            return part
        paths = {tuple(key.split("/")[1:]): value for key, value in part.items()}
        return traverse_util.unflatten_dict(paths)

    return jax.tree.map(one, values, is_leaf=lambda part: isinstance(part, Values))


def by_hand(tx: Any, shardings: Any, steps: int) -> Any:
    """Parameters and optimizer state after some steps of flax and optax alone.

    Args:
        tx: the optimizer.
        shardings: of the parameters and of the optimizer state; None: one device.
        steps: how many.
    """
    tx = optax.with_extra_args_support(tx)

    def init(key: Any) -> Any:
        params = nn.meta.unbox(Net().init(key, X)["params"])
        return params, tx.init(params)

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean((Net().apply({"params": params}, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        if shardings is not None:  # else the compiler may spread a norm's sum in another way
            grads = jax.lax.with_sharding_constraint(grads, shardings[0])
        updates, state = tx.update(grads, state, params, value=value, grad=grads)
        return optax.apply_updates(params, updates), state, value

    into: dict[str, Any] = {}
    params, state = jax.jit(init, out_shardings=shardings)(INIT)
    if shardings is not None:
        into = {
            "in_shardings": (*shardings, None, None),
            "out_shardings": (*shardings, None),
        }
    jitted = jax.jit(step, donate_argnums=(0, 1), **into)
    values = []
    for _ in range(steps):
        params, state, value = jitted(params, state, X, Y)
        values.append(value)
    return params, state, values


def run(exe: Any, tx: Any, steps: int) -> Any:
    step = TrainStep(exe, squares, tx)
    state, values = step.init(INIT), []
    for _ in range(steps):
        state, value = step(state, X, Y)
        values.append(value)
    return step, state, values


ON_ONE_DEVICE = (
    "momentum",
    "adafactor",
    "masked",
    "partition",
    "multi steps",
    "hyperparameters",
    "noise",
    "plateau",
    "schedule free",
    "muon",
)


@pytest.mark.parametrize("name", ON_ONE_DEVICE)
def test_steps_equal_flax_and_optax_by_hand(name: str) -> None:
    _, state, values = run(PROGRAM.compile(), OPTIMIZERS[name](), 2)
    params, opt_state, expected = by_hand(OPTIMIZERS[name](), None, 2)
    assert_same(nested(state.values), params)
    assert_same(nested(state.opt_state), opt_state)
    assert_same(values, expected)


@pytest.mark.mesh
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_steps_equal_flax_and_optax_by_hand(name: str) -> None:
    step, state, values = run(on_mesh(), OPTIMIZERS[name](), 2)
    shardings = step.shardings(state)
    assert shardings is not None
    where = nested(shardings.values), nested(shardings.opt_state)
    params, opt_state, expected = by_hand(OPTIMIZERS[name](), where, 2)
    assert_same(nested(state.values), params)
    assert_same(nested(state.opt_state), opt_state)
    assert_same(values, expected)
    assert_lies_as_parameters(state, name)


@pytest.mark.mesh
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_born_as_its_parameters_lie(name: str) -> None:
    assert_lies_as_parameters(TrainStep(on_mesh(), squares, OPTIMIZERS[name]()).init(INIT), name)


def spec_of(array: Any) -> tuple[Any, ...]:
    """The spec of an array, filled up with None to its rank."""
    return full(array.sharding.spec, array.ndim)


def full(spec: P, rank: int) -> tuple[Any, ...]:
    return (*spec, *[None] * (rank - len(spec)))


def assert_lies_as_parameters(state: TrainState, name: str) -> None:
    for key, value in state.values.items():
        assert spec_of(value) == full(SPECS[key], value.ndim), key
    followed = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        place = jax.tree_util.keystr(path)
        keys = [getattr(part, "key", None) for part in path]
        names = [key for key in keys if key in SPECS]
        if names and leaf.shape == state.values[names[0]].shape:
            followed += 1
            assert spec_of(leaf) == full(SPECS[names[0]], leaf.ndim), place
        elif "v_row" not in place and "v_col" not in place:  # these have a test of their own
            assert spec_of(leaf) == (None,) * leaf.ndim, place
            assert leaf.size <= 6, place  # what is replicated is small
    assert followed >= 2 or name == "noise"


@pytest.mark.mesh
def test_adafactor_drops_the_axis_that_it_averages() -> None:
    _, state, _ = run(on_mesh(), OPTIMIZERS["adafactor"](), 1)
    (factored,) = (
        part
        for part in jax.tree.leaves(
            state.opt_state, is_leaf=lambda part: isinstance(part, optax.FactoredState)
        )
        if isinstance(part, optax.FactoredState)
    )
    # The wide kernel is (8, 16), its larger axis is the last one: v_row is of the first.
    wide, square, plain = (f"params/{name}/kernel" for name in ("wide", "square", "plain"))
    assert (factored.v_row[wide].shape, spec_of(factored.v_row[wide])) == ((8,), ("data",))
    assert (factored.v_col[wide].shape, spec_of(factored.v_col[wide])) == ((16,), ("model",))
    # The square one is split over both: which axis is dropped decides.
    assert (factored.v_row[square].shape, spec_of(factored.v_row[square])) == ((16,), ("model",))
    assert (factored.v_col[square].shape, spec_of(factored.v_col[square])) == ((16,), ("data",))
    assert factored.v[wide].shape == (1,)
    assert spec_of(factored.v[wide]) == (None,)
    # (16, 4) is below the size from which on it factors.
    assert spec_of(factored.v[plain]) == (None, None)
    assert spec_of(factored.v_row[plain]) == (None,)
    assert spec_of(factored.v["params/wide/bias"]) == ("model",)


def arranged(state: Any, specs: dict[str, P], **shapes: tuple[int, ...]) -> Any:
    """The shardings of a state of some parameters on a mesh that needs one device."""
    names = tuple(f"params/{name}" for name in shapes)
    index = linsey.ir.SlotIndex(names, ("params",) * len(names), {})
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = Values(index, tuple(jnp.zeros(shape) for shape in shapes.values()))
    where = Values(index, tuple(NamedSharding(mesh, specs[name]) for name in shapes))
    return state_shardings(state(params), params, where)


def test_adafactor_drops_the_right_axis_of_three() -> None:
    found = arranged(
        optax.scale_by_factored_rms(min_dim_size_to_factor=2).init,
        {"a": P("data", None, "model"), "b": P(None, ("data", "model"))},
        a=(6, 2, 4),
        b=(4, 4),
    )
    assert found.v_row["params/a"].spec == P(None, "model")  # 6 is dropped
    assert found.v_col["params/a"].spec == P("data", None)  # 4 is dropped
    assert found.v_row["params/b"].spec == P(None)
    assert found.v_col["params/b"].spec == P(("data", "model"))
    assert found.count.spec == P()


def test_a_history_keeps_its_own_axis_whole() -> None:
    found = arranged(
        lambda params: optax.scale_by_lbfgs(memory_size=3).init(params),
        {"w": P("data", "model")},
        w=(4, 8),
    )
    assert found.diff_params_memory["params/w"].spec == P(None, "data", "model")
    assert found.params["params/w"].spec == P("data", "model")
    assert found.weights_memory.spec == P()


def test_a_missing_axis_is_told_only_where_there_is_no_doubt() -> None:
    def means(params: Values) -> Any:
        return jax.tree.map(lambda leaf: leaf.mean(-1), params)

    specs = {"a": P("data", "model"), "b": P("data", "model"), "c": P("model", None)}
    found = arranged(means, specs, a=(4, 8), b=(4, 4), c=(4, 4))
    assert found["params/a"].spec == P("data")
    assert found["params/b"].spec == P()
    assert found["params/c"].spec == P()


def test_trees_inside_a_slot_follow_it() -> None:
    def doubled(params: Values) -> Any:
        return jax.tree.map(lambda leaf: {"all": leaf, "norm": leaf.sum(), "low": leaf}, params)

    found = arranged(doubled, {"w": P("data", "model")}, w=(4, 8))
    specs = {name: sharding.spec for name, sharding in found["params/w"].items()}
    assert specs == {"all": P("data", "model"), "norm": P(), "low": P("data", "model")}


def test_a_state_of_one_flat_array_is_replicated() -> None:
    found = arranged(optax.flatten(optax.adam(1.0)).init, {"w": P("data", "model")}, w=(4, 8))
    assert {sharding.spec for sharding in jax.tree.leaves(found)} == {P()}


@pytest.mark.mesh
def test_flat_state_runs_and_is_replicated() -> None:
    _, state, _ = run(on_mesh(), optax.flatten(optax.adam(1e-2)), 2)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.mesh
def test_state_of_some_parameters() -> None:
    step = TrainStep(on_mesh(), squares, optax.adam(1e-2), wrt=lambda name: "kernel" in name)
    state, _ = step(step.init(INIT), X, Y)
    mu = state.opt_state[0].mu
    assert mu.keys() == tuple(key for key in state.values if "kernel" in key)
    for key, value in mu.items():
        assert spec_of(value) == full(SPECS[key], value.ndim)


@pytest.mark.mesh
def test_no_device_makes_a_whole_slot_of_the_state() -> None:
    exe = on_mesh()
    assert exe.shardings is not None
    params = exe.init(INIT).select("params")
    for name in ("adam", "muon", "schedule free", "adafactor"):
        init = jax.jit(
            lambda params, name=name: init_optimizer(OPTIMIZERS[name](), params, exe.shardings)
        )
        text = init.lower(params).compile().as_text()
        assert "f32[2,8]" in text
        assert "f32[8,16]" not in text, name
        assert "f32[16,16]" not in text, name


@pytest.mark.mesh
def test_explicit_axes() -> None:
    values = []
    for kind in (AxisType.Auto, AxisType.Explicit):
        exe = PROGRAM.compile(mesh=mesh_of(kind), rules=RULES)
        state = TrainStep(exe, squares, OPTIMIZERS["adafactor"]()).init(INIT)
        values.append(state)
        first, own = (jax.tree.leaves(each.opt_state) for each in (values[0], state))
        for leaf, other in zip(first, own, strict=True):
            assert spec_of(leaf) == spec_of(other)
    assert_same(jax.device_get(values[0].opt_state), jax.device_get(values[1].opt_state))
