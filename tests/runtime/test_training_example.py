"""The sharded training example runs, and what it prints holds, on a small part of its work."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = ROOT / "examples" / "train_sharded.py"
    spec = importlib.util.spec_from_file_location("train_sharded", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_sharded"] = module  # where dataclasses, and so Linen modules, look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.mesh
def test_the_example_in_short(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = example.main(epochs=3)
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("params/Mlp_1/Dense_0/kernel"))
    # Split over both axes of the mesh, and its Adam state with it.
    _, shape, shard, spec = re.split(" {2,}", row)
    assert (shape, shard, spec) == ("(64, 256)", "(16, 128)", "('data', 'model')")
    assert sum(line.startswith("epoch") for line in lines) == 3
    assert accuracy > 0.5  # far above one in ten; the whole example reaches 95 %
