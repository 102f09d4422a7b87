"""Modules of an emitted model are replaced, and the Linen code around them never changes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

import linsey
from linsey.ir import LoweringError

X = jax.random.normal(jax.random.key(0), (2, 4))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        h = nn.Dense(4)(x)
        h = nn.BatchNorm(use_running_average=not train)(h)
        h = nn.Dropout(0.5, deterministic=not train)(h)
        return x + h


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.Dense(3, name="head")(Block(name="block")(x, train))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.relu(nn.Dense(4)(x)), None


class Stack(nn.Module):
    """Parameters are stacked at axis 1, and no other collection is lifted."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        steps = nn.scan(
            nn.remat(Step), variable_axes={"params": 1}, split_rngs={"params": True}, length=3
        )
        return nn.Dense(2)(steps(name="steps")(x, None)[0])


class Scaled(nnx.Module):
    """Another module with the call of a dense layer; it counts its calls."""

    def __init__(self, kernel: Any, scale: float) -> None:
        self.q = nnx.Param((kernel / scale).astype(jnp.int8))
        self.scale = scale
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        return x @ (self.q[...] * self.scale)


def lora_of(dense: nnx.Linear, seed: int = 1) -> nnx.LoRALinear:
    lora = nnx.LoRALinear(dense.in_features, dense.out_features, lora_rank=2, rngs=nnx.Rngs(seed))
    lora.kernel, lora.bias = dense.kernel, dense.bias
    return lora


def everywhere(model: Any, *args: Any) -> None:
    """Lowered, compiled, emitted and lowered again, a model gives the same numbers."""
    expected, jitted = model(*args), nnx.jit(lambda model: model(*args))(model)
    program = linsey.lower(model)
    again = nnx.merge(*program.emit("nnx"))
    assert_same(again(*args), expected)
    assert linsey.lower(again).graph == program.graph
    module, variables = program.emit("linen")
    found = module.apply(variables, *args, mutable=["batch_stats"])[0]
    assert_same(found, expected)
    assert linsey.lower(module, *args, variables=variables).graph == program.graph
    assert_same(program.compile()(program.values, *args)[0], jitted)


def test_a_layer_with_lora() -> None:
    model = linsey.to_nnx(Net(), X, rngs=0)
    before = model(X)
    model.block.Dense_0 = lora_of(model.block.Dense_0)
    assert_same(model(X), before)  # the second half of a new LoRA is zero

    def loss(model: Any) -> Any:
        return jnp.sum(model(X) ** 2)

    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    lora = gradient["block"]["Dense_0"]["lora"]
    assert jnp.any(lora["lora_b"][...] != 0)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
    optimizer.update(model, gradient)
    assert not jnp.array_equal(model(X), before)
    assert nnx.LoRAParam in {type(leaf) for _, leaf in nnx.to_flat_state(nnx.state(model))}
    everywhere(model, X)


def test_a_quantised_layer_that_counts_its_calls() -> None:
    model = linsey.to_nnx(Net(), X, rngs=0)
    head = model.head
    model.head = Scaled(head.kernel[...], 0.02)
    expected = model.block(X) @ (model.head.q[...] * 0.02)
    assert_same(model(X), expected)
    assert model.head.calls[...] == 1
    nnx.jit(lambda model: model(X))(model)
    assert model.head.calls[...] == 2
    everywhere(model, X)


def test_a_frozen_normalisation_and_a_dropout_of_its_own() -> None:
    model = linsey.to_nnx(Net(), X, rngs=0)
    keys = {"dropout": jax.random.key(3)}
    before = model(X, True, rngs=keys)

    class Frozen(nnx.BatchNorm):
        def __call__(self, x: Any, use_running_average: Any = None, **kwargs: Any) -> Any:
            return super().__call__(x, use_running_average=True, **kwargs)

    model = linsey.to_nnx(Net(), X, rngs=0)
    model.block.BatchNorm_0 = Frozen(4, rngs=nnx.Rngs(0))
    stats = model.block.BatchNorm_0.mean[...]
    model(X, True, rngs=keys)
    assert_same(model.block.BatchNorm_0.mean[...], stats)

    # Called as Linen calls it: not random without `train`, and by the keys that a call brings.
    model = linsey.to_nnx(Net(), X, rngs=0)
    model.block.Dropout_0 = nnx.Dropout(0.5, rngs=nnx.Rngs(7))
    assert_same(model(X), linsey.to_nnx(Net(), X, rngs=0)(X))
    assert_same(model(X, True, rngs=keys), before)
    first, second = model(X, True), model(X, True)  # its own stream
    assert not jnp.array_equal(first, second)


def test_user_code_is_replaced_as_layers_are() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.full((4,), 2.0))

        def __call__(self, x: Any, train: bool) -> Any:
            return x * self.w

    model = linsey.to_nnx(Net(), X, rngs=0)
    model.block = Twice()
    assert_same(model(X), model.head(X * 2.0))
    assert "block/Dense_0" not in str(linsey.lower(model).report())


def test_in_a_scan_a_module_has_to_be_stacked() -> None:
    model = linsey.to_nnx(Stack(), X, rngs=0)
    before, dense = model(X), model.steps.Dense_0
    assert isinstance(dense, nnx.Linear)
    assert dense.kernel.shape == (4, 3, 4)
    model.steps.Dense_0 = nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(linsey.LinseyError) as caught:
        model(X)
    assert str(caught.value) == (
        "at steps/Dense_0/bias: found the shape (4,), expected one stacked by axis:1=3 (axis 1):"
        " the module is called inside the transform that steps runs\n"
        "Make one module per step, stacked: nnx.vmap(lambda key: YourModule(...,"
        " rngs=nnx.Rngs(key)), out_axes=1)(jax.random.split(jax.random.key(0), (3,)))."
    )

    def make(key: Any) -> Any:
        return nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(key))

    lora = nnx.vmap(make, out_axes=1)(jax.random.split(jax.random.key(0), (3,)))
    lora.kernel, lora.bias = dense.kernel, dense.bias
    model.steps.Dense_0 = lora
    assert_same(model(X), before)
    lora.lora.lora_b[...] = jnp.ones(lora.lora.lora_b.shape)
    assert not jnp.array_equal(model(X), before)
    everywhere(model, X)


def test_in_a_scan_state_that_no_transform_lifts_cannot_change() -> None:
    class Counting(nnx.Module):
        def __init__(self, dense: Any) -> None:
            self.dense = dense
            self.calls = nnx.BatchStat(jnp.zeros((1, 3)))

        def __call__(self, x: Any) -> Any:
            self.calls[...] += 1
            return self.dense(x)

    model = linsey.to_nnx(Stack(), X, rngs=0)
    model.steps.Dense_0 = Counting(model.steps.Dense_0)
    with pytest.raises(linsey.LinseyError, match="no transform around it lifts its collection"):
        model(X)


def test_a_part_of_a_native_layer() -> None:
    class Attend(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.MultiHeadDotProductAttention(2, name="attn")(x)

    x = jax.random.normal(jax.random.key(1), (1, 3, 4))
    model = linsey.to_nnx(Attend(), x, rngs=0)

    class Louder(nnx.Module):
        def __init__(self, inner: Any) -> None:
            self.inner, self.by = inner, nnx.Param(jnp.ones(()))

        def __call__(self, x: Any, out_sharding: Any = None) -> Any:
            return self.inner(x) * self.by

    before = model(x)
    model.attn.query = Louder(model.attn.query)
    assert_same(model(x), before)
    model.attn.query.by[...] = jnp.asarray(3.0)
    assert not jnp.array_equal(model(x), before)
    everywhere(model, x)


def test_replace_by_pattern() -> None:
    model = linsey.to_nnx(Net(), X, rngs=0)
    before = model(X)
    assert linsey.replace(model, "**/Dense_*", lora_of) == ("block/Dense_0",)
    assert linsey.replace(model, "head", lambda head: head) == ()
    assert isinstance(model.block.Dense_0, nnx.LoRALinear)
    assert_same(model(X), before)
    assert linsey.replace(
        model, "*/*_0/lora", lambda lora: nnx.LoRA(4, 1, 4, rngs=nnx.Rngs(0))
    ) == ("block/Dense_0/lora",)
    with pytest.raises(linsey.LinseyError) as caught:
        linsey.replace(model, "encoder/*", lora_of)
    assert str(caught.value).startswith(
        "at encoder/*: no module fits the pattern; there are: block, block/"
    )
    with pytest.raises(linsey.LinseyError, match="at head: found a int in place of Linear"):
        linsey.replace(model, "head", lambda head: 3)  # type: ignore[arg-type, return-value]


def test_replace_in_lists_and_shared_modules() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            one = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.layers = nnx.List([one, nnx.Linear(4, 4, rngs=nnx.Rngs(1)), one])

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model()
    before = model(X)
    assert linsey.replace(model, "layers/[[]?[]]", lora_of) == (
        "layers/[0]",
        "layers/[1]",
        "layers/[2]",
    )
    assert model.layers[0] is model.layers[2]
    assert_same(model(X), before)
    assert linsey.replace(model, "layers/[1]", lambda old: nnx.Linear(4, 4, rngs=nnx.Rngs(5))) == (
        "layers/[1]",
    )


@pytest.mark.parametrize("value", [3, lambda x: x], ids=["number", "function"])
def test_what_is_no_module_is_refused(value: Any) -> None:
    model = linsey.to_nnx(Net(), X, rngs=0)
    del model.head
    model.head = value
    with pytest.raises(linsey.LinseyError, match="at head"):
        model(X)


def test_code_of_another_program_is_called_and_not_lowered() -> None:
    model = linsey.to_nnx(Net(), X, rngs=0)
    other = linsey.to_nnx(Block(), X, rngs=5)
    expected = model.head(other(X))
    model.block = other
    assert_same(model(X), expected)
    with pytest.raises(LoweringError, match="found Linen code of another program"):
        linsey.lower(model)


def test_a_replaced_model_is_saved_and_loaded(tmp_path: Path) -> None:
    script = tmp_path / "nets.py"
    script.write_text(
        "from flax import linen as nn\n"
        "class Small(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        return nn.Dense(4)(nn.relu(nn.Dense(4)(x)))\n"
    )
    code = (
        "import jax, jax.numpy as jnp, linsey, nets, numpy as np, sys\n"
        "from flax import nnx\n"
        "x = jnp.ones((1, 4))\n"
        "model = linsey.to_nnx(nets.Small(), x, rngs=0)\n"
        "model.Dense_0 = nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(1))\n"
        "program = linsey.lower(model)\n"
        "program.save('m.linsey')\n"
        "again = linsey.load('m.linsey', trust=['nets'])\n"
        "assert again.graph == program.graph\n"
        "assert (nnx.merge(*again.emit('nnx'))(x) == model(x)).all()\n"
        "module, variables = again.emit('linen')\n"
        "assert (module.apply(variables, x) == model(x)).all()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_layers_made_otherwise_than_when_lowered() -> None:
    class Changing(nn.Module):
        @nn.compact
        def __call__(self, x: Any, dtype: Any = None, use_bias: bool = True) -> Any:
            return nn.Dense(3, dtype=dtype, use_bias=use_bias)(x)

    variables = Changing().init(jax.random.key(0), X)
    model = linsey.to_nnx(Changing(), X, variables=variables)
    for dtype in (None, jnp.bfloat16, jnp.float32):
        assert_same(model(X, dtype), Changing().apply(variables, X, dtype))
    # The layer cannot follow that: Linen's own code runs, unless the layer is no longer its own.
    assert_same(model(X, use_bias=False), Changing().apply(variables, X, use_bias=False))
    model.Dense_0.precision = "highest"
    with pytest.raises(linsey.LinseyError) as caught:
        model(X, use_bias=False)
    assert str(caught.value).startswith(
        "at Dense_0: this call makes the layer with other fields than when it was lowered:"
        " use_bias=False (was True); Linear cannot follow that"
    )
    hosted = linsey.to_nnx(Changing(), X, variables=variables, native=False)
    assert_same(hosted(X, use_bias=False), Changing().apply(variables, X, use_bias=False))


def test_a_native_attention_takes_the_options_of_nnx() -> None:
    class Attend(nn.Module):
        @nn.compact
        def __call__(self, x: Any, mask: Any = None) -> Any:
            return nn.MultiHeadDotProductAttention(2, name="attn")(x, mask=mask)

    x = jax.random.normal(jax.random.key(1), (1, 3, 4))
    model = linsey.to_nnx(Attend(), x, rngs=0)
    causal = model.attn(x, decode=False, is_causal=True)
    assert_same(causal, model(x, nn.make_causal_mask(x[..., 0])))
    assert not jnp.array_equal(causal, model(x))
