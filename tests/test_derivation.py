"""Whose rule makes keys: the source's, or that of the API that a model is emitted in."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import linsey

X = jnp.ones((2, 4))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        h = nn.Dense(4, kernel_init=nn.initializers.normal(0.3))(x)
        h = nn.Dropout(0.5)(h, deterministic=not train)
        h = nn.LayerNorm(scale_init=nn.initializers.normal(1.0))(h)
        return h * self.param("by", nn.initializers.normal(), (4,))


class Body(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x)), None


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        scan = nn.scan(
            Body,
            variable_axes={"params": 1},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return scan(name="steps")(x, None)[0]


def make(rngs: nnx.Rngs) -> Any:
    return nnx.Sequential(
        nnx.Linear(4, 3, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.BatchNorm(3, rngs=rngs),
        nnx.Linear(3, 2, rngs=rngs),
    )


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_linens_rule_in_nnx(make_key: Any) -> None:
    key, keys = make_key(3), {"dropout": make_key(5)}
    variables = Net().init(key, X)
    model = linsey.to_nnx(Net(), X, rngs=key)
    _, found = linsey.lower(model).emit("linen")
    assert_same(found, variables)
    for _ in range(2):
        expected = Net().apply(variables, X, train=True, rngs=keys)
        assert_same(model(X, train=True, rngs=keys), expected)


def test_linens_rule_below_a_scan_and_in_repeated_calls() -> None:
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = Deep().init(keys, X)
    model = linsey.to_nnx(Deep(), X, rngs=keys)
    for seed in (1, 2, 1):
        own = {"dropout": jax.random.key(seed)}
        assert_same(model(X, rngs=own), Deep().apply(variables, X, rngs=own))


def test_nnxs_rule_in_linen() -> None:
    source = make(nnx.Rngs(params=1, dropout=2))
    module, variables = linsey.to_linen(make, rngs=nnx.Rngs(params=1, dropout=2))
    assert linsey.lower(source).report().native_share == 1.0
    for _ in range(3):
        expected = source(X)
        found, updates = module.apply(variables, X, mutable=["RngCount", "batch_stats"])
        assert_same(found, expected)
        variables |= updates
    with pytest.raises(linsey.LinseyError) as caught:
        module.apply(variables, X, mutable=["batch_stats"])
    assert str(caught.value).startswith("at layers_1/rngs: the call drew a key from this stream")
    own = {"dropout": jax.random.key(1)}
    first, _ = module.apply(variables, X, rngs=own, mutable=["batch_stats"])
    second, _ = module.apply(variables, X, rngs=own, mutable=["batch_stats"])
    assert_same(first, second)


def test_nnxs_rule_for_a_linen_model() -> None:
    model = linsey.to_nnx(Net(), X, rngs=nnx.Rngs(7), derivation="target")
    rngs = nnx.Rngs(7)
    variables = Net().init({"params": rngs.params()}, X)
    dense = nnx.Linear(4, 4, kernel_init=nn.initializers.normal(0.3), rngs=rngs)
    assert_same(model.Dense_0.kernel[...], dense.kernel[...])
    norm = nnx.LayerNorm(4, scale_init=nn.initializers.normal(1.0), rngs=rngs)
    assert_same(model.LayerNorm_0.scale[...], norm.scale[...])
    assert_same(model.by[...], variables["params"]["by"])
    mask = nnx.Dropout(0.5, rngs=rngs)
    for _ in range(2):
        expected = norm(mask(dense(X))) * model.by[...]
        assert_same(model(X, train=True), expected)


def test_nnxs_rule_for_stacked_layers() -> None:
    streams = nnx.Rngs(params=0, dropout=1)
    model = linsey.to_nnx(Deep(), X, rngs=streams, derivation="target")
    rngs = nnx.Rngs(params=0, dropout=1)
    rngs.params(), rngs.dropout()

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=1)
    def layers(rngs: Any) -> Any:
        return nnx.Linear(4, 4, rngs=rngs)

    assert_same(model.steps.Dense_0.kernel[...], layers(rngs).kernel[...])
    assert not jnp.array_equal(model(X), model(X))


def test_linens_rule_for_an_nnx_model() -> None:
    key = jax.random.key(4)
    _, variables = linsey.to_linen(
        lambda rngs: nnx.Linear(4, 3, rngs=rngs), rngs=key, derivation="target"
    )
    expected = bridge.ToLinen(nnx.Linear, args=(4, 3)).init(key, X)
    assert_same(variables["params"]["kernel"], expected["params"]["kernel"])


def test_another_word_is_refused() -> None:
    for convert in (linsey.to_nnx, linsey.to_linen):
        with pytest.raises(linsey.LinseyError, match="at derivation: found 'nnx', expected"):
            convert(Net(), X, rngs=0, derivation="nnx")  # type: ignore[operator]
