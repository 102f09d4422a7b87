"""A plan tells what each device would hold, and the figures are those that jax then shows."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

import linsey
from linsey.ir import (
    UNCONSTRAINED,
    Const,
    Graph,
    Node,
    Partition,
    PartitionError,
    Slot,
    Template,
    TensorType,
    TreeType,
    ValuesError,
)
from linsey.runtime.analyse import Collective, analyse, read_collectives
from linsey.runtime.optimizer_state import init_optimizer
from linsey.runtime.plan import abstract_values, plan

ROOT = Path(__file__).parents[2]
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
BIG = {"data": 16, "fsdp": 16, "tensor": 2}
TOKENS = jax.ShapeDtypeStruct((8, 16), jnp.int32)


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decoder", ROOT / "examples" / "decoder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decoder"] = module  # where dataclasses, and so Linen modules, look for it
    spec.loader.exec_module(module)
    return module


def slot(
    *axes: Any,
    shape: tuple[int, ...],
    name: str = "w",
    dtype: str = "float32",
    logical: bool = True,
) -> Slot:
    partition = Partition(axes=axes, logical=logical, spec=Const(None)) if axes else None
    kind = TensorType(shape=shape, dtype=dtype)
    return Slot(collection="params", paths=((name,),), type=kind, partition=partition)


def graph(*slots: Slot) -> Graph:
    held = tuple((entry.path[0], number) for number, entry in enumerate(slots))
    return Graph(nodes=(Node(slots=held),), slots=slots)


def test_bytes_by_collection():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            kernel = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
            return nn.BatchNorm(use_running_average=False)(nn.Dense(32, kernel_init=kernel)(x))

    made = plan(
        linsey.lower(Net(), jnp.ones((2, 16))).graph, BIG, [("embed", "fsdp"), ("mlp", "tensor")]
    )
    found = {each.name: (each.slots, each.whole, each.per_device) for each in made.collections}
    kernel, vector = 16 * 32 * 4, 32 * 4
    assert found == {
        "batch_stats": (2, 2 * vector, 2 * vector),
        "params": (4, kernel + 3 * vector, kernel // 32 + 3 * vector),
    }
    assert made.devices == 512
    assert made.whole == kernel + 5 * vector
    assert made.per_device == kernel // 32 + 5 * vector


def test_nnx_annotations():
    def factory(rngs: Any) -> Any:
        init = nnx.with_partitioning(nnx.initializers.ones, (None, "tensor"))
        return nnx.Linear(16, 32, kernel_init=init, use_bias=False, rngs=rngs)

    assert plan(linsey.lower(factory).graph, BIG).per_device == 16 * 32 * 4 // 2


@pytest.mark.parametrize("scanned", [False, True])
def test_a_full_size_decoder_with_no_device(decoder, scanned):
    """Two layers of it where they are unrolled; all of it where they are one stack."""
    sizes = decoder.Sizes() if scanned else dataclasses.replace(decoder.Sizes(), layers=2)
    source = decoder.Decoder(sizes, scanned=scanned)
    lowered = linsey.lower(source, jax.ShapeDtypeStruct((512, 8192), jnp.int32)).graph
    made = plan(lowered, BIG, decoder.RULES, optimizer=optax.adam(1e-3))
    (params,) = made.collections
    layer = 2 * 16384 * 128 * (128 + 8) + 3 * 16384 * 53248
    norms = (2 * sizes.layers + 1) * 16384
    split = 2 * 128256 * 16384 + sizes.layers * layer
    assert params.whole == 2 * (split + norms)
    assert params.per_device == 2 * (split // 32 + norms)
    if scanned:
        assert params.whole == 2 * 405_853_388_800  # the number that its authors publish
    assert made.optimizer is not None
    assert made.optimizer.whole == 2 * params.whole + 4
    assert made.optimizer.per_device == 2 * params.per_device + 4
    assert not made.problems
    assert not made.uneven
    assert not made.unmapped
    assert made.unused_axes == ("data",)


@pytest.mark.mesh
@pytest.mark.parametrize("name", ["tiny", "tiny_scanned"])
def test_the_bytes_are_those_on_the_devices(decoder, name):
    program = linsey.lower(getattr(decoder, name)(), TOKENS)
    mesh = jax.make_mesh((2, 2, 2), tuple(CUBE), axis_types=(AxisType.Auto,) * 3)
    exe = program.compile(mesh=mesh, rules=decoder.RULES)
    values = exe.init(0)
    made = plan(program.graph, mesh, decoder.RULES)
    assert made.whole == sum(array.nbytes for array in values.arrays)
    assert set(held(values)) == {made.per_device}

    for optimizer in (optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=4)):
        state = init_optimizer(optimizer, values.select("params"), exe.shardings)
        share = plan(program.graph, mesh, decoder.RULES, optimizer=optimizer).optimizer
        assert share is not None
        assert share.slots == len(jax.tree.leaves(state))
        assert share.whole == sum(array.nbytes for array in jax.tree.leaves(state))
        assert set(held(state)) == {share.per_device}


def held(tree: Any) -> list[int]:
    """The bytes of the shards on each device."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return list(sizes.values())


def test_the_example_prints_its_plan(decoder, capsys):
    decoder.main(decoder.tiny_scanned(), batch=8, length=16)
    assert "Plan for 512 devices: data=16, fsdp=16, tensor=2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tiny", "tiny_scanned"])
def test_the_decoder_looks_back_only(decoder, name):
    source = getattr(decoder, name)()
    tokens = jnp.arange(16).reshape(1, 16)
    variables = nn.unbox(source.init(jax.random.key(0), tokens))
    scores = source.apply(variables, tokens)
    changed = source.apply(variables, tokens.at[0, 9].set(60))
    same = jnp.all(scores == changed, axis=-1)[0].tolist()
    assert same == [True] * 9 + [False] * 7


def test_an_uneven_axis_is_padded_and_listed():
    made = plan(graph(slot("embed", None, shape=(10, 3))), {"model": 4}, [("embed", "model")])
    assert made.per_device == 3 * 3 * 4
    (uneven,) = made.uneven
    assert (uneven.group.name, uneven.axis, uneven.size, uneven.parts) == ("params/w", 0, 10, 4)
    assert uneven.on == "model"
    assert uneven.reason == "the rule ('embed', 'model')"
    assert "axis 0 of size 10  4 parts of 'model', by the rule ('embed', 'model')" in str(made)


def test_an_axis_over_several_mesh_axes():
    made = plan(graph(slot("batch", shape=(64,))), BIG, [("batch", ("data", "tensor"))])
    assert made.per_device == 64 * 4 // 32
    assert made.unused_axes == ("fsdp",)


def test_what_the_compiler_chooses_is_counted_whole():
    found = graph(slot(UNCONSTRAINED, None, shape=(8, 8), logical=False))
    assert plan(found, BIG).per_device == 8 * 8 * 4


def test_slots_that_stay_replicated_come_by_what_they_could_save():
    found = graph(
        slot(shape=(8,), name="small"),
        slot("mlp", None, shape=(64, 7), name="partly"),
        slot(shape=(1024, 6), name="large"),
        slot("mlp", None, shape=(64, 64), name="split"),
        slot(shape=(1009,), name="prime"),
        slot(shape=(0, 8), name="empty"),
    )
    made = plan(found, {"x": 4, "y": 2, "one": 1}, [("mlp", ("x", "y"))])
    names = [each.group.name for each in made.replicated]
    assert names == ["params/large", "params/small", "params/prime", "params/empty"]
    large, small, prime, empty = made.replicated
    assert (large.over, large.copies, large.type) == (("x", "y"), 8, "float32[1024,6]")
    assert (large.per_device, large.least, large.factor) == (24576, 3072, 8.0)
    assert small.saved == 32 - 4
    assert (prime.per_device, prime.least, prime.saved) == (4036, 4036, 0)
    assert (empty.per_device, empty.factor) == (0, 1.0)


def test_a_slot_that_is_split_over_some_axes_could_be_over_others():
    (each,) = plan(graph(slot("mlp", shape=(24,))), {"x": 4, "y": 3}, [("mlp", "x")]).replicated
    assert each.axes == ("x",)
    assert (each.over, each.copies, each.per_device, each.least) == (("y",), 3, 24, 8)


def test_the_best_split_is_found_though_a_greedy_one_is_not():
    # The axis of 4 must leave the first axis of the array to the two of 2 and 3.
    (each,) = plan(graph(slot(shape=(6, 4))), {"p": 2, "q": 4, "r": 3}).replicated
    assert each.factor == 24.0


def test_equal_layers_are_one_group(decoder):
    made = plan(linsey.lower(decoder.tiny(), TOKENS).graph, BIG, decoder.RULES)
    (gate,) = (each for each in made.replicated if "gate" in each.group.name)
    assert gate.group.name == "params/layers_*/mlp/gate/kernel"
    assert gate.group.example == "params/layers_0/mlp/gate/kernel"
    assert gate.group.slots == 2
    assert gate.saved == 2 * (gate.per_device - gate.least)


def test_names_and_rules_and_axes_of_no_use():
    rules = [
        ("embed", "fsdp"),
        ("mlp", "fsdp"),
        ("mlp", "tensor"),
        ("mlp", "data"),
        ("heads", "tensor"),
        ("embed", "fsdp"),
        ("kv", None),
    ]
    found = graph(
        slot("embed", "mlp", shape=(16, 16)),
        slot("embed", "lora", shape=(16, 16), name="a"),
        slot("lora", "kv", shape=(16, 16), name="b"),
    )
    made = plan(found, BIG, rules)
    (unmapped,) = made.unmapped
    assert (unmapped.name, unmapped.slots, unmapped.example) == ("lora", 2, "params/a")
    absent, earlier = "no slot has this name", "an earlier rule comes first wherever a slot has"
    assert [(each.rule, each.reason[: len(earlier)]) for each in made.unused_rules] == [
        (("mlp", "fsdp"), earlier),
        (("mlp", "data"), earlier),
        (("heads", "tensor"), absent),
        (("embed", "fsdp"), earlier),
    ]
    assert made.unused_axes == ("data",)


def test_rules_in_force_are_used():
    found = graph(slot("embed", shape=(16,)))
    with nn.logical_axis_rules((("embed", "tensor"),)):
        made = plan(found, BIG)
    assert made.rules == (("embed", "tensor"),)
    assert made.per_device == 32
    assert plan(found, BIG).rules is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (slot("embed", shape=(4, 4)), "has 1 entries and the value float32[4,4] has 2 axes"),
        (slot("nowhere", None, shape=(4, 4), logical=False), "lies on 'nowhere'"),
        (slot("embed", "embed", shape=(4, 4)), "the name 'embed' stands at two axes"),
        (slot(shape=(4, 4), dtype="key<own>"), "the size of key<own>[4,4] is not known"),
    ],
)
def test_problems_are_listed_and_not_raised(bad, message):
    good = slot("embed", shape=(16,), name="good")
    rules = None if bad.partition is None or not bad.partition.logical else [("embed", "tensor")]
    made = plan(graph(bad, good), BIG, rules)
    (problem,) = made.problems
    assert problem.group.name == "params/w"
    assert message in problem.message
    sizes = {each.name: each.per_device for each in made.collections}
    whole = 0 if "key" in message else 64
    assert sizes == {"params": whole + (32 if rules else 64)}
    assert message in str(made)


def test_rules_of_a_slot_against_those_in_force_are_a_problem():
    clash = dataclasses.replace(
        slot("embed", shape=(16,), logical=False),
        partition=Partition(
            axes=("embed",),
            spec=Const(None),
            rules=linsey.ir.encode((("embed", "data"),)),
        ),
    )
    with nn.logical_axis_rules((("embed", "tensor"),)):
        made = plan(graph(clash, slot("embed", shape=(16,), name="good")), BIG)
    (problem,) = made.problems
    assert "'embed' is mapped to 'data' by the slot's own sharding_rules" in problem.message
    assert made.per_device == 64 + 32


def test_a_value_that_is_a_tree():
    leaves = (TensorType(shape=(8, 4), dtype="int8"), TensorType(shape=(8, 1), dtype="float32"))
    tree = TreeType(structure=Template(structure=Const(None)), leaves=leaves)
    partition = Partition(axes=("model", None), logical=False, spec=Const(None))
    quantised = Slot(collection="params", paths=(("w",),), type=tree, partition=partition)
    made = plan(graph(quantised), {"model": 4, "data": 2})
    assert (made.whole, made.per_device) == (32 + 32, 8 + 8)
    (each,) = made.replicated
    assert (each.over, each.least) == (("data",), 4 + 4)


@pytest.mark.parametrize(
    "mesh",
    [
        AbstractMesh((16, 16, 2), tuple(BIG), axis_types=(AxisType.Auto,) * 3),
        BIG,
        tuple(BIG.items()),
        [["data", 16], ["fsdp", 16], ["tensor", 2]],
    ],
    ids=["AbstractMesh", "dict", "pairs", "lists"],
)
def test_a_mesh_in_any_form(mesh):
    assert plan(graph(slot("embed", shape=(16,))), mesh, [("embed", "fsdp")]).per_device == 4


def test_a_mesh_of_devices():
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",), axis_types=(AxisType.Auto,))
    assert plan(graph(slot(shape=(16,))), mesh).mesh == (("x", 1),)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (8, "at mesh: found int, expected a mesh"),
        ("xy", "at mesh: found str, expected a mesh"),
        ((16, 2), "at mesh: found tuple, expected a mesh"),
        ({"x": 0}, "at mesh: found 'x': 0, expected the name of an axis and its size"),
        ([("x", 2), ("x", 4)], "at mesh: found the axis 'x' twice"),
        ([(1, 2)], "at mesh: found 1: 2, expected the name of an axis"),
        ({}, "at mesh: found no axes, expected one at least"),
    ],
)
def test_what_is_no_mesh(mesh, message):
    with pytest.raises(PartitionError) as error:
        plan(graph(slot(shape=(4,))), mesh)
    assert message in str(error.value)


def test_what_are_no_rules():
    with pytest.raises(PartitionError, match="expected pairs"):
        plan(graph(slot(shape=(4,))), BIG, ["embed"])


def test_the_state_of_an_optimizer_lies_as_the_parameters_do():
    found = graph(
        slot("embed", "mlp", shape=(16, 8)),
        slot("mlp", shape=(8,), name="bias"),
        dataclasses.replace(slot(shape=(100,), name="mean"), collection="batch_stats"),
    )
    rules = [("embed", "fsdp"), ("mlp", "tensor")]
    per_device = 16 * 8 * 4 // 32 + 8 * 4 // 2

    def share(optimizer: Any) -> Any:
        return plan(found, BIG, rules, optimizer=optimizer).optimizer

    assert share(optax.sgd(0.1)).per_device == 0
    assert share(optax.adam(0.1)).per_device == 2 * per_device + 4
    mask = {"params/w": True, "params/bias": False}
    masked = optax.masked(optax.trace(0.9), lambda values: values.replace(mask))
    assert share(masked).per_device == 16 * 8 * 4 // 32
    assert share(optax.MultiSteps(optax.trace(0.9), 4)).per_device == 2 * per_device + 2 * 4
    only = plan(found, BIG, rules, optimizer=optax.trace(0.9), wrt=lambda key: "bias" in key)
    assert only.optimizer is not None
    assert (only.optimizer.whole, only.optimizer.per_device) == (8 * 4, 8 * 4 // 2)
    with pytest.raises(ValuesError, match="no slot is in the collection 'weights'"):
        plan(found, BIG, rules, optimizer=optax.trace(0.9), wrt="weights")


def test_json_holds_the_whole():
    found = graph(slot("embed", "lora", shape=(10, 4)), slot(UNCONSTRAINED, shape=(4,), name="u"))
    rules = [("embed", ("data", "tensor")), ("mlp", P.UNCONSTRAINED)]
    made = plan(found, {"data": 2, "tensor": 2, "pipe": 3}, rules, optimizer=optax.adam(0.1))
    data = json.loads(json.dumps(made.to_json()))
    assert data == {
        "version": 1,
        "mesh": {"data": 2, "tensor": 2, "pipe": 3},
        "devices": 12,
        "rules": [["embed", ["data", "tensor"]], ["mlp", "UNCONSTRAINED"]],
        "bytes": {"whole": 532, "per_device": 196, "all_devices": 2352},
        "collections": [{"name": "params", "slots": 2, "whole": 176, "per_device": 64}],
        "optimizer": {"name": "optimizer", "slots": 5, "whole": 356, "per_device": 132},
        "replicated": [
            {
                "group": {"name": "params/u", "example": "params/u", "slots": 1},
                "type": "float32[4]",
                "axes": ["UNCONSTRAINED"],
                "over": ["data", "tensor", "pipe"],
                "copies": 12,
                "per_device": 16,
                "least": 4,
                "factor": 4.0,
                "saved": 12,
            },
            {
                "group": {"name": "params/w", "example": "params/w", "slots": 1},
                "type": "float32[10,4]",
                "axes": [["data", "tensor"], None],
                "over": ["pipe"],
                "copies": 3,
                "per_device": 48,
                "least": 16,
                "factor": 3.0,
                "saved": 32,
            },
        ][::-1],
        "uneven": [
            {
                "group": {"name": "params/w", "example": "params/w", "slots": 1},
                "axis": 0,
                "size": 10,
                "parts": 4,
                "on": ["data", "tensor"],
                "reason": "the rule ('embed', ('data', 'tensor'))",
            }
        ],
        "unmapped": [{"name": "lora", "slots": 1, "example": "params/w"}],
        "unused_rules": [{"rule": ["mlp", "UNCONSTRAINED"], "reason": "no slot has this name"}],
        "unused_axes": ["pipe"],
        "problems": [],
    }


def test_the_text(decoder, assert_golden):
    source = nn.Sequential([decoder.tiny(), nn.Dense(3)])
    rules = [rule for rule in decoder.RULES if rule[0] != "norm"]
    made = plan(linsey.lower(source, TOKENS).graph, {"data": 4, "fsdp": 3, "tensor": 2}, rules)
    assert_golden("plan", str(made))


def test_a_long_table_is_cut_short():
    slots = [slot(shape=(number + 2,), name="ab"[number % 2] * number) for number in range(1, 21)]
    assert "\nand 8 more\n" in str(plan(graph(*slots), {"x": 2}))


def test_abstract_values():
    found = graph(slot(shape=(2, 3)), slot(shape=(), name="k", dtype="key<fry>"))
    values = abstract_values(found)
    assert values["params/w"] == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert values["params/k"].dtype == jax.random.key(0).dtype


HLO = """\
HloModule jit_f, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.3 = f32[8]{0} all-reduce(%v), channel_id=3, to_apply=%add.1
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %all-reduce.3)
}

%body.2 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w.1 = (s32[], f32[8]{0}) while(%p), condition=%cond, body=%inner_body, \
backend_config={"known_trip_count":{"n":"3"}}
  %ag = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%x), dimensions={0}
  %agd = bf16[16,4]{1,0} all-gather-done(%ag)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %v)
}

%async (q: f32[16]) -> f32[2] {
  ROOT %rs = f32[2]{0} reduce-scatter(%q), dimensions={0}, to_apply=%add.1
}

%yes (q: f32[2]) -> f32[2] {
  ROOT %cp = f32[2]{0} collective-permute(%q), source_target_pairs={{0,1},{1,0}}
}

%no (q: f32[2]) -> f32[2] {
  ROOT %q = f32[2]{0} parameter(0)
}

%never (q: f32[2]) -> f32[2] {
  ROOT %cp = f32[2]{0} all-to-all(%q), dimensions={0}
}

ENTRY %main (p0: f32[4]) -> f32[4] {
  %w.2 = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body.2, \
backend_config={"known_trip_count":{"n":"5"}}
  %w.3 = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%inner_body
  %start = ((f32[16]{0}), f32[2]{0}) async-start(%q), calls=%async
  %cond.1 = f32[2]{0} conditional(%b, %q, %q), branch_computations={%yes, %no}
  %both = (pred[5]{0}, /*index=1*/s4[3]{0}, f8e4m3fn[<=7]{0}) all-to-all(%a, %b, %c), \
metadata={op_name="a"}
  ROOT %r = f32[4]{0} add(%all-reduce.9, %reduce-scatter.1), metadata={op_name="all-reduce(x)"}
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    assert read_collectives(HLO) == (
        Collective(kind="all-gather", instructions=1, executed=5, nbytes=5 * 128),
        Collective(kind="all-reduce", instructions=1, executed=16, nbytes=16 * 32),
        Collective(kind="all-to-all", instructions=2, executed=1, nbytes=5 + 2 + 7),
        Collective(kind="collective-permute", instructions=1, executed=1, nbytes=8),
        Collective(kind="reduce-scatter", instructions=1, executed=1, nbytes=8),
    )


def test_an_analysis_without_a_mesh():
    found = analyse(jax.jit(lambda x: x * 2).lower(jnp.ones((4, 8))).compile())
    assert (found.devices, found.collectives) == (1, ())
    assert found.memory is not None
    assert (found.memory.arguments, found.memory.outputs, found.memory.aliased) == (128, 128, 0)
    assert found.memory.peak == 256 + found.memory.temporaries
    assert "none" in str(found)
    assert json.loads(json.dumps(found.to_json()))["memory"]["arguments"] == 128


def test_donated_memory_is_not_counted_twice():
    found = analyse(jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.ones(8)).compile())
    assert found.memory is not None
    assert (found.memory.aliased, found.memory.peak - found.memory.temporaries) == (32, 32)


def test_a_platform_that_tells_nothing():
    class Silent:
        input_shardings = output_shardings = ()

        def memory_analysis(self) -> None:
            return None

        def as_text(self) -> None:
            return None

    found = analyse(Silent())
    assert (found.memory, found.collectives) == (None, ())
    assert "not told by this platform" in str(found)


@pytest.mark.mesh
def test_the_collectives_of_a_sharded_product():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows = jax.NamedSharding(mesh, P(None, "x"))
    columns = jax.NamedSharding(mesh, P("x", None))
    whole = jax.NamedSharding(mesh, P())
    product = jax.jit(jnp.matmul, in_shardings=(rows, columns), out_shardings=whole)
    kind = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    found = analyse(product.lower(kind, kind).compile())
    assert (found.devices, found.platform) == (8, "cpu")
    assert found.collectives == (
        Collective(kind="all-reduce", instructions=1, executed=1, nbytes=16 * 16 * 4),
    )
    assert found.memory is not None
    assert found.memory.arguments == 2 * 16 * 16 * 4 // 8


@pytest.mark.mesh
def test_a_loop_over_layers_runs_the_collectives_of_the_unrolled_ones(decoder):
    mesh = jax.make_mesh((2, 2, 2), tuple(CUBE), axis_types=(AxisType.Auto,) * 3)

    def collectives(source: Any) -> Any:
        program = linsey.lower(source, TOKENS)
        batch = P(("data", "fsdp"))
        exe = program.compile(mesh=mesh, rules=decoder.RULES, in_shardings=batch)
        return analyse(exe.lower(abstract_values(program.graph), TOKENS).compile()).collectives

    unrolled, scanned = collectives(decoder.tiny()), collectives(decoder.tiny_scanned())
    assert [(each.kind, each.executed, each.nbytes) for each in unrolled] == [
        (each.kind, each.executed, each.nbytes) for each in scanned
    ]
    assert sum(each.instructions for each in scanned) < sum(each.instructions for each in unrolled)
