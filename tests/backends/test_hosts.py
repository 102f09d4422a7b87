"""Hosted modules: Linen code as an NNX module, and NNX code as a Linen module, used as such."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

import linsey

X = jnp.arange(6.0, dtype=jnp.float32).reshape(2, 3) / 5.0 - 0.3
Y = jnp.arange(4.0, dtype=jnp.float32).reshape(2, 2)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
CALL_KEYS = {"dropout": jax.random.key(7)}


def key_of(stream: str, count: int, seed: int) -> jax.Array:
    """The key that ``nnx.Rngs`` gives at its draw number `count` of a stream with `seed`."""
    rngs = nnx.Rngs(**{stream: seed})
    for _ in range(count):
        rngs[stream]()
    return rngs[stream]()


# Linen in NNX


class MLP(nn.Module):
    features: int = 2
    activation: Callable[[Any], Any] = nn.relu

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = self.activation(nn.Dense(4)(x))
        return nn.Dense(self.features)(x)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, train: bool = True) -> Any:
        x = nn.Dense(8)(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))


class Coder(nn.Module):
    def setup(self) -> None:
        self.encoder = nn.Dense(4)
        self.decoder = nn.Dense(3)
        self.scale = self.param("scale", nn.initializers.ones, (3,))

    def encode(self, x: Any) -> Any:
        return self.encoder(x)

    def decode(self, z: Any, *, double: bool = False) -> Any:
        return self.decoder(z) * self.scale * (2 if double else 1)

    def __call__(self, x: Any) -> Any:
        return self.decode(self.encode(x))


class Clashing(nn.Module):
    """Every name here is one that an NNX module uses for something else."""

    def setup(self) -> None:
        self.rngs = nn.Dense(3)
        self.set_attributes = nn.Dense(3)
        self.train = self.param("eval", nn.initializers.normal(), (3,))
        self.gain = self.param("gain", nn.initializers.ones, (3,))
        self.seen = self.variable("stats", "gain", jnp.zeros, (3,))
        self.other = self.param("linsey_spec", nn.initializers.normal(), (3,))

    def sow_it(self, x: Any) -> Any:
        return x * self.gain

    def __call__(self, x: Any) -> Any:
        self.seen.value = self.seen.value + x.sum(0)
        return self.sow_it(self.set_attributes(self.rngs(x))) + self.train * self.other


class Shadowing(nn.Module):
    """A child and a parameter that are named like methods, its own and those of NNX."""

    def setup(self) -> None:
        self.encode = nn.Dense(3)
        self.iter_modules = self.param("iter_modules", nn.initializers.ones, (3,))

    def encode(self, x: Any) -> Any:
        raise NotImplementedError  # Linen takes the attribute that setup made

    def __call__(self, x: Any) -> Any:
        return self.encode(x) * self.iter_modules


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(2)(x)
        self.sow("intermediates", "hidden", x)
        return x


class Cell(nn.Module):
    @nn.compact
    def __call__(self, carry: Any, _: Any) -> Any:
        return jnp.tanh(nn.Dense(3)(carry)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        layers = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)(
            name="layers"
        )
        return layers(x, None)[0]


def test_variables_and_submodules_are_attributes() -> None:
    model = linsey.to_nnx(MLP(), X, rngs=0)
    variables = MLP().init(jax.random.key(0), X)
    assert isinstance(model, nnx.Module)
    assert isinstance(model.Dense_0.kernel, nnx.Param)
    assert_same(model.Dense_0.kernel.get_value(), variables["params"]["Dense_0"]["kernel"])
    assert_same(nnx.to_pure_dict(nnx.state(model)), variables["params"])
    assert_same(model(X), MLP().apply(variables, X))


def test_a_child_can_be_called_alone() -> None:
    model = linsey.to_nnx(MLP(), X, rngs=0)
    variables = MLP().init(jax.random.key(0), X)
    assert_same(model.Dense_0(X), nn.Dense(4).apply({"params": variables["params"]["Dense_0"]}, X))


def test_an_unknown_attribute_names_those_that_there_are() -> None:
    model = linsey.to_nnx(MLP(), X, rngs=0)
    with pytest.raises(
        AttributeError, match=r"MLP has no attribute 'Dense_7'; it has Dense_0, Dense_1"
    ):
        _ = model.Dense_7


def test_every_method_can_be_called() -> None:
    model = linsey.to_nnx(Coder(), X, rngs=0)
    variables = Coder().init(jax.random.key(0), X)
    z = Coder().apply(variables, X, method="encode")
    assert_same(model.encode(X), z)
    assert_same(
        model.decode(z, double=True), Coder().apply(variables, z, method="decode", double=True)
    )
    assert_same(model(z, method="decode"), Coder().apply(variables, z, method="decode"))
    assert_same(model(X, method=Coder.encode), z)


@pytest.mark.parametrize(
    "module", [Clashing(), Shadowing()], ids=lambda module: type(module).__name__
)
def test_names_that_clash_work_and_round_trip(module: nn.Module) -> None:
    variables = module.init(jax.random.key(0), X)
    model = linsey.to_nnx(module, X, rngs=0)
    model.eval()
    model.train()
    again, found = linsey.lower(model).emit("linen")
    assert again == module
    assert_same(found, variables)
    expected, updates = module.apply(variables, X, mutable=["stats"])
    assert_same(model(X), expected)
    _, found = linsey.lower(model).emit("linen")
    assert_same(found, {**variables, **updates})


def test_a_name_that_is_taken_says_what_it_is() -> None:
    model = linsey.to_nnx(Clashing(), X, rngs=0)
    assert isinstance(model.rngs__module.kernel, nnx.Param)
    assert isinstance(model.set_attributes__module, nnx.Module)
    assert isinstance(model.eval__params, nnx.Param)
    assert isinstance(model.gain, nnx.Param)
    assert not isinstance(model.gain__stats, nnx.Param)
    other = linsey.to_nnx(Shadowing(), X, rngs=0)
    assert isinstance(other.iter_modules__params, nnx.Param)
    assert isinstance(other.encode__module.kernel, nnx.Param)


def test_keys_given_at_call_are_used_as_module_apply_does() -> None:
    model = linsey.to_nnx(Noisy(), X, rngs=KEYS)
    variables = Noisy().init(KEYS, X)
    expected = Noisy().apply(variables, X, rngs=CALL_KEYS)
    assert_same(model(X, rngs=CALL_KEYS), expected)
    assert_same(model(X, rngs=CALL_KEYS), expected)
    assert_same(model(X, train=False), Noisy().apply(variables, X, train=False))


def test_own_streams_are_drawn_from_when_a_call_brings_no_keys() -> None:
    model = linsey.to_nnx(Noisy(), X, rngs={"params": 0, "dropout": 1})
    variables = Noisy().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    outputs = [model(X) for _ in range(2)]
    assert not jnp.array_equal(*outputs)
    for count, found in enumerate(outputs):
        rngs = {"dropout": key_of("dropout", count, 1)}
        assert_same(found, Noisy().apply(variables, X, rngs=rngs))
    assert "params" not in model.rngs


def test_reseeding_repeats_the_draws() -> None:
    model = linsey.to_nnx(Noisy(), X, rngs={"params": 0, "dropout": 1})
    runs = []
    for _ in range(2):
        nnx.reseed(model, dropout=1)
        runs.append([model(X) for _ in range(2)])
    assert_same(runs[1], runs[0])
    assert not jnp.array_equal(*runs[0])
    nnx.reseed(model, dropout=2)
    assert not jnp.array_equal(model(X), runs[0][0])


def test_streams_come_from_nnx_rngs_too() -> None:
    model = linsey.to_nnx(Noisy(), X, rngs=nnx.Rngs(params=0, dropout=1))
    rngs = nnx.Rngs(params=0, dropout=1)
    variables = Noisy().init({"params": rngs.params(), "dropout": rngs.dropout()}, X)
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), variables["params"])
    assert not jnp.array_equal(model(X), model(X))


def test_a_missing_stream_is_named() -> None:
    model = linsey.to_nnx(Noisy(), X, rngs=KEYS)
    del model.rngs
    with pytest.raises(linsey.LinseyError) as caught:
        model(X)
    assert str(caught.value).startswith("at Noisy: a PRNG stream is missing; given: none.")
    assert '"dropout"' in str(caught.value)
    assert str(caught.value).endswith(
        "Pass rngs= with a key for every stream that the call draws from."
    )


def test_batch_statistics_are_written_back() -> None:
    model = linsey.to_nnx(Norm(), X, rngs=0)
    variables = Norm().init(jax.random.key(0), X)
    for _ in range(2):
        expected, updates = Norm().apply(variables, X, mutable=["batch_stats"])
        assert_same(model(X), expected)
        variables = {**variables, **updates}
        mean = variables["batch_stats"]["BatchNorm_0"]["mean"]
        assert isinstance(model.BatchNorm_0.mean, nnx.BatchStat)
        assert_same(model.BatchNorm_0.mean.get_value(), mean)
    assert_same(model(X, train=False), Norm().apply(variables, X, train=False))


def test_mutable_says_which_changes_stay() -> None:
    variables = Clashing().init(jax.random.key(0), X)
    model = linsey.to_nnx(Clashing(), X, rngs=0)
    model(X, mutable=["stats"])
    _, updates = Clashing().apply(variables, X, mutable=["stats"])
    assert_same(model.gain__stats.get_value(), updates["stats"]["gain"])
    with pytest.raises(Exception, match="Cannot update variable"):
        model(X, mutable=False)
    assert_same(model.gain__stats.get_value(), updates["stats"]["gain"])


def test_what_a_call_sows_is_that_of_the_call() -> None:
    model = linsey.to_nnx(Sowing(), X, rngs=0)
    variables = Sowing().init(jax.random.key(0), X)
    model(X)
    assert not hasattr(model, "intermediates")
    for _ in range(2):
        _, updates = Sowing().apply({"params": variables["params"]}, X, mutable=["intermediates"])
        model(X, mutable=["intermediates"])
        state = nnx.to_pure_dict(nnx.state(model, nnx.Intermediate))
        assert_same(jax.tree.leaves(state), jax.tree.leaves(updates))
    nnx.pop(model, nnx.Intermediate)
    assert_same(model(X), Sowing().apply(variables, X))


def loss_of(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x) - y) ** 2)


def linen_loss(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((MLP().apply({"params": params}, x) - y) ** 2)


def test_nnx_jit_updates_the_model() -> None:
    model = linsey.to_nnx(Norm(), X, rngs=0)
    variables = Norm().init(jax.random.key(0), X)

    @jax.jit
    def source(variables: Any, x: Any) -> Any:
        return Norm().apply(variables, x, mutable=["batch_stats"])

    expected, updates = source(variables, X)
    assert_same(nnx.jit(lambda model, x: model(x))(model, X), expected)
    state = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert_same(state, updates["batch_stats"])


def test_nnx_grad_gives_linens_gradients() -> None:
    model = linsey.to_nnx(MLP(), X, rngs=0)
    params = MLP().init(jax.random.key(0), X)["params"]
    expected = jax.grad(linen_loss)(params, X, Y)
    assert_same(nnx.to_pure_dict(nnx.grad(loss_of)(model, X, Y)), expected)
    value, found = nnx.value_and_grad(loss_of)(model, X, Y)
    assert_same((value, nnx.to_pure_dict(found)), jax.value_and_grad(linen_loss)(params, X, Y))


def test_nnx_vmap_runs_an_ensemble() -> None:
    keys = jax.random.split(jax.random.key(0), 3)

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: Any) -> Any:
        return linsey.to_nnx(MLP(), X, rngs=key)

    models = make(keys)
    variables = jax.vmap(lambda key: MLP().init(key, X))(keys)
    assert_same(nnx.to_pure_dict(nnx.state(models)), variables["params"])
    found = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(models, X)
    assert_same(found, jax.vmap(lambda v: MLP().apply(v, X))(variables))


def test_nnx_split_rngs_gives_each_its_keys() -> None:
    model = linsey.to_nnx(Noisy(), X, rngs={"params": 0, "dropout": 1})
    variables = Noisy().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    inputs = jnp.stack([X, X, X])

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}), 0))
    def run(model: Any, x: Any) -> Any:
        return model(x)

    streams = nnx.Rngs(dropout=1)
    keys = streams.split(3).dropout.key.get_value()

    @jax.vmap
    def expected(key: Any, x: Any) -> Any:
        draw = nnx.Rngs(dropout=key).dropout()
        return Noisy().apply(variables, x, rngs={"dropout": draw})

    found = run(model, inputs)
    assert_same(found, expected(keys, inputs))
    assert not jnp.array_equal(found[0], found[1])
    assert not jnp.array_equal(run(model, inputs), found)


def test_nnx_scan_runs_over_stacked_hosts() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    dense = nn.Dense(3)
    variables = jax.vmap(lambda key: dense.init(key, X))(keys)
    make = nnx.vmap(lambda key: linsey.to_nnx(nn.Dense(3), X, rngs=key), in_axes=0, out_axes=0)
    models = make(keys)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer: Any, x: Any) -> Any:
        return jnp.tanh(layer(x))

    expected, _ = jax.lax.scan(lambda x, v: (jnp.tanh(dense.apply(v, x)), None), X, variables)
    assert_same(run(models, X), expected)


def test_split_merge_state_update_and_clone() -> None:
    model = linsey.to_nnx(MLP(), X, rngs=0)
    other = linsey.to_nnx(MLP(), X, rngs=1)
    graphdef, state = nnx.split(model)
    assert graphdef == nnx.graphdef(other)
    assert hash(graphdef) == hash(nnx.graphdef(other))
    assert_same(nnx.merge(graphdef, state)(X), model(X))
    assert_same(nnx.clone(model)(X), model(X))
    nnx.update(model, nnx.state(other))
    assert_same(model(X), other(X))


def test_a_training_step_is_that_of_linen_and_optax() -> None:
    transform = optax.adam(1e-2)
    model = linsey.to_nnx(MLP(), X, rngs=0)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        loss, gradients = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(model, gradients)
        return loss

    params = MLP().init(jax.random.key(0), X)["params"]
    opt_state = transform.init(params)

    @jax.jit
    def source(params: Any, opt_state: Any, x: Any, y: Any) -> Any:
        loss, gradients = jax.value_and_grad(linen_loss)(params, x, y)
        updates, opt_state = transform.update(gradients, opt_state, params)
        return loss, optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        expected, params, opt_state = source(params, opt_state, X, Y)
        assert_same(step(model, optimizer, X, Y), expected)
        assert_same(nnx.to_pure_dict(nnx.state(model)), params)


def test_a_child_of_a_scanned_region_cannot_be_called_alone() -> None:
    model = linsey.to_nnx(Stack(), X, rngs=0, native=False)
    variables = Stack().init(jax.random.key(0), X)
    assert model.layers.Dense_0.kernel.shape == (4, 3, 3)
    assert_same(model(X), Stack().apply(variables, X))
    with pytest.raises(linsey.LinseyError) as caught:
        model.layers.Dense_0(X)
    assert str(caught.value) == (
        "at layers/Dense_0: its values are stacked (axis:0=4) by the transform that layers runs\n"
        "Call the module that runs the transform; it gives this one its slices."
    )


@pytest.mark.parametrize("make", [MLP, lambda: MLP(activation=lambda x: jnp.maximum(x, 0.1))])
def test_equal_lowerings_compile_once(make: Callable[[], nn.Module]) -> None:
    traces = 0

    @nnx.jit
    def run(model: Any, x: Any) -> Any:
        nonlocal traces
        traces += 1
        return model(x)

    models = [linsey.to_nnx(make(), X, rngs=seed) for seed in range(3)]
    assert len({nnx.graphdef(model) for model in models}) == 1
    outputs = [run(model, X) for model in models]
    assert traces == 1
    assert not jnp.array_equal(outputs[0], outputs[1])


def test_other_hyper_parameters_are_another_graphdef() -> None:
    def with_slope(slope: float) -> nn.Module:
        return MLP(activation=lambda x: jnp.maximum(x, slope * x))

    first, same, other = (
        nnx.graphdef(linsey.to_nnx(with_slope(slope), X, rngs=0)) for slope in (0.1, 0.1, 0.2)
    )
    assert first == same
    assert first != other


# NNX in Linen


constructed = 0


class Tower(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        global constructed
        constructed += 1
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.Linear(4, 3, rngs=rngs)

    def encode(self, x: Any) -> Any:
        return nnx.relu(self.first(x))

    def decode(self, z: Any, *, double: bool = False) -> Any:
        return self.second(z) * (2 if double else 1)

    def __call__(self, x: Any) -> Any:
        return self.decode(self.encode(x))


class Wobbly(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.linear(x))


class Steady(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any) -> Any:
        self.calls.set_value(self.calls.get_value() + 1)
        return self.norm(x)


def test_methods_are_called_through_apply() -> None:
    source = Tower(rngs=nnx.Rngs(0))
    module, variables = linsey.to_linen(source)
    assert isinstance(module, nn.Module)
    assert variables["params"]["first"]["kernel"].shape == (3, 4)
    assert_same(module.apply(variables, X), source(X))
    z = source.encode(X)
    assert_same(module.apply(variables, X, method="encode"), z)
    found = module.apply(variables, z, double=True, method="decode")
    assert_same(found, source.decode(z, double=True))


def test_a_method_that_is_not_there_is_named() -> None:
    module, variables = linsey.to_linen(Tower(rngs=nnx.Rngs(0)))
    with pytest.raises(AttributeError, match="transmogrify"):
        module.apply(variables, X, method="transmogrify")


def test_streams_advance_when_their_counters_are_mutable() -> None:
    source = Wobbly(rngs=nnx.Rngs(0))
    module, variables = linsey.to_linen(Wobbly(rngs=nnx.Rngs(0)))
    for _ in range(2):
        expected = source(X)
        found, updates = module.apply(variables, X, mutable=["RngCount"])
        assert set(updates) == {"RngCount"}
        assert_same(found, expected)
        variables = {**variables, **updates}


@pytest.mark.parametrize("mutable", [False, ["params"]])
def test_a_stream_that_cannot_advance_is_refused(mutable: Any) -> None:
    module, variables = linsey.to_linen(Wobbly(rngs=nnx.Rngs(0)))
    with pytest.raises(
        linsey.LinseyError, match="its counter cannot change: the next call"
    ) as error:
        module.apply(variables, X, mutable=mutable)
    assert error.value.path == "dropout/rngs"
    assert "mutable=['RngCount']" in error.value.fix


def test_a_variable_of_another_shape_is_refused() -> None:
    module, variables = linsey.to_linen(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), native=False)
    wrong = {"params": {**variables["params"], "bias": jnp.ones(1)}}
    for mutable in (False, ["params"]):
        with pytest.raises(
            linsey.LinseyError, match=r"found the shape \(1,\), expected float32\[3\]"
        ):
            module.apply(wrong, jnp.ones((2, 4)), mutable=mutable)


def test_keys_given_to_apply_take_the_place_of_the_stored_ones() -> None:
    module, variables = linsey.to_linen(Wobbly(rngs=nnx.Rngs(0)))
    keys = {"dropout": jax.random.key(5)}
    first, second = (module.apply(variables, X, rngs=keys) for _ in range(2))
    assert_same(first, second)
    stored, _ = module.apply(variables, X, mutable=["RngCount"])
    assert not jnp.array_equal(first, stored)
    without = {"params": variables["params"]}
    assert_same(module.apply(without, X, rngs=keys), first)
    found, updates = module.apply(variables, X, rngs=keys, mutable=["RngCount", "RngKey"])
    assert_same(found, first)
    for name, tree in updates.items():
        assert_same(tree, variables[name])


def test_state_comes_back_where_it_is_mutable() -> None:
    source = Steady(rngs=nnx.Rngs(0))
    module, variables = linsey.to_linen(Steady(rngs=nnx.Rngs(0)))
    before = jax.tree.map(jnp.copy, variables)
    for _ in range(2):
        expected = source(X)
        found, updates = module.apply(variables, X, mutable=True)
        assert_same(found, expected)
        variables = {**variables, **updates}
    assert_same(variables["batch_stats"]["norm"]["mean"], source.norm.mean.get_value())
    assert_same(module.apply(before, X, mutable=["batch_stats"])[0], expected)
    again = linsey.lower(module, variables=variables)
    assert_same(nnx.state(nnx.merge(*again.emit("nnx"))), nnx.state(source))


def test_a_missing_variable_is_named() -> None:
    module, variables = linsey.to_linen(Tower(rngs=nnx.Rngs(0)))
    broken = {"params": {**variables["params"], "second": {"bias": jnp.zeros(3)}}}
    with pytest.raises(linsey.LinseyError) as caught:
        module.apply(broken, X)
    assert caught.value.path == "params/second/kernel"
    assert str(caught.value) == (
        "at params/second/kernel: the variable is missing\n"
        "Pass the variables that came with the module, as init or linsey.to_linen returned them."
    )


def test_init_says_that_the_variables_are_there() -> None:
    module, _ = linsey.to_linen(Tower(rngs=nnx.Rngs(0)))
    with pytest.raises(linsey.LinseyError) as caught:
        module.init(jax.random.key(0), X)
    assert str(caught.value) == (
        "at Tower: init was called on a module whose variables came with it\n"
        "Use the variables that linsey.to_linen or program.emit('linen') returned."
    )


def test_the_constructor_never_runs_at_apply() -> None:
    module, variables = linsey.to_linen(Tower(rngs=nnx.Rngs(0)))
    before = constructed
    module.apply(variables, X)
    module.apply(variables, X, method="encode")
    jax.jit(module.apply)(variables, X)
    assert constructed == before


def test_a_factory_is_converted() -> None:
    module, variables = linsey.to_linen(Tower, rngs=nnx.Rngs(3))
    assert_same(module.apply(variables, X), Tower(rngs=nnx.Rngs(3))(X))


def test_equal_hosts_are_equal_modules() -> None:
    first, second = (linsey.to_linen(Tower(rngs=nnx.Rngs(seed)))[0] for seed in range(2))
    assert first == second
    assert hash(first) == hash(second)


class Holder(nn.Module):
    """Holds a hosted module as any Linen module holds another one."""

    inner: nn.Module

    def __call__(self, x: Any) -> Any:
        return self.inner(x)


def held(variables: Any) -> Any:
    return {name: {"inner": tree} for name, tree in variables.items()}


def stacked(make: Callable[..., Any], count: int) -> list[Any]:
    return [make(rngs=nnx.Rngs(seed)) for seed in range(count)]


def stack_variables(models: list[Any]) -> Any:
    each = [linsey.to_linen(model)[1] for model in models]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def test_nn_vmap_lifts_a_host() -> None:
    module, _ = linsey.to_linen(Tower(rngs=nnx.Rngs(0)))
    models = stacked(Tower, 3)
    lifted = nn.vmap(
        type(module), variable_axes={"params": 0}, split_rngs={"params": False}, in_axes=None
    )(module.spec)
    found = lifted.apply(stack_variables(models), X)
    graphdef, _ = nnx.split(models[0])
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, models))
    assert_same(found, jax.vmap(lambda state: nnx.merge(graphdef, state)(X))(states))


class Ensemble(nn.Module):
    """A lift over a method that calls a hosted module."""

    inner: nn.Module

    def __call__(self, x: Any) -> Any:
        run = nn.vmap(
            lambda module, x: module(x),
            variable_axes={"params": 0},
            split_rngs={"dropout": True},
            in_axes=None,
        )
        return run(self.inner, x)


def test_nn_vmap_splits_the_keys_of_a_host() -> None:
    module, variables = linsey.to_linen(Wobbly(rngs=nnx.Rngs(0)))
    repeated = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), variables["params"])
    key = jax.random.key(4)
    found = Ensemble(module).apply({"params": {"inner": repeated}}, X, rngs={"dropout": key})
    assert found.shape == (3, 2, 8)
    assert not jnp.array_equal(found[0], found[1])
    again = Ensemble(module).apply({"params": {"inner": repeated}}, X, rngs={"dropout": key})
    assert_same(again, found)


class Deep(nn.Module):
    inner: nn.Module

    def __call__(self, x: Any) -> Any:
        run = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": False},
            length=4,
        )
        return run(self.inner, x, None)[0]


def test_nn_scan_lifts_a_host() -> None:
    module, _ = linsey.to_linen(Tower(rngs=nnx.Rngs(0)))
    models = stacked(Tower, 4)
    graphdef, _ = nnx.split(models[0])
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, models))
    expected, _ = jax.lax.scan(lambda x, state: (nnx.merge(graphdef, state)(x), None), X, states)
    assert_same(Deep(module).apply(held(stack_variables(models)), X), expected)


class Cheap(nn.Module):
    inner: nn.Module

    def __call__(self, x: Any) -> Any:
        return nn.remat(lambda module, x: module(x))(self.inner, x)


class Compiled(nn.Module):
    inner: nn.Module

    def __call__(self, x: Any) -> Any:
        return nn.jit(lambda module, x: module(x))(self.inner, x)


@pytest.mark.parametrize("outer", [Holder, Cheap, Compiled])
def test_hosts_run_inside_linen_modules(outer: type[nn.Module]) -> None:
    source = Steady(rngs=nnx.Rngs(0))
    module, variables = linsey.to_linen(Steady(rngs=nnx.Rngs(0)))

    @jax.jit
    def run(variables: Any, x: Any) -> Any:
        return outer(module).apply(variables, x, mutable=["batch_stats", "Variable"])

    expected = nnx.jit(lambda model, x: model(x))(source, X)
    found, updates = run(held(variables), X)
    assert_same(found, expected)
    mean = updates["batch_stats"]["inner"]["norm"]["mean"]
    assert_same(mean, source.norm.mean.get_value())


@pytest.mark.parametrize("outer", [Holder, Cheap, Compiled])
def test_gradients_through_a_host_are_nnx_gradients(outer: type[nn.Module]) -> None:
    source = Tower(rngs=nnx.Rngs(0))
    module, variables = linsey.to_linen(source)
    graphdef, state = nnx.split(source)

    def loss(variables: Any) -> Any:
        return jnp.sum(outer(module).apply(variables, X) ** 2)

    def nnx_loss(state: Any) -> Any:
        return jnp.sum(nnx.merge(graphdef, state)(X) ** 2)

    found = jax.jit(jax.grad(loss))(held(variables))["params"]["inner"]
    assert_same(found, nnx.to_pure_dict(jax.jit(jax.grad(nnx_loss))(state)))


def test_partition_metadata_becomes_a_box() -> None:
    init = nnx.with_partitioning(nnx.initializers.normal(), ("in", "out"))
    with nnx.use_eager_sharding(False):
        source = nnx.Linear(3, 2, kernel_init=init, rngs=nnx.Rngs(0))
        module, variables = linsey.to_linen(source)
        box = variables["params"]["kernel"]
        assert isinstance(box, nn.Partitioned)
        assert box.names == ("in", "out")
        assert_same(box.value, source.kernel.get_value())
        assert nn.get_partition_spec(variables)["params"]["kernel"] == jax.P("in", "out")
        assert_same(module.apply(variables, X), source(X))
        assert_same(module.apply(nn.meta.unbox(variables), X), source(X))


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.with_partitioning(nn.initializers.normal(), ("in", "out"))
        return nn.Dense(2, kernel_init=init)(x)


def test_a_box_becomes_partition_metadata() -> None:
    variables = Boxed().init(jax.random.key(0), X)
    with nnx.use_eager_sharding(False):
        model = linsey.to_nnx(Boxed(), X, rngs=0)
        assert model.Dense_0.kernel.get_metadata("out_sharding") == ("in", "out")
        assert_same(model(X), Boxed().apply(variables, X))
        assert_same(linsey.lower(model).emit("linen")[1], variables)


class Around(nnx.Module):
    """NNX code around an emitted module."""

    def __init__(self, inner: nnx.Module) -> None:
        self.inner = inner

    def __call__(self, x: Any) -> Any:
        return self.inner(x)


def test_an_emitted_module_inside_a_bigger_model_lowers_to_its_own_node() -> None:
    model = Around(linsey.to_nnx(Stack(), X, rngs=0))
    program = linsey.lower(model)
    stacks = {slot.key: slot.stack for slot in program.graph.slots}
    assert {axis.owner for stack in stacks.values() for axis in stack} == {("inner", "layers")}
    again = nnx.merge(*program.emit("nnx"))
    assert linsey.lower(again).graph == program.graph
    assert_same(again(X), model(X))
    again = nnx.merge(*program.emit("nnx", native=False))
    with pytest.raises(linsey.LinseyError, match="by the transform that inner/layers runs"):
        again.inner.layers.Dense_0(X)
