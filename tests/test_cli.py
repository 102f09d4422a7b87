"""The command line prints what lowering gives, and says what is wrong in one message."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from linsey.cli import main
from linsey.ir import TensorType
from linsey.ir.summary import nbytes, parse_type

MODELS = """
import flax.linen as nn
import jax.numpy as jnp
import optax
from flax import nnx


class Encoder(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x, mask=None, train: bool = False):
        x = nn.Dense(self.width)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return x if mask is None else x * mask

    @nn.compact
    def narrow(self, x):
        return nn.Dense(1)(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4)(x), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Step,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers()(x, None)[0]


class Tied(nnx.Module):
    def __init__(self, rngs):
        first = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.layers = nnx.List([first, first, nnx.Linear(4, 4, use_bias=False, rngs=rngs)])
        self.layers[2].kernel = first.kernel

    def __call__(self, x):
        return self.layers[0](x)


class Empty(nnx.Module):
    def __call__(self, x):
        return x


class Needy(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return x


class Split(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(32, kernel_init=init)(x))
        init = nn.with_logical_partitioning(nn.initializers.ones, ("mlp", "embed"))
        return nn.Dense(16, kernel_init=init)(x)


instance = Encoder(width=3)
number = 7
rules = (("mlp", "tensor"), ("embed", "pipe"))
bad_rules = ("mlp",)
adam = optax.adam(1e-3)


def make_adam():
    return optax.adam(1e-3)


def encoder():
    return Encoder()


def tied(rngs):
    return Tied(rngs)


def huge():
    return nn.Dense(10_000_000)


def huge_nnx(rngs):
    return nnx.Linear(10_000_000, 10_000_000, rngs=rngs)


def fails():
    raise RuntimeError("the disk is on fire")


def imports_nothing():
    import no_such_package_anywhere
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current directory with modules in it, which is not on the path."""
    (tmp_path / "cli_models.py").write_text(MODELS, encoding="utf-8")
    (tmp_path / "cli_broken.py").write_text("x = 1\ny = x +\n", encoding="utf-8")
    (tmp_path / "cli_raises.py").write_text("raise KeyError('gone')\n", encoding="utf-8")
    (tmp_path / "cli_lacks.py").write_text("import no_such_package_anywhere\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("cli_models", "cli_broken", "cli_raises", "cli_lacks"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def lowered(*args: str) -> str:
    result = run("lower", *args)
    assert result.exit_code == 0, result.output
    return result.output


def lowered_json(*args: str) -> Any:
    return json.loads(lowered(*args, "--json"))


def rows(output: str) -> list[list[str]]:
    """The rows of the summary, cell by cell."""
    table = output[output.index("Summary") :]
    return [line.split() for line in table.splitlines() if line.strip()]


def test_prints_the_graph_and_a_summary():
    output = lowered("cli_models:encoder", "--input", "f32[2,5]")
    assert "%0 linen.Encoder(width=8)" in output
    assert "params/kernel: float32[5,8]" in output
    found = rows(output)
    assert ["layers", "linen.Encoder", "1"] in found
    assert ["linen.Dense", "1"] in found
    assert ["slots", "batch_stats", "2", "64"] in found
    assert ["params", "4", f"{4 * (5 * 8 + 8 + 8 + 8)}"] in found
    assert ["all", "6", "320"] in found
    assert ["streams", "params", "(path,", "init)"] in found
    assert ["shared", "nodes", "none"] in found


@pytest.mark.parametrize("target", ["instance", "encoder", "Encoder"])
def test_a_target_is_an_instance_a_factory_or_a_class(target):
    assert "linen.Encoder" in lowered(f"cli_models:{target}", "--input", "f32[2,5]")


def test_an_nnx_class_that_needs_nothing():
    assert "nnx.Empty" in lowered("cli_models:Empty")


def test_settings_are_static_keywords():
    output = lowered("cli_models:encoder", "--input", "f32[2,5]", "--set", "train=true")
    assert "__call__(float32[2,5], train=True)" in output
    assert "dropout (path, call)" in output


def test_a_keyword_input():
    output = lowered("cli_models:encoder", "--input", "f32[2,5]", "--input", "mask=bool[2,8]")
    assert "__call__(float32[2,5], mask=bool[2,8])" in output


def test_another_method():
    output = lowered("cli_models:encoder", "--input", "f32[2,5]", "--method", "narrow")
    assert "narrow(float32[2,5]) -> float32[2,1]" in output


def test_shared_tied_and_stacked_parts():
    found = rows(lowered("cli_models:tied"))
    assert ["shared", "nodes", "layers/[0],", "also", "layers/[1]", "2"] in found
    data = lowered_json("cli_models:tied")["summary"]
    assert data["shared"] == [{"node": 2, "paths": ["layers/[0]", "layers/[1]"]}]
    assert len(data["tied"]) == 1

    output = lowered("cli_models:Stacked", "--input", "f32[1,4]")
    assert ["stacked", "slots", "layers=3", "by", "ScanStep_0", "2"] in rows(output)
    part = {"owner": "ScanStep_0", "name": "layers", "length": 3, "slots": 2}
    data = lowered_json("cli_models:Stacked", "--input", "f32[1,4]")
    assert data["summary"]["stacked"] == [part]
    (kernel,) = (slot for slot in data["slots"] if slot["key"].endswith("kernel"))
    assert kernel["stack"] == [{"axis": 1, "length": 3, "name": "layers", "owner": "ScanStep_0"}]
    assert kernel["type"] == {"dtype": "float32", "shape": [4, 3, 4]}


def test_json_holds_the_whole():
    data = lowered_json("cli_models:encoder", "--input", "f32[2,5]", "--set", "train=true")
    assert list(data) == [
        "version",
        "target",
        "root",
        "nodes",
        "slots",
        "streams",
        "signatures",
        "empty",
        "summary",
    ]
    assert (data["version"], data["target"]) == (1, "cli_models:encoder")
    root = data["nodes"][data["root"]]
    assert root["source"] == {"dialect": "linen", "class": "cli_models:Encoder"}
    assert root["attrs"] == {"width": "8"}
    names = [child["name"] for child in root["children"]]
    assert names == ["Dense_0", "BatchNorm_0", "Dropout_0"]
    dense = data["nodes"][root["children"][0]["node"]]
    keys = [data["slots"][held["slot"]]["key"] for held in dense["slots"]]
    assert sorted(keys) == ["params/Dense_0/bias", "params/Dense_0/kernel"]
    assert data["signatures"] == [
        {
            "method": "__call__",
            "inputs": [
                {"name": "0", "type": {"dtype": "float32", "shape": [2, 5]}},
                {"name": "train", "value": "True"},
            ],
            "output": {"dtype": "float32", "shape": [2, 8]},
        }
    ]
    assert data["summary"]["collections"]["batch_stats"] == {"slots": 2, "bytes": 64}
    assert data["summary"]["streams"] == ["dropout", "params"]


def test_json_is_the_same_each_time():
    args = ("cli_models:tied", "--input", "f32[1,4]", "--json")
    assert lowered(*args) == lowered(*args)


def test_nothing_is_allocated():
    output = lowered("cli_models:huge", "--input", "f32[1,10000000]")
    assert "params/kernel: float32[10000000,10000000]" in output
    assert ["slots", "params", "2", "400,000,040,000,000"] in rows(lowered("cli_models:huge_nnx"))


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("f32[2]", "float32"),
        ("bf16[2]", "bfloat16"),
        ("f16[2]", "float16"),
        ("f8_e4m3fn[2]", "float8_e4m3fn"),
        ("i8[2]", "int8"),
        ("i4[2]", "int4"),
        ("u32[2]", "uint32"),
        ("c64[2]", "complex64"),
        ("bool[2]", "bool"),
        ("float32[2]", "float32"),
        ("bfloat16[2]", "bfloat16"),
        (" uint8 [ 2 ] ", "uint8"),
        ("i32[2,]", "int32"),
    ],
)
def test_types_as_jax_prints_them_and_by_full_name(text, dtype):
    assert parse_type(text) == TensorType(shape=(2,), dtype=dtype)


def test_the_type_of_a_scalar():
    assert parse_type("i32[]") == TensorType(shape=(), dtype="int32")


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (TensorType(shape=(3, 4), dtype="bfloat16"), 24),
        (TensorType(shape=(), dtype="key<fry>"), 8),
        (TensorType(shape=(2,), dtype="float8_e5m2"), 2),
        (TensorType(shape=(), dtype="int"), 4),
        (TensorType(shape=(0, 5), dtype="float64"), 0),
        (TensorType(shape=(), dtype="key<own>"), None),
    ],
)
def test_bytes(kind, size):
    assert nbytes(kind) == size


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cli_models"], "'cli_models' is not of the form package.module:name"),
        (["cli_models:instance", "--input", "f33[2]"], "'f33' is not a dtype"),
        (["cli_models:instance", "--input", "f8[2]"], "'f8' is not a dtype"),
        (["cli_models:instance", "--input", "array[2]"], "'array' is not a dtype"),
        (["cli_models:instance", "--input", "f32[-1]"], "'f32[-1]' is not a type"),
        (["cli_models:instance", "--input", "f32[2"], "'f32[2' is not a type"),
        (["cli_models:instance", "--input", "f32"], "'f32' is not a type"),
        (["cli_models:instance", "--input", ""], "'' is not a type"),
        (["cli_models:instance", "--set", "train"], "'train' is not of the form name=value"),
        (["cli_models:instance", "--set", "a-b=1"], "'a-b=1' is not of the form name=value"),
        (["cli_models:instance", "--set", "a=1", "--set", "a=2"], "'a' is given twice"),
        (["cli_models:instance", "--input", "a=f32[]", "--set", "a=2"], "'a' is given twice"),
        ([], "Missing argument 'TARGET'"),
    ],
)
def test_a_bad_option_is_a_usage_error(args, message):
    result = run("lower", *args)
    assert result.exit_code == 2
    assert " ".join(message.split()) in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no_such_module_here:x"], "there is no module 'no_such_module_here'"),
        (["cli_models.inner:x"], "there is no module 'cli_models.inner'"),
        (["cli_lacks:x"], "importing cli_lacks raised ModuleNotFoundError: No module named"),
        (["cli_broken:x"], "importing cli_broken raised SyntaxError"),
        (["cli_raises:x"], "importing cli_raises raised KeyError: 'gone'"),
        (["cli_models:encodr"], "module cli_models has no 'encodr'; near it: encoder"),
        (["cli_models:instance.width.more"], "module cli_models has no 'instance.width.more'"),
        (["cli_models:number"], "no frontend accepts a builtins.int"),
        (["cli_models:instance"], "missing a required argument: 'x'"),
        (["cli_models:instance", "--input", "f64[2,5]"], "needs jax in its 64-bit mode"),
        (["cli_models:instance", "--input", "f32[2,5]", "--method", "nothing"], "'nothing'"),
        (["cli_models:Needy", "--input", "f32[2]"], "width"),
        (["cli_models:imports_nothing"], "No module named 'no_such_package_anywhere'"),
    ],
)
def test_what_cannot_be_lowered_is_one_message(args, message):
    result = run("lower", *args)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_error_of_the_users_code_names_its_line():
    result = run("lower", "cli_models:fails")
    assert result.exit_code == 1
    assert "RuntimeError: the disk is on fire" in result.output
    line = MODELS.splitlines().index('    raise RuntimeError("the disk is on fire")') + 1
    assert f"cli_models.py, line {line})" in result.output


def planned(*args: str) -> Any:
    result = run("plan", *args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


SPLIT = ("cli_models:Split", "--input", "f32[8,16]")


def test_a_plan():
    result = run("plan", *SPLIT, "--mesh", "data=4,tensor=2", "--rules", "mlp=tensor")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert "Plan for 8 devices: data=4, tensor=2" in result.output
    assert ["params", "4", "4.19", "KiB", "2.19", "KiB", "17.50", "KiB"] in lines
    assert (
        "name without a rule       embed  2 slots, such as params/Dense_0/kernel" in result.output
    )


def test_a_plan_as_json():
    data = planned(*SPLIT, "--mesh", "data=4", "--mesh", "tensor=2", "--rules", "mlp=tensor")
    assert (data["version"], data["target"], data["compiled"]) == (1, "cli_models:Split", None)
    assert data["mesh"] == {"data": 4, "tensor": 2}
    assert data["rules"] == [["mlp", "tensor"]]
    whole, split = 4 * (2 * 16 * 32 + 32 + 16), 4 * (16 * 32 + 32 + 16)
    assert data["bytes"] == {"whole": whole, "per_device": split, "all_devices": 8 * split}
    assert data["unused_axes"] == ["data"]


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        (["mlp=tensor,embed=none"], [["mlp", "tensor"], ["embed", None]]),
        (["mlp=tensor", "embed=None"], [["mlp", "tensor"], ["embed", None]]),
        ([" mlp = data+tensor "], [["mlp", ["data", "tensor"]]]),
        (["mlp=unconstrained"], [["mlp", "UNCONSTRAINED"]]),
    ],
)
def test_rules_on_the_command_line(text, rules):
    given = [part for entry in text for part in ("--rules", entry)]
    assert planned(*SPLIT, "--mesh", "data=4,tensor=2", *given)["rules"] == rules


def test_rules_from_a_module_come_after_those_given():
    made = planned(
        *SPLIT, "--mesh=tensor=2,pipe=4", "--rules", "mlp=pipe", "--rules-from", "cli_models:rules"
    )
    assert made["rules"] == [["mlp", "pipe"], ["mlp", "tensor"], ["embed", "pipe"]]


def test_a_rule_of_a_module_for_another_mesh_is_a_problem_in_the_plan():
    made = planned(*SPLIT, "--mesh=tensor=2", "--rules-from", "cli_models:rules")
    messages = [problem["message"] for problem in made["problems"]]
    assert any("lies on 'pipe', by the rule ('embed', 'pipe')" in text for text in messages)


@pytest.mark.parametrize("name", ["adam", "make_adam"])
def test_the_state_of_an_optimizer_is_counted(name):
    made = planned(*SPLIT, "--mesh=x=2", "--rules", "mlp=x", "--optimizer", f"cli_models:{name}")
    (params,) = made["collections"]
    assert made["optimizer"]["whole"] == 2 * params["whole"] + 4
    assert made["optimizer"]["per_device"] == 2 * params["per_device"] + 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing option '--mesh'"),
        (["--mesh", "data"], "'data' is not of the form axis=size"),
        (["--mesh", "data=0"], "data=0: the size of an axis is a number from 1 on"),
        (["--mesh", "data=x"], "data=x: the size of an axis is a number from 1 on"),
        (["--mesh", "data=2,"], "'data=2,' is not of the form axis=size"),
        (["--mesh", "data=2,data=4"], "the axis 'data' is given twice"),
        (["--mesh", "x=2", "--rules", "mlp"], "'mlp' is not of the form name=axis"),
        (["--mesh", "x=2", "--rules", "mlp=x+"], "'x+' is not of the form axis or axis+axis"),
        (["--mesh", "x=2", "--rules", "mlp=y"], "the rule for 'mlp' names the axis 'y'; the mesh"),
        (["--mesh", "x=2", "--rules-from", "rules"], "'rules' is not of the form package.module"),
        (["--mesh", "x=2", "--batch", "x"], "--batch is of use with --compile only"),
        (["--mesh", "x=2", "--compile", "--batch", "y"], "--batch names the axis 'y'; the mesh"),
    ],
)
def test_a_bad_option_of_plan_is_a_usage_error(args, message):
    result = run("plan", *SPLIT, *args)
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert " ".join(message.split()) in words


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cli_models:Split"], "missing a required argument: 'x'"),
        (["cli_models:nothing"], "module cli_models has no 'nothing'"),
        ([*SPLIT, "--rules-from", "cli_models:none"], "module cli_models has no 'none'"),
        ([*SPLIT, "--rules-from", "cli_models:number"], "at rules: found int, expected pairs"),
        ([*SPLIT, "--rules-from", "cli_models:bad_rules"], "at rules: found 'mlp' among them"),
        (
            [*SPLIT, "--optimizer", "cli_models:number"],
            "is a int, expected an optax transformation",
        ),
        ([*SPLIT, "--optimizer", "cli_models:fails"], "RuntimeError: the disk is on fire"),
        (
            [*SPLIT, "--mesh", "y=4096", "--compile"],
            "--compile needs 8192 CPU devices, and jax has",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_message(args, message):
    import jax

    jax.devices()  # started, with too few devices for the last case
    result = run("plan", "--mesh", "x=2", *args)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert "Traceback" not in result.output


def test_compiling_for_faked_devices():
    made = command(
        *("plan", *SPLIT, "--set", "train=true", "--mesh=data=4,tensor=4", "--rules=mlp=tensor"),
        *("--compile", "--batch=data", "--json"),
    )
    assert made.returncode == 0, made.stderr
    assert made.stderr.strip() == "Compiling the call for 16 faked CPU devices ..."
    data = json.loads(made.stdout)
    compiled = data["compiled"]
    assert (compiled["platform"], compiled["devices"]) == ("cpu", 16)
    # A quarter of the batch, the values, and the key of the dropout.
    inputs = 8 * 16 * 4 // 4
    assert 0 <= compiled["memory"]["arguments"] - data["bytes"]["per_device"] - inputs <= 16
    (reduced,) = compiled["collectives"]
    assert reduced == {"kind": "all-reduce", "instructions": 1, "executed": 1, "nbytes": 2 * 16 * 4}


def test_a_plan_that_cannot_be_compiled_is_printed_all_the_same():
    made = command("plan", *SPLIT, "--mesh=x=3", "--rules=mlp=x", "--compile")
    assert made.returncode == 1
    assert "axis 1 of size 32  3 parts of 'x'" in made.stdout
    assert "Error: at params/Dense_0/kernel: axis 1 of float32[16,32] has size 32" in made.stderr


def test_the_commands_of_the_page_on_plans(monkeypatch):
    root = Path(__file__).parents[1]
    text = (root / "docs" / "plan.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(root / "examples")
    for line in block.splitlines():
        program, *args = shlex.split(line)
        made = command(*args)
        assert (program, made.returncode) == ("linsey", 0), made.stderr
        assert "tensor" in made.stdout or "--json" in args
        assert ("collective" in made.stdout) == ("--compile" in args)


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "linsey.cli", *args],
        capture_output=True,
        text=True,
        check=False,
    )


def test_as_a_command():
    made = command("lower", "cli_models:encoder", "--input", "f32[2,5]", "--json")
    assert (made.returncode, made.stderr) == (0, "")
    assert json.loads(made.stdout)["summary"]["nodes"] == 4


def test_an_error_goes_to_stderr():
    made = command("lower", "cli_models:instance")
    assert (made.returncode, made.stdout) == (1, "")
    assert made.stderr.startswith("Error: ")


def test_help_and_version():
    import linsey

    assert "lower" in run("--help").output
    output = run("lower", "--help").output
    assert "--json prints one object" in output
    assert "bytes         whole (unsharded), per_device" in run("plan", "--help").output
    assert linsey.__version__ in run("--version").output


def test_a_plan_lowers_with_its_mesh_around(tmp_path: Path) -> None:
    (tmp_path / "constrained.py").write_text(
        """
import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.lax.with_sharding_constraint(nn.Dense(4)(x), P("data"))
""",
        encoding="utf-8",
    )
    arguments = ["constrained:Model", "--input", "f32[8,2]"]
    assert CliRunner().invoke(main, ["plan", *arguments, "--mesh", "data=4"]).exit_code == 0
