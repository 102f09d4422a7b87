"""Values: by name, in parts, and as a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_same
from flax import nnx

import linsey.runtime  # jax takes Values as a pytree from here on
from linsey.ir import Graph, Node, Slot, TensorType, Values, ValuesError, slot_index

KIND = TensorType(shape=(2,), dtype="float32")
GRAPH = Graph(
    nodes=(Node(slots=(("kernel", 0), ("bias", 1), ("mean", 2), ("a/b", 3))),),
    slots=(
        Slot(collection="params", paths=(("dense", "kernel"), ("tied", "kernel")), type=KIND),
        Slot(collection="params", paths=(("dense", "bias"),), type=KIND),
        Slot(collection="batch_stats", paths=(("norm", "mean"),), type=KIND),
        Slot(collection="cache", paths=(("layers", 0, "a/b"),), type=KIND),
    ),
)
KEYS = (
    "params/dense/kernel",
    "params/dense/bias",
    "batch_stats/norm/mean",
    r"cache/layers/[0]/a\/b",
)


def make(scale: float = 1.0) -> Values:
    return Values(slot_index(GRAPH), tuple(scale * jnp.arange(2.0) + n for n in range(4)))


def test_a_value_is_found_by_the_name_of_its_slot() -> None:
    values = make()
    assert values.keys() == KEYS
    assert tuple(values) == KEYS
    assert len(values) == 4
    for key, array in zip(KEYS, values.arrays, strict=True):
        assert key in values
        assert values[key] is array
    assert dict(values.items()) == dict(zip(KEYS, values.arrays, strict=True))


def test_a_tied_slot_is_found_by_any_of_its_names() -> None:
    values = make()
    assert values["params/tied/kernel"] is values["params/dense/kernel"]
    assert "params/tied/kernel" not in values.keys()  # noqa: SIM118 - keys are the canonical ones
    chosen = values.select("params")
    assert chosen["params/tied/kernel"] is values["params/dense/kernel"]


def test_whether_a_name_is_in_agrees_with_indexing() -> None:
    values = make()
    assert "params/tied/kernel" in values
    assert "params/dense/nothing" not in values
    assert None not in values


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ValuesError) as caught:
        make()["params/dense/kernal"]
    assert str(caught.value) == (
        "at params/dense/kernal: no slot named 'params/dense/kernal'; near it: params/dense/kernel,"
        " params/dense/bias\n"
        "Use one of `values.keys()`; `print(program)` shows them in place."
    )
    with pytest.raises(ValuesError) as caught:
        make()["zzz"]
    assert caught.value.message == "no slot named 'zzz'"


def test_a_selection_by_collection_and_by_predicate() -> None:
    values = make()
    assert values.select("params").keys() == KEYS[:2]
    assert values.select("cache", "params").keys() == (*KEYS[:2], KEYS[3])
    assert values.select(lambda key: key.endswith("mean")).keys() == KEYS[2:3]
    assert values.select("cache", lambda key: "bias" in key).keys() == (KEYS[1], KEYS[3])
    assert values.select().keys() == ()
    assert repr(values.select()) == "Values()"
    for key, array in values.select("params").items():
        assert array is values[key]


def test_a_name_that_is_not_selected_is_not_there() -> None:
    chosen = make().select("batch_stats")
    assert KEYS[0] not in chosen
    with pytest.raises(ValuesError, match="no slot named"):
        chosen[KEYS[0]]
    with pytest.raises(ValuesError, match="no slot named"):
        chosen["params/tied/kernel"]


def test_an_unknown_collection_is_named() -> None:
    with pytest.raises(ValuesError) as caught:
        make().select("param")
    assert str(caught.value) == (
        "at param: no slot is in the collection 'param'; there are: batch_stats, cache, params\n"
        "Select one of these, or by a predicate on the slot's name."
    )


def test_replacing_leaves_the_others_and_the_original() -> None:
    values = make()
    new = jnp.zeros(2)
    for other in ({KEYS[1]: new}, Values(slot_index(GRAPH).subset((1,)), (new,))):
        changed = values.replace(other)
        assert changed[KEYS[1]] is new
        assert [changed[key] is values[key] for key in KEYS] == [True, False, True, True]
    assert values[KEYS[1]] is not new
    assert values.replace({"params/tied/kernel": new})[KEYS[0]] is new
    assert values.replace(values.select("params")).arrays == values.arrays
    with pytest.raises(ValuesError, match="no slot named 'params/x'"):
        values.replace({"params/x": new})


def test_the_text_shows_names_and_types() -> None:
    assert repr(make().select("params")) == (
        "Values(\n  params/dense/kernel: float32[2]\n  params/dense/bias: float32[2]\n)"
    )
    assert repr(Values(slot_index(GRAPH).subset((0,)), (1.0,))).endswith("kernel: float\n)")


def test_values_are_a_pytree() -> None:
    values = make()
    leaves, tree = jax.tree.flatten(values)
    assert leaves == list(values.arrays)
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, linsey.Values)
    assert again.index == values.index
    assert jax.tree.structure(make(2.0)) == tree
    assert hash(jax.tree.structure(make(2.0))) == hash(tree)
    assert jax.tree.structure(values.select("params")) != tree


def test_maps_over_values() -> None:
    values = make()
    doubled = jax.tree.map(lambda a, b: a + b, values, make())
    assert_same(dict(doubled.items()), {key: 2 * array for key, array in values.items()})
    with pytest.raises(ValueError, match="tree"):
        jax.tree.map(lambda a, b: a, values, values.select("params"))


def test_values_go_through_jit() -> None:
    traces = []

    @jax.jit
    def run(values: Values) -> Values:
        traces.append(values)
        return values.replace({KEYS[0]: values[KEYS[0]] + values["batch_stats/norm/mean"]})

    for scale in (1.0, 2.0):
        values = make(scale)
        found = run(values)
        assert_same(found[KEYS[0]], values[KEYS[0]] + values[KEYS[2]])
        assert_same(found[KEYS[1]], values[KEYS[1]])
    assert len(traces) == 1


def test_gradients_are_values() -> None:
    values = make()

    def loss(params: Values) -> jax.Array:
        whole = values.replace(params)
        return sum(jnp.sum(array**2) for array in whole.arrays)

    gradients = jax.grad(loss)(values.select("params"))
    assert isinstance(gradients, linsey.Values)
    assert gradients.keys() == KEYS[:2]
    for key, gradient in gradients.items():
        assert_same(gradient, 2 * values[key])


def test_optax_trains_values() -> None:
    transform = optax.adam(0.1)
    params = make().select("params")
    plain = dict(params.items())
    state, plain_state = transform.init(params), transform.init(plain)
    for _ in range(2):
        updates, state = transform.update(params, state, params)
        params = optax.apply_updates(params, updates)
        plain_updates, plain_state = transform.update(plain, plain_state, plain)
        plain = optax.apply_updates(plain, plain_updates)
    assert isinstance(params, linsey.Values)
    assert_same(dict(params.items()), plain)


def test_paths_of_leaves_name_the_slots() -> None:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(make())]
    for path, key in zip(paths, KEYS, strict=True):
        assert repr(key)[1:-1] in path


def test_values_of_a_program_are_these() -> None:
    program = linsey.lower(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    assert program.values["params/kernel"].shape == (3, 2)
    np.testing.assert_array_equal(program.values["params/bias"], np.zeros(2))
