"""Wrappers inside wrappers give bit for bit what the same layers give without any.

The twin of a nested model is written in one API alone, and has the same weights. Both are run
alike: both as they are, or both under jit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

from linsey import bridge

Array = jax.Array


def _draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


X = _draw(5, 4)
WEIGHT = _draw(5, 4, seed=1)
KEY = jax.random.key(0)

RUNS = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


def _run(function: Callable[..., Any], *args: Any, jit: bool) -> Any:
    return (jax.jit(function) if jit else function)(*args)


def _run_nnx(function: Callable[..., Any], *args: Any, jit: bool) -> Any:
    return (nnx.jit(function) if jit else function)(*args)


def _loss(y: Array) -> Array:
    return jnp.sum(jnp.tanh(y) * WEIGHT)


def _pure(model: Any, kind: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(model, kind))


# --------------------------------------------------------------------------------------
# a tower: each level holds the one below it, in the other API


class LinenLevel(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(4, name="dense")(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.5, name="norm")(x)
        if self.depth > 1:
            x = bridge.to_linen(NNXLevel, self.depth - 1, name="below")(x)
        return x


class NNXLevel(nnx.Module):
    def __init__(self, depth: int, rngs: nnx.Rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.depth = depth
        if depth > 1:
            self.below = bridge.ToNNX(LinenLevel(depth - 1), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.norm(self.dense(x))
        return self.below(x) if self.depth > 1 else x


class Tower(nn.Module):
    """The same levels in Linen alone."""

    depth: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for level in range(self.depth):
            x = nn.Dense(4, name=f"dense_{level}")(x)
            norm = nn.BatchNorm(use_running_average=False, momentum=0.5, name=f"norm_{level}")
            x = norm(x)
        return x


def _levels(tree: Any, collection: str, depth: int, *, is_linen: bool) -> dict[str, Any]:
    """A collection of a tower in the layout of `Tower`."""
    found = {}
    for level in range(depth):
        found.update({f"{name}_{level}": tree[name] for name in ("dense", "norm") if name in tree})
        if level + 1 < depth:
            # A ToNNX keeps the collection as an attribute.
            tree = tree["below"] if is_linen else tree["below"][collection]
            is_linen = not is_linen
    return found


DEPTHS = pytest.mark.parametrize("depth", [2, 3, 4, 5])


def _twin(variables: Any, jit: bool) -> tuple[Any, Any, Any]:
    """Output, gradients and new batch statistics of the twin."""
    depth = len(variables["params"]) // 2

    def loss(params: Any) -> Any:
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        y, updates = Tower(depth).apply(given, X, mutable=["batch_stats"])
        return _loss(y), (y, updates["batch_stats"])

    grads, (y, stats) = _run(jax.grad(loss, has_aux=True), variables["params"], jit=jit)
    return y, grads, stats


@DEPTHS
@RUNS
def test_a_linen_tower_of_wrappers_is_its_twin(depth: int, jit: bool) -> None:
    module = LinenLevel(depth)
    variables = module.init(KEY, X)

    def loss(params: Any, rest: Any) -> Any:
        y, updates = module.apply({**rest, "params": params}, X, mutable=["batch_stats"])
        return _loss(y), (y, updates["batch_stats"])

    rest = {name: tree for name, tree in variables.items() if name != "params"}
    grads, (y, stats) = _run(jax.grad(loss, has_aux=True), variables["params"], rest, jit=jit)

    flat = {
        name: _levels(nn.unbox(variables[name]), name, depth, is_linen=True)
        for name in ("params", "batch_stats")
    }
    assert len(flat["params"]) == 2 * depth
    expected, expected_grads, expected_stats = _twin(flat, jit)
    assert_same(y, expected)
    assert_same(_levels(nn.unbox(grads), "params", depth, is_linen=True), expected_grads)
    assert_same(_levels(nn.unbox(stats), "batch_stats", depth, is_linen=True), expected_stats)


@DEPTHS
@RUNS
def test_an_nnx_tower_of_wrappers_is_its_twin(depth: int, jit: bool) -> None:
    model = bridge.lazy_init(NNXLevel(depth, rngs=nnx.Rngs(0)), X)

    def flat() -> Any:
        return {
            "params": _levels(_pure(model, nnx.Param), "params", depth, is_linen=False),
            "batch_stats": _levels(
                _pure(model, nnx.BatchStat), "batch_stats", depth, is_linen=False
            ),
        }

    before = flat()
    assert len(before["params"]) == 2 * depth

    def step(model: Any) -> Any:
        def loss(model: Any) -> Any:
            y = model(X)
            return _loss(y), y

        return nnx.grad(loss, has_aux=True)(model)

    grads, y = _run_nnx(step, model, jit=jit)
    # `lazy_init` updates the statistics of the NNX levels, as every call of NNX does.
    expected, expected_grads, expected_stats = _twin(before, jit)
    assert_same(y, expected)
    found = _levels(nnx.to_pure_dict(grads), "params", depth, is_linen=False)
    assert_same(found, expected_grads)
    assert_same(flat()["batch_stats"], expected_stats)


@DEPTHS
def test_a_tower_inside_a_tower_is_the_tower(depth: int) -> None:
    """ToLinen around the NNX root, and ToNNX around that: no more than a longer way to it."""
    outer = bridge.to_linen(NNXLevel, depth)
    model = bridge.ToNNX(outer, rngs=nnx.Rngs(0)).lazy_init(X)
    params = _levels(_pure(model, nnx.Param)["params"], "params", depth, is_linen=False)
    stats = _levels(
        _pure(model, nnx.BatchStat)["batch_stats"], "batch_stats", depth, is_linen=False
    )
    expected, _, expected_stats = _twin({"params": params, "batch_stats": stats}, jit=False)
    assert_same(model(X), expected)
    after = _pure(model, nnx.BatchStat)["batch_stats"]
    assert_same(_levels(after, "batch_stats", depth, is_linen=False), expected_stats)


@DEPTHS
def test_initial_statistics_are_fresh_in_a_linen_tower(depth: int) -> None:
    """`init` gives what the constructors and initialisers made, whatever its call then changed."""
    stats = LinenLevel(depth).init(KEY, X)["batch_stats"]
    for level in _levels(nn.unbox(stats), "batch_stats", depth, is_linen=True).values():
        assert_same(level, {"mean": jnp.zeros(4), "var": jnp.ones(4)})


# --------------------------------------------------------------------------------------
# lists and dicts


class LinenWithNNX(nn.Module):
    """Linen modules and a ToLinen in a list and in a dict, given as attributes."""

    blocks: Any
    heads: Any

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return self.heads["a"](x) + self.heads["b"](x)


class LinenTwin(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index in range(3):
            x = nn.Dense(4, name=f"block_{index}")(x)
        return nn.Dense(4, name="a")(x) + nn.Dense(4, name="b")(x)


def _linen_with_nnx() -> LinenWithNNX:
    return LinenWithNNX(
        blocks=[
            nn.Dense(4),
            bridge.to_linen(nnx.Linear, 4, 4),
            bridge.to_linen(HoldsLinen),
        ],
        heads={"a": bridge.to_linen(nnx.Linear, 4, 4), "b": nn.Dense(4)},
    )


class HoldsLinen(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linen = bridge.ToNNX(nn.Dense(4), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linen(x)


def _of_linen_with_nnx(params: Any) -> Any:
    return {
        "block_0": params["blocks_0"],
        "block_1": params["blocks_1"],
        "block_2": params["blocks_2"]["linen"]["params"],
        "a": params["heads_a"],
        "b": params["heads_b"],
    }


@RUNS
def test_to_linen_works_in_lists_and_dicts(jit: bool) -> None:
    module = _linen_with_nnx()
    variables = module.init(KEY, X)

    def loss(params: Any) -> Any:
        y = module.apply({**variables, "params": params}, X, mutable=["RngCount"])[0]
        return _loss(y), y

    def twin_loss(params: Any) -> Any:
        y = LinenTwin().apply({"params": params}, X)
        return _loss(y), y

    grads, y = _run(jax.grad(loss, has_aux=True), variables["params"], jit=jit)
    params = _of_linen_with_nnx(nn.unbox(variables["params"]))
    expected_grads, expected = _run(jax.grad(twin_loss, has_aux=True), params, jit=jit)
    assert_same(y, expected)
    assert_same(_of_linen_with_nnx(nn.unbox(grads)), expected_grads)


class NNXWithLinen(nnx.Module):
    """ToNNX in an nnx.List, in an nnx.Dict, and in plain containers marked as data."""

    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List(
            [
                bridge.ToNNX(nn.Dense(4), rngs=rngs),
                nnx.Linear(4, 4, rngs=rngs),
                bridge.ToNNX(bridge.to_linen(nnx.Linear, 4, 4), rngs=rngs),
            ]
        )
        self.heads = nnx.Dict(
            a=bridge.ToNNX(nn.Dense(4), rngs=rngs),
            b=bridge.ToNNX(_linen_with_nnx(), rngs=rngs),
        )
        self.plain = nnx.data([{"c": bridge.ToNNX(nn.Dense(4), rngs=rngs)}])

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return self.plain[0]["c"](self.heads["a"](x) + self.heads["b"](x))


class NNXTwin(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
        self.heads = nnx.Dict(a=nnx.Linear(4, 4, rngs=rngs), b=NNXTwinHead(rngs))
        self.last = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return self.last(self.heads["a"](x) + self.heads["b"](x))


class NNXTwinHead(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        for name in ("block_0", "block_1", "block_2", "a", "b"):
            setattr(self, name, nnx.Linear(4, 4, rngs=rngs))

    def __call__(self, x: Array) -> Array:
        x = self.block_2(self.block_1(self.block_0(x)))
        return self.a(x) + self.b(x)


def _of_nnx_with_linen(params: Any) -> Any:
    return {
        "blocks": {
            0: params["blocks"][0]["params"],
            1: params["blocks"][1],
            2: params["blocks"][2]["params"],
        },
        "heads": {
            "a": params["heads"]["a"]["params"],
            "b": _of_linen_with_nnx(params["heads"]["b"]["params"]),
        },
        "last": params["plain"][0]["c"]["params"],
    }


def _nnx_step(model: Any) -> Any:
    def loss(model: Any) -> Any:
        y = model(X)
        return _loss(y), y

    return nnx.grad(loss, has_aux=True)(model)


@RUNS
def test_to_nnx_works_in_lists_and_dicts(jit: bool) -> None:
    model = bridge.lazy_init(NNXWithLinen(nnx.Rngs(0)), X)
    twin = NNXTwin()
    nnx.update(twin, _of_nnx_with_linen(_pure(model, nnx.Param)))
    grads, y = _run_nnx(_nnx_step, model, jit=jit)
    expected_grads, expected = _run_nnx(_nnx_step, twin, jit=jit)
    assert_same(y, expected)
    assert_same(_of_nnx_with_linen(nnx.to_pure_dict(grads)), nnx.to_pure_dict(expected_grads))


@RUNS
def test_to_linen_of_a_list_of_to_nnx_is_its_twin(jit: bool) -> None:
    """Linen, ToLinen, an NNX list of ToNNX, Linen with ToLinen."""

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return bridge.to_linen(NNXWithLinen, name="inner")(nn.Dense(4, name="first")(x))

    module = Outer()
    variables = module.init(KEY, X)

    def loss(params: Any) -> Any:
        y = module.apply({**variables, "params": params}, X, mutable=["RngCount"])[0]
        return _loss(y), y

    grads, y = _run(jax.grad(loss, has_aux=True), variables["params"], jit=jit)
    graphdef = nnx.graphdef(NNXTwin())

    def twin_loss(params: Any) -> Any:
        hidden = nn.Dense(4).apply({"params": params["first"]}, X)
        y = nnx.merge(graphdef, nnx.State(params["inner"]))(hidden)
        return _loss(y), y

    def flat(params: Any) -> Any:
        params = nn.unbox(params)
        return {"first": params["first"], "inner": _of_nnx_with_linen(params["inner"])}

    expected_grads, expected = _run(
        jax.grad(twin_loss, has_aux=True), flat(variables["params"]), jit=jit
    )
    assert_same(y, expected)
    assert_same(flat(grads), expected_grads)


class HoldsGiven(nnx.Module):
    def __init__(self, module: nn.Module, rngs: nnx.Rngs):
        self.linen = bridge.ToNNX(module, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linen(x)


def test_a_linen_module_made_in_a_method_may_be_handed_down() -> None:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return bridge.to_linen(HoldsGiven, nn.Dense(2), name="holds")(x)

    variables = Outer().init(KEY, X)
    assert sorted(variables["params"]) == ["holds"]
    params = nn.unbox(variables["params"])["holds"]["linen"]["params"]
    assert_same(Outer().apply(variables, X), nn.Dense(2).apply({"params": params}, X))


# --------------------------------------------------------------------------------------
# wrappers that are used twice


class SharesLinen(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.shared = bridge.ToNNX(SharesNNX(), rngs=rngs)
        self.again = nnx.List([self.shared, nnx.Linear(4, 4, rngs=rngs), self.shared])

    def __call__(self, x: Array) -> Array:
        for layer in self.again:
            x = layer(x)
        return self.shared(x)


class SharesNNX(nn.Module):
    def setup(self) -> None:
        self.shared = bridge.to_linen(nnx.Linear, 4, 4)
        self.norm = bridge.to_linen(nnx.BatchNorm, 4, momentum=0.5)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.shared(self.norm(self.shared(x))))


class SharesTwin(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.shared = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.linear(self._shared(x))
        return self._shared(self._shared(x))

    def _shared(self, x: Array) -> Array:
        return self.norm(self.shared(self.norm(self.shared(x))))


@RUNS
def test_a_wrapper_that_is_called_twice_has_one_set_of_variables(jit: bool) -> None:
    model = bridge.lazy_init(SharesLinen(nnx.Rngs(0)), X)
    assert model.again[0] is model.shared
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == 6

    def flat(model: Any) -> Any:
        return {
            "linear": {
                "kernel": model.again[1].kernel[...],
                "bias": model.again[1].bias[...],
            },
            "shared": jax.tree.map(
                lambda v: v[...], dict(model.shared.params["shared"]), is_leaf=_is_variable
            ),
            "norm": jax.tree.map(
                lambda v: v[...],
                {**model.shared.params["norm"], **model.shared.batch_stats["norm"]},
                is_leaf=_is_variable,
            ),
        }

    twin = SharesTwin()
    nnx.update(twin, flat(model))

    grads, y = _run_nnx(_nnx_step, model, jit=jit)
    expected_grads, expected = _run_nnx(_nnx_step, twin, jit=jit)
    assert_same(y, expected)
    assert_same(flat(model)["norm"], _pure(twin, (nnx.Param, nnx.BatchStat))["norm"])
    found = nnx.to_pure_dict(grads)
    of_twin = nnx.to_pure_dict(expected_grads)
    own = found["again"][0] if "params" in found["again"].get(0, {}) else found["shared"]
    assert_same(own["params"]["shared"], of_twin["shared"])
    assert_same(own["params"]["norm"], of_twin["norm"])
    assert_same(found["again"][1], of_twin["linear"])


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


class OneLinenInTwo(nnx.Module):
    """Two wrappers of one Linen module are two models."""

    def __init__(self, rngs: nnx.Rngs):
        dense = nn.Dense(4)
        self.first = bridge.ToNNX(dense, rngs=rngs)
        self.second = bridge.ToNNX(dense, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.second(self.first(x))


def test_two_wrappers_of_one_linen_module_are_two_models() -> None:
    model = bridge.lazy_init(OneLinenInTwo(nnx.Rngs(0)), X)
    first, second = model.first.params["kernel"], model.second.params["kernel"]
    assert not np.array_equal(first[...], second[...])
    hidden = nn.Dense(4).apply({"params": _pure(model.first, nnx.Param)["params"]}, X)
    expected = nn.Dense(4).apply({"params": _pure(model.second, nnx.Param)["params"]}, hidden)
    assert_same(model(X), expected)


def test_a_shared_wrapper_with_two_inputs_is_initialized_by_both() -> None:
    """The second call of a shared wrapper adds what only it makes, and keeps what is there."""

    class TwoMethods(nn.Module):
        def setup(self) -> None:
            self.common, self.one, self.two = nn.Dense(4), nn.Dense(4), nn.Dense(4)

        def first(self, x: Array) -> Array:
            return self.one(self.common(x))

        def second(self, x: Array) -> Array:
            return self.two(self.common(x))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linen = bridge.ToNNX(TwoMethods(), rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.linen.first(x) + self.linen.second(x)

    model = bridge.lazy_init(Model(nnx.Rngs(0)), X)
    assert sorted(model.linen.params) == ["common", "one", "two"]
    params = _pure(model, nnx.Param)["linen"]["params"]

    def dense(name: str, x: Array) -> Array:
        return nn.Dense(4).apply({"params": params[name]}, x)

    common = dense("common", X)
    assert_same(model(X), dense("one", common) + dense("two", common))


# --------------------------------------------------------------------------------------
# dropout


class DropsInLinen(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.drops = nnx.List(
            [bridge.ToNNX(nn.Dropout(0.5, deterministic=False), rngs=rngs) for _ in range(2)]
        )

    def __call__(self, x: Array) -> Array:
        return jnp.stack([drop(x) for drop in self.drops])


ONES = jnp.ones((8, 8))


def _mask_of(stream_key: Array) -> Array:
    drop = nn.Dropout(0.5, deterministic=False)
    return drop.apply({}, ONES, rngs={"dropout": stream_key})


@RUNS
def test_masks_of_to_nnx_are_those_of_its_streams(jit: bool) -> None:
    model = bridge.lazy_init(DropsInLinen(nnx.Rngs(0, dropout=1)), ONES)
    for _ in range(2):
        keys = [drop.rngs.dropout() for drop in nnx.clone(model).drops]
        masks = _run_nnx(lambda model: model(ONES), model, jit=jit)
        assert_same(masks, jnp.stack([_run(_mask_of, key, jit=jit) for key in keys]))
        assert not np.array_equal(masks[0], masks[1])


@RUNS
def test_masks_of_to_nnx_inside_to_linen_are_those_of_the_stored_streams(jit: bool) -> None:
    module = bridge.to_linen(DropsInLinen)
    variables = module.init({"params": KEY, "dropout": jax.random.key(1)}, ONES)
    model = DropsInLinen(nnx.Rngs(params=0, dropout=1))
    for _ in range(2):
        stored = nn.unbox({name: variables[name] for name in ("RngKey", "RngCount")})
        nnx.update(model, stored["RngKey"])
        nnx.update(model, stored["RngCount"])
        expected = _run_nnx(lambda model: model(ONES), model, jit=jit)

        def call(variables: Any) -> Any:
            return module.apply(variables, ONES, mutable=["RngCount"])

        masks, updates = _run(call, variables, jit=jit)
        assert_same(masks, expected)
        variables = {**variables, **updates}


@RUNS
def test_masks_of_to_linen_are_those_of_the_stored_stream(jit: bool) -> None:
    module = bridge.to_linen(nnx.Dropout, rate=0.5)
    variables = module.init({"dropout": jax.random.key(1)}, ONES)
    twin = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=2))
    nnx.update(twin, nn.unbox(variables["RngKey"]))
    nnx.update(twin, nn.unbox(variables["RngCount"]))

    def call(variables: Any) -> Any:
        return module.apply(variables, ONES, mutable=["RngCount"])

    for _ in range(3):
        y, updates = _run(call, variables, jit=jit)
        assert_same(y, _run_nnx(lambda twin: twin(ONES), twin, jit=jit))
        variables = {**variables, **updates}


@RUNS
def test_dropout_in_a_linen_parent_is_not_moved_by_a_to_linen_beside_it(jit: bool) -> None:
    class Parent(nn.Module):
        wraps: bool

        @nn.compact
        def __call__(self, x: Array) -> Array:
            if self.wraps:
                bridge.to_linen(nnx.Linear, 8, 8, name="linear")(x)
            else:
                nn.Dense(8, name="linear")(x)
            return nn.Dropout(0.5, deterministic=False)(x)

    def mask(wraps: bool) -> Array:
        module = Parent(wraps)
        variables = module.init({"params": KEY, "dropout": KEY}, ONES)
        rngs = {"dropout": jax.random.key(2)}
        return _run(lambda v: module.apply(v, ONES, rngs=rngs), variables, jit=jit)

    assert_same(mask(True), mask(False))


def test_every_level_of_a_tower_draws_its_own_mask() -> None:
    class Bottom(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.linen = bridge.ToNNX(nn.Dropout(0.5, deterministic=False), rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return jnp.stack([self.drop(x), self.linen(x)])

    class Top(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            own = nn.Dropout(0.5, deterministic=False)(x)
            return jnp.concatenate([own[None], bridge.to_linen(Bottom)(x)])

    model = bridge.ToNNX(Top(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(ONES)
    first, second = model(ONES), model(ONES)
    masks = [np.asarray(mask).tobytes() for mask in (*first, *second)]
    assert len(set(masks)) == 6


# --------------------------------------------------------------------------------------
# lifted transforms between the levels


@RUNS
def test_a_scan_over_to_linen_over_to_nnx_is_its_twin(jit: bool) -> None:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
            return jnp.tanh(bridge.to_linen(HoldsLinen, name="dense")(x)), None

    class TwinBody(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
            return jnp.tanh(nn.Dense(4, name="dense")(x)), None

    def scanned(body: Any) -> nn.Module:
        return nn.scan(
            body,
            variable_axes={"params": 0, "RngCount": 0, "RngKey": 0},
            variable_broadcast="nnx",
            split_rngs={"params": True},
            length=3,
        )()

    module = scanned(Body)
    variables = module.init(KEY, X, None)
    params = {"dense": nn.unbox(variables["params"])["dense"]["linen"]["params"]}
    assert params["dense"]["kernel"].shape == (3, 4, 4)
    assert not np.array_equal(params["dense"]["kernel"][0], params["dense"]["kernel"][1])

    def loss(params: Any) -> Any:
        (y, _), _ = module.apply({**variables, "params": params}, X, None, mutable=["RngCount"])
        return _loss(y), y

    def twin_loss(params: Any) -> Any:
        y, _ = scanned(TwinBody).apply({"params": params}, X, None)
        return _loss(y), y

    grads, y = _run(jax.grad(loss, has_aux=True), variables["params"], jit=jit)
    expected_grads, expected = _run(jax.grad(twin_loss, has_aux=True), params, jit=jit)
    assert_same(y, expected)
    assert_same(nn.unbox(grads)["dense"]["linen"]["params"], expected_grads["dense"])


@RUNS
def test_a_remat_over_to_linen_is_its_twin(jit: bool) -> None:
    class Model(nn.Module):
        dense: Any

        def __call__(self, x: Array) -> Array:
            return self.dense(jnp.tanh(self.dense(x)))

    def of(dense: Any) -> Any:
        return Model(dense)

    wrapped = of(nn.remat(bridge.ToLinen)(nnx.Linear, args=(4, 4)))
    plain = of(nn.remat(nn.Dense)(4))
    variables = wrapped.init(KEY, X)

    def grads(module: nn.Module, variables: Any) -> Any:
        def loss(params: Any) -> Any:
            return _loss(module.apply({**variables, "params": params}, X))

        return _run(jax.grad(loss), variables["params"], jit=jit)

    found = nn.unbox(grads(wrapped, variables))
    assert_same(found, grads(plain, {"params": nn.unbox(variables["params"])}))


@RUNS
def test_an_nnx_scan_over_to_nnx_over_to_linen_is_its_twin(jit: bool) -> None:
    @nnx.vmap(in_axes=(0, None), out_axes=0)
    def made(key: Array, x: Array) -> Any:
        return bridge.ToNNX(bridge.to_linen(nnx.Linear, 4, 4), rngs=key).lazy_init(x)

    model = made(jax.random.split(KEY, 3), X)
    kernel, bias = model.params["kernel"][...], model.params["bias"][...]
    assert kernel.shape == (3, 4, 4)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def layers(x: Array, layer: Any) -> Array:
        return jnp.tanh(layer(x))

    @nnx.vmap(in_axes=(0,), out_axes=0)
    def twins(_: Array) -> Any:
        return nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    twin = twins(jnp.zeros(3))
    nnx.update(twin, {"kernel": kernel, "bias": bias})

    def run(model: Any) -> Array:
        return layers(X, model)

    assert_same(_run_nnx(run, model, jit=jit), _run_nnx(run, twin, jit=jit))
