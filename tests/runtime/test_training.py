"""Train steps: equal to flax and optax by hand, one jit, errors that say what to do."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx, traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import linsey
from linsey.ir import EmitError, PartitionError, ValuesError
from linsey.runtime.gradients import value_and_grad
from linsey.runtime.train_state import TrainState
from linsey.runtime.training import TrainStep

RULES = (("batch", "data"), ("embed", "data"), ("mlp", "model"))
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
KEYS = {"dropout": jax.random.key(2)}

traces: list[str] = []


class Net(nn.Module):
    """Parameters with names, batch statistics and dropout."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        traces.append("net")
        init = nn.initializers.lecun_normal()
        up = nn.with_logical_partitioning(init, ("embed", "mlp"))
        down = nn.with_logical_partitioning(init, ("mlp", "embed"))
        h = nn.Dense(16, kernel_init=up, name="up")(x)
        h = nn.with_logical_constraint(h, ("batch", "mlp"))
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(h)
        h = nn.Dropout(0.25, deterministic=not train)(nn.gelu(h))
        return nn.Dense(8, kernel_init=down, name="down")(h)


PROGRAM = linsey.lower(Net(), X, rngs=RNGS)


def mesh_of(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def compiled(where: str) -> Any:
    if where == "one device":
        return PROGRAM.compile()
    kind = AxisType.Explicit if where == "explicit mesh" else AxisType.Auto
    return PROGRAM.compile(mesh=mesh_of(kind), rules=RULES)


WHERE = ["one device", pytest.param("mesh", marks=pytest.mark.mesh)]


def squares(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x, train=True) - y) ** 2)


def flat(variables: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(nn.meta.unbox(variables), sep="/")


def by_hand(exe: Any, tx: Any, count: int, steps: int) -> Any:
    """Variables, optimizer state and losses of flax and optax alone, with the same shardings."""
    mesh = exe.mesh

    def init() -> Any:
        variables = nn.meta.unbox(Net().init(RNGS, X))
        return variables, tx.init(variables["params"])

    def around() -> Any:
        return nn.logical_axis_rules(RULES if mesh is not None else ())

    def held(tree: Any) -> Any:
        if mesh is None:
            return tree
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, where["params"])

    def gradients(variables: Any, x: Any, y: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            out, updates = Net().apply(
                {**variables, "params": params},
                x,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return jnp.mean((out - y) ** 2), updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    def averaged(variables: Any, x: Any, y: Any, key: Any) -> Any:
        def body(carry: Any, micro: Any) -> Any:
            stats, mean = carry
            number, x, y = micro
            own = jax.random.fold_in(key, number)
            (value, updates), grads = gradients({**variables, **stats}, x, y, own)
            mean = jax.tree.map(lambda m, g: m + (g - m) / (number + 1), mean, held(grads))
            return (updates, held(mean)), value

        zeros = held(jax.tree.map(jnp.zeros_like, variables["params"]))
        stats = {"batch_stats": variables["batch_stats"]}
        batch = [jnp.stack([array[i::count] for i in range(count)]) for array in (x, y)]
        (stats, grads), losses = jax.lax.scan(body, (stats, zeros), (jnp.arange(count), *batch))
        return (jnp.mean(losses), stats), grads

    def step(variables: Any, state: Any, x: Any, y: Any, key: Any) -> Any:
        with around():
            run = gradients if count == 1 else averaged
            (value, updates), grads = run(variables, x, y, key)
            params = variables["params"]
            changes, state = tx.update(held(grads), state, params)
        params = optax.apply_updates(params, changes)
        return {"params": params, **updates}, state, value

    options: dict[str, Any] = {}
    if mesh is not None:
        abstract, abstract_state = jax.eval_shape(init)
        with around():
            boxed = jax.eval_shape(lambda: Net().init(RNGS, X))
            specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
        where = jax.tree.map(lambda _, spec: spec, abstract, specs)
        states = optax.tree_map_params(
            tx,
            lambda _, spec: spec,
            abstract_state,
            where["params"],
            transform_non_params=lambda _: NamedSharding(mesh, P()),
        )
        options = {"out_shardings": (where, states)}
    variables, state = jax.jit(init, **options)()
    if mesh is not None:
        options["out_shardings"] = (where, states, None)
    jitted, losses = jax.jit(step, **options), []
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for number in range(steps):
            key = jax.random.fold_in(KEYS["dropout"], number)
            variables, state, value = jitted(variables, state, X, Y, key)
            losses.append(value)
    return variables, state, losses


def run(step: TrainStep, steps: int) -> Any:
    state, losses = step.init(RNGS), []
    for number in range(steps):
        key = jax.random.fold_in(KEYS["dropout"], number)
        state, value = step(state, X, Y, rngs={"dropout": key})
        losses.append(value)
    return state, losses


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("where", WHERE)
def test_steps_equal_flax_and_optax_by_hand(where: str, count: int) -> None:
    exe, tx = compiled(where), optax.adamw(1e-2)
    state, losses = run(TrainStep(exe, squares, tx, accumulate=count), 3)
    variables, opt_state, expected = by_hand(exe, tx, count, 3)
    assert_same(losses, expected)
    assert_same(dict(state.values.items()), flat(variables))
    for part in ("mu", "nu"):
        found = getattr(state.opt_state[0], part)
        assert_same(dict(found.items()), flat({"params": getattr(opt_state[0], part)}))


class Plain(nn.Module):
    """No constraints inside: with explicit axes these would be for the model to get right."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(8, use_bias=False)(
            jnp.tanh(nn.Dense(16, use_bias=False)(x)) @ self.param("w", init, (16, 16))
        )


@pytest.mark.mesh
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_auto_and_explicit_axes(kind: AxisType, count: int) -> None:
    mesh, tx = mesh_of(kind), optax.adam(1e-2)
    exe = linsey.lower(Plain(), X).compile(mesh=mesh)
    ours = TrainStep(exe, plain_squares, tx, accumulate=count, in_shardings=P("data"))
    state, losses = ours.init(0), []
    for _ in range(2):
        state, loss = ours(state, X, Y)
        losses.append(loss)
    assert state.opt_state[0].mu["params/w"].sharding == NamedSharding(mesh, P(None, "model"))

    def gradients(params: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.mean((Plain().apply({"params": params}, x) - y) ** 2)

        return jax.value_and_grad(loss)(params)

    def averaged(params: Any, x: Any, y: Any) -> Any:
        def body(mean: Any, micro: Any) -> Any:
            number, *batch = micro
            loss, grads = gradients(params, *batch)
            return jax.tree.map(lambda m, g: m + (g - m) / (number + 1), mean, grads), loss

        micro = [a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1) for a in (x, y)]
        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, losses = jax.lax.scan(body, zeros, (jnp.arange(count), *micro))
        return jnp.mean(losses), grads

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        loss, grads = (gradients if count == 1 else averaged)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    first, expected = ours.init(0), []
    params = traverse_util.unflatten_dict(
        {tuple(key.split("/")[1:]): value for key, value in first.values.items()}
    )
    with jax.set_mesh(mesh):
        opt_state = tx.init(params)
        batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
        for _ in range(2):
            params, opt_state, loss = step(params, opt_state, *batch)
            expected.append(loss)
    assert_same(losses, expected)
    assert_same(jax.tree.leaves(state), [*jax.tree.leaves(params), *jax.tree.leaves(opt_state)])


def plain_squares(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x) - y) ** 2)


def test_the_average_is_that_of_optax_multi_steps() -> None:
    exe = PROGRAM.compile()
    whole = TrainStep(exe, plain_squares, optax.sgd(0.1, momentum=0.9), accumulate=4)
    parts = TrainStep(exe, plain_squares, optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 4))
    state, other = whole.init(RNGS), parts.init(RNGS)
    for _ in range(2):
        state, loss = whole(state, X, Y)
        losses = []
        for number in range(4):
            other, value = parts(other, X[number::4], Y[number::4])
            losses.append(value)
        assert_same(loss, jnp.mean(jnp.stack(losses)))
    assert_same(state.values, other.values)
    assert_same(state.opt_state, other.opt_state.inner_opt_state)


def test_micro_batches_may_come_stacked() -> None:
    exe, tx = PROGRAM.compile(), optax.sgd(0.1)
    split = TrainStep(exe, squares, tx, accumulate=4)
    stacked = TrainStep(exe, squares, tx, accumulate=4, stacked=True)
    arranged = [np.stack([array[number::4] for number in range(4)]) for array in (X, Y)]
    state, loss = split(split.init(RNGS), X, Y, rngs=KEYS)
    other, value = stacked(stacked.init(RNGS), *arranged, rngs=KEYS)
    assert_same((state, loss), (other, value))


def test_an_array_without_axes_goes_to_every_micro_batch() -> None:
    def scaled(model: Any, x: Any, y: Any, scale: Any) -> Any:
        return scale * squares(model, x, y), (x.shape, scale)

    step = TrainStep(PROGRAM.compile(), scaled, optax.sgd(0.1), accumulate=4)
    _, (_, (_, scales)) = step(step.init(RNGS), X, Y, jnp.float32(3.0), rngs=KEYS)
    assert_same(scales, jnp.full((4,), 3.0))


def test_accumulation_is_one_loop_on_the_device() -> None:
    step = TrainStep(PROGRAM.compile(), plain_squares, optax.adam(1e-2), accumulate=8)
    text = step.lower(step.init(RNGS), X, Y).as_text()
    assert text.count("stablehlo.while") == 1


def test_gradients_are_averaged_in_float32() -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PROGRAM.init(RNGS).values)
    step = TrainStep(PROGRAM.compile(), plain_squares, optax.sgd(0.1), accumulate=4)
    state = step.init(values=half)
    assert "tensor<8x16xf32>" in step.lower(state, X, Y).as_text()  # of a bfloat16 kernel
    state, _ = step(state, X, Y)
    assert state.values["params/up/kernel"].dtype == jnp.bfloat16


def test_several_calls_thread_the_state() -> None:
    def twice(model: Any, x: Any, y: Any) -> Any:
        return jnp.mean((model(x, train=True) + model(x + 1.0, train=True) - y) ** 2)

    step = TrainStep(PROGRAM.compile(), twice, optax.sgd(0.0))
    state, _ = step(step.init(RNGS), X, Y, rngs=KEYS)

    def expected(variables: Any) -> Any:
        for x in (X, X + 1.0):
            _, updates = Net().apply(variables, x, train=True, rngs=KEYS, mutable=["batch_stats"])
            variables = {**variables, **updates}
        return variables

    assert_same(
        dict(state.values.items()), flat(jax.jit(expected)(nn.meta.unbox(Net().init(RNGS, X))))
    )


def test_a_call_may_bring_its_own_keys() -> None:
    def views(model: Any, x: Any) -> Any:
        first = model(x, train=True)
        again = model(x, train=True)
        other = model(x, train=True, rngs={"dropout": jax.random.key(9)})
        return jnp.mean(first), (jnp.array_equal(first, again), jnp.array_equal(first, other))

    step = TrainStep(PROGRAM.compile(), views, optax.sgd(0.1))
    _, (_, (same, other)) = step(step.init(RNGS), X, rngs=KEYS)
    assert bool(same)
    assert not bool(other)


def test_slots_that_are_not_trained_stay_the_very_objects() -> None:
    step = TrainStep(PROGRAM.compile(), squares, optax.adam(0.1), wrt=lambda name: "down" in name)
    before = step.init(RNGS)
    kept, trained = before.values["params/up/kernel"], before.values["params/down/kernel"]
    state, _ = step(before, X, Y, rngs=KEYS)
    assert state.values["params/up/kernel"] is kept
    assert trained.is_deleted()
    assert before.values["batch_stats/norm/mean"].is_deleted()
    assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * 2


def test_several_selections() -> None:
    step = TrainStep(
        PROGRAM.compile(),
        squares,
        optax.trace(0.9),
        wrt=(lambda n: "bias" in n, lambda n: "up" in n),
    )
    assert step.init(RNGS).opt_state.trace.keys() == (
        "params/down/bias",
        "params/norm/bias",
        "params/up/bias",
        "params/up/kernel",
    )


def test_the_state_is_donated_and_values_at_hand_are_not() -> None:
    values = PROGRAM.init(RNGS).values
    step = TrainStep(PROGRAM.compile(), squares, optax.adam(1e-2))
    first = step.init(values=values)
    assert_same(first.values, values)
    second, _ = step(first, X, Y, rngs=KEYS)
    assert first.values["params/up/kernel"].is_deleted()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.opt_state))
    assert not any(array.is_deleted() for array in (*values.arrays, *second.values.arrays))


@pytest.mark.parametrize("where", WHERE)
def test_the_model_is_traced_once_for_all_steps(where: str) -> None:
    for count in (1, 4):
        exe = compiled(where)
        step = TrainStep(exe, squares, optax.adam(1e-2), accumulate=count)
        state = step.init(RNGS)
        traces.clear()
        for number in range(4):
            rngs = {"dropout": jax.random.key(number)}
            if number == 2:  # as it comes from a checkpoint: equal names, other objects
                state = jax.tree.map(lambda leaf: leaf, state)
            state, _ = step(state, X, Y, rngs=rngs)
        assert traces == ["net"]


def test_each_combination_of_static_arguments_compiles_once() -> None:
    def loss(model: Any, batch: Any, train: bool, *, scale: float = 1.0) -> Any:
        return scale * jnp.mean((model(batch["x"], train=train) - batch["y"]) ** 2)

    step = TrainStep(PROGRAM.compile(), loss, optax.sgd(0.0))
    state, batch, losses = step.init(RNGS), {"x": X, "y": Y}, []
    for train, scale in ((True, 1.0), (False, 1.0), (True, 1.0), (False, 2.0)):
        state, value = step(state, batch, train, rngs=KEYS, scale=scale)
        losses.append(float(value))
    assert losses[0] == losses[2]
    assert len(set(losses)) == 3


def test_value_and_grad_in_a_jit_of_ones_own() -> None:
    exe = PROGRAM.compile()
    values = exe.init(RNGS)

    @jax.jit
    def ours(values: Any, x: Any, y: Any) -> Any:
        return value_and_grad(exe, squares)(values, x, y, rngs=KEYS)

    @jax.jit
    def theirs(variables: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            y_, updates = Net().apply(
                {**variables, "params": params}, x, train=True, rngs=KEYS, mutable=["batch_stats"]
            )
            return jnp.mean((y_ - y) ** 2), updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    (loss, aux), grads, after = ours(values, X, Y)
    variables = nn.meta.unbox(Net().init(RNGS, X))
    (expected, updates), expected_grads = theirs(variables, X, Y)
    assert aux is None
    assert_same(loss, expected)
    assert_same(dict(grads.items()), flat({"params": expected_grads}))
    assert_same(dict(after.items()), flat({**variables, **updates}))


def test_value_and_grad_gives_what_else_the_loss_gave() -> None:
    gradients = value_and_grad(PROGRAM.compile(), lambda model, x: (jnp.mean(model(x)), {"a": 1.0}))
    (_, aux), _, _ = gradients(PROGRAM.init(RNGS).values, X)
    assert aux == {"a": 1.0}


@pytest.mark.mesh
def test_value_and_grad_on_a_mesh() -> None:
    exe = compiled("mesh")
    (_, _), grads, after = jax.jit(value_and_grad(exe, squares))(exe.init(RNGS), X, Y, rngs=KEYS)
    assert exe.shardings is not None
    for key, grad in grads.items():
        assert grad.sharding.is_equivalent_to(exe.shardings[key], grad.ndim)
    assert not np.array_equal(after["batch_stats/norm/mean"], np.zeros(16))


@pytest.mark.mesh
def test_a_state_from_elsewhere_is_moved() -> None:
    step = TrainStep(compiled("mesh"), squares, optax.adam(1e-2))
    expected = run(step, 1)
    single = TrainStep(PROGRAM.compile(), squares, optax.adam(1e-2)).init(
        values=step.init(RNGS).values
    )
    on_one = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[3]), single)
    key = {"dropout": jax.random.fold_in(KEYS["dropout"], 0)}
    found = step(on_one, X, Y, rngs=key)
    assert_same(found, (expected[0], expected[1][0]))
    # Replicated, as a batch that was given to one device becomes: the compiler must not split it.
    replicated = jax.device_put(X, NamedSharding(step.exe.mesh, P()))
    there = jax.device_put(X, jax.devices()[5])
    assert_same(
        step(step.init(RNGS), there, Y, rngs=key), step(step.init(RNGS), replicated, Y, rngs=key)
    )
    host = jax.device_get(step.init(RNGS))
    assert_same(step(host, X, Y, rngs=key), (expected[0], expected[1][0]))


@pytest.mark.mesh
def test_values_at_hand_are_placed() -> None:
    step = TrainStep(compiled("mesh"), squares, optax.adam(1e-2))
    state = step.init(values=PROGRAM.init(RNGS).values)
    where = step.shardings(state)
    assert where is not None
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("where", WHERE)
def test_the_abstract_state_is_that_of_init(where: str) -> None:
    step = TrainStep(compiled(where), squares, optax.adafactor(1e-2, min_dim_size_to_factor=8))
    abstract, state = step.abstract(RNGS), step.init(RNGS)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for found, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        if where == "mesh":
            assert found.sharding == array.sharding
    assert step.lower(abstract, X, Y, rngs=KEYS).as_text().count("tf.aliasing_output") or where


@pytest.mark.mesh
def test_no_device_holds_a_whole_accumulator() -> None:
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(112, kernel_init=init, use_bias=False)(x)

    exe = linsey.lower(Wide(), X).compile(mesh=mesh_of())
    step = TrainStep(exe, lambda model, x: jnp.mean(model(x) ** 2), optax.adam(1.0), accumulate=4)
    text = step.lower(step.abstract(0), X).compile().as_text()
    assert "f32[8,56]" in text
    assert "f32[8,112]" not in text


@pytest.mark.mesh
def test_batches_are_split_where_they_lie() -> None:
    step = TrainStep(
        compiled("mesh"), squares, optax.sgd(0.1), accumulate=2, in_shardings=P("data")
    )
    lowered = step.lower(step.init(RNGS), X, Y, rngs=KEYS)
    shardings = jax.tree.leaves(lowered.compile().input_shardings)
    assert sum(sharding.spec == P("data") for sharding in shardings) >= 2
    assert "all-to-all" not in lowered.compile().as_text()


class Counted(nnx.Module):
    """Streams, batch statistics and a counter of its own."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        self.up = nnx.Linear(8, 16, kernel_init=init, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any) -> Any:
        self.calls.set_value(self.calls.get_value() + 1)
        return self.down(self.drop(nnx.gelu(self.norm(self.up(x)))))


class Trainer(nnx.Module):
    """A model and its optimizer: what is trained, as one module."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.model = Counted(rngs)
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-2), wrt=nnx.Param)

    def step(self, x: Any, y: Any) -> Any:
        def loss(model: Any) -> Any:
            return jnp.mean((model(x) - y) ** 2)

        value, grads = nnx.value_and_grad(loss)(self.model)
        self.optimizer.update(self.model, grads)
        return value


def make_trainer() -> Trainer:
    return Trainer(nnx.Rngs(0, dropout=1))


def on(where: str) -> dict[str, Any]:
    return {} if where == "one device" else {"mesh": mesh_of()}


def nnx_by_hand(model: Any, method: Any, where: str, shardings: Any) -> Any:
    """State and losses of three steps of flax alone: split, one jit, merge."""
    graphdef, state = nnx.split(model)
    options = {}
    if where == "mesh":
        paths = {".".join(map(str, path)): spec for path, spec in shardings.items()}
        flat_state = nnx.to_flat_state(state)
        specs = nnx.from_flat_state(
            (path, leaf.replace(paths[".".join(map(str, path))])) for path, leaf in flat_state
        )
        options = {"out_shardings": (specs, None)}
        state = jax.device_put(state, specs)

    def step(state: Any, x: Any, y: Any) -> Any:
        model = nnx.merge(graphdef, state)
        value = method(model, x, y)
        return nnx.state(model), value

    jitted, losses = jax.jit(step, **options), []
    for _ in range(3):
        state, value = jitted(state, X, Y)
        losses.append(value)
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}, losses


def paths_of(graph: Any, values: Any) -> dict[str, Any]:
    pairs = zip(graph.slots, values.arrays, strict=True)
    return {".".join(map(str, slot.path)): value for slot, value in pairs}


@pytest.mark.parametrize("where", WHERE)
def test_an_nnx_optimizer_is_trained_by_the_users_own_step(where: str) -> None:
    program = linsey.lower(make_trainer)
    exe = program.compile("step", donate=True, **on(where))
    values, losses = exe.init(), []
    if where == "mesh":
        mu = values["OptVariable/optimizer/opt_state/[0]/mu/up/kernel"]
        assert mu.sharding.spec == P("data", "model")
        assert mu.addressable_shards[0].data.shape == (2, 8)
    for _ in range(3):
        value, values = exe(values, X, Y)
        losses.append(value)
    shardings = where == "mesh" and {
        slot.path: sharding
        for slot, sharding in zip(program.graph.slots, exe.shardings.arrays, strict=True)
    }
    with nnx.use_eager_sharding(False):
        expected, values_by_hand = nnx_by_hand(make_trainer(), Trainer.step, where, shardings)
    assert_same(losses, values_by_hand)
    assert_same(paths_of(program.graph, values), expected)


def test_an_nnx_optimizer_may_be_the_root() -> None:
    def step(trainer: Any, x: Any, y: Any) -> Any:
        value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(
            trainer.model
        )
        trainer.update(grads)
        return value

    def make() -> Any:
        return nnx.ModelAndOptimizer(Counted(nnx.Rngs(0, dropout=1)), optax.adam(1e-2))

    with nnx.use_eager_sharding(False):
        program = linsey.lower(make())
        expected, losses = nnx_by_hand(make(), step, "one device", None)
    exe, values = program.compile(step), program.values
    for value in losses:
        found, values = exe(values, X, Y)
        assert_same(found, value)
    assert_same(paths_of(program.graph, values), expected)


@pytest.mark.parametrize("where", WHERE)
def test_an_nnx_model_is_trained_with_optax(where: str) -> None:
    """The same numbers as by its own nnx.Optimizer; its streams and counters go on."""
    with nnx.use_eager_sharding(False):
        model = Counted(nnx.Rngs(0, dropout=1))
        expected, losses = nnx_by_hand(make_trainer(), Trainer.step, "one device", None)
    exe = linsey.lower(model).compile(**on(where))
    step = TrainStep(exe, plain_squares, optax.adam(1e-2))
    state = step.init(values=linsey.lower(model).values)
    found = []
    for _ in range(3):
        state, value = step(state, X, Y)
        found.append(value)
    assert int(state.values["Variable/calls"]) == 3
    assert int(state.values["RngCount/drop/rngs/count"]) == 3
    if where == "one device":
        assert_same(found, losses)
        for path, value in paths_of(exe.graph, state.values).items():
            assert_same(value, expected[f"model.{path}"])


def test_wrt_that_selects_nothing() -> None:
    with pytest.raises(ValuesError, match=r"at wrt: wrt=<function .* selects none of the 8 slots"):
        TrainStep(PROGRAM.compile(), squares, optax.sgd(0.1), wrt=lambda name: "nowhere" in name)
    with pytest.raises(ValuesError, match="no slot is in the collection 'weights'"):
        value_and_grad(PROGRAM.compile(), squares, wrt="weights")


@pytest.mark.parametrize(
    ("wrt", "message"),
    [
        ("Variable", r"at Variable/calls: found int32\[\], expected floating point"),
        ("RngKey", r"at RngKey/drop/rngs/key: found key<fry>\[\], expected floating point"),
        (lambda name: "r" in name, "expected floating point: it has no gradient\nLeave it out"),
    ],
)
def test_slots_that_have_no_gradient(wrt: Any, message: str) -> None:
    with nnx.use_eager_sharding(False):
        exe = linsey.lower(Counted(nnx.Rngs(0, dropout=1))).compile()
    with pytest.raises(ValuesError, match=message):
        TrainStep(exe, plain_squares, optax.sgd(0.1), wrt=wrt)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda model, x, y: (model(x) - y) ** 2, r"gave float32\[16,8\], expected one real"),
        (lambda model, x, y: jnp.sum(model(x) > y), r"gave int32\[\], expected one real"),
        (lambda model, x, y: None, "gave NoneType, expected one real"),
        (lambda model, x, y: {"loss": model(x).sum()}, "gave dict, expected one real"),
        (lambda model, x, y: (model(x), y, 1), "gave tuple, expected one real"),
    ],
)
def test_a_loss_that_is_no_number(loss: Any, found: str) -> None:
    exe = PROGRAM.compile()
    step = TrainStep(exe, loss, optax.sgd(0.1))
    with pytest.raises(EmitError, match=f"at loss: the loss function {found}"):
        step(step.init(RNGS), X, Y)
    with pytest.raises(EmitError, match=f"at loss: the loss function {found}"):
        value_and_grad(exe, loss)(PROGRAM.init(RNGS).values, X, Y)


def test_a_batch_that_does_not_divide() -> None:
    step = TrainStep(PROGRAM.compile(), squares, optax.sgd(0.1), accumulate=3)
    with pytest.raises(
        EmitError,
        match=r"at batch, array 0: the first axis of float32\[16,8\] does not divide into 3",
    ):
        step(step.init(RNGS), X, Y, rngs=KEYS)
    step = TrainStep(PROGRAM.compile(), squares, optax.sgd(0.1), accumulate=3, stacked=True)
    with pytest.raises(
        EmitError, match=r"at batch, array 1: found float32\[16,8\], expected 3 micro-batches"
    ):
        step(step.init(RNGS), X[:15].reshape(3, 5, 8), Y)


@pytest.mark.parametrize("count", [0, -2, 2.0, True])
def test_a_number_of_micro_batches_that_is_none(count: Any) -> None:
    with pytest.raises(EmitError, match=f"at accumulate: found {count!r}, expected a positive"):
        TrainStep(PROGRAM.compile(), squares, optax.sgd(0.1), accumulate=count)


def test_states_of_others() -> None:
    step = TrainStep(PROGRAM.compile(), squares, optax.adam(0.1))
    state = step.init(RNGS)
    with pytest.raises(ValuesError, match="at state: found tuple, expected a TrainState"):
        step((state.values, state.opt_state), X, Y, rngs=KEYS)
    other = linsey.lower(nn.Dense(3), X).compile()
    foreign = TrainStep(other, squares, optax.adam(0.1)).init(0)
    with pytest.raises(ValuesError, match="the values are not those of this program"):
        step(foreign, X, Y, rngs=KEYS)
    with pytest.raises(ValuesError, match="the values are not those of this program"):
        step.init(values=foreign.values)
    wrong = TrainState(state.values, optax.sgd(0.1).init(state.values.select("params")))
    with pytest.raises(ValuesError, match="at opt_state: the state is that of another optimizer"):
        step(wrong, X, Y, rngs=KEYS)
    state, _ = step(state, X, Y, rngs=KEYS)
    with pytest.raises(ValuesError, match="at opt_state: the state is that of another optimizer"):
        step(TrainState(state.values, wrong.opt_state), X, Y, rngs=KEYS)


def test_arguments_that_cannot_be_static() -> None:
    step = TrainStep(PROGRAM.compile(), squares, optax.sgd(0.1))
    with pytest.raises(EmitError, match="at arguments: a static argument cannot be hashed"):
        step(step.init(RNGS), X, Y, {1, 2}, rngs=KEYS)


@pytest.mark.mesh
def test_a_batch_that_the_mesh_does_not_divide() -> None:
    step = TrainStep(compiled("mesh"), squares, optax.sgd(0.1), in_shardings=P("data"))
    with pytest.raises(PartitionError, match="cannot be split"):
        step(step.init(RNGS), X[:6], Y[:6], rngs=KEYS)
    with pytest.raises(PartitionError, match="in_shardings are given and no mesh"):
        TrainStep(PROGRAM.compile(), squares, optax.sgd(0.1), in_shardings=P("data"))


def test_a_program_that_cannot_be_initialised() -> None:
    with nnx.use_eager_sharding(False):
        exe = linsey.lower(Counted(nnx.Rngs(0, dropout=1))).compile()
    with pytest.raises(EmitError, match="it was lowered from a live module"):
        TrainStep(exe, plain_squares, optax.sgd(0.1)).init(0)


def test_a_state_prints() -> None:
    state = TrainStep(PROGRAM.compile(), squares, optax.sgd(0.1, momentum=0.9)).init(RNGS)
    assert repr(state).startswith("TrainState(values=Values(\n  batch_stats/norm/mean: float32[16]")
    assert "TraceState(trace=Values(" in repr(state)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths[0] == ".values['batch_stats/norm/mean']"
    assert paths[-1] == ".opt_state[0].trace['params/up/kernel']"
