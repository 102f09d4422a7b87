"""A zoo of trees that mix Linen and NNX through `flax.nnx.bridge`: test data for round trips.

Nothing here imports linsey. A case with `api == "linen"` is used like a `LinenCase`::

    module = case.make()
    variables = module.init(case.keys(case.init_rngs), *case.args, **case.kwargs)
    module.apply(variables, *case.args, rngs=case.keys(case.call_rngs),
                 mutable=case.mutable, **case.kwargs)

and one with `api == "nnx"` like this::

    model = case.make()
    nnx.bridge.lazy_init(model, *case.args, **case.kwargs)
    model(*case.args, **case.kwargs)

Where `flax_runs` is False, flax itself fails (or loses values) at one of these steps.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from flax.nnx.bridge import wrappers

Array = jax.Array


# --------------------------------------------------------------------------------------
# the table's entries


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCall:
    """One call of another method of the initialised object."""

    method: str
    """The method's name."""
    args: tuple[Any, ...] = ()
    """Positional inputs."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedCase:
    """A mixed tree with what is needed to initialise and to call it."""

    name: str
    """Unique, usable as a pytest id."""
    api: Literal["linen", "nnx"]
    """The dialect of the root."""
    build: Callable[..., Any]
    """`build()` makes a Linen module, `build(rngs)` an NNX module that is not yet initialised."""
    args: tuple[Any, ...]
    """Positional inputs of the call and of the initialisation."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword inputs of the call and of the initialisation."""
    init_rngs: Mapping[str, int] = field(default_factory=lambda: {"params": 0})
    """Seeds of the streams that `init` (or the `nnx.Rngs` that `build`) is given."""
    call_rngs: Mapping[str, int] | None = None
    """Linen: seeds of the streams that the call is given."""
    mutable: tuple[str, ...] | bool = False
    """Linen: the collections that the call changes (or makes), or False."""
    changes: tuple[type[nnx.Variable[Any]], ...] = ()
    """NNX: the Variable types of which the call changes (or adds) some value."""
    methods: tuple[MethodCall, ...] = ()
    """Other methods to call."""
    eager_sharding: bool = True
    """False: run flax under `nnx.use_eager_sharding(False)`, as there is no mesh."""
    flax_runs: bool = True
    """False: flax itself cannot run the case; a comment says what happens."""
    jittable: bool = True
    """False: flax runs the case, but not under `jit`; a comment says why."""
    importable: bool = True
    """False: a lambda, a closure or a local class is part of the tree, so it cannot be saved."""
    warns: str | None = None
    """A pattern that matches the warning which running the case raises, or None."""
    depth: int = 2
    """How many times the dialect changes on the way down, plus one."""

    def make(self) -> Any:
        """Build the root: a Linen module, or an NNX module that is not yet initialised."""
        return self.build() if self.api == "linen" else self.build(nnx.Rngs(**self.init_rngs))

    def keys(self, seeds: Mapping[str, int] | None) -> dict[str, Array] | None:
        """Make keys for `seeds`."""
        if seeds is None:
            return None
        return {name: jax.random.key(seed) for name, seed in seeds.items()}


def _x(*shape: int, seed: int = 0) -> np.ndarray:
    """Draw a deterministic normal float32 array of `shape`."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


# --------------------------------------------------------------------------------------
# Linen parts


class LinenMLP(nn.Module):
    """Two compact layers."""

    hidden: int = 5
    features: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.features)(nn.relu(nn.Dense(self.hidden)(x)))


class LinenCodec(nn.Module):
    """A setup module with several methods."""

    def setup(self) -> None:
        self.encoder = nn.Dense(2)
        self.decoder = nn.Dense(4)

    def encode(self, x: Array) -> Array:
        return jnp.tanh(self.encoder(x))

    def decode(self, z: Array) -> Array:
        return self.decoder(z)

    def __call__(self, x: Array) -> Array:
        return self.decode(self.encode(x))


class LinenBlock(nn.Module):
    """Batch norm in train mode and dropout."""

    features: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(self.features)(x))
        return nn.Dropout(0.5, deterministic=False)(x)


class LinenCounter(nn.Module):
    """A custom collection."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        count = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        if not self.is_initializing() and self.is_mutable_collection("counts"):
            count.value += 1
        return x * scale + count.value


class LinenSameName(nn.Module):
    """One name in two collections."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))
        ema = self.variable("ema", "kernel", lambda: kernel)
        return x @ (kernel + ema.value)


class LinenPartitioned(nn.Module):
    """`nn.with_partitioning` and `nn.with_logical_partitioning`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.lecun_normal()
        x = nn.Dense(4, kernel_init=nn.with_partitioning(init, (None, "model")))(x)
        return nn.Dense(3, kernel_init=nn.with_logical_partitioning(init, ("mlp", "embed")))(x)


class LinenScanBody(nn.Module):
    """A scan body."""

    @nn.compact
    def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
        return jnp.tanh(nn.Dense(x.shape[-1])(x)), None


class LinenScan(nn.Module):
    """Scanned layers."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scan = nn.scan(
            LinenScanBody, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan(name="layers")(x, None)[0]


class LinenSow(nn.Module):
    """Sows its output."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.Dense(3)(x)
        self.sow("intermediates", "hidden", y)
        return y


class LinenClash(nn.Module):
    """Children named like ToNNX's own attributes."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for name in self.names:
            x = nn.Dense(4, name=name)(x)
        return x


class LinenOwnCall(nn.Module):
    """Takes keyword inputs and a static flag."""

    @nn.compact
    def __call__(self, x: Array, *, scale: float, negate: bool = False) -> Array:
        return scale * nn.Dense(3)(-x if negate else x)


class LinenWithoutVariables(nn.Module):
    """No variables."""

    def __call__(self, x: Array) -> Array:
        return jnp.tanh(x)


# --------------------------------------------------------------------------------------
# NNX parts


class NNXMLP(nnx.Module):
    """Two layers."""

    def __init__(self, din: int, hidden: int, dout: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(din, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dout, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(nnx.relu(self.up(x)))

    def half(self, x: Array) -> Array:
        return self.up(x)


class NNXBlock(nnx.Module):
    """Batch norm and dropout."""

    def __init__(self, din: int, dout: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(din, dout, rngs=rngs)
        self.norm = nnx.BatchNorm(dout, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.dropout(self.norm(self.linear(x)))


class NNXPartitioned(nnx.Module):
    """Sharding metadata in NNX's own spelling and in the bridge's."""

    def __init__(self, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.own = nnx.Linear(
            4,
            3,
            kernel_metadata={"out_sharding": (None, "model"), "eager_sharding": False},
            rngs=rngs,
        )
        self.described = nnx.Param(init(rngs.params(), (3, 2)), note="own key")

    def __call__(self, x: Array) -> Array:
        return self.own(x) @ self.described


class NNXBridgePartitioned(nnx.Module):
    """A parameter that `bridge.with_partitioning` boxes as Linen's `nn.Partitioned`."""

    def __init__(self, *, rngs: nnx.Rngs):
        init = bridge.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
        with nnx.use_eager_sharding(False):
            self.linear = nnx.Linear(4, 3, kernel_init=init, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear(x)


class Codebook(nnx.Variable[Array]):
    """A Variable type without a registered collection name."""


class NNXCustomVariables(nnx.Module):
    """Variables of own types, one of which a call changes."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.codes = Codebook(rngs.params.normal((4,)))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        self.count[...] += 1
        return self.linear(x * self.codes) + self.count


class NNXContainers(nnx.Module):
    """Lists and dicts: integers in the paths."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.heads = nnx.Dict(a=nnx.Linear(4, 2, rngs=rngs), b=nnx.Linear(4, 3, rngs=rngs))

    def __call__(self, x: Array) -> tuple[Array, Array]:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.heads["a"](x), self.heads["b"](x)


class NNXTied(nnx.Module):
    """One Param under two paths."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.a = nnx.Linear(4, 4, rngs=rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)
        self.b.kernel = self.a.kernel

    def __call__(self, x: Array) -> Array:
        return self.b(self.a(x))


class NNXFixedInit(nnx.Module):
    """Needs no rngs to be made."""

    def __init__(self, size: int):
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x: Array) -> Array:
        return x * self.scale


# --------------------------------------------------------------------------------------
# NNX around Linen


class NNXOutside(nnx.Module):
    """An NNX model with a Linen module between two NNX layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(2, 4, rngs=rngs)
        self.linen = bridge.ToNNX(LinenMLP(), rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.last(self.linen(self.first(x)))


class NNXOutsideContainers(nnx.Module):
    """Linen modules in `nnx.List` and `nnx.Dict`, one of them under two names."""

    def __init__(self, rngs: nnx.Rngs):
        shared = bridge.ToNNX(nn.Dense(4), rngs=rngs)
        self.layers = nnx.List([shared, nnx.Linear(4, 4, rngs=rngs), shared])
        self.heads = nnx.Dict(
            a=bridge.ToNNX(nn.Dense(2), rngs=rngs), b=bridge.ToNNX(LinenMLP(), rngs=rngs)
        )

    def __call__(self, x: Array) -> tuple[Array, Array]:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.heads["a"](x), self.heads["b"](x)


class NNXOutsideTrain(nnx.Module):
    """A Linen block with batch statistics and dropout, called with `mutable`."""

    def __init__(self, rngs: nnx.Rngs):
        self.block = bridge.ToNNX(LinenBlock(), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.block(x, mutable=["batch_stats"]))


class NNXOutsideMethods(nnx.Module):
    """Uses two methods of a wrapped Linen module, by name and by attribute."""

    def __init__(self, rngs: nnx.Rngs):
        self.codec = bridge.ToNNX(LinenCodec(), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        if self.codec._pytree__state.initializing:  # a Linen module initialises as a whole
            return self.codec(x)
        return self.codec.decode(self.codec(x, method="encode"))


class ScaledToNNX(bridge.ToNNX):
    """A subclass that overrides `__call__`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


class ToNNXWithParam(bridge.ToNNX):
    """A subclass with a constructor and a child of its own.

    `ToNNX` hands every attribute that does not start with `to_nnx__` to Linen, so the child's
    name starts with that.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        super().__init__(nn.Dense(features), rngs=rngs)
        self.to_nnx__after = nnx.Linear(features, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.to_nnx__after(super().__call__(x))


class NNXSubclassed(nnx.Module):
    """Subclasses of ToNNX as children."""

    def __init__(self, rngs: nnx.Rngs):
        self.scaled = ScaledToNNX(nn.Dense(4), rngs=rngs)
        self.own = ToNNXWithParam(3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.own(self.scaled(x))


class NNXTwoWrappers(nnx.Module):
    """The same Linen instance in two wrappers: each has variables of its own."""

    def __init__(self, rngs: nnx.Rngs):
        dense = nn.Dense(4)
        self.a = bridge.ToNNX(dense, rngs=rngs)
        self.b = bridge.ToNNX(dense, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.b(self.a(x))


class NNXTrainer(nnx.Module):
    """An optimizer over a model with a Linen part; made after the model is initialised."""

    def __init__(self, rngs: nnx.Rngs):
        self.model = NNXOutside(rngs)
        bridge.lazy_init(self.model, jnp.ones((1, 2)))
        self.optimizer = nnx.Optimizer(self.model, optax.adam(0.1), wrt=nnx.Param)

    def __call__(self, x: Array) -> Array:
        loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(self.model)
        self.optimizer.update(self.model, grads)
        return loss


# --------------------------------------------------------------------------------------
# Linen around NNX


# Only a subclass of what `to_linen_class` returns can be instantiated (`__init_subclass__`).
class LinearByArgs(wrappers.to_linen_class(nnx.Linear)):  # type: ignore[misc]
    """A subclass of what `to_linen_class` makes, given `args`."""


class NamedLinear(wrappers.to_linen_class(nnx.Linear, use_bias=False)):  # type: ignore[misc]
    """A subclass of what `to_linen_class` makes: takes the NNX class's keywords."""


class DoubledToLinen(bridge.ToLinen):
    """A subclass that overrides `__call__`."""

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


class LinenOutside(nn.Module):
    """A compact Linen model with NNX modules between Linen layers."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(4)(x)
        x = bridge.to_linen(NNXMLP, 4, 5, 3, name="mlp")(x)
        x = bridge.ToLinen(nnx.Linear, args=(3, 2))(x)
        return nn.LayerNorm()(x)


class LinenOutsideSetup(nn.Module):
    """A setup Linen model with NNX modules in a list and a dict, one of them used twice."""

    def setup(self) -> None:
        shared = bridge.to_linen(nnx.Linear, 4, 4)
        self.layers = [shared, nn.Dense(4), shared]
        self.heads = {"a": bridge.to_linen(nnx.Linear, 4, 2), "b": nn.Dense(3)}

    def __call__(self, x: Array) -> tuple[Array, Array]:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.heads["a"](x), self.heads["b"](x)


class LinenOutsideAttributes(nn.Module):
    """NNX modules that were wrapped outside, as attributes."""

    layers: Sequence[nn.Module]
    heads: Mapping[str, nn.Module]

    def __call__(self, x: Array) -> dict[str, Array]:
        for layer in self.layers:
            x = layer(x)
        return {name: head(x) for name, head in self.heads.items()}


class LinenOutsideTrain(nn.Module):
    """Batch norm and dropout in both dialects."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = bridge.to_linen(NNXBlock, 4, 3, name="nnx_block")(x)
        return LinenBlock(2, name="linen_block")(x)


class LinenOutsideScanBody(nn.Module):
    """A scan body with an NNX layer."""

    @nn.compact
    def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
        size = x.shape[-1]
        return jnp.tanh(bridge.to_linen(nnx.Linear, size, size, name="nnx")(x)), None


class LinenOutsideScan(nn.Module):
    """`nn.scan` of `nn.remat` over blocks with an NNX layer."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scan = nn.scan(
            nn.remat(LinenOutsideScanBody),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(name="layers")(x, None)[0]


class LinenOutsideVmap(nn.Module):
    """`nn.vmap` over a wrapped NNX layer."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        vmap = nn.vmap(
            bridge.ToLinen,
            in_axes=None,
            out_axes=0,
            axis_size=2,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return vmap(nnx.Linear, args=(4, 3), name="ensemble")(x)


class LinenOutsideMethod(nn.Module):
    """Uses another method of a wrapped NNX module."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        mlp = bridge.to_linen(NNXMLP, 4, 5, 4, name="mlp")
        return mlp(mlp(x), nnx_method=NNXMLP.half)


# --------------------------------------------------------------------------------------
# three levels


class LinenInMiddle(nn.Module):
    """A Linen module with an NNX child."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(4, name="before")(x)
        x = bridge.to_linen(NNXMLP, 4, 5, 3, name="inner")(x)
        return nn.Dense(2, name="after")(x)


class NNXLinenNNX(nnx.Module):
    """NNX, Linen, NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(2, 3, rngs=rngs)
        self.middle = bridge.ToNNX(LinenInMiddle(), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.middle(self.first(x))


class LinenInMiddleTrain(nn.Module):
    """A Linen module with batch norm and dropout of its own and in an NNX child."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return LinenBlock(2, name="after")(bridge.to_linen(NNXBlock, 4, 3, name="inner")(x))


class NNXLinenNNXTrain(nnx.Module):
    """NNX, Linen, NNX, with batch norm and dropout at the two lower levels."""

    def __init__(self, rngs: nnx.Rngs):
        self.middle = bridge.ToNNX(LinenInMiddleTrain(), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.middle(x, mutable=["batch_stats"])


class NNXInMiddle(nnx.Module):
    """An NNX module with a Linen child."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.linen = bridge.ToNNX(LinenMLP(), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linen(self.linear(x))


class LinenNNXLinen(nn.Module):
    """Linen, NNX, Linen."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(4, name="before")(x)
        return bridge.to_linen(NNXInMiddle, name="middle")(x)


class NNXOfFour(nnx.Module):
    """NNX, Linen, NNX, Linen."""

    def __init__(self, rngs: nnx.Rngs):
        self.linen = bridge.ToNNX(LinenNNXLinen(), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linen(x)


# --------------------------------------------------------------------------------------
# the table


def _sequential(din: int, dout: int, *, rngs: nnx.Rngs) -> nnx.Sequential:
    """Make an NNX module by a function instead of a class."""
    return nnx.Sequential(nnx.Linear(din, dout, rngs=rngs), nnx.relu)


def _nnx(name: str, build: Callable[[nnx.Rngs], Any], *args: Any, **options: Any) -> MixedCase:
    return MixedCase(name=name, api="nnx", build=build, args=args, **options)


def _linen(name: str, build: Callable[[], nn.Module], *args: Any, **options: Any) -> MixedCase:
    return MixedCase(name=name, api="linen", build=build, args=args, **options)


def _wrap(make: Callable[[], nn.Module]) -> Callable[[nnx.Rngs], bridge.ToNNX]:
    """Wrap a Linen module by itself."""
    return lambda rngs: bridge.ToNNX(make(), rngs=rngs)


_TRAIN_NNX: dict[str, Any] = {
    "init_rngs": {"params": 0, "dropout": 1},
    "changes": (nnx.BatchStat, nnx.RngCount),
}
_TRAIN_LINEN: dict[str, Any] = {
    "init_rngs": {"params": 0, "dropout": 1},
    "call_rngs": {"dropout": 2},
    "mutable": ("batch_stats",),
}
_COUNTS: dict[str, Any] = {"changes": (nnx.RngCount,)}

LINEN_IN_NNX: tuple[MixedCase, ...] = (
    # Each call of a ToNNX draws a key from every stream that it holds, whence the counts.
    _nnx("to-nnx-dense", _wrap(lambda: nn.Dense(3)), _x(2, 4), **_COUNTS),
    _nnx("to-nnx-mlp", _wrap(LinenMLP), _x(2, 4), **_COUNTS),
    _nnx(
        "to-nnx-methods",
        _wrap(LinenCodec),
        _x(3, 4),
        methods=(
            MethodCall(method="encode", args=(_x(5, 4),)),
            MethodCall(method="decode", args=(_x(3, 2),)),
        ),
        **_COUNTS,
    ),
    _nnx(
        "to-nnx-key",
        lambda rngs: bridge.ToNNX(LinenMLP(), rngs=jax.random.key(3)),
        _x(2, 4),
        **_COUNTS,
    ),
    _nnx("to-nnx-no-variables", lambda rngs: bridge.ToNNX(LinenWithoutVariables()), _x(2, 4)),
    _nnx(
        "to-nnx-keywords",
        _wrap(LinenOwnCall),
        _x(2, 4),
        kwargs={"scale": 0.5, "negate": True},
        **_COUNTS,
    ),
    _nnx(
        "to-nnx-batch-norm",
        _wrap(lambda: nn.BatchNorm(use_running_average=False)),
        _x(5, 3),
        kwargs={"mutable": ("batch_stats",)},
        changes=(nnx.BatchStat, nnx.RngCount),
    ),
    _nnx("to-nnx-partitioned", _wrap(LinenPartitioned), _x(2, 5), eager_sharding=False, **_COUNTS),
    _nnx("to-nnx-scan", _wrap(LinenScan), _x(2, 4), **_COUNTS),
    _nnx(
        "to-nnx-sequential",
        _wrap(lambda: nn.Sequential([nn.Dense(3), nn.relu])),
        _x(2, 4),
        **_COUNTS,
    ),
    _nnx("to-nnx-rnn", _wrap(lambda: nn.RNN(nn.GRUCell(3))), _x(2, 5, 4), **_COUNTS),
    _nnx("to-nnx-custom-collection", _wrap(LinenCounter), _x(2, 3), **_COUNTS),
    _nnx("to-nnx-sow", _wrap(LinenSow), _x(2, 4), **_COUNTS),
    _nnx(
        "to-nnx-same-name",
        _wrap(LinenSameName),
        _x(2, 4),
        flax_runs=False,  # "Found duplicate variable path": NNX has one attribute per name
    ),
    _nnx(
        "to-nnx-clashing-names",
        _wrap(lambda: LinenClash(("train", "eval", "sow", "set_attributes"))),
        _x(2, 4),
        flax_runs=False,  # "expected Mapping; got method": a child meets a method of the wrapper
    ),
    _nnx(
        "to-nnx-child-named-rngs",
        _wrap(lambda: LinenClash(("rngs", "module"))),
        _x(2, 4),
        flax_runs=False,  # `ToNNX.rngs` and `ToNNX.module` are properties without a setter
    ),
    _nnx("nnx-linen", NNXOutside, _x(5, 2), **_COUNTS),
    _nnx("nnx-linen-containers", NNXOutsideContainers, _x(2, 4), **_COUNTS),
    _nnx("nnx-linen-train", NNXOutsideTrain, _x(5, 4), **_TRAIN_NNX),
    _nnx("nnx-linen-methods", NNXOutsideMethods, _x(3, 4), **_COUNTS),
    _nnx(
        "to-nnx-subclass-call",
        lambda rngs: ScaledToNNX(nn.Dense(3), rngs=rngs),
        _x(2, 4),
        **_COUNTS,
    ),
    _nnx("to-nnx-subclasses", NNXSubclassed, _x(2, 5), **_COUNTS),
    _nnx("nnx-same-linen-twice", NNXTwoWrappers, _x(2, 4), **_COUNTS),
    _nnx(
        "nnx-linen-trainer",
        NNXTrainer,
        _x(5, 2),
        changes=(nnx.Param, nnx.OptState, nnx.RngCount),
    ),
)

NNX_IN_LINEN: tuple[MixedCase, ...] = (
    _linen("to-linen", lambda: bridge.to_linen(nnx.Linear, 4, 3), _x(2, 4)),
    _linen(
        "to-linen-record",
        lambda: bridge.ToLinen(nnx.Linear, args=(4, 3), kwargs={"use_bias": False}),
        _x(2, 4),
    ),
    _linen("to-linen-user", lambda: bridge.to_linen(NNXMLP, 4, 5, 3), _x(2, 4)),
    _linen("to-linen-class", lambda: LinearByArgs(args=(4, 3)), _x(2, 4)),
    _linen(
        "to-linen-class-keywords",
        lambda: NamedLinear(in_features=4, out_features=3, name="named"),
        _x(2, 4),
    ),
    _linen("to-linen-subclass-call", lambda: DoubledToLinen(nnx.Linear, args=(4, 3)), _x(2, 4)),
    _linen("to-linen-train", lambda: bridge.to_linen(NNXBlock, 4, 3), _x(5, 4), **_TRAIN_LINEN),
    _linen("to-linen-partitioned", lambda: bridge.to_linen(NNXPartitioned), _x(2, 4)),
    _linen("to-linen-bridge-partitioned", lambda: bridge.to_linen(NNXBridgePartitioned), _x(2, 4)),
    _linen(
        "to-linen-no-metadata",
        lambda: bridge.to_linen(NNXPartitioned, metadata_fn=None),
        _x(2, 4),
    ),
    _linen("to-linen-skip-rng", lambda: bridge.to_linen(NNXFixedInit, 4, skip_rng=True), _x(2, 4)),
    _linen(
        "to-linen-custom-variables",
        lambda: bridge.to_linen(NNXCustomVariables),
        _x(2, 4),
        mutable=("batch_stats",),
    ),
    _linen("to-linen-containers", lambda: bridge.to_linen(NNXContainers), _x(2, 4)),
    _linen("to-linen-tied", lambda: bridge.to_linen(NNXTied), _x(2, 4)),
    _linen(
        "to-linen-sequential",
        lambda: bridge.to_linen(
            functools.partial(_sequential, 4, 3),
        ),
        _x(2, 4),
    ),
    _linen("linen-nnx", LinenOutside, _x(5, 2)),
    _linen("linen-nnx-setup", LinenOutsideSetup, _x(2, 4)),
    _linen(
        "linen-nnx-attributes",
        lambda: LinenOutsideAttributes(
            layers=[bridge.to_linen(nnx.Linear, 4, 3), nn.LayerNorm()],
            heads={"a": bridge.to_linen(nnx.Linear, 3, 2), "b": nn.Dense(5)},
        ),
        _x(2, 4),
    ),
    _linen(
        "linen-nnx-sequential",
        lambda: nn.Sequential([bridge.to_linen(nnx.Linear, 4, 3), nn.relu, nn.Dense(2)]),
        _x(2, 4),
    ),
    _linen("linen-nnx-train", LinenOutsideTrain, _x(5, 4), **_TRAIN_LINEN),
    _linen("linen-nnx-scan-remat", LinenOutsideScan, _x(2, 4)),
    _linen("linen-nnx-vmap", LinenOutsideVmap, _x(5, 4)),
    _linen("linen-nnx-method", LinenOutsideMethod, _x(2, 4)),
)

DEEP: tuple[MixedCase, ...] = (
    _nnx("nnx-linen-nnx", NNXLinenNNX, _x(5, 2), depth=3, **_COUNTS),
    _nnx("nnx-linen-nnx-train", NNXLinenNNXTrain, _x(5, 4), depth=3, **_TRAIN_NNX),
    _linen(
        "linen-nnx-linen",
        LinenNNXLinen,
        _x(5, 2),
        depth=3,
        flax_runs=False,  # ToLinen does not initialise a ToNNX below it (a TODO in flax)
    ),
    _nnx("nnx-linen-nnx-linen", NNXOfFour, _x(5, 2), depth=4, flax_runs=False),
)

CASES: tuple[MixedCase, ...] = LINEN_IN_NNX + NNX_IN_LINEN + DEEP
