"""One checkpoint: what is saved comes back, and what does not fit is told before it is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import linsey
from linsey import _trees
from linsey.ir import CheckpointError, Graph, Node, Slot, TensorType, slot_index, summary
from linsey.runtime import Values, checkpoint


def hold(arrays: dict[str, Any], **fields: Any) -> tuple[Graph, Values]:
    """A graph with a slot ``state/NAME`` for each array, and its values."""
    slots = tuple(
        Slot(collection="state", paths=((name,),), type=_trees.value_type(array), **fields)
        for name, array in arrays.items()
    )
    graph = Graph(nodes=(Node(),), slots=slots)
    return graph, Values(slot_index(graph), tuple(arrays.values()))


def bits(value: Any) -> tuple[Any, ...]:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return (str(value.dtype), bits(jax.random.key_data(value)))
    array = np.asarray(value)
    return (type(value) in (bool, int, float, complex), array.dtype, array.shape, array.tobytes())


def assert_same(found: Values, expected: Values) -> None:
    assert found.index == expected.index
    for key, value in expected.items():
        assert bits(found[key]) == bits(value), key


def comes_back(folder: Path, arrays: dict[str, Any]) -> Values:
    graph, values = hold(arrays)
    checkpoint.save(folder / "x", graph, values)
    assert checkpoint.compare(folder / "x", graph).is_clean
    restored = checkpoint.restore(folder / "x", graph)
    assert_same(restored, values)
    return restored


class Model(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(self.width)(x))
        calls = self.variable("cache", "calls", lambda: jnp.int32(7))
        return nn.Dense(2)(x) + 0 * calls.value


@pytest.fixture(scope="module")
def program() -> linsey.Program:
    return linsey.lower(Model(), jnp.ones((1, 3))).init(0)


@pytest.fixture(scope="module")
def kept(program: linsey.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the program, for the tests that do not change it."""
    folder = tmp_path_factory.mktemp("kept") / "x"
    checkpoint.save(folder, program, program.values)
    return folder


def other(width: int = 4, **fields: Any) -> linsey.Program:
    return linsey.lower(Model(width), jnp.ones((1, 3)), **fields)


# What is saved comes back.


def test_values_come_back_bit_for_bit(program: linsey.Program, kept: Path) -> None:
    assert_same(checkpoint.restore(kept, program, values=program.values), program.values)


def test_the_graph_lies_beside_the_values(program: linsey.Program, kept: Path) -> None:
    found = json.loads((kept / "graph" / "metadata").read_text())
    assert (found["format"], found["version"]) == ("linsey.checkpoint", 1)
    assert found["graph"] == json.loads(json.dumps(summary.to_json(program.graph)))


def test_orbax_alone_reads_the_values_by_name(program: linsey.Program, kept: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(
            kept / "values",
            args=ocp.args.PyTreeRestore(
                item={"params/Dense_0/kernel": 0},
                restore_args={"params/Dense_0/kernel": ocp.RestoreArgs(restore_type=np.ndarray)},
                partial_restore=True,
            ),
        )
    assert bits(found["params/Dense_0/kernel"]) == bits(program.values["params/Dense_0/kernel"])


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    names = (
        *("bool", "int2", "int4", "int8", "int16", "int32", "uint8", "uint16", "uint32"),
        *("float16", "bfloat16", "float32", "complex64", "float4_e2m1fn", "float8_e8m0fnu"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2"),
        *("float8_e5m2fnuz", "float8_e3m4"),
    )
    drawn = np.random.default_rng(0).integers(0, 2, (3, 5))
    arrays = {
        name: jnp.asarray(drawn).astype(np.dtype(getattr(ml_dtypes, name, name))) for name in names
    }
    comes_back(tmp_path, arrays)


def test_keys_come_back_typed_or_raw(tmp_path: Path) -> None:
    restored = comes_back(
        tmp_path,
        {
            "typed": jax.random.key(1),
            "several": jax.random.split(jax.random.key(2), (2, 3)),
            "rbg": jax.random.key(3, impl="rbg"),
            "raw": jax.random.PRNGKey(4),
            "none": jax.random.split(jax.random.key(5), 0),
        },
    )
    drawn = jax.random.normal(restored["state/typed"])
    assert drawn == jax.random.normal(jax.random.key(1))


def test_numbers_come_back_as_numbers(tmp_path: Path) -> None:
    restored = comes_back(
        tmp_path,
        {"flag": True, "count": 2**40, "rate": 0.1, "z": 1 + 2j, "array": jnp.array(True)},
    )
    assert restored["state/flag"] is True
    assert isinstance(restored["state/array"], jax.Array)


def test_scalars_and_arrays_without_elements_come_back(tmp_path: Path) -> None:
    comes_back(tmp_path, {"scalar": jnp.float32(3), "none": jnp.zeros((0, 3), jnp.int8)})


def test_values_without_any_element_come_back(tmp_path: Path) -> None:
    comes_back(tmp_path, {"none": jnp.zeros((4, 0))})


def test_64_bits_stay_64_bits_on_the_host(tmp_path: Path) -> None:
    arrays = {"numpy": np.array([1 / 3]), "none": np.zeros((0,), np.int64)}
    restored = comes_back(tmp_path, arrays)
    assert isinstance(restored["state/numpy"], np.ndarray)


def test_unusual_names_come_back(tmp_path: Path) -> None:
    names = ("a.b", "a/b", "[0]", "..", "ü %20?", "", "x", "x'y", "values", "a\\b")
    comes_back(tmp_path, {name: jnp.full((2,), at) for at, name in enumerate(names)})


@struct.dataclass
class Quantized:
    q: Any
    scale: Any
    bits: int = struct.field(pytree_node=False, default=8)


def test_values_that_are_trees_come_back(tmp_path: Path) -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def init(key: Any) -> Any:
                return Quantized(jax.random.randint(key, (2, 3), 0, 99, jnp.int8), jnp.ones(3))

            w = self.param("w", init)
            return x @ (w.q * w.scale)

    program = linsey.lower(Layer(), jnp.ones((1, 2))).init(0)
    checkpoint.save(tmp_path / "x", program, program.values)
    found = checkpoint.restore(tmp_path / "x", program)["params/w"]
    assert jax.tree.structure(found) == jax.tree.structure(program.values["params/w"])
    assert bits(found.q) == bits(program.values["params/w"].q)
    half = checkpoint.restore(tmp_path / "x", program, dtype="bfloat16")["params/w"]
    assert (half.q.dtype, half.scale.dtype) == (jnp.int8, jnp.bfloat16)

    def smaller(x: Any) -> Graph:
        slot = program.graph.slots[0]
        kind = _trees.value_type({"q": x})
        changed = Slot(collection="params", paths=slot.paths, type=kind)
        return Graph(nodes=(Node(),), slots=(changed,))

    report = checkpoint.compare(tmp_path / "x", smaller(jnp.ones((2, 3), jnp.int8)))
    assert report.missing == ("params/w/[['q']]",)
    assert report.extra == ("params/w/[.q]", "params/w/[.scale]")
    with pytest.raises(CheckpointError, match="1 missing, 2 extra"):
        checkpoint.restore(tmp_path / "x", smaller(jnp.ones((2, 3))), ignore_extra=True)


def test_values_of_an_nnx_model_come_back(tmp_path: Path) -> None:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    program = linsey.lower(Block(nnx.Rngs(0)))
    checkpoint.save(tmp_path / "x", program, program.values)
    assert_same(checkpoint.restore(tmp_path / "x", program), program.values)


# What cannot be saved is refused.


@pytest.mark.parametrize("name", ["uint2", "uint4", "float8_e4m3"])
def test_a_dtype_that_orbax_cannot_write_is_refused(tmp_path: Path, name: str) -> None:
    graph, values = hold({"w": jnp.zeros((2,), getattr(ml_dtypes, name))})
    with pytest.raises(CheckpointError, match=f"at state/w: found an array of dtype {name}, which"):
        checkpoint.save(tmp_path / "x", graph, values)
    assert not (tmp_path / "x").exists()


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    graph, values = hold({"w": {"a": jnp.zeros(2), "b": 1}})
    text = values.replace({"state/w": {"a": jnp.zeros(2), "b": "text"}})
    message = r"at state/w\['b'\]: expected an array or a number, found str"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "x", graph, text)
    graph, values = hold({"w": jnp.zeros(2)})
    with pytest.raises(CheckpointError, match=r"at state/w: found dict, expected float32\[2\]"):
        checkpoint.save(tmp_path / "x", graph, values.replace({"state/w": {}}))


def test_a_number_that_is_too_large_is_refused(tmp_path: Path) -> None:
    graph, values = hold({"w": 2**70})
    with pytest.raises(CheckpointError, match=r"at state/w: 11805\d+ does not fit into"):
        checkpoint.save(tmp_path / "x", graph, values)


def test_values_of_another_program_are_refused(tmp_path: Path, program: linsey.Program) -> None:
    wide = other(5).init(0)
    with pytest.raises(
        CheckpointError, match=r"BatchNorm_0/mean: found float32\[5\], expected float"
    ):
        checkpoint.save(tmp_path / "x", program, wide.values)
    with pytest.raises(CheckpointError, match="found no value, expected a value for every slot"):
        checkpoint.save(tmp_path / "x", program, program.values.select("batch_stats"))
    with pytest.raises(CheckpointError, match="found dict, expected a value for every slot"):
        checkpoint.save(tmp_path / "x", program, dict(program.values.items()))
    with pytest.raises(CheckpointError, match="at program: found Model, expected a program or"):
        checkpoint.save(tmp_path / "x", Model(), program.values)


def test_an_existing_folder_is_not_overwritten(program: linsey.Program, kept: Path) -> None:
    with pytest.raises(CheckpointError, match="found something there already, expected a new"):
        checkpoint.save(kept, program, program.values)
    assert checkpoint.compare(kept, program).is_clean


# Parts: ephemeral slots and collections.


def test_ephemeral_slots_are_left_out(program: linsey.Program, kept: Path) -> None:
    stored = json.loads((kept / "graph" / "metadata").read_text())["slots"]
    assert "cache/calls" in program.values
    assert set(stored) == set(program.values) - {"cache/calls"}


def test_ephemeral_slots_come_from_the_given_values(program: linsey.Program, kept: Path) -> None:
    given = program.values.replace({"cache/calls": jnp.int32(9)})
    restored = checkpoint.restore(kept, program, values=given)
    assert restored["cache/calls"] is given["cache/calls"]
    with pytest.raises(CheckpointError, match="at cache/calls: the slot is ephemeral, and no"):
        checkpoint.restore(kept, program)


def test_derived_keys_need_no_value(tmp_path: Path) -> None:
    def dropout(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))

    module = nnx.bridge.ToLinen(dropout, kwargs={}, skip_rng=False)
    rngs = {"params": 0, "dropout": 1}
    program = linsey.lower(module, jnp.ones((1, 2)), rngs=rngs).init(rngs)
    assert any(slot.is_derived for slot in program.graph.slots)
    checkpoint.save(tmp_path / "x", program, program.values)
    restored = checkpoint.restore(tmp_path / "x", program)
    assert restored.index == program.values.index
    for slot in program.graph.slots:
        if not slot.is_derived:
            assert bits(restored[slot.key]) == bits(program.values[slot.key])


def test_collections_are_restored_apart(program: linsey.Program, kept: Path) -> None:
    params = checkpoint.restore(kept, program, collections=("params",))
    assert_same(params, program.values.select("params"))
    fresh = other().init(1).values
    mixed = checkpoint.restore(kept, program, collections=("params",), values=fresh)
    assert_same(mixed, fresh.replace(params))


def test_collections_are_saved_apart(tmp_path: Path, program: linsey.Program) -> None:
    folder = tmp_path / "x"
    checkpoint.save(folder, program, program.values.select("params"), collections=("params",))
    params = checkpoint.restore(folder, program, collections=("params",))
    assert_same(params, program.values.select("params"))
    assert checkpoint.compare(folder, program).missing == (
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
    )


@pytest.mark.parametrize("name", ["weights", "cache"])
def test_a_collection_that_no_checkpoint_holds_is_an_error(
    program: linsey.Program, kept: Path, name: str
) -> None:
    with pytest.raises(CheckpointError, match=f"in the collection '{name}'; there are: batch_st"):
        checkpoint.restore(kept, program, collections=(name,))


# Another dtype.


def test_floating_slots_are_cast_as_jax_casts_them(tmp_path: Path) -> None:
    drawn = jax.random.normal(jax.random.key(0), (64, 65))
    graph, values = hold({"w": drawn, "n": jnp.arange(3), "none": jnp.zeros((0,)), "x": 0.5})
    checkpoint.save(tmp_path / "x", graph, values)
    for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"):
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        found = checkpoint.restore(tmp_path / "x", graph, dtype=dtype)
        assert bits(found["state/w"]) == bits(drawn.astype(dtype))
        assert found["state/none"].dtype == dtype
        assert (found["state/n"].dtype, found["state/x"]) == (jnp.int32, 0.5)


def test_a_dtype_by_collection_or_by_slot(program: linsey.Program, kept: Path) -> None:
    def dtypes(dtype: Any) -> dict[str, str]:
        found = checkpoint.restore(kept, program, dtype=dtype, values=program.values)
        return {key: str(value.dtype) for key, value in found.items()}

    by_collection = dtypes({"params": jnp.bfloat16})
    assert by_collection["params/Dense_1/kernel"] == "bfloat16"
    assert by_collection["batch_stats/BatchNorm_0/mean"] == "float32"
    by_slot = dtypes(lambda key: "float16" if key.endswith("/kernel") else None)
    assert by_slot["params/Dense_1/kernel"] == "float16"
    assert by_slot["params/Dense_1/bias"] == "float32"


def test_another_dtype_must_be_asked_for(program: linsey.Program, tmp_path: Path) -> None:
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, program.values
    )
    checkpoint.save(tmp_path / "x", program, half)
    report = checkpoint.compare(tmp_path / "x", program)
    assert ("params/BatchNorm_0/bias", "bfloat16[4]", "float32[4]") in report.dtype
    assert len(report.dtype) == 8
    with pytest.raises(CheckpointError, match=r"8 dtype\n  dtype: .*: found bfloat16\[4\], expect"):
        checkpoint.restore(tmp_path / "x", program, values=program.values)
    assert checkpoint.compare(tmp_path / "x", program, dtype="bfloat16").is_clean
    same = checkpoint.restore(tmp_path / "x", program, dtype="bfloat16", values=half)
    assert_same(same, half)


def test_a_dtype_that_is_not_floating_is_an_error(program: linsey.Program, kept: Path) -> None:
    with pytest.raises(CheckpointError, match="at dtype: found int8, expected a floating dtype"):
        checkpoint.restore(kept, program, dtype="int8")
    with pytest.raises(CheckpointError, match="at dtype: found half a float, expected a floating"):
        checkpoint.restore(kept, program, dtype="half a float")
    with pytest.raises(CheckpointError, match="no slot is in the collection 'weights'; there are"):
        checkpoint.restore(kept, program, dtype={"weights": "bfloat16"})


def test_a_number_and_the_array_that_jit_makes_of_it_are_the_same(tmp_path: Path) -> None:
    numbers, values = hold({"count": 3, "rate": 0.5, "flag": True})
    arrays, after = hold({"count": jnp.int32(3), "rate": jnp.float32(0.5), "flag": jnp.array(True)})
    checkpoint.save(tmp_path / "numbers", numbers, values)
    checkpoint.save(tmp_path / "arrays", numbers, after)
    assert_same(checkpoint.restore(tmp_path / "numbers", arrays), values)
    assert_same(checkpoint.restore(tmp_path / "arrays", numbers), after)
    assert checkpoint.compare(tmp_path / "numbers", hold({"count": 0.5})[0]).dtype


# The report.


def test_the_report_names_every_difference(kept: Path) -> None:
    class Changed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(5, name="Dense_0")(x)
            x = nn.Dense(2, param_dtype=jnp.float16, name="Dense_1")(x[:, :4])
            return nn.Dense(1, use_bias=False, name="Dense_2")(x)

    report = checkpoint.compare(kept, linsey.lower(Changed(), jnp.ones((1, 3))))
    assert not report.is_clean
    assert str(report) == "\n".join(
        (
            f"{kept}: 1 missing, 4 extra, 2 shape, 2 dtype",
            "  missing: params/Dense_2/kernel",
            "  extra: batch_stats/BatchNorm_0/mean",
            "  extra: batch_stats/BatchNorm_0/var",
            "  extra: params/BatchNorm_0/bias",
            "  extra: params/BatchNorm_0/scale",
            "  shape: params/Dense_0/bias: found float32[4], expected float32[5]",
            "  shape: params/Dense_0/kernel: found float32[3,4], expected float32[3,5]",
            "  dtype: params/Dense_1/bias: found float32[2], expected float16[2]",
            "  dtype: params/Dense_1/kernel: found float32[4,2], expected float16[4,2]",
        )
    )


def test_nothing_is_read_when_the_report_is_not_clean(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint._arrays, "read", lambda *_: pytest.fail("arrays were read"))
    with pytest.raises(CheckpointError, match="does not fit, and nothing was loaded: 7 shape"):
        checkpoint.restore(kept, other(5))


def test_extra_slots_can_be_ignored(kept: Path) -> None:
    class Less(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(4)(x)

    less = linsey.lower(Less(), jnp.ones((1, 3))).init(1)
    with pytest.raises(CheckpointError, match="leave out what is extra with ignore_extra=True"):
        checkpoint.restore(kept, less)
    restored = checkpoint.restore(kept, less, ignore_extra=True)
    assert set(restored) == {"params/Dense_0/bias", "params/Dense_0/kernel"}


# Tied slots.


def tied(*paths: str) -> Graph:
    kind = TensorType(shape=(2,), dtype="float32")
    slot = Slot(collection="params", paths=tuple((path,) for path in paths), type=kind)
    return Graph(nodes=(Node(),), slots=(slot,))


def test_a_tied_slot_is_found_by_any_of_its_paths(tmp_path: Path) -> None:
    saved = tied("decoder", "embedding")
    checkpoint.save(tmp_path / "x", saved, Values(slot_index(saved), (jnp.arange(2.0),)))
    for paths in (("embedding", "head"), ("embedding",), ("a", "decoder")):
        found = checkpoint.restore(tmp_path / "x", tied(*paths))
        assert bits(found[f"params/{paths[0]}"]) == bits(jnp.arange(2.0))
    assert checkpoint.compare(tmp_path / "x", tied("head")).missing == ("params/head",)


def test_what_was_tied_may_be_untied(tmp_path: Path) -> None:
    saved = tied("a", "b")
    checkpoint.save(tmp_path / "x", saved, Values(slot_index(saved), (jnp.arange(2.0),)))
    apart = Graph(nodes=(Node(),), slots=(*tied("a").slots, *tied("b").slots))
    found = checkpoint.restore(
        tmp_path / "x", apart, dtype=lambda key: "float16" if "b" in key else None
    )
    assert bits(found["params/a"]) == bits(jnp.arange(2.0))
    assert bits(found["params/b"]) == bits(jnp.arange(2.0, dtype=jnp.float16))


def test_what_was_apart_is_not_tied_in_silence(tmp_path: Path) -> None:
    apart = Graph(nodes=(Node(),), slots=(*tied("a").slots, *tied("b").slots))
    arrays = (jnp.zeros(2), jnp.ones(2))
    checkpoint.save(tmp_path / "x", apart, Values(slot_index(apart), arrays))
    assert checkpoint.compare(tmp_path / "x", tied("a", "b")).extra == ("params/b",)


# Folders that are no checkpoint.


def test_a_folder_that_is_not_there(program: linsey.Program, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"at {tmp_path}/x: found no checkpoint\nGive the"):
        checkpoint.restore(tmp_path / "x", program)


def test_a_folder_of_another_program(program: linsey.Program, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found a folder that is no checkpoint of linsey"):
        checkpoint.restore(tmp_path, program)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"w": jnp.ones(2)})
    with pytest.raises(CheckpointError, match="found a folder that is no checkpoint of linsey"):
        checkpoint.compare(tmp_path / "orbax", program)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="found a folder that is no checkpoint of linsey"):
        checkpoint.compare(tmp_path / "file", program)


@pytest.fixture
def broken(kept: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(kept, tmp_path / "x"))


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "graph" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_newer_version_of_the_format(program: linsey.Program, broken: Path) -> None:
    edit(broken, version=2)
    with pytest.raises(CheckpointError, match="found version 2 of linsey's checkpoints, expected"):
        checkpoint.restore(broken, program)


def test_json_of_something_else(program: linsey.Program, broken: Path) -> None:
    edit(broken, format="another")
    with pytest.raises(CheckpointError, match="found a folder that is no checkpoint of linsey"):
        checkpoint.restore(broken, program)


def test_damaged_json(program: linsey.Program, broken: Path) -> None:
    edit(broken, slots={"params/w": {"collection": "params"}})
    with pytest.raises(CheckpointError, match="damaged: its list of slots is not readable: KeyErr"):
        checkpoint.restore(broken, program)
    path = broken / "graph" / "metadata"
    path.write_text(path.read_text()[:100])
    with pytest.raises(CheckpointError, match="the checkpoint is damaged: JSONDecodeError"):
        checkpoint.restore(broken, program)
    path.unlink()
    with pytest.raises(CheckpointError, match="the checkpoint is damaged: FileNotFoundError"):
        checkpoint.restore(broken, program)


def test_arrays_that_are_gone(program: linsey.Program, broken: Path) -> None:
    shutil.rmtree(broken / "values")
    message = "damaged: the array '.*' is not there\nRestore another step or another copy"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(broken, program, values=program.values)


def test_arrays_that_are_not_those_described(broken: Path) -> None:
    path = broken / "graph" / "metadata"
    data = json.loads(path.read_text())
    data["slots"]["params/Dense_0/bias"]["types"][""]["shape"] = [9]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"damaged: 'params/Dense_0/bias' has the shape \(4,"):
        checkpoint.compare(broken, other())


def test_data_that_are_cut_off(tmp_path: Path) -> None:
    graph, values = hold({"w": jax.random.normal(jax.random.key(0), (64, 64))})
    checkpoint.save(tmp_path / "x", graph, values)
    data = max(tmp_path.rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="is damaged: Exception: Encountered error while"):
        checkpoint.restore(tmp_path / "x", graph)


def test_a_checkpoint_that_is_not_complete(program: linsey.Program, broken: Path) -> None:
    half = broken.rename(broken.with_name("x.orbax-checkpoint-tmp"))
    with pytest.raises(CheckpointError, match="damaged: ValueError: Found incomplete checkpoint"):
        checkpoint.restore(half, program)


# Shardings.


def mesh(*sizes: int) -> jax.sharding.Mesh:
    names = ("a", "b")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def test_shardings_are_given_in_any_form(program: linsey.Program, kept: Path) -> None:
    one = NamedSharding(mesh(1), PartitionSpec())
    count = len(program.graph.slots)
    index = program.values.index
    by_name: dict[str, Any] = dict.fromkeys(program.values, one)
    for shardings in (one, [one] * count, Values(index, (one,) * count), by_name):
        found = checkpoint.restore(kept, program, shardings=shardings, values=program.values)
        assert found["params/Dense_0/kernel"].sharding == one
    by_name["params/Dense_0/kernel"] = None
    found = checkpoint.restore(kept, program, shardings=by_name, values=program.values)
    assert found["params/Dense_0/kernel"].devices() == {jax.devices()[0]}


@pytest.mark.parametrize(
    ("shardings", "message"),
    [
        ([None], "found 1 shardings for 9 slots, expected one for every slot"),
        ({}, "found no sharding for it among 0, expected one for every slot"),
        (3, "found int for shardings, expected one for every slot"),
        ([PartitionSpec()] * 9, "found (P|PartitionSpec), expected a jax.sharding.Sharding"),
    ],
)
def test_shardings_that_are_none(
    program: linsey.Program, kept: Path, shardings: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(kept, program, shardings=shardings, values=program.values)


@pytest.mark.mesh
def test_values_move_from_mesh_to_mesh(tmp_path: Path) -> None:
    drawn = jax.random.normal(jax.random.key(0), (16, 8))
    keys = jax.random.split(jax.random.key(1), 8)
    graph, values = hold({"w": drawn, "keys": keys, "none": jnp.zeros((8, 0))})
    specs = {
        "8": (mesh(8), PartitionSpec("a")),
        "2x4": (mesh(2, 4), PartitionSpec("b")),
        "4x2": (mesh(4, 2), PartitionSpec(("b", "a"))),
        "one": (mesh(1), PartitionSpec()),
    }
    held = values
    for name, (over, spec) in specs.items():
        sharding = NamedSharding(over, spec)
        if name == "8":
            held = jax.device_put(held, sharding)
        else:
            held = checkpoint.restore(tmp_path / "last", graph, shardings=sharding)
        assert_same(held, values)
        for value in held.arrays:
            assert value.sharding.is_equivalent_to(sharding, value.ndim)
            assert value.addressable_shards[0].data.shape == sharding.shard_shape(value.shape)
        shutil.rmtree(tmp_path / "last", ignore_errors=True)
        checkpoint.save(tmp_path / "last", graph, held)


@pytest.mark.mesh
def test_a_sharding_that_does_not_divide_a_slot(program: linsey.Program, kept: Path) -> None:
    odd = NamedSharding(mesh(8), PartitionSpec("a"))
    message = r"float32\[4\] cannot lie as NamedSharding"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(kept, program, shardings=odd, values=program.values)


@pytest.mark.mesh
def test_an_executable_says_where_values_lie(tmp_path: Path) -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
    program = linsey.lower(nn.Dense(8, kernel_init=init), jnp.ones((1, 4)))
    small, large = program.compile(mesh=mesh(2, 2)), program.compile(mesh=mesh(4, 2))
    values = small.init(0)
    checkpoint.save(tmp_path / "x", small, values)
    found = checkpoint.restore(tmp_path / "x", large, shardings=large.shardings, dtype="bfloat16")
    assert found["params/kernel"].sharding == NamedSharding(mesh(4, 2), PartitionSpec("a", "b"))
    assert bits(found["params/kernel"]) == bits(values["params/kernel"].astype(jnp.bfloat16))
