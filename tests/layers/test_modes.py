"""What a layer is told where it is made, where it is called, or by an axis around it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx
from flax.errors import FlaxError
from layer_checks import check_eager, check_jitted, lowered, values_in
from layer_grid import ALIASES, IS_FULL, ROWS, Call, Plain, Point, call_of, operations, points, use

import linsey
from linsey.ir import EmitError

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


class Modes(nn.Module):
    """Says whether it is training in each of Linen's ways."""

    way: str
    train: bool | None = None

    @nn.compact
    def __call__(self, x: Any, train: bool | None = None) -> Any:
        train = nn.merge_param("train", self.train, train)
        if self.way == "construction":
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.5, deterministic=not train)(x)
            attention = nn.MultiHeadAttention(1, dropout_rate=0.5, deterministic=not train)
            return attention(x)
        x = nn.BatchNorm()(x, use_running_average=not train)
        x = nn.Dropout(0.5)(x, not train)
        return nn.MultiHeadAttention(1, dropout_rate=0.5)(x, deterministic=not train)


@pytest.mark.parametrize("lowered_in", [True, False])
@pytest.mark.parametrize("way", ["construction", "call"])
def test_a_model_is_called_in_both_modes(way: str, lowered_in: bool) -> None:
    module = Modes(way)
    variables = module.init(KEYS, X, train=lowered_in)
    model = linsey.to_nnx(module, X, train=lowered_in, rngs=KEYS, variables=variables)
    for train in (not lowered_in, lowered_in):
        expected, updates = module.apply(
            variables, X, train=train, rngs=KEYS, mutable=["batch_stats"]
        )
        variables = {**variables, **updates}
        assert_same(model(X, train=train, rngs=KEYS), expected)
        assert_same(values_in(model), variables)


class Stats(nn.Module):
    """Normalises by the statistics that it has just made."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = nn.BatchNorm(momentum=0.5)
        norm(x, use_running_average=False)
        return norm(2 * x, use_running_average=True)


def test_gradients_flow_through_new_statistics() -> None:
    variables = Stats().init(KEYS, X)
    program = linsey.lower(Stats(), X, variables=variables)
    graphdef, state = program.emit("nnx")

    def own(x: Any, state: Any) -> Any:
        return jnp.sin(nnx.merge(graphdef, jax.tree.map(jnp.copy, state))(x)).sum()

    def linen(x: Any, variables: Any) -> Any:
        return jnp.sin(Stats().apply(variables, x, mutable=["batch_stats"])[0]).sum()

    assert program.report().rows[1].became == "native"
    assert_same(jax.grad(own)(X, state), jax.grad(linen)(X, variables))


def test_statistics_that_were_cast_take_the_dtype_of_the_new_ones() -> None:
    variables = Stats().init(KEYS, X)
    model = linsey.to_nnx(Stats(), X, variables=variables)
    half = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
    nnx.update(model, half(nnx.state(model)))
    expected, updates = Stats().apply(half(variables), X, mutable=["batch_stats"])
    assert_same(model(X), expected)
    assert_same(
        model.BatchNorm_0.mean.get_raw_value(), updates["batch_stats"]["BatchNorm_0"]["mean"]
    )


@pytest.mark.parametrize(
    ("transform", "groups"),
    [("vmap", None), ("linen vmap", None), ("pmap", None), ("pmap", [[0]])],
)
def test_a_batch_norm_over_a_named_axis(transform: str, groups: Any) -> None:
    xs = X[None] if transform == "pmap" else np.stack([X, 2 * X])
    around = {"vmap": jax.vmap, "pmap": jax.pmap}.get(transform)
    module: Any
    if around is None:
        module = nn.vmap(
            Norm,
            variable_axes={"params": None, "batch_stats": None},
            axis_name="i",
            split_rngs={"params": False},
        )(groups)
        around, args = (lambda function, **_: function), xs
    else:
        module, args = Norm(groups), X
    variables = module.init(KEYS, args)
    program = linsey.lower(module, args, variables=variables)
    assert [row.became for row in program.report().rows] == ["hosted", "native"]
    graphdef, state = program.emit("nnx")

    def own(x: Any) -> Any:
        model = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
        out = model(x)
        return out, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def linen(x: Any) -> Any:
        return module.apply(variables, x, mutable=["batch_stats"])

    out, stats = around(own, axis_name="i")(xs)
    expected, updates = around(linen, axis_name="i")(xs)
    assert_same(out, expected)
    assert_same(stats, updates["batch_stats"])


class Norm(nn.Module):
    """A BatchNorm of an axis that the caller names."""

    groups: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.BatchNorm(False, axis_name="i", axis_index_groups=self.groups)(x)


@pytest.mark.parametrize("cls", ROWS, ids=lambda cls: cls.__name__)
def test_custom_initialisers_give_linens_values(cls: type[nn.Module]) -> None:
    point = points(cls, is_full=False)[0]
    inits = {name: counted for name in cls.__dataclass_fields__ if name.endswith("_init")}
    inits.pop("negative_slope_init", None)
    call = call_of(point, is_scanned=False)
    make = functools.partial(cls, **point.fields, **inits)
    module = Plain(make)
    program = linsey.lower(module, *call.init, rngs=call.init_keys, **call.kwargs)
    variables = module.init(call.init_keys, *call.init, **call.kwargs)
    found = program.init(call.init_keys)
    assert_same(found.emit("linen")[1], variables)
    assert_same(values_in(nnx.merge(*found.emit("nnx"))), variables)


def counted(key: Any, shape: Any, dtype: Any = jnp.float32, **options: Any) -> Any:
    """An initialiser whose values depend on all that it is told."""
    return jax.random.uniform(key, shape, dtype) + len(shape)


class Mixed(nn.Module):
    """A block of several dtypes, precisions and functions of the user's."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.Dense(8, dtype=jnp.bfloat16, param_dtype=jnp.float32, precision="highest")(x)
        y = nn.LayerNorm(dtype=jnp.float32, param_dtype=jnp.bfloat16)(y)
        y = nn.Dense(3, promote_dtype=widest, dot_general=scaled, param_dtype=jnp.float16)(y)
        y = nn.RMSNorm(dtype=jnp.bfloat16, force_float32_reductions=False)(x + y)
        return nn.Dense(2, dot_general_cls=lambda: scaled)(y)


def widest(*args: Any, dtype: Any = None, inexact: bool = True) -> Any:
    """A promotion to float32."""
    return [None if each is None else jnp.asarray(each, jnp.float32) for each in args]


def scaled(lhs: Any, rhs: Any, dimensions: Any, precision: Any = None) -> Any:
    """A dot_general that knows nothing that Linen does not pass."""
    return 3 * jax.lax.dot_general(lhs, rhs, dimensions, precision=precision)


def test_mixed_precision_is_exact_or_hosted() -> None:
    variables = Mixed().init(KEYS, X)
    call = Call(module=Mixed(), variables=variables, args=(X,), init=(X,), init_keys=KEYS)
    program = lowered(call)
    became = {row.path: (row.became, row.reason) for row in program.report().rows}
    assert [became[(name,)] for name in ("Dense_0", "LayerNorm_0", "Dense_1")] == [
        ("native", "")
    ] * 3
    assert became["RMSNorm_0",] == ("hosted", "force_float32_reductions=False has no counterpart")
    assert became["Dense_2",][0] == "hosted"
    assert "dot_general_cls" in became["Dense_2",][1]
    check_eager(call, program)
    check_jitted(call, program)


class Either(nn.Module):
    """Makes its layer in one of two ways."""

    first: Any
    second: Any

    @nn.compact
    def __call__(self, *args: Any, is_second: bool = False, **kwargs: Any) -> Any:
        make = self.second if is_second else self.first
        return use(make(name="layer"), args, kwargs)


def other_points(cls: type[nn.Module]) -> list[Point]:
    """The points that are called as the default is."""
    base, *rest = points(cls, is_full=IS_FULL)
    names = ("@shape", "@call", "@input")
    return [
        point
        for point in rest
        if all(point.settings[name] == base.settings[name] for name in names)
        and "axis_name" not in point.fields
        and (IS_FULL or point.label.startswith(("precision", "use_bias", "num_groups")))
    ]


CALLED_OTHERWISE = [
    (cls, point) for cls in ROWS if cls not in ALIASES for point in other_points(cls)
]


@pytest.mark.parametrize(
    ("cls", "point"), CALLED_OTHERWISE, ids=[f"{c.__name__}-{p.label}" for c, p in CALLED_OTHERWISE]
)
def test_a_layer_that_is_made_otherwise_later(cls: type[nn.Module], point: Point) -> None:
    base = points(cls, is_full=False)[0]
    call = call_of(base, is_scanned=False)
    module = Either(*(functools.partial(cls, **each.fields) for each in (base, point)))
    variables = {
        kind: {"layer": tree[f"{cls.__name__}_0"]} for kind, tree in call.variables.items()
    }
    program = linsey.lower(
        module, *call.init, rngs=call.init_keys, variables=variables, **call.kwargs
    )
    assert program.report().rows[1].became == "native"
    graphdef, state = program.emit("nnx")
    kwargs = {**call.kwargs, "is_second": True}

    def linen(variables: Any, args: Any) -> Any:
        return module.apply(variables, *args, rngs=call.keys, mutable=call.mutable, **kwargs)

    def own(state: Any, args: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return model(*args, rngs=call.keys, **kwargs), nnx.state(model)

    try:
        expected = operations(jax.make_jaxpr(linen)(variables, call.args))
    except Exception:  # it asks for other variables
        with pytest.raises((EmitError, FlaxError, ValueError, TypeError)):
            jax.make_jaxpr(own)(state, call.args)
        return
    try:
        found = operations(jax.make_jaxpr(own)(state, call.args))
    except EmitError as error:
        refused = str(error)
    else:
        refused = ""
        assert found == expected
    assert not refused or "with other fields than when it was lowered" in refused
