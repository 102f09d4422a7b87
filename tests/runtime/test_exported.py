"""Exported programs: the numbers of the source where the source is not, or a typed error."""

import importlib.util
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import artefact_models
import fuzzing
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from click.testing import CliRunner
from compare import assert_same
from exported_models import Attention, Coder, Conv, Net, Odd, Pair, Typed, Weak
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from packaging.version import Version

import linsey
from linsey.cli import main
from linsey.ir import EmitError, FormatError, FormatWarning, ValuesError
from linsey.runtime.exported import Fields

X = jax.random.normal(jax.random.key(1), (4, 8))
KEYS = {"dropout": jax.random.key(2)}
TRAIN = linsey.Export(
    args=(X,),
    kwargs={"train": True},
    rngs=["dropout"],
    dynamic="batch, _",
    constraints=["batch>=2"],
)


def loaded(path: Path) -> linsey.Program:
    return linsey.load(path, trust=["exported_models"])


@pytest.fixture(scope="module")
def net() -> linsey.Program:
    return linsey.lower(Net(), X).init(0)


@pytest.fixture(scope="module")
def net_file(net: linsey.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "net.linsey"
    net.save(path, export=["__call__", TRAIN], dynamic="batch, _", platforms=["cpu", "cuda", "tpu"])
    return path


@pytest.fixture(scope="module")
def coder() -> linsey.Program:
    return linsey.lower(Coder(nnx.Rngs(0)), X)


@pytest.fixture(scope="module")
def coder_file(coder: linsey.Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "coder.linsey"
    encode = linsey.Export("encode", args=(X,), kwargs={"scale": 2.0}, dynamic={0: "n, _"})
    code = jax.ShapeDtypeStruct((4, 16), "float32")
    decode = linsey.Export("decode", args=(code,), dynamic=("n, _",))
    coder.save(path, export=["__call__", encode, decode], dynamic="n, ...")
    return path


def both(path: Path, **options: Any) -> tuple[linsey.Executable, linsey.Executable]:
    """The stored program and the source."""
    program = loaded(path)
    return program.compile(**options), program.compile(exported=False, **options)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_inference_at_any_batch_size(net_file: Path, rows: int) -> None:
    values, x = loaded(net_file).values, jax.random.normal(jax.random.key(rows), (rows, 8))
    stored, source = both(net_file)
    assert_same(stored(values, x), source(values, x))


def test_training_mode_with_keys_and_state(net_file: Path) -> None:
    values = loaded(net_file).values
    stored, source = both(net_file, donate=True)
    placed = linsey.Values(values.index, tuple(map(jnp.copy, values.arrays)))
    again = linsey.Values(values.index, tuple(map(jnp.copy, values.arrays)))
    for _ in range(2):
        out, placed = stored(placed, X, train=True, rngs=KEYS)
        expected, again = source(again, X, train=True, rngs=KEYS)
        assert_same((out, placed), (expected, again))
    raw = {"dropout": jax.random.key_data(KEYS["dropout"])}
    assert_same(stored(again, X, train=True, rngs=raw)[0]["rows"], jnp.int32(4))


def test_methods_with_state_and_static_arguments(coder_file: Path) -> None:
    values = loaded(coder_file).values
    for method, args, kwargs in (
        (None, (X,), {}),
        ("encode", (X,), {"scale": 2.0}),
        ("decode", (jnp.tile(X, 2),), {}),
    ):
        stored, source = both(coder_file, method=method)
        found, after = stored(values, *args, **kwargs)
        expected, wanted = source(values, *args, **kwargs)
        assert_same((found, after.arrays), (expected, wanted.arrays))


def loss(model: Any, x: Any) -> Any:
    out = model(x, train=True)["out"]
    return jnp.mean(out**2), out.shape[0]


def trained(exe: linsey.Executable, values: Any, **options: Any) -> Any:
    step = exe.train(loss, optax.adam(1e-2), **options)
    state, losses = step.init(values=values), []
    for number in range(3):
        state, (value, _) = step(state, X, rngs={"dropout": jax.random.key(number)})
        losses.append(value)
    return losses, state.values.arrays, jax.tree.leaves(state.opt_state)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_steps_are_those_of_the_source(net_file: Path, accumulate: int) -> None:
    values = loaded(net_file).values
    stored, source = both(net_file)
    found = trained(stored, values, accumulate=accumulate)
    assert_same(found, trained(source, values, accumulate=accumulate))


def test_packed_and_inside_a_jit(net_file: Path) -> None:
    values = loaded(net_file).values
    stored, source = both(net_file, pack=True)
    assert_same(stored(values, X)[0], source(values, X)[0])

    @jax.jit
    def twice(values: Any, x: Any) -> Any:
        return stored(values, x)[0]["out"] * 2

    assert_same(twice(values, X), source(values, X)[0]["out"] * 2)


def test_captured_state_and_sequences_of_any_length(tmp_path: Path) -> None:
    program = linsey.lower(Net(), X).init(0)
    export = linsey.Export(args=(X,), capture="intermediates", dynamic="b, _")
    program.save(tmp_path / "a", export=export)
    stored, source = both(tmp_path / "a", capture="intermediates")
    assert_same(stored(program.values, X), source(program.values, X))
    x = jax.random.normal(jax.random.key(1), (3, 16, 8))
    attention = linsey.lower(Attention(), x).init(0)
    attention.save(tmp_path / "b", export=["__call__"], dynamic="b, t, _", constraints=["t <= 20"])
    stored, source = both(tmp_path / "b")
    for shape in ((3, 16, 8), (1, 20, 8), (2, 5, 8)):
        x = jax.random.normal(jax.random.key(1), shape)
        assert_same(stored(attention.values, x)[0], source(attention.values, x)[0])
    with pytest.raises(EmitError, match="t <= 20 does not hold for t = 21"):
        stored(attention.values, jnp.ones((1, 21, 8)))


def test_images_of_any_size(tmp_path: Path) -> None:
    x = jax.random.normal(jax.random.key(1), (2, 12, 10, 3))
    program = linsey.lower(Conv(), x).init(0)
    with pytest.raises(EmitError, match="or leave those that the model has to know out of dynamic"):
        program.save(tmp_path / "a", export="__call__", dynamic="b, h, w, _")
    program.save(tmp_path / "a", export="__call__", dynamic="b, 2*h, 2*w, _")
    stored, source = both(tmp_path / "a")
    for shape in ((2, 12, 10, 3), (1, 8, 22, 3)):
        x = jax.random.normal(jax.random.key(1), shape)
        assert_same(stored(program.values, x)[0], source(program.values, x)[0])
    with pytest.raises(EmitError, match=r"2\*h is 6 for h = 3, found 7"):
        stored(program.values, jnp.ones((1, 7, 10, 3)))


def test_pytrees_of_inputs_and_other_dtypes(tmp_path: Path) -> None:
    class Tree(nnx.Module):
        def __init__(self) -> None:
            self.scale = nnx.Param(jnp.ones((3,), jnp.bfloat16))
            self.key = nnx.Variable(jax.random.key(3, impl="rbg"))
            self.table = nnx.Variable({"a": jnp.arange(3, dtype=jnp.int4), "b": None})
            self.count = nnx.Variable(3)

        def __call__(self, batch: Any, *, reverse: bool) -> Any:
            noise = jax.random.normal(self.key.get_value(), (3,))
            self.key.set_value(jax.random.split(self.key.get_value())[0])
            table = self.table.get_value()
            self.table.set_value({"a": table["a"][::-1], "b": None})
            out = batch["x"] * self.scale.get_value() + noise + self.count.get_value()
            return (out, [batch["ids"][::-1] if reverse else batch["ids"]], None)

    batch = {"x": jnp.ones((5, 3)), "ids": jnp.arange(5)}
    program = linsey.lower(Tree(), batch, reverse=True)
    with pytest.warns(FormatWarning, match="Tree, which cannot be imported"):
        program.save(tmp_path / "a", export="__call__", dynamic={0: {"x": "n, _", "ids": "n"}})
    stored = linsey.load(tmp_path / "a")
    values = stored.values
    batch = {"x": jnp.ones((2, 3)), "ids": jnp.arange(2)}
    found = stored.compile()(values, batch, reverse=True)
    expected = program.compile()(values, batch, reverse=True)
    assert_same(found[0], expected[0])
    assert_same(found[1].arrays, expected[1].arrays)
    with pytest.raises(EmitError, match="found the static argument False, expected True"):
        stored.compile()(values, batch, reverse=False)
    with pytest.raises(EmitError, match=r"n is \d elsewhere, found \d"):
        stored.compile()(values, {"x": jnp.ones((2, 3)), "ids": jnp.arange(3)}, reverse=True)
    with pytest.raises(linsey.LinseyError, match=r"not trusted|exists only in the process"):
        stored.compile(exported=False)(values, batch, reverse=True)


def test_classes_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(X, X * 2)
    program = linsey.lower(Typed(), pair, None).init(0)
    program.save(tmp_path / "a", export="__call__", dynamic=["n, _", None])
    expected = program.compile()(program.values, pair, None)[0]
    found = loaded(tmp_path / "a").compile()(program.values, pair, None)[0]
    assert_same(found, expected)

    bare = linsey.load(tmp_path / "a").compile()
    with pytest.raises(EmitError, match="objects of a package that is not trusted"):
        bare(program.values, pair, None)
    stand_in = Fields("Pair", first=X, second=X * 2)
    found = bare(program.values, stand_in, None)[0]
    assert isinstance(found, Fields)
    assert str(found).startswith("Output(hidden=FrozenDict({")
    assert_same(found.hidden, expected.hidden)
    assert_same(found.pair.second, expected.pair.second)
    assert found["none"] is found.none is None
    assert list(found) == ["hidden", "pair", "none"]
    with pytest.raises(AttributeError, match="Output has no field 'logits'"):
        _ = found.logits

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "flax" else find_spec(name)
    )
    found = linsey.load(tmp_path / "a").compile()(program.values, stand_in, None)[0]
    assert_same(found.hidden["x"], expected.hidden["x"])
    assert type(found.hidden) is Fields


CHILD = """
    import sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("flax", "exported_models"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocked())
    import jax, jax.numpy as jnp, linsey, numpy as np, optax

    program = linsey.load(sys.argv[1])
    x = jax.random.normal(jax.random.key(1), (4, 8))
    exe = program.compile()
    found = [exe(program.values, x)[0]["out"]]
    def loss(model, x):
        return jnp.mean(model(x, train=True)["out"] ** 2)
    step = exe.train(loss, optax.adam(1e-2))
    state = step.init(values=program.values)
    for number in range(3):
        state, value = step(state, x, rngs={"dropout": jax.random.key(number)})
        found.append(value)
    found += state.values.arrays
    try:
        program.emit("linen")
    except linsey.LinseyError as error:
        assert "flax" in str(error)
    program.save(sys.argv[2] + ".again")
    assert "flax" not in sys.modules
    np.savez(sys.argv[2], *found)
"""


def test_without_flax_and_without_the_package_of_the_model(net_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(CHILD), net_file, out], check=True
    )
    source, values = loaded(net_file).compile(exported=False), loaded(net_file).values
    losses, arrays, _ = trained(source, values)
    found = list(np.load(out).values())
    expected = [source(values, X)[0]["out"], *losses, *arrays]
    assert_same(found, list(map(np.asarray, expected)))
    assert Path(f"{out}.again").read_bytes() == net_file.read_bytes()


def test_weak_types_are_kept(tmp_path: Path) -> None:
    """A Python number in a slot, and an array made of one, give way to bfloat16."""
    half = jnp.ones((3,), jnp.bfloat16)
    program = linsey.lower(Weak(), half, jnp.asarray(2.0))
    abstract = linsey.Program(graph=program.graph)
    for saved in (program, abstract):
        saved.save(tmp_path / "a", export=linsey.Export(args=(half, jnp.asarray(2.0))))
        exe = loaded(tmp_path / "a").compile()
        found = exe(program.values, half, jnp.asarray(2.0))[0]
        assert_same(found, program.compile()(program.values, half, jnp.asarray(2.0))[0])
        assert found.dtype == jnp.bfloat16
    with pytest.raises(EmitError, match=r"found float32\[\], expected float32 \(weak\)\[\]"):
        exe(program.values, half, jnp.float32(2.0))


def test_what_cannot_be_data_is_left_out_and_said(tmp_path: Path) -> None:
    program = linsey.lower(nn.Sequential([nn.Dense(4), lambda x: x * 2]), X).init(0)
    with pytest.raises(FormatError, match="or save with an exported program"):
        program.save(tmp_path / "a")
    with pytest.warns(FormatWarning, match=r"1 values cannot be data and were left out.*") as said:
        program.save(tmp_path / "a", export=["__call__"])
    assert "layers[1]: the lambda test_what_cannot_be_data" in str(said[0].message)
    found = linsey.load(tmp_path / "a")
    assert str(found.graph) == str(program.graph)
    assert_same(found.compile()(found.values, X)[0], program.compile()(program.values, X)[0])
    with pytest.raises(linsey.LinseyError, match="exists only in the process that lowered it"):
        found.compile(exported=False)(found.values, X)
    with pytest.warns(FormatWarning, match="left out"):
        found.save(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_loaded_program_keeps_its_exports_or_makes_them_anew(
    net_file: Path, tmp_path: Path
) -> None:
    assert b".py" not in net_file.read_bytes()  # no paths of the machine that exported it
    program = loaded(net_file)
    program.save(tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == net_file.read_bytes()
    program.save(tmp_path / "none", export=())
    assert linsey.load(tmp_path / "none").exports == ()
    program.save(tmp_path / "anew", export=program.exports)
    again = loaded(tmp_path / "anew")
    assert again.exports == program.exports
    assert_same(again.compile()(again.values, X), program.compile()(program.values, X))
    result = CliRunner().invoke(
        main, ["export", os.fspath(net_file), "-o", os.fspath(tmp_path / "cli"), "--trust", "jax"]
    )
    assert result.exit_code == 1
    assert "exported_models" in result.output
    args = ["export", os.fspath(net_file), "-o", os.fspath(tmp_path / "cli")]
    result = CliRunner().invoke(main, [*args, "--trust", "exported_models"])
    assert result.exit_code == 0, result.output
    assert "exported __call__(float32[batch,8])" in result.output
    assert loaded(tmp_path / "cli").exports == program.exports
    result = CliRunner().invoke(main, ["export", os.fspath(tmp_path / "none")])
    assert "holds no exported programs" in result.output


def test_show_says_what_is_exported(net_file: Path) -> None:
    result = CliRunner().invoke(main, ["show", os.fspath(net_file)])
    assert result.exit_code == 0, result.output
    assert ("exported __call__(float32[batch,8])\n  for cpu, cuda, tpu; ") in result.output
    assert (
        "exported __call__(float32[batch,8], train=True), keys: dropout, batch>=2\n"
        "  for cpu, changes 2 slots; "
    ) in result.output
    assert f"by jax {jax.__version__}\n" in result.output


def save_net(path: Path, *args: Any, **options: Any) -> None:
    linsey.lower(Net(), X).init(0).save(path, export=linsey.Export(*args, **options))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dynamic": "b"}, r"dynamic\[0\]: 'b' does not fit float32\[4,8\]"),
        ({"dynamic": "b, 9"}, r"dynamic\[0\]: 'b, 9' does not fit"),
        ({"dynamic": {"y": "b, _"}}, "there is an entry for 'y'; the call has 1 positional"),
        ({"dynamic": ({"a": "b"},)}, "is no prefix of the argument's structure"),
        ({"dynamic": 3}, "found 3, expected a text"),
        ({"dynamic": "b, _", "constraints": ["b > 2"]}, "no expression of sizes"),
        ({"dynamic": "b, _", "constraints": "b is large"}, "no expression of"),
        ({"dynamic": "b, _", "constraints": "t <= 5"}, "names 't'; the symbolic sizes are: b"),
        ({"vjp_order": 2}, "vjp_order: found 2, expected 0 or 1"),
        ({"platforms": ["gpu"]}, "platforms: found 'gpu', expected some of cpu, cuda"),
        ({"method": "nothing"}, "lowered without sample inputs of this method"),
        ({"method": "nothing", "args": (X,)}, "has no method 'nothing'"),
        ({"args": (jnp.ones((4, 9)),)}, "the call raised"),
        ({"args": (X,), "kwargs": {"train": True}}, "dropout"),
        ({"args": (X,), "kwargs": {"train": lambda: 0}, "rngs": "dropout"}, "lambda"),
    ],
)
def test_what_cannot_be_exported(options: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(linsey.LinseyError, match=error):
        save_net(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("what", "dynamic", "error"),
    [
        ("callback", None, "A call back to Python cannot be stored"),
        ("loop", None, "vjp_order=0"),
        ("size", "b, _", "Say what holds for them by constraints="),
        ("text", None, "cannot be exported: TypeError"),
    ],
)
def test_methods_that_cannot_be_exported(
    what: str, dynamic: Any, error: str, tmp_path: Path
) -> None:
    program = linsey.lower(Odd(what), X).init(0)
    with pytest.raises(EmitError, match=error) as found:
        program.save(tmp_path / "a", export=["__call__"], dynamic=dynamic)
    assert "__call__(float32[" in found.value.path


def test_a_method_without_a_gradient(tmp_path: Path) -> None:
    program = linsey.lower(Odd("loop"), X).init(0)
    program.save(tmp_path / "a", export=linsey.Export(vjp_order=0))
    stored, source = both(tmp_path / "a")
    assert_same(stored(program.values, X)[0], source(program.values, X)[0])
    program = linsey.lower(Odd("size"), X).init(0)
    program.save(
        tmp_path / "b", export="__call__", dynamic="b, _", constraints=["mod(b, 2) == 0", "b >= 4"]
    )
    stored, source = both(tmp_path / "b")
    assert_same(stored(program.values, X)[0], source(program.values, X)[0])
    with pytest.raises(EmitError, match=r"mod\(b, 2\) == 0 does not hold for b = 5"):
        stored(program.values, jnp.ones((5, 8)))


def test_exports_that_are_asked_for_wrongly(net: linsey.Program, tmp_path: Path) -> None:
    with pytest.raises(EmitError, match="it is asked for twice"):
        net.save(tmp_path / "a", export=["__call__", "__call__"])
    with pytest.raises(EmitError, match="it names none"):
        net.save(tmp_path / "a", dynamic="b, _")
    bare = linsey.lower(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(EmitError, match=r"export=\[linsey.Export\('__call__', args=\(x,\)\)\]"):
        bare.save(tmp_path / "a", export=["__call__"])


def test_programs_without_values(tmp_path: Path) -> None:
    program = linsey.lower(Net(), X)
    program.save(tmp_path / "a", export=["__call__"])
    found = linsey.load(tmp_path / "a")
    values = program.init(0).values
    assert_same(found.compile()(values, X)[0], program.compile()(values, X)[0])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda exe, values: exe(values, X[:1], train=True, rngs=KEYS), "batch>=2 does not hold"),
        (lambda exe, values: exe(values, X[:0]), "batch is 0, expected 1 or more"),
        (lambda exe, values: exe(values, X[:, :7]), r"found float32\[4,7\], expected float32\[b"),
        (lambda exe, values: exe(values, X[0]), r"found float32\[8\], expected float32\[batch,8\]"),
        (lambda exe, values: exe(values, X > 0), r"found bool\[4,8\], expected"),
        (lambda exe, values: exe(values, X, X), "the call has other arguments"),
        (lambda exe, values: exe(values, X, train=1), "static argument 1, expected True"),
        (lambda exe, values: exe(values, X, train=True), "the stream 'dropout' is missing"),
        (
            lambda exe, values: exe(
                values, X, train=True, rngs={"dropout": jax.random.key(0, impl="rbg")}
            ),
            r"found key<rbg>\[\] for the stream 'dropout', expected key<fry>",
        ),
    ],
)
def test_calls_that_do_not_fit(call: Callable[[Any, Any], Any], error: str, net_file: Path) -> None:
    program = loaded(net_file)
    with pytest.raises(EmitError, match=error):
        call(program.compile(), program.values)


def test_slots_of_another_dtype(net_file: Path) -> None:
    program = loaded(net_file)
    half = jax.tree.map(lambda value: value.astype(jnp.bfloat16), program.values)
    with pytest.raises(ValuesError, match="and the program was exported for float32") as error:
        program.compile()(half, X)
    assert error.value.path == "batch_stats/BatchNorm_0/mean"


def test_what_is_not_stored(net_file: Path) -> None:
    program = loaded(net_file)
    for options in ({"mutable": ["params"]}, {"capture": "intermediates"}):
        with pytest.raises(EmitError, match="no program of this method, for mutable="):
            program.compile(**options)
    with pytest.raises(EmitError, match="no program of this method"):
        program.compile("encode", exported=True)
    plain = linsey.lower(Net(), X).init(0)
    with pytest.raises(EmitError, match="there are:\n  none"):
        plain.compile(exported=True)
    by_function = program.compile(lambda module, x: module(x)["rows"])
    assert by_function(program.values, X)[0] == 4


def test_a_program_for_another_platform(net: linsey.Program, tmp_path: Path) -> None:
    net.save(tmp_path / "a", export="__call__", platforms=["tpu"])
    program = loaded(tmp_path / "a")
    with pytest.raises(EmitError, match="it was exported for tpu, and runs on cpu"):
        program.compile()(program.values, X)


def test_a_program_of_a_jax_that_is_too_old(
    net_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = loaded(net_file)
    monkeypatch.setattr(jax.export, "minimum_supported_calling_convention_version", 99)
    with pytest.raises(FormatError, match=r"cannot read what jax .* exported") as error:
        program.compile()(program.values, X)
    assert "export anew" in str(error.value)
    assert "compile(exported=False)" in str(error.value)
    result = CliRunner().invoke(main, ["show", os.fspath(net_file)])
    assert "which the jax that is installed cannot read" in result.output
    source = program.compile(exported=False)(program.values, X)[0]
    assert source["rows"] == 4


def crafted(path: Path, **changes: Any) -> linsey.Program:
    """A program whose first export was changed by hand."""
    import dataclasses

    program = loaded(path)
    first = dataclasses.replace(program.exports[0], **changes)
    return dataclasses.replace(program, exports=(first,))


def test_programs_that_were_made_by_hand(net_file: Path, tmp_path: Path) -> None:
    for changes, error in (
        ({"data": lambda: b"nonsense"}, "cannot read what jax"),
        ({"data": lambda: b""}, "cannot read what jax"),
        ({"changed": ("params/nothing",)}, "for other slots"),
        ({"keys": (("dropout", "key<fry>"),)}, "for other slots"),
    ):
        program = crafted(net_file, **changes)
        with pytest.raises(FormatError, match=error):
            program.compile()(program.values, X, rngs=KEYS)
    for changes in (
        {"constraints": ("batch ** 99999999 >= 0",)},
        {"constraints": ("__import__('os')",)},
        {"constraints": ("(" * 500,)},
        {"platforms": ("cpu", 3)},
        {"vjp_order": -1},
        {"inputs": (("float32", ("batch", 1.5)),)},
    ):
        crafted(net_file, **changes).save(tmp_path / "a")
        with pytest.raises(FormatError, match="the exported programs cannot be read"):
            linsey.load(tmp_path / "a")


def test_a_program_that_calls_back_is_refused(net_file: Path) -> None:
    """One that jax.export would not have written: it enters Python through an address."""
    name = "xla_ffi_python_cpu_callback"

    def calls_back(x: Any) -> Any:
        return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    backward = jax.custom_vjp(lambda x: x * 2)
    backward.defvjp(lambda x: (x * 2, None), lambda _, cotangent: (calls_back(cotangent),))
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name)]
    for function, order in ((calls_back, 0), (backward, 1)):
        made = jax.export.export(jax.jit(function), disabled_checks=allowed)(X)
        data = bytes(made.serialize(vjp_order=order))
        program = crafted(net_file, data=lambda data=data: data)
        with pytest.raises(FormatError, match="the program calls back to Python"):
            program.compile()(program.values, X)


def test_changed_artefacts_give_a_typed_error_or_a_program(tmp_path: Path) -> None:
    fuzzing.exported(tmp_path / "a")
    found = fuzzing.artefacts(tmp_path / "a", 300, seed=0)
    assert 0 < found.graphs < found.files == 300
    assert found.slowest < 1.0


def test_without_flatbuffers(
    net: linsey.Program, net_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FormatError, match=r"pip install linsey\[export\]"):
        net.save(tmp_path / "a", export="__call__")
    program = loaded(net_file)
    with pytest.raises(FormatError, match=r"pip install linsey\[export\]"):
        program.compile()(program.values, X)


def test_exporting_leaves_nothing_behind(tmp_path: Path) -> None:
    """Constraints of other programs hold after an export, and while one fails."""
    program = linsey.lower(Odd("callback"), X).init(0)
    with pytest.raises(EmitError), warnings.catch_warnings():
        program.save(tmp_path / "a", export="__call__")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def constrained(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, P("data"))

    with jax.set_mesh(mesh):
        assert "sharding_constraint" in jax.jit(constrained).lower(X).as_text()


RULES = (("batch", "data"), ("embed", None), ("mlp", "model"))


def grid(kind: AxisType) -> Any:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


GOLDEN = Path(__file__).parent.parent / "golden"


def test_there_is_an_artefact_of_this_jax(request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"artefact-jax-{jax.__version__}.linsey"
    if request.config.getoption("--update-golden") and not path.exists():
        program = linsey.lower(artefact_models.Model(nnx.Rngs(0)), X)
        program.save(path, export="__call__", dynamic="batch, _")
    if jax.__version__ in ("0.10.2", "0.12.0.1"):
        assert path.exists()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.linsey")), ids=lambda path: path.stem)
def test_artefacts_of_other_pythons_and_jaxes(path: Path) -> None:
    """Graph and values load for ever; exported programs as far as jax promises."""
    program = linsey.load(path, trust=["artefact_models"])
    model = nnx.merge(*program.emit("nnx"))
    assert type(model) is artefact_models.Model
    assert model.one is model.two
    expected = program.compile(exported=False)(program.values, X)
    assert expected[0].shape == (4, 8)
    (stored,) = program.exports
    try:
        found = program.compile()(program.values, X)
    except FormatError as error:
        refused = str(error)
    else:
        refused = ""
        assert_same(found[0], expected[0])
        assert_same(found[1].arrays, expected[1].arrays)
    if refused:
        assert Version(stored.jax) > Version(jax.__version__)
        assert f"cannot read what jax {stored.jax} exported" in refused


@pytest.mark.mesh
def test_on_a_mesh_with_the_rules_of_the_source(net_file: Path) -> None:
    values, mesh = loaded(net_file).values, grid(AxisType.Auto)
    stored, source = both(net_file, mesh=mesh, rules=RULES, in_shardings=P("data"))
    assert stored.shardings.arrays == source.shardings.arrays  # type: ignore[union-attr]
    placed = stored.place(values)
    assert placed["params/Dense_0/kernel"].sharding.spec == P(None, "model")
    assert_same(stored(placed, X)[0], source(source.place(values), X)[0])
    first, second = trained(stored, values), trained(source, values)
    for one, other in zip(first[1], second[1], strict=True):
        assert one.sharding == other.sharding
        assert_same(one, other)


@pytest.mark.mesh
def test_on_a_mesh_with_explicit_axes(coder_file: Path) -> None:
    values = loaded(coder_file).values
    stored, source = both(coder_file, mesh=grid(AxisType.Explicit), in_shardings=P("data"))
    assert_same(stored(stored.place(values), X)[0], source(source.place(values), X)[0])

    def loss(model: Any, x: Any) -> Any:
        return jnp.mean(model(x) ** 2)

    found, expected = (
        exe.train(loss, optax.adam(1e-2), in_shardings=P("data")) for exe in (stored, source)
    )
    state, wanted = found.init(values=values), expected.init(values=values)
    for _ in range(3):
        (state, value), (wanted, other) = found(state, X), expected(wanted, X)
        # Inside a stored program XLA chooses where gradients are added up; types say it elsewhere.
        np.testing.assert_allclose(value, other, rtol=1e-6)
        assert [array.sharding for array in state.arrays] == [a.sharding for a in wanted.arrays]


@pytest.mark.mesh
def test_a_model_that_names_axes_of_a_mesh_runs_on_any(tmp_path: Path) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        program = linsey.lower(Coder(nnx.Rngs(0), "data"), X)
        program.save(tmp_path / "a", export="__call__", dynamic="n, _")
    with pytest.raises(EmitError, match=r"save inside jax.set_mesh\(mesh\)"):
        program.save(tmp_path / "b", export="__call__")
    stored, source = both(tmp_path / "a", mesh=mesh, in_shardings=P("data"))
    values = loaded(tmp_path / "a").values
    found, expected = stored(stored.place(values), X), source(source.place(values), X)
    assert_same(found[0], expected[0])
    assert_same(found[1].arrays, expected[1].arrays)
    assert found[1]["params/up/kernel"].sharding.spec == P(None, "model")
    alone = loaded(tmp_path / "a").compile()
    assert alone(values, X)[0].shape == (4, 8)
    other = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    elsewhere = loaded(tmp_path / "a").compile(mesh=other)
    assert elsewhere(elsewhere.place(values), X)[0].shape == (4, 8)
