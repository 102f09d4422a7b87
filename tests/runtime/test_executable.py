"""The compiled program: what is traced, what is static, what comes back, where it can be used."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

import linsey
from linsey.ir import EmitError, ValuesError

X = jnp.arange(6.0, dtype=jnp.float32).reshape(2, 3) / 5.0 - 0.3

traces: list[Any] = []


@pytest.fixture(autouse=True)
def _no_traces_yet() -> Iterator[None]:
    traces.clear()
    yield
    traces.clear()


class Flags(nn.Module):
    """Its call notes the static arguments that it is traced with."""

    @nn.compact
    def __call__(self, x: Any, train: Any = False, mode: Any = None, extra: Any = None) -> Any:
        traces.append((train, mode))
        x = nn.Dense(3)(x)
        x = x * 2 if train is True else x
        x = jnp.tanh(x) if mode == "tanh" else x
        for scale in jax.tree.leaves(extra):
            x = x * scale
        return x


class Net(nn.Module):
    """Parameters and batch statistics, with dropout and sown state."""

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dropout(0.5, deterministic=not train)(x)

    def encode(self, x: Any) -> Any:
        return jnp.sum(x, axis=-1)


class Counter(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any) -> Any:
        self.calls.set_value(self.calls.get_value() + 1)
        return self.dropout(self.linear(x))

    def plain(self, x: Any) -> Any:
        return self.linear(x)


class Keeping(nnx.Module):
    """Keeps a hidden value; there is no Variable for it before the first call."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.linear(x)
        self.hidden = nnx.Intermediate(x)
        return x * 2


class Growing(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.mode = "before"

    def __call__(self, x: Any) -> Any:
        self.mode = "after"
        return self.linear(x)


class TakesValues(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, values: Any, graph: Any = 0) -> Any:
        return nn.Dense(2)(x) + values + graph


RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
CALL = {"dropout": jax.random.key(2)}


def net() -> tuple[Any, linsey.Values, Any]:
    exe = linsey.lower(Net(), X, rngs=RNGS).compile()
    variables = jax.jit(Net().init)(RNGS, X)
    return exe, exe.init(RNGS), {name: variables[name] for name in ("params", "batch_stats")}


def flags(**kwargs: Any) -> tuple[Any, linsey.Values]:
    exe = linsey.lower(Flags(), X, **kwargs).compile()
    values = exe.init(0)
    traces.clear()
    return exe, values


def assert_variables(values: linsey.Values, variables: Any) -> None:
    flat = {
        "/".join((name, *path)): leaf
        for name, tree in variables.items()
        for path, leaf in nnx.traversals.flatten_mapping(tree).items()
    }
    assert_same(dict(values.items()), flat)


# numbers


def test_init_gives_the_numbers_of_the_source_under_jit() -> None:
    _, values, variables = net()
    assert_variables(values, variables)


def test_a_call_gives_the_numbers_and_the_state_of_the_source_under_jit() -> None:
    exe, values, variables = net()

    @jax.jit
    def source(variables: Any, x: Any, keys: Any) -> Any:
        return Net().apply(variables, x, rngs=keys, mutable=["batch_stats"])

    for _ in range(3):
        expected, updates = source(variables, X, CALL)
        found, values = exe(values, X, rngs=CALL)
        variables = {**variables, **updates}
        assert_same(found, expected)
        assert_variables(values, variables)


def test_nnx_state_goes_in_and_comes_out() -> None:
    graphdef, state = nnx.split(Counter(nnx.Rngs(0)))
    program = linsey.lower(Counter(nnx.Rngs(0)))
    exe, values = program.compile(), program.values

    @jax.jit
    def source(state: Any, x: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return model(x), nnx.state(model, nnx.Not(nnx.Intermediate))

    for count in range(1, 4):
        expected, state = source(state, X)
        found, values = exe(values, X)
        assert_same(found, expected)
        assert values["Variable/calls"] == count


# what is traced and what is static


def test_arrays_are_traced_once() -> None:
    exe, values = flags()
    for x in (X, X + 1, X * 2):
        found, _ = exe(values, x)
    assert len(traces) == 1
    assert_same(found, exe(values, X * 2)[0])
    exe(values, jnp.ones((5, 3)))
    assert len(traces) == 2


def test_numpy_arrays_are_traced() -> None:
    exe, values = flags()
    for scale in (1.0, 2.0):
        exe(values, np.asarray(X) * np.float32(scale))
    assert len(traces) == 1


def test_what_is_no_array_is_static_and_compiles_once_each() -> None:
    exe, values = flags()
    calls: list[dict[str, Any]] = [
        {"train": True},
        {"train": False},
        {"train": None},
        {"mode": "tanh"},
        {"mode": "linear"},
        {"train": True, "mode": "tanh"},
    ]
    for _ in range(2):
        outputs = [exe(values, X, **kwargs)[0] for kwargs in calls]
    assert len(traces) == len(calls)
    program = linsey.lower(Flags(), X)
    _, variables = linsey.Program(graph=program.graph, values=values).emit("linen")
    for kwargs, found in zip(calls, outputs, strict=True):
        assert_same(found, jax.jit(functools.partial(Flags().apply, **kwargs))(variables, X))


def test_static_arguments_are_positional_too() -> None:
    exe, values = flags()
    first = [exe(values, X, True, "tanh")[0] for _ in range(2)]
    assert traces == [(True, "tanh")]
    assert_same(first[0], exe(values, X, train=True, mode="tanh")[0])


def test_equal_numbers_of_other_types_are_other_arguments() -> None:
    exe, values = flags()
    outputs = [exe(values, X, train)[0] for train in (True, 1, 1.0, True)]
    assert [type(train) for train, _ in traces] == [bool, int, float]
    assert_same(outputs[0], outputs[3])
    assert not jnp.array_equal(outputs[0], outputs[1])


def test_static_arguments_may_lie_between_arrays_in_a_pytree() -> None:
    exe, values = flags()
    for scale in (1.0, 2.0, 3.0):
        found, _ = exe(values, X, extra={"a": jnp.asarray(scale), "b": (2.0, None)})
    assert len(traces) == 1
    exe(values, X, extra={"a": jnp.asarray(1.0), "b": (4.0, None)})
    assert len(traces) == 2
    plain, _ = exe(values, X)
    assert_same(found, jax.jit(lambda x: x * jnp.asarray(3.0) * 2.0)(plain))


def test_a_static_argument_that_cannot_be_hashed() -> None:
    exe, values = flags()
    with pytest.raises(EmitError) as caught:
        exe(values, X, mode={1, 2})
    text = str(caught.value)
    assert text.startswith("at arguments: a static argument cannot be hashed: ")
    assert "unhashable type: 'set'" in text
    assert text.endswith("\nPass arrays, or hashable objects (a tuple in place of a list).")


def test_keywords_that_linsey_uses_itself_reach_the_method() -> None:
    exe = linsey.lower(TakesValues(), X, values=X[0, 0]).compile()
    values = exe.init(0)
    program = linsey.lower(TakesValues(), X, values=X[0, 0])
    _, variables = linsey.Program(graph=program.graph, values=values).emit("linen")
    found, _ = exe(values, X, values=jnp.float32(2.0), graph=3)
    source = jax.jit(lambda v, x, values: TakesValues().apply(v, x, values=values, graph=3))
    assert_same(found, source(variables, X, jnp.float32(2.0)))


# what comes back


def test_only_the_slots_that_change_are_outputs() -> None:
    exe, values, _ = net()
    lowered = exe.lower(values, X, rngs=CALL)
    output, changed = lowered.out_info
    keys = values.keys()
    assert sorted(keys[slot] for slot in changed) == [
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
    ]
    assert output.shape == (2, 8)
    _, changed = exe.lower(values, X, train=False).out_info
    assert not changed


def test_the_call_can_be_lowered_from_shapes() -> None:
    exe, values, _ = net()
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), values)
    lowered = exe.lower(abstract, jax.ShapeDtypeStruct((5, 3), "float32"), rngs=CALL)
    assert lowered.out_info[0].shape == (5, 8)


def test_what_does_not_change_is_the_very_object() -> None:
    exe, values, _ = net()
    _, after = exe(values, X, rngs=CALL)
    for key, value in values.items():
        assert (after[key] is value) == key.startswith("params/")
    _, same = exe(values, X, train=False)
    assert same is values


def test_mutable_says_which_slots_may_change() -> None:
    program = linsey.lower(Counter(nnx.Rngs(0)))
    exe = program.compile(mutable=["RngCount"])
    _, after = exe(program.values, X)
    assert after["Variable/calls"] == 0
    assert after["RngCount/dropout/rngs/count"] == 1
    frozen = program.compile(mutable=())
    assert frozen(program.values, X)[1] is program.values
    exe, values, _ = net()
    still = linsey.lower(Net(), X, rngs=RNGS).compile(mutable=False)
    with pytest.raises(EmitError, match="Cannot update variable"):
        still(values, X, rngs=CALL)


def test_donation_takes_only_what_changes() -> None:
    program = linsey.lower(Net(), X, rngs=RNGS)
    exe, plain = program.compile(donate=True), program.compile()
    values, others = exe.init(RNGS), plain.init(RNGS)
    for _ in range(3):
        given = values
        found, values = exe(given, X, rngs=CALL)
        expected, others = plain(others, X, rngs=CALL)
        assert_same(found, expected)
        assert_same(values.arrays, others.arrays)
        for key, value in given.items():
            assert value.is_deleted() == key.startswith("batch_stats/")
        assert not any(value.is_deleted() for _, value in values.items())
    _, same = exe(values, X, train=False)
    assert not any(value.is_deleted() for _, value in same.items())


def test_what_a_call_makes_can_be_captured() -> None:
    program = linsey.lower(Net(), X, rngs=RNGS)
    exe = program.compile(capture=("intermediates",))
    values = exe.init(RNGS)
    (found, captured), after = exe(values, X, rngs=CALL)
    _, variables = linsey.Program(graph=program.graph, values=values).emit("linen")
    variables.pop("intermediates", None)
    apply = functools.partial(Net().apply, mutable=["batch_stats", "intermediates"])
    expected, updates = jax.jit(apply)(variables, X, rngs=CALL)
    assert_same(found, expected)
    assert_same(captured, {"intermediates": updates["intermediates"]})
    assert set(after.keys()) == set(values.keys())


def test_what_an_nnx_call_makes_can_be_captured() -> None:
    program = linsey.lower(Keeping(nnx.Rngs(0)))
    found, after = program.compile()(program.values, X)
    assert after is program.values
    (same, captured), after = program.compile(capture=("intermediates",))(program.values, X)
    assert after is program.values
    assert_same(same, found)
    hidden = jax.jit(lambda x: Keeping(nnx.Rngs(0)).linear(x))(X)
    assert_same(captured, {"intermediates": {"hidden": hidden}})


# methods


def test_a_method_by_name_and_as_a_function() -> None:
    program = linsey.lower(Counter(nnx.Rngs(0)))
    by_name, after = program.compile(method="plain")(program.values, X)
    assert after is program.values
    assert_same(by_name, program.compile(method=Counter.plain)(program.values, X)[0])
    by_lambda, _ = program.compile(method=lambda model, x: model.linear(x))(program.values, X)
    assert_same(by_lambda, by_name)
    exe = linsey.lower(Net(), X, rngs=RNGS).compile(method="encode")
    found, _ = exe(exe.init(RNGS), X)
    assert_same(found, jax.jit(lambda x: jnp.sum(x, axis=-1))(X))


# keys


@pytest.mark.parametrize(
    "rngs",
    [0, jax.random.key(0), {"params": 0}, {"params": jax.random.key(0)}],
    ids=["seed", "key", "dict-of-seeds", "dict-of-keys"],
)
def test_keys_in_every_form(rngs: Any) -> None:
    exe = linsey.lower(nn.Dense(4), X).compile()
    expected = jax.jit(nn.Dense(4).init)(jax.random.key(0), X)
    assert_variables(exe.init(rngs), expected)
    assert_variables(exe.init(), expected)


def test_raw_keys() -> None:
    exe = linsey.lower(nn.Dense(4), X).compile()
    key = jax.random.PRNGKey(3)
    assert_variables(exe.init(key), jax.jit(nn.Dense(4).init)(key, X))


def test_keys_from_nnx_rngs() -> None:
    exe = linsey.lower(nn.Dense(4), X).compile()
    expected = jax.jit(nn.Dense(4).init)(nnx.Rngs(5).params(), X)
    assert_variables(exe.init(nnx.Rngs(5)), expected)
    assert_variables(exe.init(nnx.Rngs(params=5)), expected)


def test_keys_of_a_call_in_every_form() -> None:
    exe, values, _ = net()
    expected, _ = exe(values, X, rngs={"dropout": jax.random.key(2)})
    assert_same(exe(values, X, rngs={"dropout": 2})[0], expected)
    assert_same(exe(values, X, rngs={"dropout": jax.random.PRNGKey(2)})[0], expected)
    streams = nnx.Rngs(dropout=2)
    drawn, _ = exe(values, X, rngs=streams)
    assert_same(drawn, exe(values, X, rngs={"dropout": nnx.Rngs(dropout=2).dropout()})[0])
    assert not jnp.array_equal(exe(values, X, rngs=streams)[0], drawn)


def test_keys_of_a_call_take_the_place_of_nnx_streams() -> None:
    program = linsey.lower(Counter(nnx.Rngs(0)))
    exe = program.compile()
    first, after = exe(program.values, X, rngs={"dropout": 5})
    second, _ = exe(after, X, rngs={"dropout": 5})
    assert_same(first, second)
    assert after["RngCount/dropout/rngs/count"] == 0


def test_keys_for_a_stream_that_is_not_there() -> None:
    program = linsey.lower(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(EmitError) as caught:
        program.compile()(program.values, X, rngs={"noise": jax.random.key(0)})
    assert str(caught.value) == (
        "at rngs: no stream is called 'noise'; there are: none\nPass keys for these streams only."
    )


# inside transforms


def loss_of(exe: Any, values: linsey.Values, x: Any) -> Any:
    return jnp.sum(exe(values, x, rngs=CALL)[0] ** 2)


def source_loss(params: Any, rest: Any, x: Any) -> Any:
    made, _ = Net().apply({"params": params, **rest}, x, rngs=CALL, mutable=["batch_stats"])
    return jnp.sum(made**2)


def test_inside_jit() -> None:
    exe, values, _ = net()

    @jax.jit
    def run(values: linsey.Values, x: Any, keys: Any) -> Any:
        return exe(values, x, rngs=keys)

    found, after = run(values, X, CALL)
    expected, updated = exe(values, X, rngs=CALL)
    assert isinstance(after, linsey.Values)
    assert_same(found, expected)
    assert_same(dict(after.items()), dict(updated.items()))


def test_inside_grad() -> None:
    exe, values, variables = net()
    gradients = jax.jit(jax.grad(lambda params: loss_of(exe, values.replace(params), X)))(
        values.select("params")
    )
    rest = {"batch_stats": variables["batch_stats"]}
    expected = jax.jit(jax.grad(source_loss))(variables["params"], rest, X)
    assert_variables(gradients, {"params": expected})


def test_inside_vmap_over_inputs() -> None:
    exe, values, _ = net()
    inputs = jnp.stack([X, X + 1, X - 1])
    found = jax.jit(jax.vmap(lambda x: exe(values, x, train=False)[0]))(inputs)
    program = linsey.lower(Net(), X, rngs=RNGS)
    _, variables = linsey.Program(graph=program.graph, values=values).emit("linen")
    expected = jax.jit(jax.vmap(lambda x: Net().apply(variables, x, train=False)))(inputs)
    assert_same(found, expected)


def test_inside_vmap_over_values() -> None:
    exe = linsey.lower(nn.Dense(4), X).compile()
    keys = jax.random.split(jax.random.key(0), 3)
    values = jax.vmap(exe.init)(keys)
    variables = jax.vmap(lambda key: nn.Dense(4).init(key, X))(keys)
    assert_variables(values, variables)
    found, _ = jax.jit(jax.vmap(lambda values: exe(values, X)))(values)
    expected = jax.jit(jax.vmap(lambda variables: nn.Dense(4).apply(variables, X)))(variables)
    assert_same(found, expected)


def test_inside_scan() -> None:
    exe, values, variables = net()
    inputs = jnp.stack([X, X + 1])

    @jax.jit
    def run(values: linsey.Values, inputs: Any) -> Any:
        return jax.lax.scan(lambda values, x: exe(values, x, rngs=CALL)[::-1], values, inputs)

    @jax.jit
    def source(variables: Any, inputs: Any) -> Any:
        @jax.jit
        def apply(variables: Any, x: Any) -> Any:
            return Net().apply(variables, x, rngs=CALL, mutable=["batch_stats"])

        def step(variables: Any, x: Any) -> Any:
            output, updates = apply(variables, x)
            return {**variables, **updates}, output

        return jax.lax.scan(step, variables, inputs)

    after, outputs = run(values, inputs)
    expected, expected_outputs = source(variables, inputs)
    assert_same(outputs, expected_outputs)
    assert_variables(after, expected)


# bad input


def test_a_stream_that_is_missing_at_a_call() -> None:
    exe, values, _ = net()
    with pytest.raises(EmitError) as caught:
        exe(values, X)
    text = str(caught.value)
    assert text.startswith(
        "at Net: a PRNG stream is missing; given: none. Dropout_0 needs PRNG for"
    )
    assert text.endswith("\nPass rngs= with a key for every stream that the call draws from.")
    with pytest.raises(EmitError, match=r"given: noise\."):
        exe(values, X, rngs={"noise": jax.random.key(0)})
    found, _ = exe(values, X, rngs=CALL)
    assert found.shape == (2, 8)


def test_what_is_no_key() -> None:
    exe, values, _ = net()
    with pytest.raises(linsey.LinseyError) as caught:
        exe(values, X, rngs="dropout")
    assert str(caught.value).startswith("at rngs: found str for PRNG keys, expected an int seed")


def test_inputs_of_a_wrong_shape() -> None:
    exe, values, _ = net()
    with pytest.raises(EmitError) as caught:
        exe(values, jnp.ones((2, 7)), rngs=CALL)
    text = str(caught.value)
    assert text.startswith("at Net.__call__: the call raised ")
    assert text.endswith(
        "\nCall it with the arguments, shapes and method that the source itself takes."
    )
    assert caught.value.__cause__ is not None


def test_missing_inputs() -> None:
    exe, values, _ = net()
    with pytest.raises(EmitError, match=r"at Net\.__call__: the call raised TypeError: .*'x'"):
        exe(values)


def test_a_method_that_is_not_there() -> None:
    program = linsey.lower(Counter(nnx.Rngs(0)))
    for method in ("decode", 3):
        with pytest.raises(EmitError, match=f"at Counter: Counter has no method {method!r}"):
            program.compile(method=method)


def test_values_of_another_program() -> None:
    exe, values, _ = net()
    other = linsey.lower(nn.Dense(4), X).init(0).values
    with pytest.raises(ValuesError) as caught:
        exe(other, X)
    assert str(caught.value) == (
        "at batch_stats/BatchNorm_0/mean: the values are not those of this program: 6 slots are"
        " missing and 2 are unknown\n"
        "Pass what exe.init, program.values or an earlier call gave, whole."
    )
    with pytest.raises(ValuesError, match="4 slots are missing and 0 are unknown"):
        exe(values.select("batch_stats"), X)


def test_values_that_are_none() -> None:
    exe, _, variables = net()
    for wrong in (variables, None, X):
        with pytest.raises(ValuesError) as caught:
            exe(wrong, X)
        assert str(caught.value) == (
            f"at values: found {type(wrong).__name__}, expected linsey.Values\n"
            "Pass what exe.init, program.values or an earlier call gave; for Linen variables:"
            " linsey.lower(..., variables=variables).values."
        )


def test_values_of_another_shape() -> None:
    exe, values, _ = net()
    name = next(key for key in values if key.startswith("params/"))
    wrong = values.replace({name: jnp.ones((1, 1, 1))})
    for use in (
        lambda: exe(wrong, X),
        lambda: linsey.Program(graph=exe.graph, values=wrong).emit("nnx"),
        lambda: linsey.Program(graph=exe.graph, values=wrong).emit("linen"),
    ):
        with pytest.raises(ValuesError, match=rf"{name}: found float32\[1,1,1\], expected float32"):
            use()


def test_a_live_module_cannot_be_initialised() -> None:
    exe = linsey.lower(Counter(nnx.Rngs(0))).compile()
    with pytest.raises(EmitError, match="it was lowered from a live module"):
        exe.init(0)


def test_a_call_that_changes_structure() -> None:
    program = linsey.lower(Growing(nnx.Rngs(0)))
    with pytest.raises(EmitError) as caught:
        program.compile()(program.values, X)
    assert str(caught.value) == (
        "at mode: the call changed the structure of the module: this attribute was 'before' and"
        " became 'after'\n"
        "Keep what a call changes in Variables; change structure outside of compiled calls."
    )


def test_a_failed_call_leaves_nothing_behind() -> None:
    exe, values, _ = net()
    expected, _ = exe(values, X, rngs=CALL)
    with pytest.raises(EmitError):
        exe(values, jnp.ones((2, 7)), rngs=CALL)
    assert_same(exe(values, X, rngs=CALL)[0], expected)
