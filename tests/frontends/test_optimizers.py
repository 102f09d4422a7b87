"""The slots of optimizers: which parameter each follows, and how it is partitioned."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from partition_cases import INIT

import linsey
from linsey.ir import Slot


@pytest.fixture(autouse=True)
def annotate_only() -> Iterator[None]:
    """Outside a mesh flax makes annotated Variables only so."""
    with nnx.use_eager_sharding(False):
        yield


class Model(nnx.Module):
    """Parameters of every rank, some large enough for Adafactor to factor."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def param(shape: tuple[int, ...], spec: Any) -> Any:
            return nnx.Param(INIT(rngs.params(), shape) if len(shape) > 1 else jnp.ones(shape),
                             out_sharding=spec)  # fmt: skip

        self.wide = param((3, 5), ("in", "out"))
        self.tall = param((5, 3), ("in", "out"))
        self.square = param((4, 4), ("in", "out"))
        self.deep = param((2, 5, 3), ("layers", "in", "out"))
        self.layers = nnx.List([param((6,), ("out",)), param((2, 2), None)])
        self.plain = nnx.Param(jnp.ones((1,)))
        self.half = param((5, 6), ("in",))


class State(nnx.Module):
    """A model with its optimizer."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model = model
        self.optimizer = optimizer


def _matrices(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def _labels(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "large" if leaf.ndim > 1 else "small", tree)


FACTORED = optax.adafactor(1e-3, min_dim_size_to_factor=3)
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adafactor": FACTORED,
    "adafactor-momentum": optax.adafactor(1e-3, momentum=0.9, min_dim_size_to_factor=3),
    "masked": optax.masked(optax.adam(1e-3), _matrices),
    "multi-steps": optax.MultiSteps(optax.adam(1e-3), 2),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "partition": optax.partition({"large": FACTORED, "small": optax.adam(1e-3)}, _labels),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.ema(0.9), optax.adam(1e-3)),
    "lbfgs": optax.lbfgs(0.1, memory_size=3),
    "sm3": optax.sm3(0.1),
    "flat": optax.flatten(optax.adam(1e-3)),
}


def _with_model(tx: Any) -> Any:
    model = Model(nnx.Rngs(0))
    return State(model, nnx.Optimizer(model, tx, wrt=nnx.Param))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_follows_the_parameters(name: str) -> None:
    state = _with_model(OPTIMIZERS[name])
    program = linsey.lower(state)
    slots = program.graph.slots
    parameters = {slot.path[1:]: slot for slot in slots if slot.path[0] == "model"}
    followed = 0
    for slot in slots:
        if slot.path[0] != "optimizer":
            continue
        shape = getattr(slot.type, "shape", None)
        named = [p for path, p in parameters.items() if slot.path[-len(path) :] == path]
        if named and named[0].type.shape == shape and not _is_placeholder(slot):
            assert slot.mirrors is not None
            assert slots[slot.mirrors] is named[0]
            assert (slot.partition is None) == (named[0].partition is None)
            if slot.partition is not None:
                assert slot.partition.axes == named[0].partition.axes
            followed += 1
        else:
            assert slot.mirrors is None
            if slot.partition is not None and shape is not None:
                assert len(slot.partition.axes) == len(shape)
    assert followed or name in ("sm3", "flat")


def _is_placeholder(slot: Slot) -> bool:
    return "v_row" in slot.path or "v_col" in slot.path


@pytest.mark.parametrize("name", ["adafactor", "adafactor-momentum", "partition"])
def test_factored_state_has_the_axes_that_are_left(name: str) -> None:
    state = _with_model(OPTIMIZERS[name])
    found = {}
    for slot in linsey.lower(state).graph.slots:
        for part in ("v_row", "v_col"):
            if part in slot.path:
                axes = None if slot.partition is None else slot.partition.axes
                found[part, slot.path[slot.path.index(part) + 1 :]] = (slot.type, axes)
    expected = {
        ("v_row", ("wide",)): ("in",),
        ("v_col", ("wide",)): ("out",),
        ("v_row", ("tall",)): ("out",),
        ("v_col", ("tall",)): ("in",),
        ("v_row", ("square",)): ("in",),
        ("v_col", ("square",)): ("out",),
        ("v_row", ("deep",)): ("layers", "out"),
        ("v_col", ("deep",)): ("layers", "in"),
        ("v_row", ("half",)): ("in",),
        ("v_col", ("half",)): (None,),
    }
    for place_of, (kind, axes) in found.items():
        assert axes == expected.get(place_of), place_of
        assert axes is None or len(kind.shape) == len(axes)
    # optax reduces the very axes that were left out: marked by the size of each.
    sizes = {"in": {"wide": 3, "tall": 5}, "out": {"wide": 5, "tall": 3}}
    for (_, path), (kind, axes) in found.items():
        if path[0] in ("wide", "tall"):
            assert kind.shape == (sizes[axes[0]][path[0]],)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_alone_has_no_partition_that_does_not_fit(name: str) -> None:
    program = linsey.lower(_with_model(OPTIMIZERS[name]).optimizer)
    for slot in program.graph.slots:
        assert slot.mirrors is None
        if slot.partition is not None:
            shapes = [leaf.shape for leaf in getattr(slot.type, "leaves", (slot.type,))]
            assert {len(shape) for shape in shapes} == {len(slot.partition.axes)}
            assert shapes != [(1,)]


def test_the_factored_state_of_a_square_needs_no_parameter() -> None:
    graph = linsey.lower(_with_model(FACTORED).optimizer).graph
    found = {slot.path[-2:]: slot.partition for slot in graph.slots}
    assert found["v_row", "square"].axes == ("in",)
    assert found["v_col", "square"].axes == ("out",)
    assert found["v_row", "wide"] is None  # (3, 5) and (5, 3) have the same rows and columns


def test_an_optimizer_that_holds_its_model_needs_no_search() -> None:
    model = Model(nnx.Rngs(0))
    state = State(Model(nnx.Rngs(1)), nnx.ModelAndOptimizer(model, optax.adam(1e-3)))
    slots = linsey.lower(state).graph.slots
    followed = [slots[slot.mirrors].path for slot in slots if slot.mirrors is not None]
    assert followed
    assert {path[:2] for path in followed} == {("optimizer", "model")}


def test_two_models_of_one_structure_are_not_guessed_between() -> None:
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    twice = nnx.Dict(student=model, teacher=Model(nnx.Rngs(1)), optimizer=optimizer)
    assert all(slot.mirrors is None for slot in linsey.lower(twice).graph.slots)


def test_of_two_models_the_one_with_just_these_parameters_is_followed() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    larger = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    larger.extra = nnx.Param(jnp.ones(2))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    slots = linsey.lower(nnx.Dict(b=larger, c=model, optimizer=optimizer)).graph.slots
    assert {slots[s.mirrors].path[0] for s in slots if s.mirrors is not None} == {"c"}


def test_an_annotation_for_the_optimizer_alone_goes_before_the_parameter_s() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones((2, 2)), out_sharding=("a", "b"),
                                 optimizer_sharding=("z", None)))  # fmt: skip
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    graph = linsey.lower(State(model, optimizer)).graph
    found = {slot.key: slot.partition for slot in graph.slots}
    assert found["OptVariable/optimizer/opt_state/[0]/mu/w"].axes == ("z", None)
    assert found["params/model/w"].axes == ("a", "b")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_metadata_of_an_optimizer_comes_back(name: str) -> None:
    for source in (_with_model(OPTIMIZERS[name]), _with_model(OPTIMIZERS[name]).optimizer):
        program = linsey.lower(source)
        graphdef, state = program.emit("nnx")
        expected = nnx.split(source)
        assert graphdef == expected[0]
        assert jax.tree.structure(state) == jax.tree.structure(expected[1])
        assert linsey.lower(nnx.merge(graphdef, state)).graph == program.graph
        module, variables = program.emit("linen")
        assert linsey.lower(module).graph == program.graph
        nn.get_partition_spec(variables)
