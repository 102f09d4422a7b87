"""The wrappers of `linsey.bridge`, called eagerly and traced, against the native modules.

The rival of `ToLinen` is the NNX module that it stands for, that of `ToNNX` is ``Module.apply`` of
the Linen module. A trace is that of a new function each time, so that jax finds nothing in a cache;
NNX modules are traced as people jit them: ``lambda state, x: nnx.merge(graphdef, state)(x)``.

Beside linsey's, against the same rival: `linsey.bridge.flax12`; flax's own bridge; and what one
would write without a bridge. For `ToNNX` that is `ByHand`, which shows what any NNX module costs
that holds the Variables: jax flattens its State, and ``nnx.merge``. For calls of `ToLinen` with
``rngs=`` it is ``nnx.reseed`` before the call of the NNX module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import harness
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge as flax_bridge

from linsey import bridge
from linsey.bridge import flax12

EAGER, TRACE = 1.3, 1.1
_FACES: Mapping[str, Any] = {"ours": bridge, "flax12": flax12, "flax's": flax_bridge}
_KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
_BATCH, _DEPTH = 8, 4


class Linear(nnx.Linear):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(width, width, rngs=rngs)


class MLP(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(_DEPTH)])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class Norm(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any, train: bool) -> Any:
        x = self.norm(self.linear(x), use_running_average=not train)
        return self.dropout(x, deterministic=not train)


class LinenMLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(_DEPTH):
            x = nn.relu(nn.Dense(self.width)(x))
        return x


class LinenNorm(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class ByHand(nnx.Module):
    """Linen variables in an NNX module, and no more than a call needs."""

    def __init__(self, module: nn.Module, variables: Mapping[str, Any], rngs: Any = None) -> None:
        self.module, self.rngs = module, rngs
        self.variables = nnx.data(
            {
                name: jax.tree.map(nnx.variable_type_from_name(name), tree)
                for name, tree in variables.items()
            }
        )

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        values = jax.tree.map(
            nnx.Variable.get_value, self.variables, is_leaf=lambda v: isinstance(v, nnx.Variable)
        )
        if self.rngs is None:
            return self.module.apply(values, x, **kwargs)
        keys = {name: stream() for name, stream in self.rngs.items()}
        y, updates = self.module.apply(values, x, rngs=keys, mutable=["batch_stats"], **kwargs)
        jax.tree.map(
            lambda variable, value: variable.set_value(value),
            self.variables["batch_stats"],
            updates["batch_stats"],
            is_leaf=lambda v: isinstance(v, nnx.Variable),
        )
        return y


class LinenOuter(nn.Module):
    layer: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for number in range(_DEPTH):
            x = nn.relu(self.layer().copy(name=f"layer_{number}")(x))
        return x


class NNXOuter(nnx.Module):
    def __init__(self, layer: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([layer(rngs) for _ in range(_DEPTH)])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


def _trace(fn: Callable[..., Any], *args: Any) -> Any:
    # A function of its own each time: jax would not trace the same one twice.
    return jax.jit(lambda *args: fn(*args)).trace(*args)


def _case(
    calls: Mapping[str, Callable[[], Any]],
    rival: Callable[[], Any],
    check: Callable[[], None],
    target: float | None,
) -> harness.Case:
    others = {name: call for name, call in calls.items() if name != "ours"}
    return harness.Case(ours=calls["ours"], rival=rival, check=check, target=target, others=others)


def _check(found: Mapping[str, Callable[[], Any]], expected: Callable[[], Any]) -> None:
    """Raises unless all calls give what the rival gives."""
    value = expected()
    for call in found.values():
        harness.assert_equal(call(), value)


def _fill(model: Any, variables: Mapping[str, Any]) -> None:
    """Gives an NNX module the values of Linen variables."""
    plain = nn.unbox(variables)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value: Any = plain[nnx.variable_name_from_type(type(variable))]
        for name in path:
            value = value[name]
        variable.set_value(value)


def _to_linen(
    make: Any,
    width: int,
    *,
    trace: bool = False,
    train: bool | None = None,
    with_rngs: bool = False,
) -> harness.Case:
    """Our `ToLinen` and others against the NNX module.

    Where ours is to draw from its stored streams, those that store none are given a key.
    """
    x = jnp.linspace(-1.0, 1.0, _BATCH * width).reshape(_BATCH, width)
    kwargs = {} if train is None else {"train": train}
    models, variables = {}, {}
    for name, face in _FACES.items():
        models[name] = face.to_linen(make, width)
        variables[name] = models[name].init(_KEYS, x, **kwargs)
    native = make(width, rngs=nnx.Rngs(0))
    _fill(native, variables["ours"])

    def apply(name: str, values: Any, x: Any, key: Any = _KEYS["dropout"]) -> Any:
        options: dict[str, Any] = {}
        is_stored = name == "ours" and not with_rngs
        if train:
            options["mutable"] = ["batch_stats", "RngCount"] if is_stored else ["batch_stats"]
            if not is_stored:
                options["rngs"] = {"dropout": key}
        return models[name].apply(values, x, **kwargs, **options)

    def eager(name: str) -> Callable[[], Any]:
        return lambda: apply(name, variables[name], x)

    calls = {name: eager(name) for name in _FACES}

    def check() -> None:
        expected = nnx.clone(native)(x, **kwargs)
        if not train:
            _check(calls, lambda: expected)
        elif not with_rngs:  # other keys make other masks
            harness.assert_equal(calls["ours"]()[0], expected)

    keys = [_KEYS["dropout"]] if with_rngs else []

    def reseeded(model: Any, x: Any, key: Any) -> Any:
        nnx.reseed(model, dropout=key)
        return model(x, **kwargs)

    if not trace:
        if with_rngs:
            calls["by hand"] = lambda: reseeded(native, x, *keys)
        return _case(calls, lambda: native(x, **kwargs), check, EAGER)
    graphdef, state = nnx.split(native)

    def call_native(state: Any, x: Any) -> Any:
        model = nnx.merge(graphdef, state)
        y = model(x, **kwargs)
        return (y, nnx.state(model)) if train else y

    def call_reseeded(state: Any, x: Any, key: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return reseeded(model, x, key), nnx.state(model)

    def traced(name: str) -> Callable[[], Any]:
        return lambda: _trace(
            lambda v, x, *keys: apply(name, v, x, *keys), variables[name], x, *keys
        )

    traces = {name: traced(name) for name in _FACES}
    if with_rngs:
        traces["by hand"] = lambda: _trace(call_reseeded, state, x, *keys)
    return _case(traces, lambda: _trace(call_native, state, x), check, TRACE)


def _to_nnx(
    module: nn.Module, width: int, *, trace: bool = False, train: bool | None = None
) -> harness.Case:
    """Our `ToNNX` and others against ``Module.apply``."""
    x = jnp.linspace(-1.0, 1.0, _BATCH * width).reshape(_BATCH, width)
    kwargs = {} if train is None else {"train": train}
    variables = module.init(_KEYS, x, **kwargs)
    models = {}
    for name, face in _FACES.items():
        streams = nnx.Rngs(dropout=1) if train else None
        models[name] = face.ToNNX(module, rngs=nnx.Rngs(params=0, dropout=1))
        face.lazy_init(models[name], x, **kwargs)
        attribute = "rngs" if name == "ours" else "to_nnx__rngs"
        setattr(models[name], attribute, streams)
        _fill_wrapper(models[name], variables, is_ours=name == "ours")

    models["by hand"] = ByHand(module, variables, nnx.Rngs(dropout=1) if train else None)

    def apply(values: Any, x: Any) -> Any:
        options: dict[str, Any] = {}
        if train:
            options = {"rngs": {"dropout": _KEYS["dropout"]}, "mutable": ["batch_stats"]}
        return module.apply(values, x, **kwargs, **options)

    def call(name: str, model: Any, x: Any) -> Any:
        options = {"mutable": ["batch_stats"]} if train and name == "flax's" else {}
        return model(x, **kwargs, **options)

    def eager(name: str) -> Callable[[], Any]:
        return lambda: call(name, models[name], x)

    calls = {name: eager(name) for name in models}

    def check() -> None:
        if not train:
            _check(calls, lambda: apply(variables, x))

    if not trace:
        return _case(calls, lambda: apply(variables, x), check, None)
    splits = {name: nnx.split(model) for name, model in models.items()}

    def call_split(name: str, state: Any, x: Any) -> Any:
        model = nnx.merge(splits[name][0], state)
        y = call(name, model, x)
        return (y, nnx.state(model)) if train else y

    def traced(name: str) -> Callable[[], Any]:
        return lambda: _trace(lambda s, x: call_split(name, s, x), splits[name][1], x)

    traces = {name: traced(name) for name in models}
    return _case(traces, lambda: _trace(apply, variables, x), check, TRACE)


def _fill_wrapper(model: Any, variables: Mapping[str, Any], *, is_ours: bool) -> None:
    for collection, tree in variables.items():
        for path, value in nnx.traversals.flatten_mapping(tree).items():
            place: Any = getattr(model, collection) if is_ours else model
            for name in path:
                place = place[name] if isinstance(place, Mapping) else getattr(place, name)
            place.set_value(value)


def _linen_parent(width: int, *, trace: bool) -> harness.Case:
    """A Linen net of `ToLinen`, against the same net of ``nn.Dense``."""
    x = jnp.linspace(-1.0, 1.0, _BATCH * width).reshape(_BATCH, width)
    native = LinenOuter(lambda: nn.Dense(width))
    values = native.init(_KEYS["params"], x)
    models, variables = {}, {}
    for name, face in _FACES.items():
        models[name] = LinenOuter(lambda face=face: face.to_linen(nnx.Linear, width, width))
        made = models[name].init(_KEYS["params"], x)
        boxes = {"params": made["params"]}
        flat = jax.tree.leaves(values)
        filled = jax.tree.unflatten(jax.tree.structure(nn.unbox(boxes)), flat)
        variables[name] = {**made, **nn.meta.replace_boxed(boxes, filled)}

    def apply(model: Any, values: Any) -> Callable[[], Any]:
        return lambda: model.apply(values, x)

    def traced(model: Any, values: Any) -> Callable[[], Any]:
        return lambda: _trace(lambda v, x: model.apply(v, x), values, x)

    eager = {name: apply(models[name], variables[name]) for name in _FACES}
    check = lambda: _check(eager, apply(native, values))  # noqa: E731
    if not trace:
        return _case(eager, apply(native, values), check, None)
    traces = {name: traced(models[name], variables[name]) for name in _FACES}
    return _case(traces, traced(native, values), check, TRACE)


def _nnx_parent(width: int, *, trace: bool) -> harness.Case:
    """An NNX net of `ToNNX`, against the same net of ``nnx.Linear``."""
    x = jnp.linspace(-1.0, 1.0, _BATCH * width).reshape(_BATCH, width)
    native = NNXOuter(lambda rngs: nnx.Linear(width, width, rngs=rngs), nnx.Rngs(0))
    models = {}
    for name, face in _FACES.items():
        wrap = lambda rngs, face=face: face.ToNNX(nn.Dense(width), rngs=rngs)  # noqa: E731
        models[name] = face.lazy_init(NNXOuter(wrap, nnx.Rngs(0)), x)
        for layer, source in zip(models[name].layers, native.layers, strict=True):
            # The weights needed a key once; from now on no stream is advanced at each call.
            setattr(layer, "rngs" if name == "ours" else "to_nnx__rngs", None)
            values = {"kernel": source.kernel.get_value(), "bias": source.bias.get_value()}
            _fill_wrapper(layer, {"params": values}, is_ours=name == "ours")
    models["by hand"] = NNXOuter(lambda _: None, nnx.Rngs(0))
    values = [{"kernel": each.kernel[...], "bias": each.bias[...]} for each in native.layers]
    dense = nn.Dense(width)
    models["by hand"].layers = nnx.List([ByHand(dense, {"params": held}) for held in values])

    def call(model: Any) -> Callable[[], Any]:
        return lambda: model(x)

    def traced(model: Any) -> Callable[[], Any]:
        graphdef, state = nnx.split(model)
        return lambda: _trace(lambda s, x: nnx.merge(graphdef, s)(x), state, x)

    eager = {name: call(model) for name, model in models.items()}
    check = lambda: _check(eager, call(native))  # noqa: E731
    if not trace:
        return _case(eager, call(native), check, None)
    traces = {name: traced(model) for name, model in models.items()}
    return _case(traces, traced(native), check, TRACE)


Make = Callable[[], harness.Case]


def _of_to_linen(width: int, *, trace: bool) -> dict[str, Make]:
    def case(make: Any, **options: Any) -> Make:
        return lambda: _to_linen(make, width, trace=trace, **options)

    return {
        f"Linear, {width}": case(Linear),
        f"MLP, {_DEPTH} layers, {width}": case(MLP),
        f"BatchNorm, Dropout, {width}, eval": case(Norm, train=False),
        f"BatchNorm, Dropout, {width}, train": case(Norm, train=True),
        f"BatchNorm, Dropout, {width}, train, rngs=": case(Norm, train=True, with_rngs=True),
    }


def _of_to_nnx(width: int, *, trace: bool) -> dict[str, Make]:
    def case(module: nn.Module, **options: Any) -> Make:
        return lambda: _to_nnx(module, width, trace=trace, **options)

    return {
        f"Dense, {width}": case(nn.Dense(width)),
        f"MLP, {_DEPTH} layers, {width}": case(LinenMLP(width)),
        f"BatchNorm, Dropout, {width}, eval": case(LinenNorm(width), train=False),
        f"BatchNorm, Dropout, {width}, train": case(LinenNorm(width), train=True),
    }


_PARENTS: dict[str, Callable[..., harness.Case]] = {
    f"Linen net of {_DEPTH} ToLinen": _linen_parent,
    f"NNX net of {_DEPTH} ToNNX": _nnx_parent,
}


def _of_parents(width: int, *, trace: bool) -> dict[str, Make]:
    def case(make: Callable[..., harness.Case]) -> Make:
        return lambda: make(width, trace=trace)

    return {f"{name}, {width}": case(make) for name, make in _PARENTS.items()}


TABLES: dict[str, dict[str, Make]] = {
    "Eager: ToLinen.apply against the NNX module": {
        **_of_to_linen(32, trace=False),
        **_of_to_linen(256, trace=False),
    },
    "Trace: ToLinen.apply against the NNX module": _of_to_linen(32, trace=True),
    "Trace: ToNNX against Module.apply": _of_to_nnx(32, trace=True),
    "Trace: inside a parent, against the same net of native layers": _of_parents(32, trace=True),
    "Eager: ToNNX against Module.apply": {
        **_of_to_nnx(32, trace=False),
        **_of_to_nnx(256, trace=False),
    },
    "Eager: inside a parent, against the same net of native layers": {
        **_of_parents(32, trace=False),
        **_of_parents(256, trace=False),
    },
}


@pytest.mark.parametrize(
    ("title", "name"), [(title, name) for title, cases in TABLES.items() for name in cases]
)
def bench_bridge(benchmark: Any, title: str, name: str) -> None:
    harness.under_pytest(benchmark, name, TABLES[title][name](), rounds=9)


if __name__ == "__main__":
    for title, cases in TABLES.items():
        harness.run(title, cases, rounds=21)
