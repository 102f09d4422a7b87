"""Calls of wrapped modules: methods, state, PRNG streams, modes, and what NNX does with them."""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.nnx.bridge
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_same
from flax import core, errors, nnx, serialization
from flax import linen as nn

from linsey import bridge
from linsey.ir import EmitError

Array = jax.Array


def _draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


X = _draw(4, 3)
ONES = jnp.ones((8, 8))
KEY = jax.random.key(0)

RUNS = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


def _run(function: Callable[..., Any], *args: Any, jit: bool) -> Any:
    return (jax.jit(function) if jit else function)(*args)


def _to_nnx(module: nn.Module, *args: Any, **kwargs: Any) -> bridge.ToNNX:
    """A wrapper whose variables are those of ``module.init(KEY, ...)``."""
    return bridge.ToNNX(module, rngs=KEY).lazy_init(*args, **kwargs)


def _linen(model: bridge.ToNNX) -> dict[str, Any]:
    """The variables of a wrapper as Linen has them."""
    kinds = (nnx.RngState, nnx.Intermediate)
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Any(*kinds))))


def _sown(model: Any, collection: str = "intermediates") -> Any:
    return jax.tree.map(
        lambda leaf: leaf.get_value(),
        getattr(model, collection),
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _forget(variables: Any, *collections: str) -> dict[str, Any]:
    return {name: tree for name, tree in variables.items() if name not in collections}


# --------------------------------------------------------------------------------------
# methods and keywords


class LinenCodec(nn.Module):
    def setup(self) -> None:
        self.encoder, self.decoder = nn.Dense(2), nn.Dense(3)

    def encode(self, x: Array, *, scale: float = 1.0) -> Array:
        return self.encoder(x) * scale

    def decode(self, z: Array) -> Array:
        return self.decoder(z)

    def __call__(self, x: Array, scale: float = 1.0) -> Array:
        return self.decode(self.encode(x, scale=scale))


class NNXCodec(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(3, 2, rngs=rngs)
        self.decoder = nnx.Linear(2, 3, rngs=rngs)

    def encode(self, x: Array, *, scale: float = 1.0) -> Array:
        return self.encoder(x) * scale

    def decode(self, z: Array) -> Array:
        return self.decoder(z)

    def __call__(self, x: Array, scale: float = 1.0) -> Array:
        return self.decode(self.encode(x, scale=scale))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.encode(X, scale=2.0),
        lambda model: model(X, method="encode", scale=2.0),
        lambda model: model(X, method=LinenCodec.encode, scale=2.0),
        lambda model: model(X, 2.0, method=lambda module, x, scale: module.encode(x, scale=scale)),
    ],
    ids=["attribute", "name", "function", "lambda"],
)
@RUNS
def test_to_nnx_calls_other_methods(call: Callable[[Any], Array], jit: bool) -> None:
    model = _to_nnx(LinenCodec(), X)
    found = nnx.jit(call)(model) if jit else call(model)

    def native(variables: Any) -> Array:
        return LinenCodec().apply(variables, X, scale=2.0, method="encode")

    assert_same(found, _run(native, _linen(model), jit=jit))


@pytest.mark.parametrize(
    "call",
    [
        lambda module, v: module.apply(v, X, scale=2.0, method="encode"),
        lambda module, v: module.apply(v, X, scale=2.0, nnx_method="encode"),
        lambda module, v: module.apply(v, X, scale=2.0, nnx_method=NNXCodec.encode),
        lambda module, v: module.apply(v, X, scale=2.0, method=module.encode),
        lambda module, v: module.bind(v).encode(X, scale=2.0),
        lambda module, v: module.bind(v)(X, scale=2.0, nnx_method="encode"),
        lambda module, v: module.apply(
            v, X, 2.0, nnx_method=lambda model, x, scale: model.encode(x, scale=scale)
        ),
        lambda module, v: module.apply(v, X, scale=2.0, method="encode", mutable=True)[0],
    ],
    ids=["method", "nnx_method", "function", "bound", "bind", "bind-call", "lambda", "mutable"],
)
@RUNS
def test_to_linen_calls_other_methods(call: Callable[..., Array], jit: bool) -> None:
    module = bridge.to_linen(NNXCodec)
    variables = module.init(KEY, X)
    native = NNXCodec(nnx.Rngs(0))
    nnx.update(native, nn.unbox(variables["params"]))

    def encode(native: NNXCodec) -> Array:
        return native.encode(X, scale=2.0)

    expected = nnx.jit(encode)(native) if jit else encode(native)
    assert_same(_run(lambda v: call(module, v), variables, jit=jit), expected)


def test_to_linen_calls_methods_from_a_linen_parent() -> None:
    class Parent(nn.Module):
        def setup(self) -> None:
            self.codec = bridge.to_linen(NNXCodec)

        def __call__(self, x: Array) -> Array:
            hidden = self.codec.encode(x, scale=2.0)
            return self.codec(hidden, nnx_method="decode")

    variables = Parent().init(KEY, X)
    native = NNXCodec(nnx.Rngs(0))
    nnx.update(native, nn.unbox(variables["params"])["codec"])
    assert_same(Parent().apply(variables, X), native(X, scale=2.0))


def test_keyword_arguments_reach_the_call() -> None:
    model = _to_nnx(LinenCodec(), X)
    expected = LinenCodec().apply(_linen(model), X, scale=3.0)
    assert_same(model(X, scale=3.0), expected)
    assert_same(model(x=X, scale=3.0), expected)
    module = bridge.to_linen(NNXCodec)
    variables = module.init(KEY, x=X, scale=3.0)
    assert_same(module.apply(variables, X, 3.0), module.apply(variables, x=X, scale=3.0))
    assert not np.array_equal(module.apply(variables, X), module.apply(variables, X, 3.0))


def test_init_may_go_through_another_method() -> None:
    module = bridge.to_linen(NNXCodec)
    by_method = module.init(KEY, X, method="encode")
    by_nnx_method = module.init(KEY, X, nnx_method="encode")
    assert_same(nn.unbox(by_method["params"]), nn.unbox(module.init(KEY, X)["params"]))
    assert_same(nn.unbox(by_nnx_method["params"]), nn.unbox(by_method["params"]))


def test_lazy_init_takes_a_bound_method() -> None:
    z = _draw(4, 2)
    model = bridge.ToNNX(LinenCodec(), rngs=KEY)
    method = bridge.lazy_init(model.decode, z)
    assert_same(_linen(model), LinenCodec().init(KEY, z, method="decode"))
    assert sorted(model.params) == ["decoder"]
    assert_same(method(z), LinenCodec().apply(_linen(model), z, method="decode"))


def test_lazy_init_takes_a_bound_method_of_a_pure_nnx_module() -> None:
    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linen = bridge.ToNNX(LinenCodec(), rngs=rngs)

        def start(self, x: Array) -> Array:
            return self.linen.encode(x)

    model = Outer(nnx.Rngs(0))
    bridge.lazy_init(model.start, X)
    assert sorted(model.linen.params) == ["encoder"]


def test_lazy_init_of_a_pure_nnx_module_calls_it_and_gives_it_back() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model))
    assert bridge.lazy_init(model, X) is model
    assert_same(nnx.to_pure_dict(nnx.state(model)), before)


def test_lazy_init_again_keeps_the_variables_and_adds_what_is_new() -> None:
    class Grown(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = bridge.ToNNX(nn.Dense(2), rngs=rngs)

        def __call__(self, x: Array) -> Array:
            y = self.first(x)
            return self.second(y) if hasattr(self, "second") else y

    model = bridge.lazy_init(Grown(nnx.Rngs(0)), X)
    model.first.params["kernel"][...] += 1
    trained = np.asarray(model.first.params["kernel"][...])
    model.second = bridge.ToNNX(nn.Dense(3), rngs=nnx.Rngs(1))
    bridge.lazy_init(model, X)
    assert_same(model.first.params["kernel"][...], jnp.asarray(trained))
    assert model.second.params["kernel"].shape == (2, 3)


# --------------------------------------------------------------------------------------
# mutable, sow, intermediates


class Counts(nn.Module):
    """Two collections that a call changes, and a sown value."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.Dense(2)(x)
        for collection in ("calls_counts", "rows_counts"):
            count = self.variable(collection, "count", lambda: jnp.zeros((), jnp.int32))
            if not self.is_initializing() and self.is_mutable_collection(collection):
                count.value += 1
        self.sow("intermediates", "total", jnp.sum(y))
        return y


@pytest.mark.parametrize(
    ("mutable", "changed"),
    [
        (None, (1, 1, 1)),
        (True, (1, 1, 1)),
        (False, (0, 0, 0)),
        ("calls_counts", (1, 0, 0)),
        (["calls_counts"], (1, 0, 0)),
        (("rows_counts", "intermediates"), (0, 1, 1)),
        (nn.DenyList("rows_counts"), (1, 0, 1)),
        ([], (0, 0, 0)),
    ],
)
def test_mutable_says_what_a_call_may_change(mutable: Any, changed: tuple[int, ...]) -> None:
    model = _to_nnx(Counts(), X)
    y = model(2 * X, mutable=mutable)
    assert_same(y, nn.Dense(2).apply({"params": _linen(model)["params"]["Dense_0"]}, 2 * X))
    calls, rows = model.calls_counts["count"][...], model.rows_counts["count"][...]
    (total,) = model.intermediates["total"]
    sown = bool(total[...] == jnp.sum(y))
    assert (int(calls), int(rows), int(sown)) == changed


def test_the_structure_after_lazy_init_is_that_of_later_calls() -> None:
    model = _to_nnx(Counts(), X)
    before = nnx.graphdef(model), jax.tree.structure(nnx.state(model))
    model(X)
    assert (nnx.graphdef(model), jax.tree.structure(nnx.state(model))) == before


def test_a_module_that_sows_can_be_carried_by_a_loop() -> None:
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            y = nn.Dense(x.shape[-1])(x)
            self.sow("intermediates", "total", jnp.sum(y))
            return y

    model, twin = _to_nnx(Sows(), X), _to_nnx(Sows(), X)
    _, found = nnx.fori_loop(0, 2, lambda _, carry: (carry[0], carry[0](carry[1])), (model, X))
    by_hand = jax.lax.fori_loop(0, 2, lambda _, x: twin(x, rngs={}), X)
    np.testing.assert_array_equal(found, by_hand)


def test_sown_values_may_be_deleted_and_the_next_call_brings_new_ones() -> None:
    model = _to_nnx(Counts(), X)
    del model.intermediates
    assert not jax.tree.leaves(nnx.state(model, nnx.Intermediate))
    y = model(2 * X)
    assert_same(model.intermediates["total"][0][...], jnp.sum(y))


def test_nnx_view_reaches_linen_modules() -> None:
    model = bridge.ToNNX(nn.Dropout(0.5), rngs=nnx.Rngs(dropout=0)).lazy_init(X, True)
    assert_same(nnx.view(model, deterministic=True)(X), X)
    assert not np.array_equal(nnx.view(model, deterministic=False)(X), X)
    assert model.deterministic is None


def test_an_array_that_a_call_makes_of_none_is_kept() -> None:
    class Keeps(nnx.Module):
        def __init__(self) -> None:
            self.last = nnx.data(None)

        def __call__(self, x: Array) -> Array:
            before, self.last = self.last, x
            return x if before is None else x - before

    module = bridge.to_linen(Keeps)
    variables = module.init({}, X)
    y, updates = module.apply(variables, X, mutable=True)
    assert_same(y, X)
    y, _ = module.apply({**variables, **updates}, 3 * X, mutable=True)
    assert_same(y, 3 * X - X)


def test_a_subclass_may_change_the_call_and_keeps_the_other_methods() -> None:
    class Codec(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(X.shape[-1], 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.linear(x)

        def twice(self, x: Array) -> Array:
            return 2 * self.linear(x)

    class Shifted(bridge.ToLinen):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return super().__call__(x) + 1

    module = Shifted(Codec)
    variables = module.init(KEY, X)
    plain = bridge.ToLinen(Codec)
    assert_same(module.apply(variables, X), plain.apply(variables, X) + 1)
    assert_same(module.apply(variables, X, method="twice"), 2 * plain.apply(variables, X))


def test_flax_serialization_leaves_the_graphdef_to_its_target() -> None:
    module = bridge.to_linen(nnx.Linear, X.shape[-1], 2)
    variables = module.init(KEY, X)
    data = serialization.to_bytes(variables)
    restored = serialization.from_bytes(jax.eval_shape(module.init, KEY, X), data)
    assert restored["nnx"]["graphdef"] == variables["nnx"]["graphdef"]
    assert_same(module.apply(restored, X), module.apply(variables, X))


@RUNS
def test_captured_intermediates_are_those_of_linen(jit: bool) -> None:
    module = LinenCodec()
    model = _to_nnx(module, X)

    def native(variables: Any) -> Any:
        return module.apply(variables, X, capture_intermediates=True, mutable=["intermediates"])

    expected, captured = _run(native, _linen(model), jit=jit)

    def call(model: Any) -> Array:
        return model(X, capture_intermediates=True)

    found = nnx.jit(call)(model) if jit else call(model)
    assert_same(found, expected)
    assert_same(_sown(model), captured["intermediates"])


def test_captured_intermediates_may_be_filtered() -> None:
    module = LinenCodec()
    model = _to_nnx(module, X)

    def only(inner: nn.Module, name: str) -> bool:
        return inner.name == "encoder" and name == "__call__"

    model(X, capture_intermediates=only)
    hidden = module.apply(_linen(model), X, method="encode")
    assert_same(_sown(model), {"encoder": {"__call__": (hidden,)}})


def test_a_call_sows_once_and_does_not_grow() -> None:
    model = _to_nnx(Counts(), X)
    for factor in (1.0, 2.0, 3.0):
        y = model(factor * X)
        assert_same(_sown(model), {"total": (jnp.sum(y),)})


def test_a_call_that_sows_twice_keeps_both() -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            self.sow("intermediates", "total", jnp.sum(x))
            self.sow("intermediates", "total", jnp.max(x))
            return x

    model = _to_nnx(Twice(), X)
    for _ in range(2):
        model(X)
        assert_same(_sown(model), {"total": (jnp.sum(X), jnp.max(X))})


class SowsLoss(nn.Module):
    collection: str = "calls_losses"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for factor in (1.0, 10.0):
            self.sow(
                self.collection,
                "total",
                factor * jnp.sum(x),
                reduce_fn=lambda before, new: before + new,
                init_fn=lambda: jnp.zeros(()),
            )
        return nn.Dense(2)(x)


@RUNS
def test_a_sown_sum_starts_from_its_initial_value_at_each_call(jit: bool) -> None:
    model = _to_nnx(SowsLoss(), X)

    def call(model: Any, x: Array) -> Array:
        return model(x)

    for factor in (1.0, 2.0):
        _, native = SowsLoss().apply(
            {"params": _linen(model)["params"]}, factor * X, mutable=["calls_losses"]
        )
        (nnx.jit(call) if jit else call)(model, factor * X)
        assert_same(_sown(model, "calls_losses"), native["calls_losses"])


def test_a_value_sown_inside_a_scan_does_not_grow() -> None:
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
            x = nn.Dense(3)(x)
            self.sow("intermediates", "hidden", x)
            self.sow("calls_scanned", "hidden", x)
            return x, None

    module = nn.scan(
        Body,
        variable_axes={"params": 0, "intermediates": 0, "calls_scanned": 0},
        split_rngs={"params": True},
        length=2,
    )()
    model = _to_nnx(module, X, None)
    for factor in (1.0, 2.0):
        (expected, _), native = module.apply(
            {"params": _linen(model)["params"]},
            factor * X,
            None,
            mutable=["intermediates", "calls_scanned"],
        )
        y, _ = model(factor * X, None)
        assert_same(y, expected)
        assert_same(_sown(model), native["intermediates"])
        assert_same(_sown(model, "calls_scanned"), native["calls_scanned"])


def test_a_tuple_that_is_not_sown_lasts() -> None:
    class Remembers(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            cell = nn.LSTMCell(2)
            carry = self.variable(
                "calls_carry", "lstm", cell.initialize_carry, jax.random.key(0), x.shape
            )
            new, y = cell(carry.value, x)
            if not self.is_initializing():
                carry.value = new
            self.sow("intermediates", "seen", y)
            return y

    module = Remembers()
    model = _to_nnx(module, X)
    variables = _forget(module.init(KEY, X), "intermediates")
    for factor in (1.0, 2.0, 3.0):
        expected, updates = module.apply(
            variables, factor * X, mutable=["calls_carry", "intermediates"]
        )
        assert_same(model(factor * X), expected)
        assert_same(_sown(model), updates["intermediates"])
        variables = {**variables, "calls_carry": updates["calls_carry"]}
        assert_same(model.calls_carry["lstm"].get_value(), updates["calls_carry"]["lstm"])


# flax 0.12.12 wants a sow in NNX to be inside nnx.capture.
@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_nnx_modules_sow_in_to_linen_once_per_call() -> None:
    class Sows(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            y = self.linear(x)
            self.sow(nnx.Intermediate, "hidden", y)
            return y

    module = bridge.to_linen(Sows)
    variables = module.init(KEY, X)
    assert sorted(variables) == ["nnx", "params"]
    for factor in (1.0, 2.0):
        y, updates = module.apply(variables, factor * X, mutable=["intermediates"])
        assert_same(nn.unbox(updates), {"intermediates": {"hidden": (y,)}})
        variables = {**variables, **updates}


# --------------------------------------------------------------------------------------
# batch norm


@RUNS
def test_batch_norm_in_a_linen_module_trains_with_no_ceremony(jit: bool) -> None:
    module = nn.BatchNorm(use_running_average=False, momentum=0.5)
    model = _to_nnx(module, X)
    variables = module.init(KEY, X)

    def native(variables: Any, x: Array) -> Any:
        return module.apply(variables, x, mutable=["batch_stats"])

    def call(model: Any, x: Array) -> Array:
        return model(x)

    for factor in (1.0, 2.0):
        expected, updates = _run(native, variables, factor * X, jit=jit)
        assert_same((nnx.jit(call) if jit else call)(model, factor * X), expected)
        variables = {**variables, **updates}
        assert_same(_linen(model), variables)


@RUNS
def test_batch_norm_in_an_nnx_module_trains_where_its_collection_is_mutable(jit: bool) -> None:
    module = bridge.to_linen(nnx.BatchNorm, 3, momentum=0.5)
    variables = module.init(KEY, X)
    native = nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))

    def call(native: Any) -> Array:
        return native(X)

    for _ in range(2):
        y, updates = _run(lambda v: module.apply(v, X, mutable=["batch_stats"]), variables, jit=jit)
        assert_same(y, (nnx.jit(call) if jit else call)(native))
        variables = {**variables, **updates}
        found = nn.unbox(updates["batch_stats"])
        assert_same(found, nnx.to_pure_dict(nnx.state(native, nnx.BatchStat)))


# --------------------------------------------------------------------------------------
# train and eval


class Modal(nn.Module):
    """Dropout and batch norm whose mode is given nowhere but by the model."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.BatchNorm(momentum=0.5)(x)
        return nn.Dropout(0.5)(x)


class Fixed(nn.Module):
    """Dropout and batch norm with a mode, and a call that may say another."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        return nn.Dropout(0.5)(x, deterministic=deterministic)


class RematModal(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.remat(Modal)()(x)


class ScanModal(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
                return Modal()(x), None

        scan = nn.scan(
            Body,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True},
            length=2,
        )
        return scan()(x, None)[0]


class NNXModal(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.drop(self.norm(x))


class LinenOverNNX(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return bridge.to_linen(NNXModal)(x)


class NNXOver(nnx.Module):
    def __init__(self, module: nn.Module, rngs: nnx.Rngs):
        self.layers = nnx.List([bridge.ToNNX(module, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        return self.layers[0](x)


class NNXOverModal(NNXOver):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(Modal(), rngs)


class LinenOverAll(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return bridge.to_linen(NNXOverModal)(x)


WIDE = _draw(8, 8)


@pytest.mark.parametrize(
    "module",
    [Modal(), RematModal(), ScanModal(), LinenOverNNX(), LinenOverAll()],
    ids=["plain", "remat", "scan", "to-linen", "to-linen-of-to-nnx"],
)
@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
def test_train_and_eval_reach_every_level(module: nn.Module, nested: bool) -> None:
    rngs = nnx.Rngs(0, dropout=1)
    model = NNXOver(module, rngs) if nested else bridge.ToNNX(module, rngs=rngs)
    model.train()
    bridge.lazy_init(model, WIDE)

    def stats() -> Any:
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    fresh = stats()
    y = model(WIDE)
    assert 0 < np.sum(np.asarray(y) == 0) < y.size
    trained = stats()
    assert jax.tree.leaves(trained)
    for before, after in zip(jax.tree.leaves(fresh), jax.tree.leaves(trained), strict=True):
        assert not np.array_equal(before, after)

    model.eval()
    y = model(WIDE)
    assert not np.any(np.asarray(y) == 0)
    assert_same(model(WIDE), y)
    assert_same(stats(), trained)

    model.train()
    assert np.any(np.asarray(model(WIDE)) == 0)


@RUNS
def test_the_mode_of_a_model_is_what_linen_calls_it(jit: bool) -> None:
    class Native(nn.Module):
        deterministic: bool

        @nn.compact
        def __call__(self, x: Array) -> Array:
            norm = nn.BatchNorm(momentum=0.5, use_running_average=self.deterministic)
            return nn.Dropout(0.5, deterministic=self.deterministic)(norm(x))

    model = bridge.ToNNX(Modal(), rngs=nnx.Rngs(0, dropout=1))
    model.train()
    model.lazy_init(WIDE)

    def call(model: Any) -> Array:
        return model(WIDE)

    for is_eval in (False, True, False):
        model.eval() if is_eval else model.train()
        keys = {"dropout": nnx.clone(model).rngs.dropout()}
        variables = _linen(model)

        def native(variables: Any, keys: Any, is_eval: bool = is_eval) -> Any:
            return Native(is_eval).apply(variables, WIDE, rngs=keys, mutable=["batch_stats"])

        expected, updates = _run(native, variables, keys, jit=jit)
        assert_same((nnx.jit(call) if jit else call)(model), expected)
        assert_same(_linen(model)["batch_stats"], updates["batch_stats"])


def test_what_a_call_says_goes_before_the_mode() -> None:
    model = bridge.ToNNX(Fixed(), rngs=nnx.Rngs(0, dropout=1))
    bridge.lazy_init(model, ONES, deterministic=True)
    model.eval()
    assert_same(model(ONES), ONES)
    assert np.any(np.asarray(model(ONES, deterministic=False)) == 0)
    assert np.any(np.asarray(model(ONES, False)) == 0)
    model.train()
    assert np.any(np.asarray(model(ONES)) == 0)
    assert_same(model(ONES, deterministic=True), ONES)


def test_a_mode_goes_before_what_a_module_was_made_with() -> None:
    """As ``nnx.Dropout(deterministic=False)`` obeys ``eval()``."""
    model = bridge.ToNNX(nn.Dropout(0.5, deterministic=False), rngs=nnx.Rngs(dropout=0))
    model.lazy_init(ONES)
    assert np.any(np.asarray(model(ONES)) == 0)
    model.eval()
    assert_same(model(ONES), ONES)


def test_a_mode_of_one_model_is_not_that_of_another() -> None:
    module = nn.Dropout(0.5, deterministic=False)
    quiet = bridge.ToNNX(module, rngs=nnx.Rngs(dropout=0))
    quiet.eval()
    loud = bridge.ToNNX(module, rngs=nnx.Rngs(dropout=0))
    assert_same(quiet(ONES), ONES)
    assert np.any(np.asarray(loud(ONES)) == 0)
    assert module.deterministic is False


def test_set_attributes_reaches_wrapped_modules() -> None:
    model = NNXOver(Modal(), nnx.Rngs(0, dropout=1))
    model.set_attributes(deterministic=True, use_running_average=False)
    bridge.lazy_init(model, WIDE)
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert not np.any(np.asarray(model(WIDE)) == 0)
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert not np.array_equal(old, new)


# --------------------------------------------------------------------------------------
# streams of ToNNX


DROP = nn.Dropout(0.5, deterministic=False)


class DenseDrop(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(x))


@pytest.mark.parametrize("rngs", [KEY, 0, {"params": KEY}, {"params": 0}])
def test_a_key_gives_the_numbers_of_init(rngs: Any) -> None:
    for module in (nn.Dense(2), LinenCodec(), nn.BatchNorm(use_running_average=False)):
        model = bridge.ToNNX(module, rngs=rngs).lazy_init(X)
        assert_same(_linen(model), module.init(KEY, X))


def test_raw_keys_are_as_good_as_typed_ones() -> None:
    raw = jax.random.PRNGKey(0)
    model = bridge.ToNNX(DenseDrop(), rngs={"params": raw, "dropout": raw}).lazy_init(ONES)
    assert_same(_linen(model), DenseDrop().init({"params": raw, "dropout": raw}, ONES))
    expected = DenseDrop().apply(_linen(model), ONES, rngs={"dropout": raw})
    assert_same(model(ONES, rngs={"dropout": raw}), expected)
    single = bridge.ToNNX(nn.Dense(2), rngs=raw).lazy_init(X)
    assert_same(_linen(single), nn.Dense(2).init(raw, X))

    module = bridge.to_linen(nnx.Dropout, 0.5)
    variables = module.init({"params": raw, "dropout": raw}, ONES)
    y = module.apply(variables, ONES, rngs={"dropout": raw})
    assert_same(module.apply(variables, ONES, rngs={"dropout": raw}), y)
    other = module.apply(variables, ONES, rngs={"dropout": jax.random.PRNGKey(1)})
    assert not np.array_equal(other, y)


def test_keys_by_stream_give_the_numbers_of_init() -> None:
    class Draws(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            start = self.variable("calls_start", "noise", lambda: self._noise(x))
            return nn.Dense(2)(x + start.value)

        def _noise(self, x: Array) -> Array:
            return jax.random.normal(self.make_rng("noise"), x.shape)

    keys = {"params": jax.random.key(3), "noise": jax.random.key(4)}
    model = bridge.ToNNX(Draws(), rngs=keys).lazy_init(X)
    assert_same(_linen(model), Draws().init(keys, X))


def test_own_streams_differ_from_call_to_call() -> None:
    model = bridge.ToNNX(DROP, rngs=nnx.Rngs(dropout=0)).lazy_init(ONES)
    masks = {np.asarray(model(ONES)).tobytes() for _ in range(4)}
    assert len(masks) == 4


@RUNS
def test_reseed_repeats_the_calls_after_lazy_init(jit: bool) -> None:
    def call(model: Any) -> Array:
        return model(ONES)

    call = nnx.jit(call) if jit else call
    model = bridge.ToNNX(DenseDrop(), rngs=nnx.Rngs(0, dropout=0)).lazy_init(ONES)
    first, second = call(model), call(model)
    assert not np.array_equal(first, second)
    nnx.reseed(model, dropout=0)
    assert_same(call(model), first)
    assert_same(call(model), second)
    nnx.reseed(model, dropout=1)
    assert not np.array_equal(call(model), first)


def test_the_streams_of_the_caller_are_forked() -> None:
    rngs = nnx.Rngs(dropout=0)
    first = bridge.ToNNX(DROP, rngs=rngs)
    second = bridge.ToNNX(DROP, rngs=rngs)
    before = rngs.dropout.count[...]
    assert not np.array_equal(first(ONES), second(ONES))
    assert_same(rngs.dropout.count[...], before)


def test_keys_of_a_call_are_those_of_apply() -> None:
    model = bridge.ToNNX(DenseDrop(), rngs=nnx.Rngs(0, dropout=0)).lazy_init(ONES)
    variables, key = _linen(model), jax.random.key(5)

    def native(keys: Any) -> Array:
        return DenseDrop().apply(variables, ONES, rngs=keys)

    count = model.rngs.dropout.count[...]
    assert_same(model(ONES, rngs={"dropout": key}), native({"dropout": key}))
    assert_same(model(ONES, rngs=key), native(key))
    given = nnx.Rngs(dropout=7)
    drawn = nnx.Rngs(dropout=7).dropout()
    assert_same(model(ONES, rngs=given), native({"dropout": drawn}))
    assert int(given.dropout.count[...]) == 1
    assert_same(model.rngs.dropout.count[...], count)


def test_a_default_stream_stands_for_params_as_in_linen() -> None:
    model = bridge.ToNNX(DenseDrop(), rngs=nnx.Rngs(0)).lazy_init(ONES)
    key = nnx.clone(model).rngs.default()
    expected = DenseDrop().apply(_linen(model), ONES, rngs={"params": key})
    assert_same(model(ONES), expected)


# --------------------------------------------------------------------------------------
# streams of ToLinen


class TwoDrops(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array, deterministic: bool | None = None) -> tuple[Array, Array]:
        return (
            self.first(x, deterministic=deterministic),
            self.second(x, deterministic=deterministic),
        )


@pytest.fixture(name="drops", scope="module")
def _drops() -> tuple[Any, Any]:
    module = bridge.to_linen(TwoDrops)
    return module, module.init({"params": KEY, "dropout": jax.random.key(1)}, ONES)


@RUNS
def test_mutable_rng_counts_advance(drops: Any, jit: bool) -> None:
    module, variables = drops
    masks = set()
    for number in range(1, 4):
        y, updates = _run(lambda v: module.apply(v, ONES, mutable=["RngCount"]), variables, jit=jit)
        variables = {**variables, **updates}
        assert sorted(updates) == ["RngCount"]
        counts = jax.tree.leaves(nn.unbox(updates["RngCount"]))
        assert [int(count) for count in counts] == [number] * len(counts)
        masks.update(np.asarray(mask).tobytes() for mask in y)
    assert len(masks) == 6


def test_a_call_on_the_same_variables_repeats(drops: Any) -> None:
    module, variables = drops
    first, updates = module.apply(variables, ONES, mutable=["RngCount"])
    again, _ = module.apply(variables, ONES, mutable=["RngCount"])
    assert_same(again, first)
    later, _ = module.apply({**variables, **updates}, ONES, mutable=["RngCount"])
    assert not np.array_equal(later[0], first[0])


@RUNS
def test_keys_at_apply_go_before_the_stored_ones(drops: Any, jit: bool) -> None:
    module, variables = drops

    def call(variables: Any, key: Array) -> Any:
        return module.apply(variables, ONES, rngs={"dropout": key})

    key, other = jax.random.key(5), jax.random.key(6)
    y = _run(call, variables, key, jit=jit)
    assert_same(_run(call, variables, key, jit=jit), y)
    assert not np.array_equal(_run(call, variables, other, jit=jit)[0], y[0])
    assert not np.array_equal(y[0], y[1])
    _, updates = module.apply(variables, ONES, mutable=["RngCount"])
    assert_same(_run(call, {**variables, **updates}, key, jit=jit), y)


def test_keys_at_apply_leave_the_stored_streams_as_they_are(drops: Any) -> None:
    module, variables = drops
    _, updates = module.apply(
        variables, ONES, mutable=["RngCount"], rngs={"dropout": jax.random.key(5)}
    )
    after = {**variables, **updates}
    assert_same(nn.unbox(after["RngCount"]), nn.unbox(variables["RngCount"]))


def test_a_drawing_call_needs_a_counter_or_a_key(drops: Any) -> None:
    module, variables = drops
    with pytest.raises(EmitError, match="its counter cannot change"):
        module.apply(variables, ONES)
    with pytest.raises(EmitError, match="its counter cannot change"):
        module.apply(variables, ONES, mutable=["batch_stats"])
    with pytest.raises(EmitError, match="its counter cannot change"):
        jax.jit(module.apply)(variables, ONES)


def test_a_call_that_does_not_draw_needs_neither(drops: Any) -> None:
    module, variables = drops
    assert_same(module.apply(variables, ONES, deterministic=True), (ONES, ONES))


def test_dropout_in_a_linen_parent_takes_keys_at_apply() -> None:
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            own = nn.Dropout(0.5, deterministic=False)(x)
            return jnp.stack([own, *bridge.to_linen(TwoDrops)(x), *bridge.to_linen(TwoDrops)(x)])

    module = Parent()
    variables = module.init({"params": KEY, "dropout": KEY}, ONES)
    rngs = {"dropout": jax.random.key(5)}
    masks = module.apply(variables, ONES, rngs=rngs)
    assert len({np.asarray(mask).tobytes() for mask in masks}) == 5
    assert_same(module.apply(variables, ONES, rngs=rngs), masks)
    with pytest.raises((EmitError, errors.InvalidRngError)):
        module.apply(variables, ONES)


# --------------------------------------------------------------------------------------
# classes, instances, factories


class Trains(nnx.Module):
    made = 0

    def __init__(self, rngs: nnx.Rngs):
        type(self).made += 1
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.drop(self.norm(self.linear(x)))


MUTABLE = ["batch_stats", "RngCount"]


def test_the_constructor_runs_at_init_and_never_again() -> None:
    class Counted(Trains):
        made = 0

    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return bridge.to_linen(Counted, name="child")(x)

    for module in (bridge.to_linen(Counted), Parent(), nn.remat(Parent)()):
        Counted.made = 0
        variables = module.init({"params": KEY, "dropout": KEY}, X)
        assert Counted.made == 1
        keys = {"dropout": jax.random.key(1)}
        module.apply(variables, X, mutable=MUTABLE)
        module.apply(variables, X, mutable=True, rngs=keys)
        jax.jit(functools.partial(module.apply, mutable=MUTABLE))(variables, X)
        jax.eval_shape(functools.partial(module.apply, mutable=MUTABLE), variables, X)
        assert Counted.made == 1


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_live_module_gives_its_values(jit: bool) -> None:
    live = Trains(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(live))
    graphdef = nnx.graphdef(live)
    module = bridge.ToLinen(live)
    variables = _run(module.init, KEY, X, jit=jit)
    stored = nn.unbox(_forget(variables, "nnx"))
    assert_same(stored["params"], nnx.to_pure_dict(nnx.state(live, nnx.Param)))
    assert_same(stored["batch_stats"], nnx.to_pure_dict(nnx.state(live, nnx.BatchStat)))
    assert_same(stored["RngKey"], nnx.to_pure_dict(nnx.state(live, nnx.RngKey)))
    assert_same(stored["RngCount"], nnx.to_pure_dict(nnx.state(live, nnx.RngCount)))

    native = nnx.clone(live)

    def call(native: Any) -> Array:
        return native(X)

    for _ in range(2):
        y, updates = _run(lambda v: module.apply(v, X, mutable=MUTABLE), variables, jit=jit)
        assert_same(y, (nnx.jit(call) if jit else call)(native))
        variables = {**variables, **updates}
    assert_same(nnx.to_pure_dict(nnx.state(live)), before)
    assert nnx.graphdef(live) == graphdef


def test_a_live_module_works_inside_a_linen_parent() -> None:
    class Parent(nn.Module):
        child: Any

        @nn.compact
        def __call__(self, x: Array) -> Array:
            return self.child(nn.Dense(3, name="dense")(x))

    live = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    module = Parent(bridge.ToLinen(live))
    variables = module.init(KEY, X)
    assert_same(variables["params"]["child"]["kernel"].value, live.kernel[...])
    hidden = nn.Dense(3).apply({"params": variables["params"]["dense"]}, X)
    assert_same(module.apply(variables, X), live(hidden))


def _make(features: int, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Sequential(nnx.Linear(3, features, rngs=rngs), nnx.tanh)


@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(_make, 2),
        lambda rngs: _make(2, rngs),
        lambda: _make(2, nnx.Rngs(0)),
        lambda **kwargs: _make(2, **kwargs),
    ],
    ids=["partial", "lambda", "no-rngs", "keywords"],
)
def test_a_factory_makes_the_module(factory: Any) -> None:
    module = bridge.ToLinen(factory)
    variables = module.init(KEY, X)
    native = _make(2, nnx.Rngs(0))
    nnx.update(native, nn.unbox(variables["params"]))
    assert_same(module.apply(variables, X), native(X))


def test_a_factory_takes_arguments() -> None:
    module = bridge.to_linen(_make, 2)
    assert module.init(KEY, X)["params"]["layers"][0]["kernel"].value.shape == (3, 2)
    module = bridge.to_linen(_make, features=5)
    assert module.init(KEY, X)["params"]["layers"][0]["kernel"].value.shape == (3, 5)


# --------------------------------------------------------------------------------------
# inside flax's bridge.Module


class CompactModule(flax.nnx.bridge.Module):
    @flax.nnx.bridge.compact
    def __call__(self, x: Array) -> Array:
        self.dense = bridge.ToNNX(nn.Dense(2), rngs=self.scope.rngs)
        return self.dense(x)


class SetupModule(flax.nnx.bridge.Module):
    def setup(self) -> None:
        self.dense = bridge.ToNNX(nn.Dense(2), rngs=self.scope.rngs)
        self.norm = bridge.ToNNX(
            nn.BatchNorm(use_running_average=False, momentum=0.5), rngs=self.scope.rngs
        )

    def __call__(self, x: Array) -> Array:
        return self.norm(self.dense(x))


@RUNS
def test_to_nnx_works_in_a_compact_bridge_module(jit: bool) -> None:
    module = CompactModule()
    variables = module.init(KEY, X)
    params = variables["params"]["dense"]["params"]
    found = _run(lambda v: module.apply(v, X), variables, jit=jit)
    assert_same(found, _run(lambda p: nn.Dense(2).apply({"params": p}, X), params, jit=jit))


@RUNS
def test_to_nnx_works_in_a_bridge_module_with_setup(jit: bool) -> None:
    module = SetupModule()
    variables = module.init(KEY, X)

    def call(variables: Any) -> Any:
        return module.apply(variables, X, mutable=["batch_stats"])

    def native(variables: Any) -> Any:
        y = nn.Dense(2).apply({"params": variables["params"]["dense"]["params"]}, X)
        norm = {
            "params": variables["params"]["norm"]["params"],
            "batch_stats": variables["batch_stats"]["norm"]["batch_stats"],
        }
        return nn.BatchNorm(use_running_average=False, momentum=0.5).apply(
            norm, y, mutable=["batch_stats"]
        )

    y, updates = _run(call, variables, jit=jit)
    expected, expected_updates = _run(native, variables, jit=jit)
    assert_same(y, expected)
    assert_same(
        dict(updates["batch_stats"]["norm"]["batch_stats"]), expected_updates["batch_stats"]
    )


# --------------------------------------------------------------------------------------
# what NNX does with its modules


class Mixed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.linen = bridge.ToNNX(DenseBatch(), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linen(self.linear(x))


class DenseBatch(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(2, name="dense")(x)
        return nn.BatchNorm(use_running_average=False, momentum=0.5, name="norm")(x)


def _mixed() -> Mixed:
    return bridge.lazy_init(Mixed(nnx.Rngs(0)), X)


def test_split_and_merge() -> None:
    model = _mixed()
    graphdef, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    flat = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert flat == {
        "linear/kernel",
        "linear/bias",
        "linen/params/dense/kernel",
        "linen/params/dense/bias",
        "linen/params/norm/scale",
        "linen/params/norm/bias",
    }
    assert sorted(nnx.to_pure_dict(stats)["linen"]["batch_stats"]["norm"]) == ["mean", "var"]
    merged = nnx.merge(graphdef, params, stats, rest)
    assert_same(merged(X), model(X))
    assert_same(nnx.to_pure_dict(nnx.state(merged)), nnx.to_pure_dict(nnx.state(model)))


def test_a_clone_is_apart() -> None:
    model = _mixed()
    copy = nnx.clone(model)
    before = nnx.to_pure_dict(nnx.state(model))
    y = copy(X)
    assert_same(nnx.to_pure_dict(nnx.state(model)), before)
    assert_same(model(X), y)
    copy.linen.params["dense"]["kernel"][...] = jnp.zeros((3, 2))
    assert not np.array_equal(copy(X), model(X))


def test_abstract_state_can_be_filled() -> None:
    abstract = nnx.eval_shape(_mixed)
    assert abstract.linen.params["dense"]["kernel"].shape == (3, 2)
    graphdef, _ = nnx.split(abstract)
    model = _mixed()
    assert_same(nnx.merge(graphdef, nnx.state(model))(X), model(X))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_optimizers_train_it_as_the_native_model(jit: bool) -> None:
    class Native(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.dense = nnx.Linear(3, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, momentum=0.5, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.norm(self.dense(self.linear(x)))

    def flat(model: Any) -> Any:
        state = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        if "linen" in state:
            linen = state.pop("linen")
            stats = linen["batch_stats"]["norm"]
            state["dense"] = linen["params"]["dense"]
            state["norm"] = {**linen["params"]["norm"], **stats}
        return state

    def step(model: Any, optimizer: Any) -> Array:
        def loss(model: Any) -> Array:
            return jnp.sum(jnp.tanh(model(X)) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    model, native = _mixed(), Native(nnx.Rngs(0))
    nnx.update(native, flat(model))
    for _ in range(2):
        results = []
        for each in (model, native):
            optimizer = nnx.Optimizer(each, optax.adamw(0.1), wrt=nnx.Param)
            results.append((nnx.jit(step) if jit else step)(each, optimizer))
        assert_same(results[0], results[1])
        assert_same(flat(model), flat(native))


def test_one_variable_may_be_swapped() -> None:
    model = bridge.ToNNX(nn.Dense(2), rngs=KEY).lazy_init(X)
    y = model(X)
    model.params["kernel"][...] = model.params["kernel"] * 2
    model.params["bias"] = nnx.Param(jnp.ones(2))
    params = {"kernel": nn.Dense(2).init(KEY, X)["params"]["kernel"] * 2, "bias": jnp.ones(2)}
    assert_same(model(X), nn.Dense(2).apply({"params": params}, X))
    assert not np.array_equal(model(X), y)


def test_variables_stay_the_same_objects_from_call_to_call() -> None:
    model = _mixed()
    kernel, mean = model.linen.params["dense"]["kernel"], model.linen.batch_stats["norm"]["mean"]
    model(X)
    assert model.linen.params["dense"]["kernel"] is kernel
    assert model.linen.batch_stats["norm"]["mean"] is mean


def test_equal_to_linen_models_with_lambdas_compile_once() -> None:
    traced = []

    @jax.jit
    def call(variables: Any, x: Array) -> Array:
        traced.append(x)
        return _lambda_model().apply(variables, x)

    def _lambda_model() -> Any:
        return bridge.to_linen(
            lambda rngs: nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), lambda x: x * 2)
        )

    for seed in range(3):
        call(_lambda_model().init(jax.random.key(seed), X), X)
    assert len(traced) == 1


def test_a_model_compiles_once_over_many_steps() -> None:
    traced = []

    @nnx.jit
    def call(model: Any) -> Array:
        traced.append(model)
        return model(X)

    model = bridge.lazy_init(Mixed(nnx.Rngs(0)), X)
    for _ in range(3):
        call(model)
    assert len(traced) == 1


# --------------------------------------------------------------------------------------
# values


class Pair(NamedTuple):
    left: Any
    right: Any


class TreeValues(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        pair = self.variable("calls_trees", "pair", lambda: Pair(jnp.ones(3), jnp.zeros(3)))
        items = self.variable("calls_trees", "items", lambda: [jnp.ones(3), (jnp.ones(()),)])
        param = self.param("table", lambda key: {"a": jnp.ones(3), "b": {"c": jnp.ones(3)}})
        if not self.is_initializing():
            pair.value = Pair(pair.value.right, pair.value.left + 1)
        return x * param["a"] * param["b"]["c"] + pair.value.right + items.value[1][0]


@RUNS
def test_linen_variables_may_be_pytrees(jit: bool) -> None:
    module = TreeValues()
    model = _to_nnx(module, X)
    variables = module.init(KEY, X)

    def call(model: Any) -> Array:
        return model(X)

    def native(variables: Any) -> Any:
        return module.apply(variables, X, mutable=["calls_trees"])

    for _ in range(3):
        expected, updates = _run(native, variables, jit=jit)
        assert_same((nnx.jit(call) if jit else call)(model), expected)
        variables = {**variables, **updates}
        assert_same(_sown(model, "calls_trees"), variables["calls_trees"])


class TreeVariable(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        scale = jax.random.normal(rngs.params(), (3,))
        self.table = nnx.Param({"scale": scale, "shifts": (jnp.ones(3), jnp.zeros(3))})
        self.stats = nnx.BatchStat([jnp.zeros(())])

    def __call__(self, x: Array) -> Array:
        table = self.table.get_value()
        self.stats.set_value([self.stats.get_value()[0] + 1])
        return x * table["scale"] + table["shifts"][0]


@RUNS
def test_nnx_variables_may_be_pytrees(jit: bool) -> None:
    module = bridge.to_linen(TreeVariable)
    variables = module.init(KEY, X)
    table = nn.unbox(variables)["params"]["table"]
    assert sorted(table) == ["scale", "shifts"]

    def call(variables: Any) -> Any:
        return module.apply(variables, X, mutable=["batch_stats"])

    def native(table: Any) -> Array:
        return X * table["scale"] + table["shifts"][0]

    for number in (1.0, 2.0):
        y, updates = _run(call, variables, jit=jit)
        assert_same(y, _run(native, table, jit=jit))
        assert_same(nn.unbox(updates)["batch_stats"]["stats"], [jnp.float32(number)])
        variables = {**variables, **updates}


def test_empty_collections_stay() -> None:
    class Empty(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            self.put_variable("calls_empty", "nothing", {})
            return nn.Dense(2)(x)

    model = _to_nnx(Empty(), X)
    assert model.calls_empty["nothing"] == {}
    assert_same(
        model(X), Empty().apply(_forget(Empty().init(KEY, X), "calls_empty"), X, mutable=True)[0]
    )
    again = nnx.merge(*nnx.split(model))
    assert_same(again(X), model(X))


def test_a_module_without_variables_needs_none() -> None:
    model = bridge.ToNNX(nn.Dropout(0.5, deterministic=True)).lazy_init(X)
    assert_same(model(X), X)

    class Plain(nnx.Module):
        def __call__(self, x: Array) -> Array:
            return x * 2

    module = bridge.to_linen(Plain)
    variables = module.init(KEY, X)
    assert sorted(variables) == ["nnx"]
    assert_same(module.apply(variables, X), X * 2)


def test_frozen_variables_are_as_good() -> None:
    module = bridge.to_linen(Trains)
    variables = module.init({"params": KEY, "dropout": KEY}, X)
    frozen = core.freeze(variables)
    assert_same(
        module.apply(frozen, X, rngs={"dropout": KEY}, mutable=["batch_stats"])[0],
        module.apply(variables, X, rngs={"dropout": KEY}, mutable=["batch_stats"])[0],
    )
    linear = bridge.to_linen(nnx.Linear, 3, 2)
    variables = linear.init(KEY, X)
    assert_same(linear.apply(core.freeze(variables), X), linear.apply(variables, X))
    assert_same(jax.jit(linear.apply)(core.freeze(variables), X), linear.apply(variables, X))


def test_unboxed_variables_are_as_good() -> None:
    linear = bridge.to_linen(nnx.Linear, 3, 2)
    variables = linear.init(KEY, X)
    assert_same(linear.apply(nn.unbox(variables), X), linear.apply(variables, X))


def test_half_precision_variables_are_used_as_they_are() -> None:
    linear = bridge.to_linen(nnx.Linear, 3, 2)
    variables = linear.init(KEY, X)
    half = {
        **variables,
        "params": jax.tree.map(lambda a: a.astype("bfloat16"), variables["params"]),
    }
    native = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    nnx.update(native, nn.unbox(half["params"]))
    assert_same(linear.apply(half, X), native(X))


# --------------------------------------------------------------------------------------
# state that calls make and change


class SowsInLinen(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.List([bridge.ToNNX(SowsOnce(), rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        return self.inner[0](x)


class SowsOnce(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        self.sow("intermediates", "total", jnp.sum(x))
        return nn.Dense(2)(x)


@pytest.mark.parametrize("mutable", [["intermediates"], True], ids=["intermediates", "True"])
def test_sown_values_below_to_linen_do_not_grow(mutable: Any) -> None:
    module = bridge.to_linen(SowsInLinen)
    variables = module.init(KEY, X)
    assert "intermediates" not in variables
    for factor in (1.0, 2.0, 3.0):
        y, updates = module.apply(variables, factor * X, mutable=mutable)
        assert_same(jax.tree.leaves(updates["intermediates"]), [jnp.sum(factor * X)])
        params = nn.unbox(variables["params"])["inner"][0]["params"]["Dense_0"]
        assert_same(y, nn.Dense(2).apply({"params": params}, factor * X))
        variables = {**variables, **updates}


class MakesVariables(nnx.Module):
    def __init__(self, absent: bool, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        if not absent:
            self.kept = nnx.data(None)

    def start(self) -> None:
        self.kept = nnx.Cache(jnp.zeros(2))

    def __call__(self, x: Array) -> Array:
        self.kept[...] += 1
        return self.linear(x) + self.kept


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "none"])
@RUNS
def test_a_call_may_make_variables(absent: bool, jit: bool) -> None:
    module = bridge.to_linen(MakesVariables, absent)
    variables = module.init(KEY, method="start")
    assert sorted(variables) == ["nnx", "params"]
    _, updates = module.apply(variables, mutable=True, method="start")
    variables = {**variables, **updates}
    assert_same(nn.unbox(variables["cache"]), {"kept": jnp.zeros(2)})

    native = MakesVariables(absent, nnx.Rngs(0))
    native.start()
    nnx.update(native, nn.unbox(variables["params"]))

    def call(native: Any) -> Array:
        return native(X)

    for _ in range(2):
        y, updates = _run(lambda v: module.apply(v, X, mutable=["cache"]), variables, jit=jit)
        assert_same(y, (nnx.jit(call) if jit else call)(native))
        assert_same(nn.unbox(updates), {"cache": {"kept": native.kept[...]}})
        variables = {**variables, **updates}


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, 4, decode=True, rngs=rngs)

    def start(self, shape: tuple[int, ...]) -> None:
        self.attention.init_cache(shape)

    def __call__(self, x: Array) -> Array:
        return self.attention(x)


def test_nnx_attention_decodes_in_to_linen() -> None:
    x = _draw(1, 3, 4)
    module = bridge.to_linen(Attention)
    variables = module.init(KEY, x.shape, method="start")
    variables |= module.apply(variables, x.shape, mutable=True, method="start")[1]
    native = Attention(nnx.Rngs(0))
    nnx.update(native, nn.unbox(variables["params"]))
    native.start(x.shape)
    for step in range(2):
        y, updates = module.apply(variables, x[:, step : step + 1], mutable=["cache"])
        assert_same(y, native(x[:, step : step + 1]))
        variables = {**variables, **updates}


@RUNS
def test_linen_attention_decodes_in_to_nnx(jit: bool) -> None:
    x = _draw(1, 3, 4)
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, decode=True)
    model = _to_nnx(module, x)
    variables = module.init(KEY, x)

    def call(model: Any, x: Array) -> Array:
        return model(x)

    for step in range(2):
        one = x[:, step : step + 1]
        y, updates = _run(
            lambda v, x: module.apply(v, x, mutable=["cache"]), variables, one, jit=jit
        )
        assert_same((nnx.jit(call) if jit else call)(model, one), y)
        variables = {**variables, **updates}
        assert_same(_linen(model), variables)


def test_a_method_may_change_parameters_where_they_are_mutable() -> None:
    class Doubles(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.kernel = nnx.Param(jnp.ones(3))

        def double(self) -> None:
            self.kernel[...] = self.kernel * 2

    module = bridge.to_linen(Doubles)
    variables = module.init(KEY, method="double")
    assert_same(nn.unbox(variables["params"]), {"kernel": jnp.ones(3)})
    _, updates = module.apply(variables, mutable=["params"], method="double")
    assert_same(nn.unbox(updates), {"params": {"kernel": 2 * jnp.ones(3)}})
    assert type(updates["params"]["kernel"]) is type(variables["params"]["kernel"])


def test_perturbations_have_the_gradients_of_linen() -> None:
    class Perturbs(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return jnp.sum(self.perturb("hidden", nn.Dense(2)(x)) ** 2)

    module = Perturbs()
    model = _to_nnx(module, X)
    variables = module.init(KEY, X)

    def native(perturbations: Any) -> Array:
        return module.apply({**variables, "perturbations": perturbations}, X)

    def call(model: Any) -> Array:
        return model(X)

    grads = nnx.grad(call, argnums=nnx.DiffState(0, nnx.Perturbation))(model)
    expected = jax.grad(native)(variables["perturbations"])
    assert_same(nnx.to_pure_dict(grads), {"perturbations": expected})


def test_lazy_init_works_under_jit() -> None:
    @jax.jit
    def made(x: Array) -> Any:
        return nnx.split(bridge.ToNNX(DenseBatch(), rngs=KEY).lazy_init(x))

    model = nnx.merge(*made(X))
    expected = jax.jit(DenseBatch().init)(KEY, X)
    assert_same(_linen(model), expected)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = _to_nnx(nn.Dense(2), X)
    again = copy.deepcopy(model)
    assert_same(again(X), model(X))
    again.params["bias"][...] = jnp.ones(2)
    assert not np.array_equal(again(X), model(X))


def test_a_to_linen_is_hashed_by_what_it_is_made_of() -> None:
    first, second = bridge.to_linen(nnx.Linear, 3, 2), bridge.to_linen(nnx.Linear, 3, 2)
    assert first == second
    assert hash(first) == hash(second)
    assert first != bridge.to_linen(nnx.Linear, 3, 4)
    variables = first.init(KEY, X)
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def call(module: Any, variables: Any) -> Array:
        traced.append(module)
        return module.apply(variables, X)

    assert_same(call(first, variables), call(second, variables))
    assert len(traced) == 1


def test_functions_of_a_to_linen_can_be_initialized_and_applied() -> None:
    module = bridge.to_linen(nnx.Linear, 3, 2)

    def twice(module: Any, x: Array) -> Array:
        return module(x) * 2

    variables = nn.init(twice, module)(KEY, X)
    assert_same(nn.apply(twice, module)(variables, X), module.apply(variables, X) * 2)
    bound, of_bound = module.bind(variables).unbind()
    assert bound == module
    assert_same(bound.apply(of_bound, X), module.apply(variables, X))
