"""A zoo of small Linen modules with sample inputs: test data for the round-trip tests.

Nothing here imports linsey. A case is built, initialised and called like this::

    module = case.build()
    variables = module.init(case.keys(case.init_rngs), *case.init_inputs[0],
                            method=case.method, **case.init_inputs[1])
    module.apply(variables, *case.args, rngs=case.keys(case.call_rngs),
                 mutable=case.mutable, **case.kwargs)

All sizes are 2 to 5, and distinct within a case, except where equal sizes are the point.
"""

import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from flax.core import FrozenDict, meta
from flax.linen import partitioning as nn_partitioning

Array = jax.Array


# --------------------------------------------------------------------------------------
# the table's entries


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCall:
    """One call of another method of an initialised module."""

    method: str
    """The method's name."""
    args: tuple[Any, ...] = ()
    """Positional inputs."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword inputs."""
    mutable: tuple[str, ...] | bool = False
    """Collections that the call changes, or False."""
    rngs: Mapping[str, int] | None = None
    """Seeds for the call's rng streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinenCase:
    """A Linen module with what is needed to initialise and to call it."""

    name: str
    """Unique, usable as a pytest id."""
    build: Callable[[], nn.Module]
    """Makes a new, unbound module."""
    args: tuple[Any, ...]
    """Positional inputs of the call: numpy arrays, or pytrees of them."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword inputs of the call; static values (bool, str) are Python values."""
    init_args: tuple[Any, ...] | None = None
    """Positional inputs of `init` where they differ from `args`."""
    init_kwargs: Mapping[str, Any] | None = None
    """Keyword inputs of `init` where they differ from `kwargs`."""
    init_rngs: Mapping[str, int] = field(default_factory=lambda: {"params": 0})
    """Seeds of the streams that `init` is given."""
    call_rngs: Mapping[str, int] | None = None
    """Seeds of the streams that the call is given."""
    mutable: tuple[str, ...] | bool = False
    """The collections that the call changes (or makes), or False."""
    method: str | None = None
    """The method that `init` runs; None is `__call__`."""
    methods: tuple[MethodCall, ...] = ()
    """Other methods to call on the initialised variables."""
    raw_keys: bool = False
    """Give raw `uint32[2]` keys instead of typed ones."""
    importable: bool = True
    """False: a lambda, a closure or a local class is part of the module, so it cannot be saved."""
    differentiable: bool = True
    """False: `jax.grad` with respect to `params` is not defined (an integer parameter, say)."""
    warns: str | None = None
    """A pattern that matches the warning which building or running the case raises, or None."""
    covers: tuple[type[nn.Module], ...] = ()
    """The classes of `flax.linen` that this case is about."""

    @property
    def init_inputs(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The positional and keyword inputs of `init`."""
        return (
            self.args if self.init_args is None else self.init_args,
            self.kwargs if self.init_kwargs is None else self.init_kwargs,
        )

    def keys(self, seeds: Mapping[str, int] | None) -> dict[str, Array] | None:
        """Keys for `seeds`, typed or raw as the case asks."""
        if seeds is None:
            return None
        make = jax.random.PRNGKey if self.raw_keys else jax.random.key
        return {name: make(seed) for name, seed in seeds.items()}


def public_layers() -> frozenset[type[nn.Module]]:
    """Find every concrete `nn.Module` subclass that `flax.linen` exports."""
    exported = (getattr(nn, name) for name in dir(nn))
    layers = {c for c in exported if isinstance(c, type) and issubclass(c, nn.Module)}
    return frozenset(layers - {nn.Module, nn.RNNCellBase})


def covered_layers() -> frozenset[type[nn.Module]]:
    """Return the classes of `flax.linen` that some case is about."""
    return frozenset(c for case in CASES for c in case.covers)


def _x(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Draw a deterministic normal array of `shape`."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def _ids(*shape: int, below: int) -> np.ndarray:
    """Draw deterministic int32 token ids under `below`."""
    return np.random.default_rng(shape).integers(0, below, shape).astype(np.int32)


# --------------------------------------------------------------------------------------
# compact and setup


class CompactMLP(nn.Module):
    """Children made inside `__call__`, with automatic names."""

    hidden: int = 5
    features: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.features)(nn.relu(nn.Dense(self.hidden)(x)))


class SetupMLP(nn.Module):
    """Children made in `setup`."""

    hidden: int = 5
    features: int = 3

    def setup(self) -> None:
        self.up = nn.Dense(self.hidden)
        self.down = nn.Dense(self.features)

    def __call__(self, x: Array) -> Array:
        return self.down(nn.relu(self.up(x)))


class SetupParams(nn.Module):
    """Parameters and variables declared in `setup`, one of them never used."""

    features: int = 3

    def setup(self) -> None:
        self.scale = self.param("scale", nn.initializers.ones, (self.features,))
        self.unused = self.param("unused", nn.initializers.normal(1.0), (2, self.features))
        self.shift = self.variable("buffers", "shift", jnp.full, (self.features,), 0.5)

    def __call__(self, x: Array) -> Array:
        return x * self.scale + self.shift.value


class NestedCompact(nn.Module):
    """Compact children inside a setup parent inside a compact parent, some with own names."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = SetupMLP(hidden=4, features=2)(x)
        x = CompactMLP(hidden=5, features=3, name="outer/with slash")(x)
        return CompactMLP(hidden=2, features=4, name="[0]")(x)


class LazySetup(nn.Module):
    """A child made in `setup` that only one method uses: it has no variables until then."""

    def setup(self) -> None:
        self.used = nn.Dense(3)
        self.other = nn.Dense(4)

    def __call__(self, x: Array) -> Array:
        return self.used(x)

    def run_other(self, x: Array) -> Array:
        return self.other(x)


class BaseBlock(nn.Module):
    """A base class whose compact method a subclass calls through `super()`."""

    features: int = 3

    def activation(self, x: Array) -> Array:
        return nn.relu(x)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.activation(nn.Dense(self.features, name="base")(x))


class DerivedBlock(BaseBlock):
    """Overrides a helper and extends a compact method."""

    scale: float = 0.5

    def activation(self, x: Array) -> Array:
        return jnp.tanh(x)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = super().__call__(x)
        return self.scale * nn.Dense(self.features, name="derived")(x)


class PostInit(nn.Module):
    """Computes a field in `__post_init__`."""

    features: int = 3
    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.hidden is None:
            self.hidden = self.features + 2
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.features)(nn.Dense(self.hidden)(x))


class KwOnlyField(nn.Module, kw_only=True):
    """Fields are keyword-only; one without a default follows one with a default."""

    use_bias: bool = True
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.features, use_bias=self.use_bias)(x)


class NoWrap(nn.Module):
    """Makes its children through a `nn.nowrap` helper and a plain property."""

    features: int = 3

    @nn.nowrap
    def make(self, name: str) -> nn.Dense:
        return nn.Dense(self.features, name=name)

    @property
    def factor(self) -> float:
        return 1.0 / self.features

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.factor * self.make("second")(self.make("first")(x))


class ManyCompactMethods(nn.Module):
    """Two compact-named methods, by `nn.compact_name_scope`, beside a compact call."""

    features: int = 3

    @nn.compact_name_scope
    def up(self, x: Array) -> Array:
        return nn.Dense(self.features)(x)

    @nn.compact_name_scope
    def down(self, x: Array) -> Array:
        return nn.Dense(self.features + 1)(x)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.features - 1)(self.down(self.up(x)))


class Branching(nn.Module):
    """Which children exist depends on a static argument and on the input's rank."""

    @nn.compact
    def __call__(self, x: Array, *, wide: bool = False) -> Array:
        if x.ndim == 3:
            x = nn.Dense(3, name="folded")(x).sum(1)
        return nn.Dense(5, name="wide")(x) if wide else nn.Dense(2, name="narrow")(x)


class DataDependentInit(nn.Module):
    """Initial values computed from the first batch."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        loc = self.param("loc", lambda _, v: v.mean(0), x)
        scale = self.param("scale", lambda _, v: 1.0 / (v.std(0) + 1.0), x)
        return (x - loc) * scale


# --------------------------------------------------------------------------------------
# sharing


class SharedTwice(nn.Module):
    """One child, used twice in one call."""

    def setup(self) -> None:
        self.dense = nn.Dense(4)

    def __call__(self, x: Array) -> Array:
        return self.dense(nn.relu(self.dense(x)))


class SharedTwiceCompact(nn.Module):
    """One compact child, used twice in one call."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = nn.Dense(4)
        return dense(nn.relu(dense(x)))


class UsesInner(nn.Module):
    """Applies a module that it was given, then a layer of its own."""

    inner: nn.Module
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.features)(self.inner(x))


class SharedAttribute(nn.Module):
    """The same child passed as an attribute to two other children."""

    def setup(self) -> None:
        self.shared = nn.Dense(4)
        self.left = UsesInner(self.shared, 2)
        self.right = UsesInner(self.shared, 3)

    def __call__(self, x: Array) -> Array:
        return jnp.concatenate([self.left(x), self.right(x)], -1)


class SharedOutside(nn.Module):
    """Two attributes, given from outside, that hold the same instance."""

    first: nn.Module
    second: nn.Module

    def __call__(self, x: Array) -> Array:
        return self.second(nn.relu(self.first(x)))


class SharedDeep(nn.Module):
    """A grandchild's child is used from the top as well."""

    def setup(self) -> None:
        self.embed = nn.Embed(5, 4)
        self.wrap = UsesInner(UsesInner(self.embed, 3), 2)

    def __call__(self, ids: Array) -> Array:
        return self.wrap(ids).sum() + self.embed.attend(self.embed(ids))


class TakesModule(nn.Module):
    """Applies a module that comes as a call argument."""

    features: int

    @nn.compact
    def __call__(self, x: Array, other: nn.Module) -> Array:
        return nn.Dense(self.features)(other(x))


class SharedArgument(nn.Module):
    """A child passed to two others as a call argument."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shared = nn.Dense(4)
        return jnp.concatenate([TakesModule(2)(x, shared), TakesModule(3)(x, shared)], -1)


class SharesScope(nn.Module):
    """Two children in one scope, by `nn.share_scope`."""

    def setup(self) -> None:
        self.dense = nn.Dense(3)
        nn.share_scope(self, self.dense)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        extra = self.param("extra", nn.initializers.ones, (3,))
        return self.dense(x) * extra


class TiedEmbedding(nn.Module):
    """An embedding used at the input and, transposed, at the output."""

    vocabulary: int = 5
    features: int = 3

    def setup(self) -> None:
        self.embed = nn.Embed(self.vocabulary, self.features)
        self.mix = nn.Dense(self.features)

    def __call__(self, ids: Array) -> Array:
        return self.embed.attend(self.mix(self.embed(ids)))


class CloneInside(nn.Module):
    """Clones a template child: each clone has its own parameters."""

    template: nn.Module = nn.Dense(4)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(2):
            x = self.template.clone(name=f"clone_{i}", parent=self)(x)
        return x


class ReadsChildVariables(nn.Module):
    """Reads a child's variables from outside the child."""

    def setup(self) -> None:
        self.dense = nn.Dense(3)

    def __call__(self, x: Array) -> Array:
        y = self.dense(x)
        return y + self.dense.variables["params"]["kernel"].sum()


# --------------------------------------------------------------------------------------
# modules in containers


class ListOfModules(nn.Module):
    """Modules as attributes in a list, a tuple and a dict, nested."""

    layers: Sequence[nn.Module]
    heads: Mapping[str, Any]

    def __call__(self, x: Array) -> dict[str, Array]:
        for layer in self.layers:
            x = layer(x)
        return {
            "plain": self.heads["plain"](x),
            "deep": self.heads["deep"][0](x) + self.heads["deep"][1]["leaf"](x),
        }


class SetupContainers(nn.Module):
    """Lists and dicts of children that are made in `setup`, with a hole and with sharing."""

    def setup(self) -> None:
        first = nn.Dense(4)
        self.layers = [first, nn.Dense(4, use_bias=False), first]
        self.optional = (None, nn.Dense(4))
        self.heads = {"a": nn.Dense(2), "b": [nn.Dense(3), nn.Dense(5)]}

    def __call__(self, x: Array) -> tuple[Array, ...]:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        x = self.optional[1](x)
        return self.heads["a"](x), self.heads["b"][0](x), self.heads["b"][1](x)


class Mode(enum.Enum):
    """A static choice."""

    ADD = "add"
    MULTIPLY = "multiply"


@dataclass(frozen=True)
class BlockConfig:
    """A user's own frozen settings object."""

    hidden: int = 5
    act: Callable[[Array], Array] = nn.gelu
    dims: tuple[int, ...] = (3, 4)


class ManyAttributes(nn.Module):
    """Static fields of all kinds."""

    config: BlockConfig = BlockConfig()
    mode: Mode = Mode.ADD
    act: Callable[[Array], Array] = nn.silu
    act_partial: Callable[[Array], Array] = functools.partial(nn.leaky_relu, negative_slope=0.2)
    norm_cls: type[nn.Module] = nn.LayerNorm
    make_dense: Callable[..., nn.Module] = functools.partial(nn.Dense, use_bias=False)
    kernel_init: Callable[..., Array] = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    dtype: Any = jnp.float32
    precision: Any = jax.lax.Precision.HIGHEST
    spec: jax.sharding.PartitionSpec = jax.sharding.PartitionSpec("data", None)
    table: FrozenDict = FrozenDict({"depth": 2, "names": ("a", "b")})
    widths: tuple[int, ...] = (4, 3)
    nothing: None = None
    epsilon: float = float("inf")
    phase: complex = 1 + 2j
    label: str = "a/b [0] ü"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.act(nn.Dense(self.config.hidden, kernel_init=self.kernel_init)(x))
        x = self.norm_cls()(self.act_partial(x))
        y = self.make_dense(self.widths[1], dtype=self.dtype, precision=self.precision)(x)
        z = nn.Dense(self.widths[1])(self.config.act(x))
        return y + z if self.mode is Mode.ADD else y * z


class ArrayAttribute(nn.Module):
    """Array and array-valued-mapping fields: constants of the module, not variables."""

    table: Any
    weights: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(3)(x * self.table + self.weights["bias"])


# --------------------------------------------------------------------------------------
# lifted transforms


class Ensemble(nn.Module):
    """`nn.vmap` over parameters and rngs; the input is broadcast."""

    members: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = nn.vmap(
            nn.Dense,
            in_axes=None,
            out_axes=0,
            axis_size=self.members,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return dense(4)(x)


class VmapSharedParams(nn.Module):
    """`nn.vmap` over the input only: parameters are shared, statistics are stacked last."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        counter = nn.vmap(
            Counter,
            in_axes=0,
            out_axes=0,
            variable_axes={"params": None, "counts": -1},
            split_rngs={"params": False},
        )
        return counter()(x)


class VmapMethods(nn.Module):
    """`nn.vmap` over two methods of a module."""

    def setup(self) -> None:
        lifted = nn.vmap(
            EncodeDecode,
            in_axes=0,
            out_axes=0,
            axis_size=3,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            methods=["encode", "decode"],
        )
        self.codec = lifted()

    def __call__(self, x: Array) -> Array:
        return self.codec.decode(self.codec.encode(x))


class VmapFunction(nn.Module):
    """`nn.vmap` of a function over the parent's variables."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def body(mdl: nn.Module, x: Array) -> Array:
            return nn.Dense(3, name="inner")(x)

        return nn.vmap(body, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})(
            self, x
        )


class ScanBlock(nn.Module):
    """The body of a scan over layers: (carry, None) -> (carry, output)."""

    features: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, _: Any) -> tuple[Array, Array]:
        y = nn.Dense(self.features)(nn.LayerNorm()(x))
        if self.dropout:
            y = nn.Dropout(self.dropout, deterministic=False)(y)
        return x + jnp.tanh(y), y.mean()


class ScanLayers(nn.Module):
    """`nn.scan` over layers."""

    layers: int = 3
    features: int = 4
    unroll: int = 1

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        block = nn.scan(
            ScanBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
            unroll=self.unroll,
        )
        return block(self.features, name="layers")(x, None)


class ScanDropout(nn.Module):
    """`nn.scan(nn.remat(...))` over layers with dropout."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.scan(
            nn.remat(ScanBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        return block(4, dropout=0.5, name="layers")(x, None)[0]


class CachedBlock(nn.Module):
    """A square layer with a square cache of the running sum."""

    @nn.compact
    def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
        size = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (size, size))
        cache = self.variable("cache", "total", jnp.zeros, (size, size))
        if not self.is_initializing():
            cache.value = cache.value + x
        return jnp.tanh(x @ kernel + cache.value), None


class ScanEqualDims(nn.Module):
    """Parameters stacked at axis 1, cache at axis 0, and every dimension 3."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.scan(
            CachedBlock,
            variable_axes={"params": 1, "cache": 0},
            split_rngs={"params": True},
            length=3,
        )
        return block(name="layers")(x, None)[0]


class ScanInVmap(nn.Module):
    """`nn.vmap(nn.scan(...))`: parameters stacked at 1, then at 2; the cache at 0 twice."""

    members: int = 2
    layers: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.scan(
            CachedBlock,
            variable_axes={"params": 1, "cache": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        ensemble = nn.vmap(
            block,
            in_axes=(None, None),
            out_axes=0,
            axis_size=self.members,
            variable_axes={"params": 2, "cache": 0},
            split_rngs={"params": True},
        )
        return ensemble(name="stack")(x, None)[0]


class VmapInScan(nn.Module):
    """`nn.scan` of a block that has a `nn.vmap` inside."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        class_ = nn.scan(
            EnsembleBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return class_(name="layers")(x, None)[0]


class EnsembleBlock(nn.Module):
    """A scan body that averages a small ensemble."""

    @nn.compact
    def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
        return Ensemble(2)(x).mean(0), None


class ScanTime(nn.Module):
    """`nn.scan` over time: broadcast parameters, a carried collection, axis 1 in and out."""

    @nn.compact
    def __call__(self, xs: Array) -> tuple[Array, Array]:
        cell = nn.scan(
            nn.GRUCell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        return cell(features=4, name="cell")(jnp.zeros((xs.shape[0], 4)), xs)


class ScanCarry(nn.Module):
    """`nn.scan` with `variable_carry`: flax wants the carried variables before the loop."""

    @nn.compact
    def __call__(self, xs: Array) -> tuple[Array, Array]:
        self.variable("state", "seen", jnp.zeros, xs.shape[1:])

        def body(mdl: nn.Module, carry: Array, x: Array) -> tuple[Array, Array]:
            seen = mdl.variable("state", "seen", jnp.zeros, x.shape)
            y = nn.Dense(x.shape[-1], name="step")(carry + x)
            if not mdl.is_initializing():
                seen.value = seen.value + y
            return y, seen.value

        scan = nn.scan(
            body,
            variable_broadcast="params",
            variable_carry="state",
            split_rngs={"params": False},
        )
        return scan(self, jnp.zeros(xs.shape[1:]), xs)


class ScanFunction(nn.Module):
    """`nn.scan` over a function body."""

    @nn.compact
    def __call__(self, xs: Array) -> tuple[Array, Array]:
        def body(mdl: nn.Module, carry: Array, x: Array) -> tuple[Array, Array]:
            carry = nn.Dense(x.shape[-1], name="step")(carry) + x
            return carry, carry.sum()

        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
        return scan(self, jnp.zeros(xs.shape[1:]), xs)


class ScanIntermediates(nn.Module):
    """`nn.scan` of a body that sows: the sown values are stacked."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.scan(
            SowBlock,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        return block(name="layers")(x, None)[0]


class SowBlock(nn.Module):
    """A scan body that sows its activation."""

    @nn.compact
    def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
        x = nn.Dense(x.shape[-1])(x)
        self.sow("intermediates", "activation", x)
        return x, None


class Remat(nn.Module):
    """`nn.remat` with a static argument."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        block = nn.remat(StaticFlagBlock, static_argnums=(2,))
        return block(name="block")(x, train)


class StaticFlagBlock(nn.Module):
    """Branches on a static positional flag."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Dense(3)(x)
        return jnp.tanh(x) if train else x


class CheckpointPolicy(nn.Module):
    """`nn.checkpoint` with a policy, on a module, on a method and on a shared instance."""

    def setup(self) -> None:
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        self.block = nn.checkpoint(CompactMLP, policy=policy)(4, 3)
        self.out = nn.Dense(2)

    @functools.partial(nn.remat, policy=jax.checkpoint_policies.everything_saveable)
    def head(self, x: Array) -> Array:
        return self.out(jnp.tanh(x))

    def __call__(self, x: Array) -> Array:
        return self.head(self.block(x))


class Jitted(nn.Module):
    """`nn.jit` on a class and on a method."""

    def setup(self) -> None:
        self.block = nn.jit(CompactMLP)(4, 3)
        self.out = nn.Dense(2)

    @nn.jit
    def head(self, x: Array) -> Array:
        return self.out(jnp.tanh(x))

    def __call__(self, x: Array) -> Array:
        return self.head(self.block(x))


class RematScan(nn.Module):
    """`nn.remat_scan` with two levels."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.remat_scan(SquareBlock, lengths=(2, 3))(name="deep")(x)


class SquareBlock(nn.Module):
    """Keeps its input's shape."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x + jnp.tanh(nn.Dense(x.shape[-1])(x))


def _transpose(variables: Any) -> Any:
    return jax.tree.map(lambda v: v.T, variables)


class MapVariables(nn.Module):
    """`nn.map_variables`: a child whose kernel is stored transposed."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        z = nn.Dense(4, use_bias=False, name="encoder")(x)
        decode = nn.map_variables(
            TransposedDense, "params", trans_in_fn=_transpose, trans_out_fn=_transpose, init=True
        )
        return decode(x.shape[-1], name="decoder")(z)


class TiedAutoencoder(nn.Module):
    """`nn.map_variables` of a function: one kernel, transposed to decode."""

    features: int = 3
    latents: int = 2

    @nn.compact
    def run(self, x: Array, decode: bool) -> Array:
        def body(mdl: nn.Module) -> Array:
            size = self.features if decode else self.latents
            return nn.Dense(size, use_bias=False)(x)

        change = _transpose if decode else _same
        return nn.map_variables(body, "params", change, change, mutable=True)(self)

    def encode(self, x: Array) -> Array:
        return self.run(x, False)

    def decode(self, z: Array) -> Array:
        return self.run(z, True)

    def __call__(self, x: Array) -> Array:
        return self.decode(self.encode(x))


def _same(variables: Any) -> Any:
    return variables


class TransposedDense(nn.Module):
    """A bias-free dense layer."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return x @ kernel


def _binarize(variables: Any) -> Any:
    return jax.tree.map(jnp.sign, variables)


class MapVariablesBinary(nn.Module):
    """`nn.map_variables` that changes values on the way in only."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.map_variables(nn.Dense, "params", _binarize, init=True)(3)(x)


class WhileLoop(nn.Module):
    """`nn.while_loop` with carried and broadcast collections."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        self.param("scale", nn.initializers.constant(0.5), ())
        self.variable("state", "steps", jnp.zeros, (), jnp.int32)
        if self.is_initializing():
            return x

        def cond(mdl: nn.Module, carry: Array) -> Array:
            return mdl.get_variable("state", "steps") < 3

        def body(mdl: nn.Module, carry: Array) -> Array:
            steps = mdl.variable("state", "steps", jnp.zeros, (), jnp.int32)
            steps.value = steps.value + 1
            return carry * mdl.get_variable("params", "scale")

        return nn.while_loop(
            cond, body, self, x, carry_variables="state", broadcast_variables="params"
        )


class Cond(nn.Module):
    """`nn.cond` between a layer and the identity."""

    @nn.compact
    def __call__(self, x: Array, pred: Array) -> Array:
        def apply(mdl: nn.Module, x: Array) -> Array:
            return nn.Dense(x.shape[-1], name="layer")(x)

        def skip(mdl: nn.Module, x: Array) -> Array:
            return x

        if self.is_initializing():
            return apply(self, x)
        return nn.cond(pred, apply, skip, self, x)


class Switch(nn.Module):
    """`nn.switch` between heads of a setup module."""

    def setup(self) -> None:
        self.heads = [nn.Dense(3, name=f"head_{i}") for i in range(3)]

    def __call__(self, x: Array, index: Array) -> Array:
        branches = [lambda mdl, x, i=i: mdl.heads[i](x) for i in range(3)]
        if self.is_initializing():
            for branch in branches:
                branch(self, x)
        return nn.switch(index, branches, self, x)


class Grads(nn.Module):
    """`nn.vjp`, `nn.value_and_grad` and `nn.jvp` inside a module."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        dense = nn.Dense(3, name="dense")

        def loss(mdl: nn.Module, x: Array) -> Array:
            return mdl(x).sum()

        value, (grad,) = nn.value_and_grad(loss, dense, x)
        _, pullback = nn.vjp(lambda mdl, x: mdl(x), dense, x)
        out, tangent = nn.jvp(
            lambda mdl, x: mdl(x), dense, (x,), (jnp.ones_like(x),), variable_tangents={}
        )
        return value * grad, pullback(out)[1], tangent


class CustomVjp(nn.Module):
    """`nn.custom_vjp`: the sign of the parameters' gradient."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def forward(mdl: nn.Module, x: Array) -> Array:
            return nn.Dense(3, name="dense")(x)

        def forward_vjp(mdl: nn.Module, x: Array) -> tuple[Array, Any]:
            return nn.vjp(forward, mdl, x)

        def backward(pullback: Any, grad: Array) -> tuple[Any, ...]:
            params, *inputs = pullback(grad)
            return (jax.tree.map(jnp.sign, params), *inputs)

        return nn.custom_vjp(forward, forward_fn=forward_vjp, backward_fn=backward)(self, x)


class AddMetadataAxis(nn.Module):
    """`nn.add_metadata_axis` around a module whose parameters carry logical names."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.add_metadata_axis(
            LogicalDense, variable_axes={"params": 0}, metadata_params={nn.PARTITION_NAME: "ax"}
        )
        return block(name="inner")(x)


# --------------------------------------------------------------------------------------
# collections


class Counter(nn.Module):
    """A parameter, a custom collection with a counter and a running sum."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        calls = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        total = self.variable("counts", "total", jnp.zeros, x.shape[-1:])
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        if not self.is_initializing() and self.is_mutable_collection("counts"):
            calls.value += 1
            total.value = total.value + x.sum(tuple(range(x.ndim - 1)))
        return x * scale + total.value


class SameNameCollections(nn.Module):
    """One path, `kernel`, in four collections; a submodule's name in two."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 3))
        ema = self.variable("ema", "kernel", lambda: kernel)
        mask = self.variable("masks", "kernel", lambda: jnp.ones_like(kernel, dtype=bool))
        count = self.variable("counts", "kernel", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            ema.value = 0.9 * ema.value + 0.1 * kernel
            count.value += 1
        return Counter(name="inner")(x @ jnp.where(mask.value, ema.value, 0))


class Sows(nn.Module):
    """`sow` twice under one name, with a reduction, and below a child."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(3)(x)
        self.sow("intermediates", "hidden", x)
        self.sow("intermediates", "hidden", x + 1)
        self.sow("losses", "l2", (x**2).sum(), reduce_fn=lambda a, b: a + b, init_fn=lambda: 0.0)
        self.sow("losses", "l2", jnp.float32(1), reduce_fn=jnp.add, init_fn=lambda: 0.0)
        self.sow("losses", "latest", x, reduce_fn=_keep_latest, init_fn=_zero)
        return SowBlock()(x, None)[0]


def _keep_latest(_: Any, new: Any) -> Any:
    return new


def _zero() -> float:
    return 0.0


class Perturbs(nn.Module):
    """`perturb` at two places."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.perturb("before", nn.Dense(3)(x))
        return self.perturb("after", nn.Dense(2)(x), collection="own_perturbations")


class PutsVariable(nn.Module):
    """`put_variable` and `get_variable`, a variable made on the first call only."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        last = self.get_variable("history", "last", jnp.zeros_like(x))
        if self.is_mutable_collection("history"):
            self.put_variable("history", "last", x)
        return nn.Dense(3)(x + last)


class Statistics(NamedTuple):
    """Values that one variable holds together."""

    mean: Any
    var: Any


class PytreeVariables(nn.Module):
    """Variables whose values are a dict, a NamedTuple, a list with a hole, and an empty dict."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = x.shape[-1]
        weights = self.param("weights", _dict_init, size)
        pair = self.param("pair", _statistics_init, size)
        stats = self.variable(
            "stats", "pair", lambda: Statistics(jnp.zeros(size), {"var": jnp.ones(size)})
        )
        items = self.variable("stats", "items", lambda: [jnp.zeros(2), None, (jnp.ones(3),)])
        self.variable("stats", "empty", dict)
        if not self.is_initializing():
            stats.value = Statistics(x.mean(0), {"var": stats.value.var["var"] + 1})
            items.value = [items.value[0] + 1, None, items.value[2]]
        return x @ weights["kernel"] + weights["nested"]["bias"] + pair.mean + stats.value.mean


def _dict_init(key: Array, size: int) -> dict[str, Any]:
    kernel = jax.random.normal(key, (size, size))
    return {"kernel": kernel, "nested": {"bias": jnp.zeros(size)}}


def _statistics_init(key: Array, size: int) -> Statistics:
    return Statistics(jnp.zeros(size), jax.random.uniform(key, (size,)))


class DtypeZoo(nn.Module):
    """Parameters and variables of many dtypes and odd shapes."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        phase = self.param("phase", _complex_init, (x.shape[-1],))
        half = self.param("half", nn.initializers.normal(), (x.shape[-1], 3), jnp.bfloat16)
        f16 = self.param("f16", nn.initializers.ones, (3,), jnp.float16)
        scalar = self.param("scalar", nn.initializers.ones, ())
        empty = self.param("empty", nn.initializers.zeros, (0, 3))
        f8 = self.variable("buffers", "f8", jnp.ones, (3,), jnp.float8_e4m3fn)
        small = self.variable("buffers", "u8", jnp.arange, 3, dtype=jnp.uint8)
        flags = self.variable("buffers", "flags", jnp.ones, (3,), bool)
        y = jnp.abs(x * phase) @ half.astype(jnp.float32) * scalar + empty.sum()
        y = y * f16 + f8.value.astype(jnp.float32) + small.value
        return jnp.where(flags.value, y, 0)


def _complex_init(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.lax.complex(*jax.random.normal(key, (2, *shape)))


class IntegerParams(nn.Module):
    """An integer parameter, a Python number, a numpy array and a typed key as variables."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        order = self.param("order", lambda key, n: jax.random.permutation(key, n), x.shape[-1])
        number = self.variable("buffers", "number", lambda: 2)
        table = self.variable("buffers", "table", lambda: np.arange(3, dtype=np.int16))
        key = self.variable("buffers", "key", lambda: jax.random.key(7))
        noise = jax.random.normal(key.value, x.shape)
        return (x + noise)[..., order] * number.value + jnp.asarray(table.value).sum()


class StatelessModule(nn.Module):
    """No variables at all, although it has a child."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dropout(0.5, deterministic=True)(jnp.tanh(x))


class VariableOnly(nn.Module):
    """No `params` collection."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x + self.variable("constants", "offset", jnp.ones, x.shape[-1:]).value


# --------------------------------------------------------------------------------------
# methods and inputs


class EncodeDecode(nn.Module):
    """Several methods, one of which initialises nothing that `__call__` does not."""

    def setup(self) -> None:
        self.encoder = nn.Dense(2)
        self.decoder = nn.Dense(4)

    def encode(self, x: Array) -> Array:
        return jnp.tanh(self.encoder(x))

    def decode(self, z: Array) -> Array:
        return self.decoder(z)

    def __call__(self, x: Array) -> Array:
        return self.decode(self.encode(x))


class OwnInit(nn.Module):
    """Variables come from a method of its own, which takes other inputs than the call."""

    features: int = 3

    def setup(self) -> None:
        self.dense = nn.Dense(self.features)
        self.norm = nn.BatchNorm(use_running_average=True)

    def setup_variables(self, size: int = 2) -> None:
        self.norm(self.dense(jnp.zeros((1, size))))

    def __call__(self, x: Array) -> Array:
        return self.norm(self.dense(x))


class KeywordInputs(nn.Module):
    """Array and static keyword inputs, a default, and pytree inputs and outputs."""

    @nn.compact
    def __call__(
        self,
        batch: Mapping[str, Array],
        *,
        mask: Array | None = None,
        scale: float = 1.0,
        mode: str = "mean",
    ) -> dict[str, Any]:
        hidden = nn.Dense(3, name="a")(batch["a"]) + nn.Dense(3, name="b")(batch["b"][0])
        if mask is not None:
            hidden = jnp.where(mask[:, None], hidden, 0)
        pooled = hidden.mean(0) if mode == "mean" else hidden.sum(0)
        return {"pooled": scale * pooled, "parts": (hidden, None)}


class MergeParam(nn.Module):
    """A flag that is either a field or a call argument (`nn.merge_param`)."""

    train: bool | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool | None = None) -> Array:
        train = nn.merge_param("train", self.train, train)
        return nn.Dropout(0.5)(nn.Dense(3)(x), deterministic=not train)


# --------------------------------------------------------------------------------------
# boxed parameters


class PartitionedDense(nn.Module):
    """`nn.with_partitioning` on a kernel, with an unnamed and a doubly named axis."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(
            4,
            kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")),
            bias_init=nn.with_partitioning(nn.initializers.zeros, ("model",)),
        )(x)
        both = nn.with_partitioning(nn.initializers.lecun_normal(), (("data", "model"), None))
        return x @ self.param("out", both, (4, 3))


class LogicalDense(nn.Module):
    """`nn.with_logical_partitioning`, with rules of its own on one parameter."""

    features: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp")),
            (x.shape[-1], self.features),
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(
                nn.initializers.zeros, ("mlp",), rules=(("mlp", "model"), ("embed", None))
            ),
            (self.features,),
        )
        return nn.with_logical_constraint(x @ kernel + bias, ("batch", "mlp"))


class LogicalScanBlock(nn.Module):
    """A scan body with logical names on its parameters and on a statistic."""

    @nn.compact
    def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
        y = LogicalDense(x.shape[-1])(x)
        mean = self.variable(
            "stats",
            "mean",
            nn.with_logical_partitioning(jnp.zeros, ("embed",)),
            x.shape[-1:],
        )
        if not self.is_initializing():
            mean.value = mean.value + y.mean(0)
        return y + mean.value, None


class LogicalScan(nn.Module):
    """Logical names through scan in vmap, with `metadata_params`, at axes 1 and 0."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.scan(
            LogicalScanBlock,
            variable_axes={"params": 1, "stats": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        ensemble = nn.vmap(
            block,
            in_axes=(None, None),
            variable_axes={"params": 0, "stats": 0},
            split_rngs={"params": True},
            axis_size=2,
            metadata_params={nn.PARTITION_NAME: "ensemble"},
        )
        return ensemble(name="stack")(x, None)[0]


class UnnamedAxisScan(nn.Module):
    """Partitioned parameters through a scan whose axis has no name (`PARTITION_NAME: None`)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.scan(
            PartitionedBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: None},
        )
        return block(name="layers")(x, None)[0]


class PartitionedBlock(nn.Module):
    """A scan body with `nn.with_partitioning`."""

    @nn.compact
    def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(x.shape[-1], kernel_init=init)(x), None


class TaggedBox(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A user's own box: remembers each axis that a transform adds."""

    value: Any
    tag: str = struct.field(pytree_node=False, default="")
    axes: tuple[tuple[int, str], ...] = struct.field(pytree_node=False, default=())

    def replace_boxed(self, val: Any) -> "TaggedBox":
        return self.replace(value=val)

    def unbox(self) -> Any:
        return self.value

    def add_axis(self, index: int, params: dict[Any, Any]) -> "TaggedBox":
        return self.replace(axes=(*self.axes, (index, params.get("axis_name", ""))))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "TaggedBox":
        assert self.axes[-1][0] == index
        return self.replace(axes=self.axes[:-1])


def _tagged_init(key: Array, shape: tuple[int, ...]) -> TaggedBox:
    return TaggedBox(jax.random.normal(key, shape), tag="own")


class OwnBoxBlock(nn.Module):
    """Parameters in a user's own box."""

    @nn.compact
    def __call__(self, x: Array, _: Any) -> tuple[Array, None]:
        return x @ self.param("kernel", _tagged_init, (x.shape[-1], x.shape[-1])), None


class OwnBoxScan(nn.Module):
    """The own box through a scan at axis 1."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block = nn.scan(
            OwnBoxBlock,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=3,
            metadata_params={"axis_name": "layers"},
        )
        return block(name="layers")(x, None)[0]


class BoxedPytree(nn.Module):
    """One box around a parameter that is a dict."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def init(key: Array) -> meta.Partitioned[Any]:
            return meta.Partitioned(_dict_init(key, x.shape[-1]), names=("a", "b"))

        weights = self.param("weights", init)
        return x @ weights["kernel"] + weights["nested"]["bias"]


class ParamWithAxes(nn.Module):
    """`nn.partitioning.param_with_axes`: names live in a collection of their own."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = nn_partitioning.param_with_axes(
            "kernel", nn.initializers.lecun_normal(), (x.shape[-1], 3), axes=("embed", "mlp")
        )
        return x @ kernel


# --------------------------------------------------------------------------------------
# names


class ClashingNames(nn.Module):
    """Submodules and parameters with the names of NNX attributes and methods."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for name in ("rngs", "module", "set_attributes", "to_nnx__module", "iter_modules"):
            x = nn.Dense(4, name=name)(x)
        for name in ("eval", "train", "set_mode", "__call__", "_pytree__state", "class"):
            x = x + self.param(name, nn.initializers.normal(), x.shape[-1:])
        return x


class ClashingSetup(nn.Module):
    """Attributes of `setup` with the names of NNX attributes."""

    def setup(self) -> None:
        self.rngs = nn.Dense(4)
        self.module = nn.Dense(4)
        self.eval = self.param("eval", nn.initializers.ones, (4,))
        self.training = self.variable("stats", "training", jnp.zeros, (4,))

    def __call__(self, x: Array) -> Array:
        return self.module(self.rngs(x)) * self.eval + self.training.value


class NumericNames(nn.Module):
    """Names that look like list indices, and ones that sort differently as text."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for name in ("0", "1", "10", "2", "layers_10", "layers_9", "a.b", "['x']", "ä"):
            x = nn.Dense(4, name=name)(x)
        return x


# --------------------------------------------------------------------------------------
# randomness and realistic models


class OwnStream(nn.Module):
    """`make_rng` from a stream of its own, twice, at two levels."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(3)(x)
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return NoisyChild(name="child")(x)


class NoisyChild(nn.Module):
    """Draws from `noise` where it is given and from the default stream otherwise."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.has_rng("noise"):
            x = x + jax.random.uniform(self.make_rng("noise"), x.shape)
        return nn.Dropout(0.5, deterministic=False, rng_collection="mask")(x)


class RngInInit(nn.Module):
    """A variable outside `params` that takes its value from the `params` stream."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        table = self.variable(
            "buffers",
            "projection",
            lambda: jax.random.normal(self.make_rng("params"), (x.shape[-1], 3)),
        )
        return nn.Dense(2)(x @ table.value)


class ConvNet(nn.Module):
    """Convolution, batch norm in train or eval mode, pooling, dropout."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        x = nn.Conv(3, (2, 2))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        x = nn.avg_pool(x, (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(2)(nn.Dropout(0.5)(x, deterministic=not train))


class DecoderBlock(nn.Module):
    """A pre-norm decoder block with a decode cache."""

    decode: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        mask = None if self.decode else nn.make_causal_mask(x[..., 0])
        y = nn.MultiHeadDotProductAttention(
            num_heads=2, qkv_features=4, decode=self.decode, name="attention"
        )(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dropout(self.dropout)(y, deterministic=deterministic)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(5)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """Tied embedding, decoder blocks, dropout."""

    vocabulary: int = 5
    features: int = 4
    layers: int = 2
    decode: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, ids: Array, *, train: bool = False) -> Array:
        embed = nn.Embed(self.vocabulary, self.features, name="embed")
        x = embed(ids)
        for i in range(self.layers):
            x = DecoderBlock(self.decode, self.dropout, name=f"block_{i}")(x, not train)
        return embed.attend(nn.RMSNorm(name="final_norm")(x))


class SpectralUser(nn.Module):
    """A setup module with `nn.SpectralNorm` and `nn.WeightNorm` around layers."""

    @nn.compact
    def __call__(self, x: Array, *, update_stats: bool = False) -> Array:
        x = nn.SpectralNorm(nn.Dense(4), n_steps=2)(x, update_stats=update_stats)
        return nn.WeightNorm(nn.Dense(3))(x)


class _QuietFp8(nn.Fp8DotGeneralOp):
    """`nn.Fp8DotGeneralOp` without its deprecation warning, which only the base class raises."""

    amax_history_length: int = 3


def _shared_outside() -> SharedOutside:
    dense = nn.Dense(4)
    return SharedOutside(dense, dense)


def _local_class_module() -> nn.Module:
    """Make a module of a class that no import can reach."""

    class Local(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(3)(x)

    return Local()


# --------------------------------------------------------------------------------------
# the table


def _layer(name: str, build: Callable[[], nn.Module], *args: Any, **options: Any) -> LinenCase:
    """Make a case about the class that `name` starts with: `"Dense-no-bias"` covers `nn.Dense`."""
    layer = getattr(nn, name.split("-")[0])
    return LinenCase(name=name, build=build, args=args, covers=(layer,), **options)


def _case(name: str, build: Callable[[], nn.Module], *args: Any, **options: Any) -> LinenCase:
    return LinenCase(name=name, build=build, args=args, **options)


_DROPOUT: dict[str, Any] = {
    "init_rngs": {"params": 0, "dropout": 1},
    "call_rngs": {"dropout": 2},
}
_CAUSAL = np.tril(np.ones((1, 1, 3, 3), bool))

LAYERS: tuple[LinenCase, ...] = (
    # linear
    _layer("Dense", lambda: nn.Dense(3), _x(2, 4)),
    _layer("Dense-no-bias", lambda: nn.Dense(3, use_bias=False), _x(5, 2, 4)),
    _layer(
        "Dense-mixed-precision",
        lambda: nn.Dense(3, dtype=jnp.bfloat16, param_dtype=jnp.float32, precision="highest"),
        _x(2, 4),
    ),
    _layer(
        "Dense-bfloat16",
        lambda: nn.Dense(3, param_dtype=jnp.bfloat16),
        _x(2, 4, dtype=jnp.bfloat16),
    ),
    _layer(
        "Dense-complex",
        lambda: nn.Dense(3, param_dtype=jnp.complex64),
        _x(2, 4),
        differentiable=False,
    ),
    _layer(
        "Dense-inits",
        lambda: nn.Dense(
            3, kernel_init=nn.initializers.orthogonal(2.0), bias_init=nn.initializers.constant(0.1)
        ),
        _x(2, 4),
    ),
    _layer(
        "Dense-lambda-init",
        lambda: nn.Dense(3, kernel_init=lambda key, shape, dtype: jnp.ones(shape, dtype)),
        _x(2, 4),
        importable=False,
    ),
    _layer("Dense-dot-general", lambda: nn.Dense(3, dot_general=jax.lax.dot_general), _x(2, 4)),
    _layer("Dense-named", lambda: nn.Dense(3, name="top"), _x(2, 4)),
    _layer("DenseGeneral", lambda: nn.DenseGeneral((2, 5), axis=(-2, -1)), _x(2, 3, 4)),
    _layer("DenseGeneral-batch", lambda: nn.DenseGeneral(5, batch_dims=0), _x(2, 3, 4)),
    _layer("DenseGeneral-axis", lambda: nn.DenseGeneral(5, axis=1, use_bias=False), _x(2, 3, 4)),
    _layer("Einsum", lambda: nn.Einsum((4, 3, 5), "btd,dhe->bthe"), _x(2, 2, 4)),
    _layer("Einsum-at-call", lambda: nn.Einsum((4, 3), use_bias=False), _x(2, 4), "bd,de->be"),
    _layer(
        "Embed",
        lambda: nn.Embed(5, 3),
        _ids(2, 4, below=5),
        methods=(MethodCall(method="attend", args=(_x(2, 3),)),),
    ),
    _layer("Embed-bfloat16", lambda: nn.Embed(5, 3, dtype=jnp.bfloat16), _ids(2, below=5)),
    # convolution
    _layer("Conv", lambda: nn.Conv(3, (2, 3)), _x(2, 5, 4, 2)),
    _layer("Conv-1d-int-kernel", lambda: nn.Conv(3, 2), _x(2, 5, 4)),
    _layer("Conv-3d", lambda: nn.Conv(2, (2, 2, 2), padding="VALID"), _x(1, 3, 3, 4, 2)),
    _layer(
        "Conv-strided-dilated",
        lambda: nn.Conv(
            3, (2, 2), strides=(2, 1), kernel_dilation=(1, 2), padding=((1, 0), (0, 1))
        ),
        _x(2, 5, 4, 2),
    ),
    _layer(
        "Conv-grouped",
        lambda: nn.Conv(4, (3,), feature_group_count=2, use_bias=False, padding="CIRCULAR"),
        _x(2, 5, 4),
    ),
    _layer("Conv-causal", lambda: nn.Conv(3, (2,), padding="CAUSAL"), _x(2, 5, 4)),
    _layer("Conv-reflect", lambda: nn.Conv(3, (3,), padding="REFLECT"), _x(2, 5, 4)),
    _layer(
        "Conv-input-dilation",
        lambda: nn.Conv(3, (2,), padding=((1, 0),), input_dilation=2),
        _x(2, 5, 4),
    ),
    _layer(
        "Conv-masked",
        lambda: nn.Conv(
            3,
            (2,),
            mask=np.array([1, 0], np.float32)[:, None, None] * np.ones((2, 4, 3), np.float32),
        ),
        _x(2, 5, 4),
    ),
    _layer("Conv-no-batch", lambda: nn.Conv(3, (2, 2)), _x(5, 4, 2)),
    _layer("Conv-two-batch-axes", lambda: nn.Conv(3, (2,)), _x(2, 3, 5, 4)),
    _layer("ConvLocal", lambda: nn.ConvLocal(3, (2,)), _x(2, 5, 4)),
    _layer("ConvLocal-2d", lambda: nn.ConvLocal(3, (2, 2), use_bias=False), _x(2, 3, 4, 2)),
    _layer("ConvTranspose", lambda: nn.ConvTranspose(3, (2, 3)), _x(2, 5, 4, 2)),
    _layer(
        "ConvTranspose-strided",
        lambda: nn.ConvTranspose(3, (3,), strides=(2,), transpose_kernel=True, padding="VALID"),
        _x(2, 5, 4),
    ),
    _layer(
        "ConvTranspose-circular", lambda: nn.ConvTranspose(3, (3,), padding="CIRCULAR"), _x(2, 5, 4)
    ),
    # normalisation
    _layer("BatchNorm", lambda: nn.BatchNorm(use_running_average=True), _x(5, 3)),
    _layer(
        "BatchNorm-train",
        lambda: nn.BatchNorm(use_running_average=False, momentum=0.5, epsilon=1e-3),
        _x(5, 3),
        mutable=("batch_stats",),
    ),
    _layer(
        "BatchNorm-at-call",
        lambda: nn.BatchNorm(use_bias=False, use_scale=False),
        _x(5, 3),
        kwargs={"use_running_average": False},
        mutable=("batch_stats",),
    ),
    _layer(
        "BatchNorm-axis",
        lambda: nn.BatchNorm(use_running_average=False, axis=1, use_fast_variance=False),
        _x(5, 3, 2),
        mutable=("batch_stats",),
    ),
    _layer(
        "BatchNorm-masked",
        lambda: nn.BatchNorm(use_running_average=False),
        _x(5, 3),
        kwargs={"mask": np.array([[True], [True], [False], [True], [False]])},
        mutable=("batch_stats",),
    ),
    _layer("LayerNorm", lambda: nn.LayerNorm(), _x(2, 3)),
    _layer(
        "LayerNorm-axes",
        lambda: nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1), epsilon=1e-2),
        _x(2, 3, 4),
    ),
    _layer("LayerNorm-bare", lambda: nn.LayerNorm(use_bias=False, use_scale=False), _x(2, 3)),
    _layer("RMSNorm", lambda: nn.RMSNorm(), _x(2, 3)),
    _layer("RMSNorm-bfloat16", lambda: nn.RMSNorm(dtype=jnp.bfloat16), _x(2, 3)),
    _layer("GroupNorm", lambda: nn.GroupNorm(num_groups=2), _x(3, 4)),
    _layer("GroupNorm-size", lambda: nn.GroupNorm(num_groups=None, group_size=2), _x(3, 5, 4)),
    _layer("InstanceNorm", lambda: nn.InstanceNorm(), _x(2, 5, 3)),
    _layer(
        "WeightNorm",
        lambda: nn.WeightNorm(nn.Dense(3), variable_filter={"kernel"}),
        _x(2, 4),
    ),
    _layer(
        "WeightNorm-axes",
        lambda: nn.WeightNorm(nn.Conv(3, (2,)), feature_axes=(0, -1)),
        _x(2, 5, 4),
    ),
    _layer(
        "SpectralNorm",
        lambda: nn.SpectralNorm(nn.Dense(3)),
        _x(2, 4),
        kwargs={"update_stats": True},
        mutable=("batch_stats",),
    ),
    _layer(
        "SpectralNorm-eval",
        lambda: nn.SpectralNorm(nn.Conv(3, (2,))),
        _x(2, 5, 4),
        kwargs={"update_stats": False},
    ),
    # stochastic, activation, combinators
    _layer("Dropout", lambda: nn.Dropout(0.5, deterministic=True), _x(2, 3)),
    _layer(
        "Dropout-train",
        lambda: nn.Dropout(0.5),
        _x(4, 5),
        kwargs={"deterministic": False},
        **_DROPOUT,
    ),
    _layer(
        "Dropout-broadcast",
        lambda: nn.Dropout(0.5, broadcast_dims=(0,), deterministic=False, rng_collection="mask"),
        _x(4, 5),
        init_rngs={"mask": 1},
        call_rngs={"mask": 2},
    ),
    _layer("PReLU", lambda: nn.PReLU(), _x(2, 3)),
    _layer(
        "PReLU-slope", lambda: nn.PReLU(negative_slope_init=0.3, param_dtype=jnp.bfloat16), _x(2, 3)
    ),
    _layer("Sequential", lambda: nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)]), _x(2, 4)),
    _layer(
        "Sequential-lambdas",
        lambda: nn.Sequential([nn.Dense(3), lambda x: x * 2, lambda x: (x, x), lambda a, b: a + b]),
        _x(2, 4),
        importable=False,
    ),
    _layer(
        "Sequential-nested",
        lambda: nn.Sequential(
            [nn.Sequential([nn.Dense(3), jnp.tanh]), nn.Sequential([nn.Dense(2)])]
        ),
        _x(2, 4),
    ),
    _layer("Sequential-empty", lambda: nn.Sequential([jnp.tanh]), _x(2, 4)),
    # attention
    _layer(
        "MultiHeadDotProductAttention",
        lambda: nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, out_features=5),
        _x(2, 3, 5),
    ),
    _layer(
        "MultiHeadDotProductAttention-cross",
        lambda: nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False, normalize_qk=True),
        _x(2, 3, 4),
        _x(2, 5, 3),
        _x(2, 5, 2),
        kwargs={"mask": np.ones((2, 1, 3, 5), bool)},
    ),
    _layer(
        "MultiHeadDotProductAttention-dropout",
        lambda: nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.5),
        _x(2, 3, 4),
        kwargs={"deterministic": False, "mask": _CAUSAL},
        **_DROPOUT,
    ),
    _layer("MultiHeadAttention", lambda: nn.MultiHeadAttention(num_heads=2), _x(2, 3, 4)),
    _layer(
        "MultiHeadAttention-sow",
        lambda: nn.MultiHeadAttention(num_heads=2, broadcast_dropout=False),
        _x(2, 3, 4),
        kwargs={"sow_weights": True},
        mutable=("intermediates",),
    ),
    _layer(
        "MultiHeadAttention-decode",
        lambda: nn.MultiHeadAttention(num_heads=2, decode=True),
        _x(2, 1, 4),
        init_args=(_x(2, 5, 4),),
        mutable=("cache",),
    ),
    _layer(
        "SelfAttention",
        lambda: nn.SelfAttention(num_heads=2),
        _x(2, 3, 4),
        kwargs={"mask": _CAUSAL},
        warns="SelfAttention will be deprecated soon",
    ),
    # recurrence
    _layer("LSTMCell", lambda: nn.LSTMCell(3), (_x(2, 3), _x(2, 3, seed=1)), _x(2, 4)),
    _layer(
        "OptimizedLSTMCell", lambda: nn.OptimizedLSTMCell(3), (_x(2, 3), _x(2, 3, seed=1)), _x(2, 4)
    ),
    _layer("GRUCell", lambda: nn.GRUCell(3), _x(2, 3), _x(2, 4)),
    _layer("MGUCell", lambda: nn.MGUCell(3, reset_gate=True), _x(2, 3), _x(2, 4)),
    _layer("MGUCell-no-reset", lambda: nn.MGUCell(3, reset_gate=False), _x(2, 3), _x(2, 4)),
    _layer("SimpleCell", lambda: nn.SimpleCell(3, residual=True), _x(2, 3), _x(2, 3, seed=1)),
    _layer(
        "ConvLSTMCell",
        lambda: nn.ConvLSTMCell(3, (2, 2)),
        (_x(2, 4, 5, 3), _x(2, 4, 5, 3, seed=1)),
        _x(2, 4, 5, 2),
    ),
    _layer("RNN", lambda: nn.RNN(nn.LSTMCell(3)), _x(2, 5, 4)),
    _layer(
        "RNN-lengths",
        lambda: nn.RNN(nn.GRUCell(3), return_carry=True, reverse=True, keep_order=True),
        _x(2, 5, 4),
        kwargs={"seq_lengths": np.array([5, 3], np.int32)},
    ),
    _layer(
        "RNN-time-major", lambda: nn.RNN(nn.SimpleCell(3), time_major=True, unroll=2), _x(5, 2, 4)
    ),
    _layer("RNN-conv", lambda: nn.RNN(nn.ConvLSTMCell(3, (2,))), _x(2, 5, 4, 2)),
    _layer(
        "Bidirectional",
        lambda: nn.Bidirectional(nn.RNN(nn.GRUCell(3)), nn.RNN(nn.LSTMCell(2))),
        _x(2, 5, 4),
    ),
    # fp8
    _layer(
        "Fp8DotGeneralOp",
        lambda: nn.Dense(3, dot_general_cls=_QuietFp8),
        _x(2, 4),
    ),
    _layer(
        "Fp8DotGeneralOp-deprecated",
        lambda: nn.Fp8DotGeneralOp(amax_history_length=3),
        _x(2, 4),
        _x(4, 5),
        (((1,), (0,)), ((), ())),
        warns="Fp8DotGeneralOp is deprecated",
    ),
    _layer(
        "NANOOFp8DotGeneralOp",
        lambda: nn.Dense(
            3, dot_general_cls=functools.partial(nn.NANOOFp8DotGeneralOp, amax_history_length=2)
        ),
        _x(2, 4),
    ),
    _layer(
        "Fp8DirectDotGeneralOp",
        lambda: nn.Dense(
            3, dot_general_cls=functools.partial(nn.Fp8DirectDotGeneralOp, amax_history_length=2)
        ),
        _x(2, 4),
    ),
    _layer(
        "Fp8Einsum",
        lambda: nn.Fp8Einsum(amax_history_length=2),
        "bd,de->be",
        _x(2, 4),
        _x(4, 3),
    ),
)

USER: tuple[LinenCase, ...] = (
    # compact and setup
    _case("compact", CompactMLP, _x(2, 4)),
    _case("setup", SetupMLP, _x(2, 4)),
    _case("setup-params", SetupParams, _x(2, 3)),
    _case("nested-names-with-slash", NestedCompact, _x(2, 3)),
    _case(
        "lazy-setup-partial-init",
        LazySetup,
        _x(2, 5),
        methods=(MethodCall(method="__call__", args=(_x(3, 5),)),),
    ),
    _case("inherited-compact", DerivedBlock, _x(2, 4)),
    _case("post-init", PostInit, _x(2, 4)),
    _case("kw-only-field", lambda: KwOnlyField(features=3), _x(2, 4)),
    _case("nowrap-and-property", NoWrap, _x(2, 4)),
    _case(
        "compact-name-scope",
        ManyCompactMethods,
        _x(2, 5),
        methods=(
            MethodCall(method="up", args=(_x(2, 5),)),
            MethodCall(method="down", args=(_x(2, 3),)),
        ),
    ),
    _case("branching-narrow", Branching, _x(2, 4)),
    _case("branching-wide-rank-3", Branching, _x(2, 5, 4), kwargs={"wide": True}),
    _case("data-dependent-init", DataDependentInit, _x(5, 3)),
    _case("explicit-name", lambda: CompactMLP(name="root"), _x(2, 4)),
    _case("local-class", _local_class_module, _x(2, 4), importable=False),
    # sharing
    _case("shared-twice-setup", SharedTwice, _x(2, 4)),
    _case("shared-twice-compact", SharedTwiceCompact, _x(2, 4)),
    _case("shared-attribute", SharedAttribute, _x(2, 5)),
    _case("shared-outside", _shared_outside, _x(2, 4)),
    _case("shared-deep", SharedDeep, _ids(2, below=5)),
    _case("shared-call-argument", SharedArgument, _x(2, 5)),
    _case("share-scope", SharesScope, _x(2, 4)),
    _case("tied-embedding", TiedEmbedding, _ids(2, 4, below=5)),
    _case("clone-inside", CloneInside, _x(2, 4)),
    _case("reads-child-variables", ReadsChildVariables, _x(2, 4)),
    # containers and attributes
    _case(
        "modules-in-containers",
        lambda: ListOfModules(
            layers=(nn.Dense(4), nn.LayerNorm()),
            heads={"plain": nn.Dense(2), "deep": [nn.Dense(5), {"leaf": nn.Dense(5)}]},
        ),
        _x(2, 3),
    ),
    _case("setup-containers", SetupContainers, _x(2, 4)),
    _case(
        "sequential-of-user-modules",
        lambda: nn.Sequential([CompactMLP(5, 3), nn.LayerNorm(), SetupMLP(4, 2)]),
        _x(2, 3),
    ),
    _case("many-attributes", ManyAttributes, _x(2, 3)),
    _case(
        "lambda-attribute", lambda: ManyAttributes(act=lambda x: x * x), _x(2, 3), importable=False
    ),
    _case(
        "array-attribute",
        lambda: ArrayAttribute(np.arange(4.0, dtype=np.float32), {"bias": jnp.ones(4)}),
        _x(2, 4),
    ),
    # lifted transforms
    _case("vmap-ensemble", Ensemble, _x(2, 5)),
    _case("vmap-shared-params", VmapSharedParams, _x(2, 5, 3), mutable=("counts",)),
    _case(
        "vmap-methods",
        VmapMethods,
        _x(3, 5, 4),
    ),
    _case("vmap-function", VmapFunction, _x(2, 5, 4)),
    _case("scan-layers", ScanLayers, _x(2, 4)),
    _case("scan-layers-unrolled", lambda: ScanLayers(layers=4, features=5, unroll=2), _x(2, 5)),
    _case("scan-zero-length", lambda: ScanLayers(layers=0), _x(2, 4)),
    _case("scan-length-one", lambda: ScanLayers(layers=1), _x(2, 4)),
    _case("scan-remat-dropout", ScanDropout, _x(2, 4), **_DROPOUT),
    _case("scan-equal-dims-axis-1", ScanEqualDims, _x(3, 3), mutable=("cache",)),
    _case("scan-in-vmap", ScanInVmap, _x(4, 4), mutable=("cache",)),
    _case(
        "scan-in-vmap-all-equal",
        lambda: ScanInVmap(members=3, layers=3),
        _x(3, 3),
        mutable=("cache",),
    ),
    _case("vmap-in-scan", VmapInScan, _x(5, 4)),
    _case("scan-time-broadcast", ScanTime, _x(2, 5, 3)),
    _case("scan-variable-carry", ScanCarry, _x(5, 2, 3), mutable=("state",)),
    _case("scan-function", ScanFunction, _x(5, 2, 3)),
    _case("scan-sow", ScanIntermediates, _x(2, 4), mutable=("intermediates",)),
    _case("remat-static-argument", Remat, _x(2, 4), kwargs={"train": True}),
    _case("checkpoint-policy", CheckpointPolicy, _x(2, 5)),
    _case("jit-class-and-method", Jitted, _x(2, 5)),
    _case("remat-scan", RematScan, _x(5, 4)),
    _case("map-variables-transposed", MapVariables, _x(2, 3)),
    _case(
        "map-variables-tied",
        TiedAutoencoder,
        _x(4, 3),
        methods=(
            MethodCall(method="encode", args=(_x(5, 3),)),
            MethodCall(method="decode", args=(_x(5, 2),)),
        ),
    ),
    _case("map-variables-binary", MapVariablesBinary, _x(2, 4)),
    _case("while-loop", WhileLoop, _x(2, 3), mutable=("state",), differentiable=False),
    _case("cond", Cond, _x(2, 3), np.array(True)),
    _case("switch", Switch, _x(2, 4), np.array(1, np.int32)),
    _case("vjp-grad-jvp", Grads, _x(2, 4)),
    _case("custom-vjp", CustomVjp, _x(2, 4)),
    _case("add-metadata-axis", AddMetadataAxis, _x(2, 3)),
    # collections
    _case("counter", Counter, _x(2, 3), mutable=("counts",)),
    _case("counter-frozen", Counter, _x(2, 3)),
    _case("same-name-in-collections", SameNameCollections, _x(2, 4), mutable=("ema", "counts")),
    _case("sow", Sows, _x(2, 4), mutable=("intermediates", "losses")),
    _case("sow-unused", Sows, _x(2, 4)),
    _case("perturb", Perturbs, _x(2, 4)),
    _case(
        "put-variable", PutsVariable, _x(2, 4), init_args=(_x(2, 4, seed=1),), mutable=("history",)
    ),
    _case("pytree-variables", PytreeVariables, _x(2, 4), mutable=("stats",)),
    _case("dtype-zoo", DtypeZoo, _x(2, 4)),
    _case("integer-params-and-keys", IntegerParams, _x(2, 4), differentiable=False),
    _case("stateless", StatelessModule, _x(2, 3)),
    _case("no-params", VariableOnly, _x(2, 3)),
    # methods and inputs
    _case(
        "encode-decode",
        EncodeDecode,
        _x(3, 4),
        methods=(
            MethodCall(method="encode", args=(_x(5, 4),)),
            MethodCall(method="decode", args=(_x(3, 2),)),
        ),
    ),
    _case(
        "init-method",
        OwnInit,
        _x(4, 2),
        init_args=(),
        method="setup_variables",
    ),
    _case(
        "keyword-inputs",
        KeywordInputs,
        {"a": _x(3, 4), "b": (_x(3, 2),)},
        kwargs={"mask": np.array([True, False, True]), "scale": 0.5, "mode": "sum"},
        methods=(
            MethodCall(method="__call__", kwargs={"batch": {"a": _x(3, 4), "b": (_x(3, 2),)}}),
        ),
    ),
    _case("merge-param", MergeParam, _x(2, 4), True, **_DROPOUT),
    _case("merge-param-field", lambda: MergeParam(train=False), _x(2, 4)),
    # boxes
    _case("with-partitioning", PartitionedDense, _x(2, 5)),
    _case("with-logical-partitioning", LogicalDense, _x(2, 3)),
    _case("logical-scan-in-vmap", LogicalScan, _x(5, 4), mutable=("stats",)),
    _case("unnamed-axis-scan", UnnamedAxisScan, _x(2, 4)),
    _case("own-box", lambda: OwnBoxBlock(), _x(2, 4), None),
    _case("own-box-scan", OwnBoxScan, _x(2, 4)),
    _case("boxed-pytree", BoxedPytree, _x(2, 4)),
    _case("param-with-axes", ParamWithAxes, _x(2, 4)),
    # names
    _case("clashing-names", ClashingNames, _x(2, 4)),
    _case("clashing-setup-names", ClashingSetup, _x(2, 5)),
    _case("numeric-and-odd-names", NumericNames, _x(2, 4)),
    # randomness and realistic models
    _case(
        "own-stream",
        OwnStream,
        _x(2, 4),
        init_rngs={"params": 0, "noise": 1, "mask": 2},
        call_rngs={"noise": 3, "mask": 4},
    ),
    _case(
        "raw-keys",
        OwnStream,
        _x(2, 4),
        init_rngs={"params": 0, "noise": 1, "mask": 2},
        call_rngs={"noise": 3, "mask": 4},
        raw_keys=True,
    ),
    _case(
        "one-key-for-every-stream",
        OwnStream,
        _x(2, 4),
        call_rngs={"params": 5},
    ),
    _case("rng-in-init", RngInInit, _x(2, 4)),
    _case("convnet-eval", ConvNet, _x(2, 5, 4, 2)),
    _case(
        "convnet-train",
        ConvNet,
        _x(2, 5, 4, 2),
        kwargs={"train": True},
        mutable=("batch_stats",),
        **_DROPOUT,
    ),
    _case("transformer", Transformer, _ids(2, 3, below=5)),
    _case(
        "transformer-train",
        lambda: Transformer(dropout=0.5),
        _ids(2, 3, below=5),
        kwargs={"train": True},
        **_DROPOUT,
    ),
    _case(
        "transformer-decode",
        lambda: Transformer(decode=True),
        _ids(2, 1, below=5),
        init_args=(_ids(2, 3, below=5),),
        mutable=("cache",),
    ),
    _case(
        "norm-wrappers",
        SpectralUser,
        _x(2, 5),
        kwargs={"update_stats": True},
        mutable=("batch_stats",),
    ),
)

CASES: tuple[LinenCase, ...] = LAYERS + USER
