"""The demo runs, and what it claims holds, on a small part of its data."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits", ROOT / "examples" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits"] = module  # where dataclasses, and so Linen modules, look for it
    spec.loader.exec_module(module)
    return module


def test_the_demo_in_short(digits, capsys):
    accuracy = digits.main(epochs=2, batch=32, samples=512)
    output = capsys.readouterr().out
    assert "head: %6 nnx.Head() via ToLinen" in output
    assert output.count("same  ") == 7
    assert accuracy > 0.5  # far above one in ten; the whole demo reaches 98 %


def test_its_comparison_sees_a_single_bit(digits):
    x = jnp.ones(3)
    digits.assert_same({"a": x}, {"a": x}, "x")
    flipped = x.at[1].set(jnp.nextafter(x[1], 2.0))
    others = [{"a": flipped}, {"b": x}, {"a": x.astype("int32")}, {"a": x[:, None]}]
    for other in others:
        with pytest.raises(AssertionError, match="x: not the numbers of the source"):
            digits.assert_same({"a": x}, other, "x")
