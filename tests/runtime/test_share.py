"""Layers of equal structure, traced once: the same numbers, in fewer traces."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import linsey
from linsey import plugins
from linsey.backends._record import SharedCalls

X = jax.random.normal(jax.random.key(7), (2, 3, 4))
KEYS = {"params": 0, "dropout": 1}


def lowered(source: Any, *args: Any, **kwargs: Any) -> linsey.Program:
    program = linsey.lower(source, *args, **kwargs)
    return program if program.values is not None else program.init(KEYS)


def calls(
    program: linsey.Program,
    *args: Any,
    rngs: Any = None,
    mutable: Any = None,
    method: Any = None,
    grad: bool = True,
    **kwargs: Any,
) -> SharedCalls:
    """Compares a call and its gradient with and without shared traces, bit for bit."""
    dialect = program.graph.nodes[program.graph.root].source.dialect  # type: ignore[union-attr]
    backend = plugins.load("linsey.backends", dialect)
    keys = None if rngs is None else {name: jax.random.key(seed) for name, seed in rngs.items()}
    results = []
    for share in (False, True):
        runner = backend.runner(program.graph)
        runner.share_traces = share

        @jax.jit  # as an executable calls it
        def run(arrays: Any, keys: Any, dynamic: Any, runner: Any = runner) -> Any:
            inputs = iter(dynamic)
            given = [next(inputs) if isinstance(arg, jax.Array) else arg for arg in args]
            called = runner(arrays, tuple(given), kwargs, method=method, rngs=keys, mutable=mutable)
            changed = {
                slot: new
                for slot, (old, new) in enumerate(zip(arrays, called.arrays, strict=True))
                if new is not old
            }
            return called.output, changed, called.extra

        def loss(weights: Any, dynamic: Any, arrays: Any, keys: Any, run: Any = run) -> Any:
            arrays = [weights.get(slot, value) for slot, value in enumerate(arrays)]
            found = run(arrays, keys, dynamic)
            leaves = [leaf for leaf in jax.tree.leaves(found[0]) if leaf.dtype == jnp.float32]
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves), found

        assert program.values is not None
        arrays = program.values.arrays
        dynamic = [arg for arg in args if isinstance(arg, jax.Array)]
        if grad:
            weights = {n: a for n, a in enumerate(arrays) if a.dtype == jnp.float32}
            by = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
            results.append(by(weights, dynamic, arrays, keys))
        else:
            results.append(run(arrays, keys, dynamic))
        shared = runner.shared
    left, right = (jax.tree.flatten(found) for found in results)
    assert left[1] == right[1]
    for a, b in zip(left[0], right[0], strict=True):
        assert a.dtype == b.dtype
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(np.asarray(data(a)), np.asarray(data(b)))
    return shared


def data(array: Any) -> Any:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


# Linen


class Block(nn.Module):
    heads: int = 2
    rate: float = 0.5

    @nn.compact
    def __call__(self, x: Any, mask: Any = None, train: bool = False) -> Any:
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            self.heads, dropout_rate=self.rate, deterministic=not train
        )(y, y, mask=mask)
        x = x + nn.Dropout(self.rate, deterministic=not train)(y)
        y = nn.BatchNorm(use_running_average=not train)(x)
        y = nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(8)(y)))
        return x + nn.Dropout(self.rate, deterministic=not train)(y)


class Small(nn.Module):
    """What a block has, but for the attention, which takes XLA long to compile."""

    @nn.compact
    def __call__(self, x: Any, mask: Any = None, train: bool = False) -> Any:
        y = nn.BatchNorm(use_running_average=not train)(x)
        y = nn.Dense(x.shape[-1])(y)
        return x + nn.Dropout(0.5, deterministic=not train)(y)


class Stack(nn.Module):
    depth: int = 3
    block: Any = Block

    @nn.compact
    def __call__(self, x: Any, **kwargs: Any) -> Any:
        for _ in range(self.depth):
            x = self.block()(x, **kwargs)
        return nn.Dense(2)(x)


def test_linen_blocks_with_dropout_and_batch_norm_are_traced_once() -> None:
    program = lowered(Stack(), X, train=True)
    assert calls(program, X) == SharedCalls(calls=3, traces=1, inlined=0)
    found = calls(program, X, train=True, rngs={"dropout": 3})
    assert found == SharedCalls(calls=3, traces=1, inlined=0)
    assert calls(lowered(nn.Sequential([nn.Dense(4), nn.Dense(3)]), X), X) == SharedCalls()


class SetupStack(nn.Module):
    def setup(self) -> None:
        self.layers = [Small() for _ in range(3)]
        self.heads = {"a": nn.Dense(4), "b": nn.Dense(4)}

    def encode(self, x: Any, train: bool = False) -> Any:
        for layer in self.layers:
            x = layer(x, train=train)
        return x

    def __call__(self, x: Any, train: bool = False) -> Any:
        x = self.encode(x, train=train)
        return {name: head(x) for name, head in self.heads.items()}


def test_blocks_made_in_setup() -> None:
    program = lowered(SetupStack(), X, train=True)
    assert calls(program, X, train=True, rngs={"dropout": 3}).calls == 5
    assert calls(program, X, method="encode").calls == 3


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        blocks = [Small(), Small()]
        for block in (*blocks, *blocks):
            x = block(x, train=True)
        return x


def test_blocks_that_are_called_twice_draw_on() -> None:
    found = calls(lowered(Twice(), X), X, rngs={"dropout": 3})
    assert found.calls == 4
    assert found.traces == 2  # the counters of a second call are others


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = self.perturb("p", nn.Dense(4)(x))
        self.sow("intermediates", "x", x)
        count = self.variable("counts", "n", lambda: jnp.zeros((), jnp.int32))
        if self.is_mutable_collection("counts"):
            count.value += 1
        return x


def test_state_that_blocks_make() -> None:
    program = lowered(Stack(block=Sowing), X)
    assert calls(program, X).calls == 3
    assert calls(program, X, mutable=["intermediates"]).calls == 3
    assert calls(program, X, mutable=True).calls == 3
    assert calls(program, X, mutable=nn.DenyList("counts")).calls == 3
    assert calls(program, X, mutable=False).calls == 3


class Decoding(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + nn.MultiHeadDotProductAttention(2, decode=True)(x)


def test_a_cache() -> None:
    program = lowered(Stack(block=Decoding), X)
    assert calls(program, X[:, :1], mutable=["cache"]).calls == 3


class Named(nn.Module):
    reads: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        what = {
            "name": lambda: self.name,
            "path": lambda: "/".join(self.path),
            "scope": lambda: "/".join(self.scope.path),  # type: ignore[union-attr]
            "parent": lambda: str(self.parent.depth),  # type: ignore[union-attr]
            "child": lambda: "/".join(nn.Dense(1, name="other").path),
        }[self.reads]()
        return nn.Dense(4)(x) * (1 + hash(what) % 7)


@pytest.mark.parametrize("reads", ["name", "path", "scope", "parent", "child"])
def test_a_block_that_asks_where_it_stands_is_not_shared(reads: str) -> None:
    program = lowered(Stack(block=lambda: Named(reads)), X)
    assert calls(program, X).calls == 0


class Holding(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(4)(self.inner(x))


class Passing(nn.Module):
    own: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        dense = nn.Dense(4, name="one")
        for _ in range(3):
            x = Holding(nn.Dense(4, parent=None) if self.own else dense)(x)
        return x


def test_modules_as_hyper_parameters() -> None:
    assert calls(lowered(Passing(True), X), X).calls == 3
    program = lowered(Passing(False), X)
    assert calls(program, X).calls == 0


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            x = nn.remat(Small, static_argnums=(3,))()(x, None, True)
        return x


def test_blocks_inside_remat() -> None:
    found = calls(lowered(Remat(), X), X, rngs={"dropout": 3})
    assert found.traces < found.calls


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return Small()(Small()(x, train=True), train=True), None


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        axes = {"params": 0, "batch_stats": 0}
        rngs = {"params": True, "dropout": True}
        x, _ = nn.scan(Pair, variable_axes=axes, split_rngs=rngs, length=3)()(x, None)
        many = nn.vmap(Pair, variable_axes=axes, split_rngs=rngs, in_axes=(None, None), axis_size=2)
        return many()(x, None)[0]


def test_blocks_inside_scan_and_vmap() -> None:
    calls(lowered(Lifted(), X), X, rngs={"dropout": 3})


class Inside(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Lifted()(x)[0]


def test_transforms_inside_blocks() -> None:
    program = lowered(Stack(depth=2, block=Inside), X)
    assert calls(program, X, rngs={"dropout": 3}) == SharedCalls(calls=2, traces=1)


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return bridge.to_linen(nnx.Linear, 4, 4)(x)


def test_blocks_of_both_dialects_are_not_shared() -> None:
    assert calls(lowered(Stack(block=Mixed), X), X).calls == 0


class Arguments(nn.Module):
    @nn.compact
    def __call__(self, x: Any, kind: str, extra: Any, *, scale: Any, which: Any) -> Any:
        x = nn.Dense(4)(x) * scale
        if which.any():  # a numpy array stays one
            x = x * np.float32(which.mean() / 3)
        return {"x": x + extra["y"][0], "same": extra, "kind": kind, "none": None}


class Calling(nn.Module):
    each: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        extra = {"y": (x, None)}
        for number in range(3):
            which = np.arange(3) + (number if self.each else 0)
            out = Arguments()(x, "kind", extra, scale=0.5, which=which)
            assert out["same"]["y"][0] is extra["y"][0]
            assert out["kind"] == "kind"
            x = out["x"]
        return x


def test_arguments_of_any_kind() -> None:
    found = calls(lowered(Calling(), X), X)
    assert (found.calls, found.traces) == (3, 2)  # in the first call, two arguments are one array
    found = calls(lowered(Calling(each=True), X), X)
    assert (found.calls, found.traces, found.inlined) == (3, 3, 3)


class Skips(nn.Module):
    """An encoder whose output each block uses twice, and skip connections."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        memory, kept = nn.Dense(4)(x), []
        for _ in range(4):
            y = nn.MultiHeadDotProductAttention(2)(x, memory)
            kept.append(x)
            x = Small()(x + y)
        return [*kept, x + memory]


def test_gradients_are_added_up_in_the_same_order() -> None:
    found = calls(lowered(Skips(), X), X)
    assert found.calls == 8
    assert found.inlined > 0


class Other(Small):
    """Calls what it inherits."""

    @nn.compact
    def __call__(self, x: Any, mask: Any = None, train: bool = False) -> Any:
        return super().__call__(x, mask, train) * 2


def test_inherited_calls() -> None:
    assert calls(lowered(Stack(block=Other), X), X).calls == 3


def test_interceptors_see_every_call() -> None:
    program = lowered(Stack(), X)
    seen: list[str] = []

    def see(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.append(type(context.module).__name__)
        return run(*args, **kwargs)

    with nn.intercept_methods(see):
        assert calls(program, X, grad=False).calls == 0
    assert seen.count("Block") == 6


class Failing(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.Dense(4)(x)
        raise KeyError("mine")
        return y


def test_errors_are_those_of_the_source() -> None:
    program = lowered(Stack(), X, train=True)
    backend = plugins.load("linsey.backends", "linen")
    runner = backend.runner(program.graph)
    runner.share_traces = True
    assert program.values is not None
    with pytest.raises(linsey.LinseyError, match="a PRNG stream is missing"):
        runner(program.values.arrays, (X,), {"train": True}, method=None, rngs=None, mutable=None)


# NNX


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any, mask: Any = None) -> Any:
        x = x + self.dropout(self.attention(self.norm(x), mask=mask))
        return x + self.dense(x)


class SmallLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.dense(self.dropout(self.norm(x)))


class Layers(nnx.Module):
    def __init__(self, make: Any, rngs: nnx.Rngs, depth: int = 3) -> None:
        self.layers = nnx.List([make(rngs) for _ in range(depth)])
        self.named = nnx.Dict({"a": make(rngs), "b": make(rngs)})
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for layer in [*self.layers, *self.named.values()]:
            x = layer(x)
        return self.head(x)


def test_nnx_layers_are_traced_once() -> None:
    model = Layers(Layer, nnx.Rngs(0), depth=1)
    assert calls(lowered(model), X) == SharedCalls(calls=3, traces=1, inlined=0)
    program = lowered(Layers(SmallLayer, nnx.Rngs(0)))
    assert calls(program, X, rngs={"dropout": 5}).calls == 5
    assert calls(program, X, mutable=["batch_stats"]).calls == 5
    model.eval()
    assert calls(lowered(model), X).calls == 3


class Streaming(nnx.Module):
    """Draws from a stream that all layers share."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rngs = rngs
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dense(x) + jax.random.normal(self.rngs.noise(), x.shape)


def test_a_stream_that_all_layers_share() -> None:
    program = lowered(Layers(Streaming, nnx.Rngs(0, noise=1)))
    assert calls(program, X).calls == 5


def test_a_layer_that_is_called_twice() -> None:
    program = lowered(Layers(SmallLayer, nnx.Rngs(0)))
    found = calls(program, X, method=lambda model, x: model(jnp.tile(model(x), 2)))
    assert (found.calls, found.traces) == (10, 1)


def test_tied_variables() -> None:
    model = Layers(SmallLayer, nnx.Rngs(0))
    for layer in model.layers:
        layer.dense.kernel = model.named["a"].dense.kernel
        layer.norm = model.layers[0].norm
    assert calls(lowered(model), X).calls == 5


class Growing(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.dense(x)
        self.seen = nnx.Intermediate(x)
        return x


def test_a_layer_that_grows_is_not_shared() -> None:
    assert calls(lowered(Layers(Growing, nnx.Rngs(0))), X).calls == 0


def test_layers_that_the_call_changes_are_not_shared() -> None:
    def change(model: Any, x: Any) -> Any:
        model.layers[0].dropout.deterministic = True
        y = model(x)
        model.layers[0].dropout.deterministic = False
        return y

    program = lowered(Layers(SmallLayer, nnx.Rngs(0)))
    assert calls(program, X, method=change).calls == 4


class Inherited(SmallLayer):
    def __call__(self, x: Any) -> Any:
        return super().__call__(x) * 2


def test_classes_are_left_as_they_were() -> None:
    assert calls(lowered(Layers(Inherited, nnx.Rngs(0))), X).calls == 5
    before = vars(SmallLayer)["__call__"]

    class Plain(SmallLayer):
        pass

    others = []

    class Watching(SmallLayer):
        def __call__(self, x: Any) -> Any:
            thread = threading.Thread(target=lambda: others.append(SmallLayer(nnx.Rngs(0))(X)))
            thread.start()
            thread.join()
            return super().__call__(x)

    assert calls(lowered(Layers(Plain, nnx.Rngs(0))), X).calls == 5
    assert calls(lowered(Layers(Watching, nnx.Rngs(0))), X, grad=False).calls == 5
    assert "__call__" not in vars(Plain)
    assert vars(SmallLayer)["__call__"] is before
    assert others


class Pairs(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.vmap(in_axes=0)
        def make(rngs: nnx.Rngs) -> SmallLayer:
            return SmallLayer(rngs)

        self.stack = make(rngs.split(2) if hasattr(rngs, "split") else rngs.fork(split=2))
        self.layers = nnx.List([SmallLayer(rngs), SmallLayer(rngs)])

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: Any, layer: Any) -> Any:
            return layer(x)

        x = run(x, self.stack)
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return self.layers[0](self.layers[1](x))


def test_transforms_of_nnx() -> None:
    program = lowered(Pairs(nnx.Rngs(0)))
    assert calls(program, X).calls == 2


class Wrapping(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = bridge.lazy_init(bridge.ToNNX(nn.Dense(4), rngs=rngs), X)

    def __call__(self, x: Any) -> Any:
        return self.dense(x)


def test_linen_inside_nnx_layers() -> None:
    calls(lowered(Layers(Wrapping, nnx.Rngs(0))), X)


class Asking(nnx.Module):
    """Its layers take one another, a function, and give what is no array."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Taking(rngs) for _ in range(3)])

    def __call__(self, x: Any) -> Any:
        x, name = self.layers[0](x, jnp.sin, None)
        assert name == "taking"
        x, _ = self.layers[1](x, jnp.sin, None)
        scale = x.mean()
        x, _ = self.layers[2](x, lambda y: y * scale, None)
        return self.layers[0](x, jnp.sin, self.layers[1])[0]


class Taking(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any, function: Any, other: Any) -> Any:
        x = function(self.dense(x))
        return (x if other is None else other.dense(x)), "taking"


def test_arguments_that_are_modules_and_functions() -> None:
    found = calls(lowered(Asking(nnx.Rngs(0))), X)
    assert (found.calls, found.traces, found.inlined) == (3, 2, 1)


class Ruled(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for rules in ((("b", None),), (("b", "other"),), (("b", None),)):
            with nn.logical_axis_rules(rules):
                x = Asked()(x)
        return x


class Asked(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        mapped = nn.logical_to_mesh_axes(("b",))[0]
        return nn.Dense(4)(x) * (1 if mapped is None else 2)


def test_axis_rules_belong_to_a_trace() -> None:
    found = calls(lowered(Ruled(), X), X)
    assert (found.calls, found.traces) == (3, 2)


@pytest.mark.mesh
@pytest.mark.parametrize("dialect", ["linen", "nnx"])
def test_shared_layers_on_a_mesh(dialect: str) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    program = lowered(Stack(), X) if dialect == "linen" else lowered(Layers(Layer, nnx.Rngs(0)))
    assert program.values is not None
    arrays = tuple(
        jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.P(*("model",) * last)))
        for array in program.values.arrays
        for last in [int(array.ndim > 1 and array.shape[0] % 4 == 0)]
    )
    x = jax.device_put(X, jax.sharding.NamedSharding(mesh, jax.P("data")))
    backend = plugins.load("linsey.backends", dialect)
    found = []
    for share in (False, True):
        runner = backend.runner(program.graph)
        runner.share_traces = share

        def loss(x: Any, arrays: Any, runner: Any = runner) -> Any:
            called = runner(arrays, (x,), {}, method=None, rngs=None, mutable=None)
            return jnp.sum(jnp.sin(called.output)), called.output

        compiled = jax.jit(jax.grad(jax.jit(loss), has_aux=True)).lower(x, arrays).compile()
        words = ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute(")
        found.append((compiled(x, arrays), [compiled.as_text().count(word) for word in words]))
    assert runner.shared.calls > 0
    assert found[0][1] == found[1][1]
    for a, b in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0]), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dialect", ["linen", "nnx"])
def test_nothing_of_a_trace_stays(dialect: str) -> None:
    program = lowered(Stack(), X) if dialect == "linen" else lowered(Layers(Layer, nnx.Rngs(0)))
    with jax.checking_leaks():
        assert calls(program, X, grad=False).traces == 1


def test_sharing_is_off_unless_asked_for() -> None:
    program = lowered(Layers(Layer, nnx.Rngs(0)))
    runner = plugins.load("linsey.backends", "nnx").runner(program.graph)
    assert runner.share_traces is False
    assert program.values is not None
    runner(program.values.arrays, (X,), {}, method=None, rngs=None, mutable=None)
    assert runner.shared == SharedCalls()
