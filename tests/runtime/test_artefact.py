"""Programs as files: what is saved comes back, in this process and in others; or an error."""

import fcntl
import functools
import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import artefact_models
import fuzzing
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from artefact_models import (
    Block,
    Options,
    Rope,
    Sower,
    Trainer,
    Turned,
    TurnedNNX,
    TurnedTwice,
)
from click.testing import CliRunner
from compare import assert_same
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from jax.sharding import AxisType
from safetensors.numpy import load_file

import linsey
from linsey.cli import main
from linsey.ir import (
    Call,
    Const,
    EmitError,
    FormatError,
    Graph,
    Node,
    Ref,
    Source,
    Template,
    ValuesError,
    decode,
    slot_index,
)
from linsey.runtime.artefact import MappedValues

X = jax.random.normal(jax.random.key(1), (2, 8))
DTYPES = (
    *("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32"),
    *("float16", "bfloat16", "float32", "complex64", "int4", "uint4"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e5m2fnuz", "float8_e3m4"),
)


@pytest.fixture(scope="module")
def program() -> linsey.Program:
    return linsey.lower(Block(), X).init(0)


@pytest.fixture
def saved(program: linsey.Program, tmp_path: Path) -> Path:
    path = tmp_path / "block.linsey"
    program.save(path)
    return path


def load(path: Path, **options: Any) -> linsey.Program:
    return linsey.load(path, trust=["artefact_models"], **options)


def test_a_program_comes_back(program: linsey.Program, saved: Path) -> None:
    loaded = load(saved)
    assert loaded.graph == program.graph
    assert isinstance(loaded.values, MappedValues)
    assert program.values is not None
    assert loaded.values.keys() == program.values.keys()
    for key, value in program.values.items():
        assert_same(loaded.values[key], value)
    module, variables = loaded.emit("linen")
    assert module == Block()
    assert_same(variables, program.emit("linen")[1])
    found, after = loaded.compile()(loaded.values, X)
    expected, wanted = program.compile()(program.values, X)
    assert_same(found, expected)
    assert_same(after.arrays, wanted.arrays)
    again = saved.with_name("again.linsey")
    loaded.save(again)
    assert again.read_bytes() == saved.read_bytes()


def test_a_value_is_read_when_it_is_asked_for(saved: Path) -> None:
    loaded = load(saved)
    values = loaded.values
    assert isinstance(values, MappedValues)
    kernel = values.host("params/Dense_0/kernel")
    assert isinstance(kernel, np.ndarray)
    assert not kernel.flags.writeable
    assert not kernel.flags.owndata
    assert isinstance(values["params/Dense_0/kernel"], jax.Array)
    assert values["params/Dense_0/kernel"] is values["params/Dense_0/kernel"]
    assert values["state/steps"] == 7
    assert type(values["state/steps"]) is int
    selected = values.select("params")
    assert len(selected) == 4
    assert jax.tree.structure(values) == jax.tree.structure(load(saved).values)
    with pytest.raises(ValuesError, match="no slot named 'params/nothing'"):
        values["params/nothing"]


def came_back(value: Any, path: Path) -> Any:
    """A value after it was saved and loaded."""
    linsey.lower(nnx.Dict(state=nnx.Param(value))).save(path)
    values = load(path).values
    assert values is not None
    return values["params/state"]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back(name: str, tmp_path: Path) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    value = jnp.asarray(np.arange(6).reshape(2, 3).astype(dtype))
    assert_same(came_back(value, tmp_path / "a"), value)


@pytest.mark.parametrize("number", [3, -(2**62), 2.5, True, 1.5 - 2j, float("inf")])
def test_python_numbers_come_back(number: Any, tmp_path: Path) -> None:
    found = came_back(number, tmp_path / "a")
    assert found == number
    assert type(found) is type(number)


def test_64_bits_stay_64_bits(tmp_path: Path) -> None:
    value = np.arange(3, dtype=np.float64) / 3
    assert_same(came_back(value, tmp_path / "a"), value)


def test_a_number_that_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not fit into 64 bits with sign"):
        came_back(2**63, tmp_path / "a")


def test_a_program_without_values(tmp_path: Path) -> None:
    program = linsey.lower(nn.Dense(4), X)
    program.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert loaded.graph == program.graph
    assert loaded.values is None
    assert loaded.emit("linen")[1]["params"]["kernel"].shape == (8, 4)


def test_a_loaded_program_is_initialised_as_the_source(
    saved: Path, program: linsey.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = linsey.lower(Block(), X).init(1).values
    assert expected is not None
    found = load(saved).init(1).values
    assert found is not None
    assert_same(found.arrays, expected.arrays)
    assert_same(load(saved).compile().init(1).arrays, program.compile().init(1).arrays)
    linsey.lower(artefact_models.Model(nnx.Rngs(0)), X).save(tmp_path / "nnx")
    with pytest.raises(EmitError, match="lowered from a live module, or loaded"):
        load(tmp_path / "nnx").init(0)
    dense = nn.Dense
    monkeypatch.setattr(nn, "Dense", lambda features: dense(9))
    with pytest.raises(EmitError, match="other slots than the graph of the file"):
        load(saved).init(0)


def test_tied_variables_and_optimizers_come_back(tmp_path: Path) -> None:
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.one = nnx.Linear(8, 8, rngs=rngs)
            self.two = self.one
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.dropout(self.two(self.one(x)))

    program = linsey.lower(Trainer(nnx.Rngs(0)))
    program.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert loaded.graph == program.graph
    trainer = nnx.merge(*loaded.emit("nnx"))
    other = nnx.merge(*program.emit("nnx"))
    for each in (trainer, other):
        each.step(X)
    assert_same(jax.tree.leaves(nnx.state(trainer)), jax.tree.leaves(nnx.state(other)))
    assert trainer.model.one is trainer.model.two
    with pytest.raises(FormatError, match="Tied, which cannot be imported") as error:
        linsey.lower(Tied(nnx.Rngs(0))).save(tmp_path / "b")
    assert "Move it to the top of a module." in str(error.value)
    assert not (tmp_path / "b").exists()


OPTIMIZERS = {
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "multi_steps_as_functions": lambda: optax.MultiSteps(
        optax.adam(1e-2), 2
    ).gradient_transformation(),
    "masked": lambda: optax.masked(optax.sgd(1e-2, 0.9), artefact_models.biases),
    "partition": lambda: optax.partition(
        {True: optax.adam(1e-2), False: optax.sgd(1e-2)}, artefact_models.biases
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        optax.linear_schedule(1e-2, 0.0, 5), weight_decay=0.1
    ),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_any_kind_comes_back(name: str, tmp_path: Path) -> None:
    program = linsey.lower(Trainer(nnx.Rngs(0), OPTIMIZERS[name]()))
    program.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert loaded.graph == program.graph

    def trained(graphdef: Any, state: Any) -> Any:
        trainer = nnx.merge(graphdef, state)
        for _ in range(2):
            trainer.step(X)
        return nnx.state(trainer)

    found, expected = (
        jax.jit(functools.partial(trained, graphdef))(state)
        for graphdef, state in (loaded.emit("nnx"), program.emit("nnx"))
    )
    assert_same(jax.tree.leaves(found), jax.tree.leaves(expected))
    again = linsey.lower(nnx.merge(*loaded.emit("nnx")))
    assert again.graph == program.graph
    again.save(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_plain_objects_come_back_by_their_state(tmp_path: Path) -> None:
    rope = Rope(8)
    turned, turned_nnx = Turned(rope, rope.__call__), TurnedNNX(nnx.Rngs(0))
    sources = [(turned, linsey.lower(turned, X).init(0)), (turned_nnx, linsey.lower(turned_nnx))]
    made = Rope.made
    for number, (source, program) in enumerate(sources):
        path = tmp_path / str(number)
        program.save(path)
        loaded = load(path)
        assert loaded.graph == program.graph
        if source is turned:
            module, _ = loaded.emit("linen")
            assert module.turn.__self__ is module.rope
            assert module.rope is not rope
        else:
            model = nnx.merge(*loaded.emit("nnx"))
            assert model.turn.func is model.rope
            assert model.rope is not turned_nnx.rope
        found, expected = (each.compile()(each.values, X)[0] for each in (loaded, program))
        assert_same(found, expected)
        with pytest.raises(EmitError, match="artefact_models:Rope"):
            linsey.load(path).compile()
    assert Rope.made == made


def test_plain_objects_of_two_nnx_modules_in_linen_code_stay_two(tmp_path: Path) -> None:
    program = linsey.lower(TurnedTwice(), X).init(0)
    program.save(tmp_path / "a")
    for target in ("nnx", "linen"):
        found, expected = (each.emit(target) for each in (load(tmp_path / "a"), program))
        if target == "nnx":
            outputs = [nnx.merge(*emitted)(X) for emitted in (found, expected)]
        else:
            outputs = [module.apply(variables, X) for module, variables in (found, expected)]
        assert_same(*outputs)


def test_collections_for_which_flax_has_no_class_come_back(tmp_path: Path) -> None:
    model = bridge.lazy_init(bridge.ToNNX(Sower(), rngs=nnx.Rngs(0)), X)
    program = linsey.lower(model)
    assert {"params_axes", "seen"} <= {slot.collection for slot in program.graph.slots}
    program.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert loaded.graph == program.graph
    assert_same(loaded.emit("nnx")[1], program.emit("nnx")[1])
    code = f"""
        import linsey
        from flax import nnx
        program = linsey.load({os.fspath(tmp_path / "a")!r}, trust="artefact_models")
        for path, variable in nnx.to_flat_state(program.emit("nnx")[1]):
            print(type(variable).__name__)
        program.save({os.fspath(tmp_path / "b")!r})
        assert nnx.variable_type_from_name("seen").__name__ == "seen"
    """
    place = os.pathsep.join([os.fspath(Path(artefact_models.__file__).parent), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": place},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    names = [type(variable).__name__ for _, variable in nnx.to_flat_state(program.emit("nnx")[1])]
    assert result.stdout.split() == names
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_arrays_of_which_only_the_type_is_known_come_back(tmp_path: Path) -> None:
    inputs = {"x": X, "key": jax.random.key(0), "train": True}
    program = linsey.lower(Options(), inputs).init(0)
    assert "'x': ShapeDtypeStruct((2, 8), float32)" in str(program)
    program.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert loaded.graph == program.graph == linsey.lower(Options(), inputs).graph
    found, expected = (
        each.compile(mutable=False)(each.values, inputs)[0] for each in (loaded, program)
    )
    assert_same(found, expected)
    (_, given), *_ = loaded.graph.nodes[loaded.graph.root].signatures[0].inputs
    again = decode(given)
    assert again["key"].dtype == inputs["key"].dtype
    assert (again["x"].shape, again["x"].dtype) == (X.shape, X.dtype)


CHILD = """
    import sys, jax, numpy as np, linsey
    program = linsey.load(sys.argv[1], trust="artefact_models")
    print(program)
    assert "artefact_models" not in sys.modules
    module, variables = program.emit("linen")
    from artefact_models import Block
    assert module == Block()
    x = jax.random.normal(jax.random.key(1), (2, 8))
    y, values = program.compile()(program.values, x)
    np.savez(sys.argv[2], y, values["batch_stats/BatchNorm_0/mean"])
"""


def test_in_a_fresh_process(program: linsey.Program, saved: Path, tmp_path: Path) -> None:
    place = os.pathsep.join([os.fspath(Path(artefact_models.__file__).parent), *sys.path])
    out = tmp_path / "out.npz"
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), saved, out],
        env={**os.environ, "PYTHONPATH": place},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    expected, after = program.compile()(program.values, X)
    found = np.load(out)
    assert_same(found["arr_0"], np.asarray(expected))
    assert_same(found["arr_1"], np.asarray(after["batch_stats/BatchNorm_0/mean"]))


def test_packages_that_are_not_trusted_are_not_imported(saved: Path) -> None:
    loaded = linsey.load(saved)
    assert str(loaded.graph)
    for use in (lambda: loaded.emit("linen"), lambda: loaded.emit("nnx"), loaded.compile):
        with pytest.raises(EmitError, match="1 objects of packages that are not trusted") as error:
            use()
        assert "class: artefact_models:Block" in str(error.value)
        assert "trust=['artefact_models']" in str(error.value)
    assert linsey.load(saved, trust="artefact_models").compile() is not None
    with pytest.raises(EmitError, match="not trusted"):
        linsey.load(saved, trust=["artefact"]).compile()


@pytest.mark.parametrize(
    "name", ["builtins:eval", "os:system", "subprocess:run", "importlib:import_module"]
)
def test_a_crafted_graph_runs_nothing(name: str, tmp_path: Path) -> None:
    evil = Call(function=Ref(name=name), args=(Const("1/0"),))
    dense = Source(dialect="linen", cls=Ref(name="flax.linen.linear:Dense"))
    graph = Graph(nodes=(Node(source=dense, attrs=(("features", evil),)),))
    linsey.Program(graph=graph).save(tmp_path / "a")
    with pytest.raises(EmitError, match=name):
        linsey.load(tmp_path / "a").emit("linen")


def test_a_crafted_pytree_runs_nothing_when_it_is_loaded_or_read(tmp_path: Path) -> None:
    path, mark = tmp_path / "a", tmp_path / "mark"
    program = linsey.lower(nnx.Dict(state=nnx.Param({"a": jnp.ones(2)})))
    evil = Call(function=Ref(name="os:mkdir"), args=(Const(str(mark)),))
    slot = program.graph.slots[0]
    kind = replace(slot.type, structure=Template(structure=evil))
    graph = replace(program.graph, slots=(replace(slot, type=kind),))
    values = linsey.Values(slot_index(graph), program.values.arrays)  # type: ignore[union-attr]
    linsey.Program(graph=graph, values=values).save(path)
    loaded = linsey.load(path)
    result = CliRunner().invoke(main, ["show", os.fspath(path)])
    assert result.exit_code == 0, result.output
    for use in (
        lambda: loaded.values.arrays,  # type: ignore[union-attr]
        lambda: loaded.values["params/state"],  # type: ignore[index]
        lambda: loaded.emit("nnx"),
    ):
        with pytest.raises(linsey.LinseyError, match="not trusted"):
            use()
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("jax._src.config:os.getcwd", "packages that are not trusted"),
        ("jax._src.api:np.array", "np is a module"),
        ("jax.numpy:load", "packages that are not trusted"),
        ("numpy:ndarray.tofile", "packages that are not trusted"),
        ("numpy.testing:runstring", "packages that are not trusted"),
        ("linsey.ir.decode:resolve", "packages that are not trusted"),
        ("linsey.backends._decode:decode", "found an object of linsey.ir.decode"),
        ("flax.linen.linear:Any", "found an object of typing, expected one of flax"),
    ],
)
def test_a_name_that_leads_to_more_than_a_model_needs(
    name: str, refusal: str, tmp_path: Path
) -> None:
    """What the packages that are always trusted hold besides layers and functions of arrays."""
    evil = Call(function=Ref(name=name))
    dense = Source(dialect="linen", cls=Ref(name="flax.linen.linear:Dense"))
    graph = Graph(nodes=(Node(source=dense, attrs=(("features", evil),)),))
    linsey.Program(graph=graph).save(tmp_path / "a")
    with pytest.raises(linsey.LinseyError, match=refusal):
        linsey.load(tmp_path / "a").emit("linen")


def test_another_tool_can_read_the_arrays(program: linsey.Program, saved: Path) -> None:
    found = load_file(saved)
    assert program.values is not None
    assert_same(found["params/Dense_0/kernel"], np.asarray(program.values["params/Dense_0/kernel"]))


def test_every_truncation_is_an_error(saved: Path) -> None:
    data = saved.read_bytes()
    rng = random.Random(0)
    for end in sorted({0, 1, 7, 8, 9, len(data) - 1, *rng.sample(range(len(data)), 150)}):
        saved.write_bytes(data[:end])
        with pytest.raises(FormatError, match=r"no artefact|damaged"):
            load(saved)


def test_every_changed_byte_is_an_error(saved: Path) -> None:
    data = saved.read_bytes()
    rng = random.Random(0)
    for place in sorted({*range(60), *rng.sample(range(len(data)), 200)}):
        saved.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        with pytest.raises(FormatError):
            assert load(saved).values.arrays  # type: ignore[union-attr]


def test_an_unchecked_value_is_read_as_it_is(saved: Path, program: linsey.Program) -> None:
    data = bytearray(saved.read_bytes())
    assert program.values is not None
    place = data.index(np.asarray(program.values["params/Dense_0/kernel"]).tobytes())
    data[place] ^= 1
    saved.write_bytes(data)
    with pytest.raises(FormatError, match=r"the checksum of params/Dense_0/kernel is wrong"):
        load(saved).values["params/Dense_0/kernel"]  # type: ignore[index]
    values = load(saved, check=False).values
    assert values is not None
    assert values["params/Dense_0/kernel"].shape == (8, 8)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_what_is_no_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(FormatError, match="could not be read") as error:
        load(tmp_path / "a")
    assert error.value.path == os.fspath(tmp_path / "a")


def test_a_folder_that_is_missing(program: linsey.Program, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"could not be written: .*No such file"):
        program.save(tmp_path / "missing" / "a")


def test_a_save_that_fails_leaves_the_old_file(saved: Path, program: linsey.Program) -> None:
    before = saved.read_bytes()
    assert program.values is not None
    arrays = list(program.values.arrays)
    arrays[0] = jax.ShapeDtypeStruct((8,), "float32")
    broken = linsey.Program(
        graph=program.graph, values=linsey.Values(program.values.index, tuple(arrays))
    )
    with pytest.raises(FormatError, match="found a ShapeDtypeStruct, expected an array"):
        broken.save(saved)
    assert saved.read_bytes() == before
    other = linsey.lower(nn.Dense(2), X).init(0)
    with pytest.raises(ValuesError, match="not those of the graph"):
        linsey.Program(graph=program.graph, values=other.values).save(saved)
    assert saved.read_bytes() == before


def test_values_that_were_donated_away(saved: Path) -> None:
    before = saved.read_bytes()
    program = linsey.lower(Block(), X).init(0)
    assert program.values is not None
    program.values["params/Dense_0/kernel"].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        program.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_two_processes_that_save_at_once(saved: Path, program: linsey.Program) -> None:
    before = saved.read_bytes()
    with (saved.parent / f".{saved.name}.partial").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FormatError, match="another process is writing this file"):
            program.save(saved)
    assert saved.read_bytes() == before
    program.save(saved)
    assert os.listdir(saved.parent) == [saved.name]


def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    fuzzing.killed_saves(tmp_path / "a", count=3, seed=0)


def test_show(saved: Path, program: linsey.Program) -> None:
    result = CliRunner().invoke(main, ["show", os.fspath(saved)])
    assert result.exit_code == 0, result.output
    assert str(program.graph) in result.output
    assert "format 1.0, by linsey 0.1.0" in result.output
    result = CliRunner().invoke(main, ["show", "--json", os.fspath(saved)])
    data = json.loads(result.output)
    assert data["file"]["bytes"] == saved.stat().st_size
    assert data["file"]["format"] == [1, 0]
    assert len(data["slots"]) == len(program.graph.slots)
    result = CliRunner().invoke(main, ["show", os.fspath(saved.parent / "nothing")])
    assert result.exit_code == 1
    assert "could not be read" in result.output


@pytest.mark.mesh
def test_values_go_straight_onto_a_mesh(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    program = linsey.lower(nn.Dense(8, kernel_init=init), X).init(0)
    program.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    exe = loaded.compile(mesh=mesh)
    assert loaded.values is not None
    placed = exe.place(loaded.values)
    expected = program.compile(mesh=mesh).place(program.values)
    for key, value in expected.items():
        assert placed[key].sharding == value.sharding
        assert_same(placed[key], value)
    assert_same(exe(placed, X)[0], program.compile(mesh=mesh)(expected, X)[0])
