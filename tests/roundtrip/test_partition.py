"""Annotations through both backends: flax reads from what was emitted what the source said."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import partition_cases as cases
import pytest
from compare import assert_same
from flax import core, nnx
from flax import linen as nn
from flax.nnx import bridge
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from partition_cases import LIFTS, LINEN_INITS, Block, Dense, Lifted
from stored import assert_comes_back

import linsey
from linsey import bridge as own
from linsey.ir import left_out

X = jnp.ones((2, 4))
COMPLETE = (("embed", "model"), ("mlp", "data"), ("other", None), ("layers", None), ("ens", None),
            ("t", None), ("data", None), ("model", None))  # fmt: skip
"""Rules that map every name of the cases, and no two of one slot to the same axis."""

LINEN: dict[str, Any] = {
    **{name: lambda name=name: Dense(name) for name in LINEN_INITS},
    **{
        f"{name}-{lift}-{axis}": lambda name=name, lift=lift, axis=axis: Lifted(
            cases.PureLinen(name), lift, axis
        )
        for name in ("partitioned", "logical")
        for lift, axis in LIFTS
    },
    **{
        how: lambda how=how: cases.LiftedWithAxes(how)
        for how in ("plain", "scan_with_axes", "vmap_with_axes")
    },
    **{
        f"to-linen-{which}-{lift}": lambda which=which, lift=lift: Lifted(
            cases.ToLinen(which), lift, 1
        )
        for which in ("flax", "linsey", "flax12")
        for lift in ("scan", "vmap")
    },
}
NNX: dict[str, Any] = {
    "tuple": lambda: Block(nnx.Rngs(0)),
    "spec": lambda: Block(nnx.Rngs(0), P("data", None)),
    "unconstrained": lambda: Block(nnx.Rngs(0), (P.UNCONSTRAINED, ("data", "model"))),
    "sharding": lambda: Block(nnx.Rngs(0), NamedSharding(cases.mesh(), P("data", None))),
    "mesh": lambda: Block(nnx.Rngs(0), mesh=cases.mesh()),
    "none": lambda: Block(nnx.Rngs(0), None),
    "nothing": lambda: Block(nnx.Rngs(0), ()),
    "mine": lambda: Block(nnx.Rngs(0), mine={"a": 1}, eager_sharding=False),
    "layers": lambda: cases.Layers(nnx.Rngs(0)),
    "stacked": lambda: cases.stack(Block, 1, 0)(nnx.Rngs(0)),
    "to-nnx": lambda: bridge.lazy_init(cases.Wrapped(nnx.Rngs(0)), X),
    "to-nnx-logical": lambda: bridge.lazy_init(
        cases.Wrapped(nnx.Rngs(0), module=Dense("logical-rules")), X
    ),
    "to-nnx-own": lambda: bridge.lazy_init(cases.Wrapped(nnx.Rngs(0), own.ToNNX), X),
    "sown": lambda: bridge.lazy_init(
        cases.Wrapped(nnx.Rngs(0), module=cases.LiftedWithAxes("scan_with_axes")), X
    ),
    "optimizer": lambda: nnx.ModelAndOptimizer(
        Block(nnx.Rngs(0)), optax.adafactor(1e-3, min_dim_size_to_factor=2)
    ),
}


@pytest.fixture(autouse=True)
def annotate_only() -> Iterator[None]:
    """Outside a mesh flax makes annotated Variables only so."""
    with nnx.use_eager_sharding(False):
        yield


def by_path(tree: Any) -> dict[Any, P]:
    """The specs of Linen variables by path, collection not included."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, P))[0]
    return {tuple(key.key for key in path[1:]): leaf for path, leaf in flat}


def of_state(state: Any) -> dict[Any, P]:
    """The specs of an NNX state by path."""
    flat = nnx.to_flat_state(nnx.get_partition_spec(state))
    return {path: leaf.get_raw_value() for path, leaf in flat if leaf.get_raw_value() is not None}


def kernels(found: dict[Any, P]) -> list[P]:
    return [leaf for path, leaf in found.items() if path[-1] == "kernel"]


@pytest.mark.parametrize("name", [name for name in LINEN if not name.startswith("to-linen")])
def test_emitted_nnx_has_the_specs_of_the_linen_source(name: str) -> None:
    module = LINEN[name]()
    variables = core.unfreeze(module.init(jax.random.key(0), X))
    named = {
        name: core.unfreeze(nn.partitioning.get_axis_names(variables[f"{name}_axes"]))
        if f"{name}_axes" in variables
        else nn.get_partition_spec(tree)
        for name, tree in variables.items()
        if not name.endswith("_axes")
    }
    graphdef, state = linsey.lower(module, X, variables=variables).emit("nnx")
    rules = getattr(variables.get("params", {}).get("kernel"), "rules", None)
    expected = by_path(named)
    if rules:
        expected["kernel",] = nn.logical_to_mesh_axes(expected["kernel",], rules)
    found = of_state(state)
    assert {path: found[path] for path in expected} == expected
    assert all(found[path] == P() for path in found.keys() - expected.keys())
    if rules is None:
        # Linen's own reading of the names holds for what NNX gives, whatever the rules.
        for given in (COMPLETE, cases.RULES):
            linen = by_path(nn.logical_to_mesh(named, given))
            assert {p: nn.logical_to_mesh_axes(found[p], given) for p in linen} == linen
        with nn.logical_axis_rules(COMPLETE):
            linen = by_path(nn.logical_to_mesh(named))
            assert {path: of_state(state)[path] for path in linen} == linen
    np.testing.assert_array_equal(nnx.merge(graphdef, state)(X), _linen_call(module, variables))


def _linen_call(module: nn.Module, variables: Any) -> Any:
    return module.apply(variables, X)


def test_rules_of_a_box_mean_in_nnx_what_they_mean_in_linen() -> None:
    rules = (("mlp", "model"), ("mlp", "data"), ("embed", "model"))
    init = nn.with_logical_partitioning(cases.INIT, ("embed", "mlp"), rules=rules)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.param("kernel", init, (4, 4))

    _, state = linsey.lower(Model(), X).init(0).emit("nnx")
    expected = nn.logical_to_mesh_axes(("embed", "mlp"), rules)
    assert expected == P(None, "model")
    assert kernels(of_state(state)) == [expected]


@pytest.mark.parametrize("name", [name for name in LINEN if name.startswith("to-linen")])
def test_emitted_nnx_has_the_stacked_names_of_nnx_in_linen(name: str) -> None:
    module = LINEN[name]()
    pure = Lifted(cases.PureLinen(), module.lift, module.axis)
    variables = jax.eval_shape(pure.init, jax.random.key(0), X)
    _, state = linsey.lower(module, X).emit("nnx")
    assert kernels(of_state(state)) == kernels(by_path(nn.get_partition_spec(variables)))


def test_the_fields_of_a_box_travel_with_the_variable() -> None:
    model = nnx.merge(*linsey.lower(Dense("subclass-logical"), X).init(0).emit("nnx"))
    metadata = model.kernel.get_metadata()
    assert metadata["tag"] == "mine"
    assert metadata["linen_meta_type"] is cases.TaggedLogically
    box = bridge.variables.to_linen_var(model.kernel.to_state())
    assert type(box) is cases.TaggedLogically
    assert (box.names, box.tag) == (("embed", "mlp"), "mine")


@pytest.mark.parametrize("name", LINEN)
def test_linen_gets_its_boxes_back(name: str) -> None:
    module = LINEN[name]()
    variables = core.unfreeze(module.init(jax.random.key(0), X))
    program = linsey.lower(module, X, variables=variables)
    again, emitted = program.emit("linen")
    assert_comes_back(name, program, "linen")
    assert again == module
    assert_same(emitted, variables)
    model = nnx.merge(*program.emit("nnx"))
    back = linsey.lower(model)
    assert back.graph.slots == program.graph.slots
    assert_same(back.emit("linen")[1], variables)


@pytest.mark.parametrize("name", NNX)
def test_nnx_gets_its_metadata_back(name: str) -> None:
    model = NNX[name]()
    program = linsey.lower(model)
    assert not left_out(program.graph)
    assert_comes_back(name, program, "nnx")
    graphdef, state = program.emit("nnx")
    assert graphdef == nnx.graphdef(model)
    assert_same(state, nnx.state(model))
    for found, expected in zip(nnx.to_flat_state(state), nnx.to_flat_state(nnx.state(model)),
                               strict=True):  # fmt: skip
        assert found[1].get_metadata() == expected[1].get_metadata()
    assert linsey.lower(nnx.merge(graphdef, state)).graph == program.graph
    module, variables = program.emit("linen")
    assert linsey.lower(module).graph == program.graph
    again = linsey.lower(module, variables=variables)
    assert again.emit("nnx")[0] == graphdef


def test_nnx_becomes_the_boxes_of_linen() -> None:
    spec = ("data", "model")
    model = nnx.Dict(
        partitioned=nnx.Param(jnp.ones((2, 2)), out_sharding=spec),
        mesh=nnx.Param(jnp.ones((2, 2)), out_sharding=spec, mesh=cases.mesh()),
        sharding=nnx.Param(
            jnp.ones((2, 2)), out_sharding=NamedSharding(cases.mesh(), P("data", P.UNCONSTRAINED))
        ),
        rules=nnx.Param(
            jnp.ones((2, 2)), out_sharding=("a", "b"), sharding_rules=(("a", "data"), ("b", None))
        ),
        boxed=nnx.Param(
            bridge.with_partitioning(cases.INIT, spec)(jax.random.key(0), (2, 2))
        ),
        mine=nnx.Param(jnp.ones((2, 2)), out_sharding=spec, mine=1),
        plain=nnx.Param(jnp.ones((2, 2))),
        none=nnx.Param(jnp.ones((2, 2)), out_sharding=None),
    )  # fmt: skip
    params = linsey.lower(model).emit("linen")[1]["params"]
    kinds = {name: type(box) for name, box in params.items()}
    assert kinds.pop("mine").__name__ == "NNXMeta"
    assert issubclass(kinds.pop("rules"), nn.LogicallyPartitioned)
    assert {kinds.pop(name) for name in ("plain", "none")} == {type(jnp.ones(1))}
    assert set(kinds.values()) == {nn.Partitioned}
    assert params["mesh"].mesh == params["sharding"].mesh == cases.mesh()
    assert params["boxed"].mesh is None
    assert params["sharding"].names == ("data", P.UNCONSTRAINED)
    expected = nnx.get_partition_spec({k: v for k, v in model.items() if k != "sharding"})
    found = nn.get_partition_spec(params)
    assert found["sharding"] == P("data", P.UNCONSTRAINED)
    found["rules"] = nn.logical_to_mesh_axes(found["rules"], params["rules"].rules)
    for name, leaf in expected.items():
        assert found[name] == leaf.get_raw_value()


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("logical", ()),
        ("logical", COMPLETE),
        ("logical-rules", ()),
        ("scan_with_axes", ()),
        ("scan_with_axes", COMPLETE),
        ("logical-scan-vmap-1", ()),
        ("logical-scan-vmap-1", COMPLETE),
        ("partitioned", ()),
        ("to-linen-flax-scan", COMPLETE),  # NNX's own annotation: `layers` needs a rule
    ],
)
def test_emitted_nnx_runs_under_a_mesh(name: str, rules: Any) -> None:
    module = LINEN[name]()
    program = linsey.lower(module, X).init(0)
    graphdef, state = program.emit("nnx")
    expected = nnx.merge(graphdef, state)(X)

    @nnx.jit
    def run(model: Any, x: jax.Array) -> Any:
        return model(x)

    mesh = cases.mesh()
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules), nnx.use_eager_sharding(True):
        model = nnx.merge(*linsey.lower(module, X).init(0).emit("nnx"))
        assert nnx.split(model)[0] == nnx.split(nnx.merge(*nnx.split(model)))[0]
        np.testing.assert_array_equal(np.asarray(run(model, X)), np.asarray(expected))
        nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def test_an_optimizer_of_an_emitted_model_needs_no_mesh() -> None:
    with nnx.use_eager_sharding(True):
        model = nnx.merge(*linsey.lower(Dense("logical"), X).init(0).emit("nnx"))
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        assert not model.kernel.get_metadata("eager_sharding")
        loss = lambda model: model(X).sum()  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))
    program = linsey.lower(nnx.Dict(model=model, optimizer=optimizer))
    alone = linsey.lower(optimizer).graph
    assert {s.partition.logical for s in alone.slots if s.path[-1] == "kernel"} == {True}
    mirrored = [slot for slot in program.graph.slots if slot.mirrors is not None]
    assert {slot.path[-1] for slot in mirrored} == {"kernel"}
    assert all(slot.partition is not None and slot.partition.logical for slot in mirrored)
