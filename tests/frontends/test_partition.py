"""Partition annotations of the graph against those of flax, slot by slot."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import partition_cases as cases
import pytest
from flax import core, nnx
from flax import linen as nn
from flax.core import meta
from flax.linen import partitioning
from flax.nnx import bridge
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from partition_cases import LIFTS, LINEN_INITS, RULES, Block, Dense, Lifted, X

import linsey
from linsey import bridge as own
from linsey.ir import UNCONSTRAINED, Graph, Slot, decode, format_path, place


@pytest.fixture(autouse=True)
def annotate_only() -> Iterator[None]:
    """Outside a mesh flax makes annotated Variables only so."""
    with nnx.use_eager_sharding(False):
        yield


def spec(axes: tuple[Any, ...]) -> P:
    return P(*(P.UNCONSTRAINED if axis is UNCONSTRAINED else axis for axis in axes))


def specs(graph: Graph) -> dict[str, P]:
    """The partition of each slot, by its own rules; `P()` where there is none."""
    return {slot.key: spec(_axes(slot)) for slot in graph.slots}


def _axes(slot: Slot) -> tuple[Any, ...]:
    note = slot.partition
    if note is None:
        return ()
    rules = decode(note.rules)
    return note.axes if rules is None or note.logical else place(slot, rules).axes


def linen_specs(variables: Any, read: Any = nn.get_partition_spec) -> dict[str, P]:
    """What flax says of Linen variables, by the keys of slots."""
    found = read(variables)
    flat, _ = jax.tree_util.tree_flatten_with_path(found, is_leaf=lambda leaf: isinstance(leaf, P))
    keys = [
        tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path) for path, _ in flat
    ]
    return {format_path(path): leaf for path, (_, leaf) in zip(keys, flat, strict=True)}


def nnx_specs(model: Any) -> dict[str, P]:
    """What flax says of the Variables of an NNX module, by the keys of slots."""
    state = nnx.to_flat_state(nnx.get_partition_spec(nnx.state(model)))
    return {
        format_path((collection(type(leaf)), *path)): leaf.get_raw_value() for path, leaf in state
    }


def collection(kind: type) -> str:
    return "Variable" if kind is nnx.Variable else nnx.variable_name_from_type(kind)


def linen_variables(module: nn.Module) -> Any:
    return core.unfreeze(jax.eval_shape(module.init, jax.random.key(0), X))


def slot_of(program: linsey.Program, key: str) -> Slot:
    return next(slot for slot in program.graph.slots if slot.key == key)


# --------------------------------------------------------------------------------------
# Linen


@pytest.mark.parametrize("name", LINEN_INITS)
def test_linen_boxes_give_the_specs_of_flax(name: str) -> None:
    module = Dense(name)
    expected = linen_specs(linen_variables(module))
    assert specs(linsey.lower(module, X).graph) == {"params/kernel": P(), **expected}


@pytest.mark.parametrize("name", [name for name in LINEN_INITS if "logical" in name])
def test_logical_names_become_mesh_axes_as_in_flax(name: str) -> None:
    slot = slot_of(linsey.lower(Dense(name), X), "params/kernel")
    assert slot.partition is not None
    assert slot.partition.logical
    box = linen_variables(Dense(name))["params"]["kernel"]
    rules = RULES if box.rules is None else decode(slot.partition.rules)
    assert rules == (box.rules or RULES)
    expected = nn.logical_to_mesh_axes(box.names, box.rules or RULES)
    assert spec(place(slot, rules).axes) == expected
    assert decode(slot.partition.mesh) == box.mesh


@pytest.mark.parametrize(("lift", "axis"), LIFTS)
@pytest.mark.parametrize("name", ["partitioned", "partitioned-tuple", "logical", "subclass"])
def test_linen_transforms_give_the_specs_of_flax(name: str, lift: str, axis: int) -> None:
    module = Lifted(cases.PureLinen(name), lift, axis)
    program = linsey.lower(module, X)
    assert specs(program.graph) == linen_specs(linen_variables(module))
    for slot in program.graph.slots:
        assert slot.partition is not None
        for stacked in slot.stack[:1]:  # the outermost: its place is that in the whole value
            assert slot.partition.axes[stacked.axis] == stacked.name


@pytest.mark.parametrize("how", ["plain", "scan_with_axes", "vmap_with_axes", "scan", "vmap"])
def test_sown_axes_give_the_specs_of_flax(how: str) -> None:
    module = cases.LiftedWithAxes(how)
    variables = linen_variables(module)
    program = linsey.lower(module, X)
    found = specs(program.graph)
    for collection in ("params", "cache"):
        names = partitioning.get_axis_names(variables[f"{collection}_axes"])
        for key, expected in linen_specs({collection: core.unfreeze(names)}, dict).items():
            slot = slot_of(program, key)
            assert slot.partition is not None
            assert slot.partition.logical
            axes = list(expected)
            if how in ("scan", "vmap"):  # flax leaves the stacked axis out; it has no name
                (stacked,) = slot.stack
                axes.insert(stacked.axis, None)
            assert found[key] == P(*axes)
    assert slot_of(program, "params/lifted/free").partition is None


@pytest.mark.parametrize("how", ["plain", "scan_with_axes"])
def test_sown_axes_are_read_with_and_without_the_given_variables(how: str) -> None:
    module = cases.LiftedWithAxes(how)
    x = jnp.ones(X.shape, X.dtype)
    variables = core.unfreeze(module.init(jax.random.key(0), x))
    arrays = {name: tree for name, tree in variables.items() if not name.endswith("_axes")}
    whole = linsey.lower(module, X, variables=variables)
    program = linsey.lower(module, X, variables=arrays)
    assert program.graph == whole.graph == linsey.lower(module, X).graph
    for found in (whole, program):
        emitted, again = found.emit("linen")
        assert jax.tree.structure(again) == jax.tree.structure(variables)
        assert again["params_axes"] == variables["params_axes"]
        expected = module.apply(variables, x)
        np.testing.assert_array_equal(emitted.apply(again, x), expected)
        np.testing.assert_array_equal(found.compile()(found.values, x)[0], expected)
        np.testing.assert_array_equal(nnx.merge(*found.emit("nnx"))(x), expected)


def test_unboxed_variables_keep_the_annotations() -> None:
    x = jnp.ones(X.shape, X.dtype)
    variables = Dense("logical").init(jax.random.key(0), x)
    program = linsey.lower(Dense("logical"), X, variables=nn.unbox(variables))
    assert specs(program.graph) == linen_specs(variables)


# --------------------------------------------------------------------------------------
# NNX


SPELLINGS = {
    "tuple": ("data", "model"),
    "list": ["data", None],
    "spec": P("data", None),
    "nested": (("data", "model"), None),
    "unconstrained": (P.UNCONSTRAINED, "model"),
    "empty-name": ("", "model"),
    "short": ("data",),
    "nothing": (),
    "empty-spec": P(),
    "none": None,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_out_sharding_gives_the_specs_of_flax(spelling: str) -> None:
    model = Block(nnx.Rngs(0), SPELLINGS[spelling], mine="kept", mesh=cases.mesh())
    program = linsey.lower(model)
    assert specs(program.graph) == nnx_specs(model)
    assert dict(slot_of(program, "params/kernel").metadata).keys() >= {"mine", "mesh"}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Format(Layout((0, 1)), s)])
def test_a_sharding_names_its_axes_and_its_mesh(wrap: Any) -> None:
    mesh = cases.mesh()
    sharding = NamedSharding(mesh, P("data", "model"))
    slot = slot_of(linsey.lower(Block(nnx.Rngs(0), wrap(sharding))), "params/kernel")
    assert slot.partition is not None
    assert slot.partition.axes == ("data", "model")
    assert decode(slot.partition.mesh) == mesh


@pytest.mark.parametrize("old", ["sharding", "sharding_names"])
def test_older_spellings_are_read(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"'{old}' is deprecated"):
        model = nnx.Dict(kernel=nnx.Param(jnp.ones((2, 2)), **{old: ("data", "model")}))
    assert specs(linsey.lower(model).graph) == nnx_specs(model)


def test_layers_of_flax_give_the_specs_of_flax() -> None:
    model = cases.Layers(nnx.Rngs(0))
    program = linsey.lower(model, X)
    assert specs(program.graph) == nnx_specs(model)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        slot = slot_of(program, format_path(("params", *path)))
        kept = {name: decode(value) for name, value in slot.metadata}
        if slot.partition is not None:
            kept["out_sharding"] = decode(slot.partition.spec)
        assert kept == leaf.get_metadata()


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 0), (2, 1), (1, 0, 2)])
def test_nnx_transforms_give_the_specs_of_flax(axes: tuple[int, ...]) -> None:
    make = cases.stack(Block, *axes)
    expected = nnx_specs(make(nnx.Rngs(0)))
    assert len(expected["params/kernel"]) == 2 + len(axes)
    assert specs(linsey.lower(make(nnx.Rngs(0))).graph) == expected
    assert specs(linsey.lower(lambda rngs: make(rngs)).graph) == expected


def test_a_scan_over_a_stacked_module_gives_the_specs_of_flax() -> None:
    class Stack(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = cases.stack(Block, 0)(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            named = {nnx.PARTITION_NAME: "stack0"}
            scan = nnx.scan(
                lambda x, layer: (layer(x), None), in_axes=(nnx.Carry, 0), transform_metadata=named
            )
            return scan(x, self.layers)[0]  # type: ignore[no-any-return]

    model = Stack(nnx.Rngs(0))
    assert specs(linsey.lower(model, X).graph) == nnx_specs(model)


# --------------------------------------------------------------------------------------
# mixes


@pytest.mark.parametrize(("lift", "axis"), [("none", 0), *LIFTS])
@pytest.mark.parametrize("which", ["flax", "linsey", "flax12"])
def test_nnx_in_linen_transforms_has_the_specs_of_pure_linen(
    which: str, lift: str, axis: int
) -> None:
    def kernel(make: Any) -> Any:
        module = Lifted(make, lift, axis) if lift != "none" else make()
        found = specs(linsey.lower(module, X).graph)
        return next(entry for key, entry in found.items() if key.endswith("kernel"))

    found = kernel(cases.ToLinen(which))
    pure = cases.PureLinen()
    module = Lifted(pure, lift, axis) if lift != "none" else pure()
    expected = linen_specs(linen_variables(module))
    assert found == next(entry for key, entry in expected.items() if key.endswith("kernel"))


def test_the_box_of_flax_without_a_name_for_the_axis_gets_none() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            class Body(nn.Module):
                @nn.compact
                def __call__(self, x: jax.Array, _: Any) -> Any:
                    return cases.ToLinen("flax")(name="inner")(x), None

            scan = nn.scan(Body, {"params": 1}, split_rngs={"params": True}, length=3)
            return scan(name="lifted")(x, None)[0]  # type: ignore[no-any-return]

    slot = slot_of(linsey.lower(Model(), X), "params/lifted/inner/kernel")
    assert slot.partition is not None
    assert slot.partition.axes == ("data", None, "model")


@pytest.mark.parametrize("name", ["partitioned", "logical", "logical-rules", "subclass"])
@pytest.mark.parametrize("wrapper", [bridge.ToNNX, own.ToNNX])
def test_linen_in_nnx_has_the_specs_of_pure_linen(wrapper: Any, name: str) -> None:
    module = Dense(name)
    pure = linsey.lower(module, X).graph
    model = cases.Wrapped(nnx.Rngs(0), wrapper, module)
    found = linsey.lower(model, X).graph
    assert found.nodes[found.root].source is not None
    for key, expected in specs(pure).items():
        collection, rest = key.split("/")
        slot = next(s for s in found.slots if s.key == f"{collection}/inner/{rest}")
        assert slot.partition is not None
        assert spec(slot.partition.axes) == expected
        original = next(s for s in pure.slots if s.key == key)
        assert original.partition is not None
        assert slot.partition.logical == original.partition.logical
        assert slot.partition.rules == original.partition.rules


@pytest.mark.parametrize("wrapper", [bridge.ToNNX, own.ToNNX])
def test_sown_axes_in_nnx_are_read_and_the_metadata_stays(wrapper: Any) -> None:
    model = cases.Wrapped(nnx.Rngs(0), wrapper, cases.LiftedWithAxes("scan_with_axes"))
    bridge.lazy_init(model, jnp.ones(X.shape, X.dtype))
    program = linsey.lower(model, X)
    slot = next(s for s in program.graph.slots if s.key.endswith("/kernel"))
    assert slot.partition is not None
    assert slot.partition.axes == ("embed", "layers", "mlp")
    assert slot.partition.logical
    assert program.emit("nnx")[0] == nnx.graphdef(model)


# --------------------------------------------------------------------------------------
# where the model is made


def _meshes() -> list[Any]:
    return [
        pytest.param(contextlib.nullcontext, id="no-mesh"),
        pytest.param(lambda: jax.set_mesh(cases.mesh()), id="auto"),
        pytest.param(lambda: jax.set_mesh(cases.mesh(AxisType.Explicit)), id="explicit"),
    ]


SOURCES = {
    "nnx": lambda: lambda rngs: Block(rngs, mine=1),
    "layers": lambda: lambda rngs: cases.Layers(rngs),
    "stacked": lambda: lambda rngs: cases.stack(Block, 1)(rngs),
    "linen": lambda: Dense("partitioned"),
    "logical": lambda: Dense("logical"),
    "to-linen": lambda: Lifted(cases.ToLinen("flax"), "scan", 0),
    "to-linen-own": lambda: Lifted(cases.ToLinen("linsey"), "scan", 0),
    "to-nnx": lambda: lambda rngs: cases.Wrapped(rngs),
    "to-nnx-own": lambda: lambda rngs: cases.Wrapped(rngs, own.ToNNX),
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mesh", _meshes())
def test_lowering_and_init_need_no_mesh_and_change_no_metadata(
    mesh: Any, source: str, eager: bool
) -> None:
    inputs = () if source == "stacked" else (X,)
    make = SOURCES[source]()
    expected = linsey.lower(make, *inputs)
    assert any(slot.partition for slot in expected.graph.slots)
    with mesh(), nnx.use_eager_sharding(eager):
        program = linsey.lower(make, *inputs)
        # With values sharded eagerly, the carry of flax's own scan would change its type.
        is_carry = source.startswith("to-linen") and "xplicit" in str(
            jax.sharding.get_abstract_mesh()
        )
        if not (eager and is_carry):
            program = program.init(0)
    assert specs(program.graph) == specs(expected.graph)
    for slot, other in zip(program.graph.slots, expected.graph.slots, strict=True):
        assert slot.partition == other.partition
        kept, before = dict(slot.metadata), dict(other.metadata)
        if kept:
            assert decode(kept.pop("eager_sharding")) is eager
            before.pop("eager_sharding")
        assert kept == before


def test_what_a_variable_says_of_eager_sharding_holds() -> None:
    def make(rngs: nnx.Rngs) -> Any:
        return nnx.Dict(off=Block(rngs, eager_sharding=False), on=Block(rngs, eager_sharding=True))

    with nnx.use_eager_sharding(True):
        program = linsey.lower(make)
    for name, expected in (("off", False), ("on", True)):
        metadata = dict(slot_of(program, f"params/{name}/kernel").metadata)
        assert decode(metadata["eager_sharding"]) is expected


def test_a_concrete_init_under_a_mesh_shards_as_flax_does() -> None:
    mesh = cases.mesh()
    with jax.set_mesh(mesh), nnx.use_eager_sharding(True):
        program = linsey.lower(lambda rngs: Block(rngs)).init(0)
        expected = Block(nnx.Rngs(0)).kernel[...]
    found = program.values["params/kernel"]
    assert found.sharding == expected.sharding
    np.testing.assert_array_equal(found, expected)


def test_an_abstract_model_of_flax_can_be_lowered() -> None:
    mesh = cases.mesh()
    with jax.set_mesh(mesh), nnx.use_eager_sharding(True):
        model = nnx.merge(*nnx.get_abstract_model(lambda: Block(nnx.Rngs(0)), mesh))
        program = linsey.lower(model)
    assert program.values is None
    assert specs(program.graph)["params/kernel"] == P("data", "model")


def test_flax_is_as_it_was_after_lowering() -> None:
    before = (meta.Partitioned.unbox, nn.LogicallyPartitioned.unbox)
    linsey.lower(Dense("logical"), X)
    assert (meta.Partitioned.unbox, nn.LogicallyPartitioned.unbox) == before
    with nnx.use_eager_sharding(True), pytest.raises(ValueError, match="mesh context"):
        Block(nnx.Rngs(0))


# --------------------------------------------------------------------------------------
# bad annotations


@pytest.mark.parametrize("written", ["model", 5, ("data", 3), ({"data"}, None)])
def test_what_is_no_annotation_is_refused(written: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Block(nnx.Rngs(0), written)
    with pytest.raises(
        linsey.LinseyError, match=r"(?s)at params/kernel: found the partition.*Write a tuple"
    ):
        linsey.lower(model)


@pytest.mark.parametrize("written", ["embed", ("embed", 1)])
def test_what_is_no_annotation_is_refused_in_linen(written: Any) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = nn.with_partitioning(cases.INIT, written)
            return x @ self.param("kernel", init, (4, 4))

    with pytest.raises(linsey.LinseyError, match="at params/kernel: found the partition"):
        linsey.lower(Model(), X)
