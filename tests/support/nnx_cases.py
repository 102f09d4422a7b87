"""A zoo of small NNX objects with sample inputs: test data for the round-trip tests.

Nothing here imports linsey. A case is built and called like this::

    model = case.build(case.make_rngs())
    case.call(model, *case.args, **case.kwargs)

All sizes are 2 to 5, and distinct within a case, except where equal sizes are the point.
"""

import enum
import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from flax.nnx import metrics

Array = jax.Array


# --------------------------------------------------------------------------------------
# the table's entries


def _apply(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model itself."""
    return model(*args, **kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCall:
    """One call of another method of a built object."""

    method: str
    """The method's name."""
    args: tuple[Any, ...] = ()
    """Positional inputs."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NNXCase:
    """An NNX object with what is needed to build and to call it."""

    name: str
    """Unique, usable as a pytest id."""
    build: Callable[[nnx.Rngs], Any]
    """Makes a new object; it may ignore the rngs."""
    args: tuple[Any, ...] = ()
    """Positional inputs of the call: numpy arrays, or pytrees of them."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword inputs of the call; static values (bool, str) are Python values."""
    seeds: Mapping[str, int] = field(default_factory=lambda: {"default": 0})
    """Seeds of the streams of the `nnx.Rngs` that `build` is given."""
    call: Callable[..., Any] | None = _apply
    """Runs the object: `call(object, *args, **kwargs)`; None where it cannot be run."""
    methods: tuple[MethodCall, ...] = ()
    """Other methods to call."""
    changes: tuple[type[nnx.Variable[Any]], ...] = ()
    """The Variable types of which the call changes (or adds) some value."""
    abstract: bool = False
    """True: the values are `jax.ShapeDtypeStruct`s, so the object cannot be run."""
    importable: bool = True
    """False: a lambda, a closure or a local class is part of the object, so it cannot be saved."""
    jittable: bool = True
    """False: flax itself cannot run the call under `nnx.jit`; a comment says why."""
    warns: str | None = None
    """A pattern that matches the warning which building or running the case raises, or None."""
    covers: tuple[type, ...] = ()
    """The classes of `flax.nnx` that this case is about."""

    def make_rngs(self) -> nnx.Rngs:
        """Make the rngs for `build`."""
        return nnx.Rngs(**self.seeds)


_ABSTRACT = {nnx.Module, nnx.Pytree, nnx.Object, nnx.RNNCellBase, nnx.Metric}


def public_classes() -> frozenset[type]:
    """Every concrete `nnx.Pytree` subclass (layers, metrics, rngs, optimizers) of `flax.nnx`."""
    exported = [getattr(space, name) for space in (nnx, metrics) for name in dir(space)]
    classes = {c for c in exported if isinstance(c, type) and issubclass(c, nnx.Pytree)}
    return frozenset(classes - _ABSTRACT)


def covered_classes() -> frozenset[type]:
    """Return the classes of `flax.nnx` that some case is about."""
    return frozenset(c for case in CASES for c in case.covers)


def _x(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Draw a deterministic normal array of `shape`."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def _ids(*shape: int, below: int) -> np.ndarray:
    """Draw deterministic int32 token ids under `below`."""
    return np.random.default_rng(shape).integers(0, below, shape).astype(np.int32)


# --------------------------------------------------------------------------------------
# sharing and containers


class MLP(nnx.Module):
    """Two layers and a static activation."""

    def __init__(self, din: int, hidden: int, dout: int, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(din, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dout, rngs=rngs)
        self.act = nnx.relu

    def __call__(self, x: Array) -> Array:
        return self.down(self.act(self.up(x)))


class SharedChild(nnx.Module):
    """One child under three names, one of them in a list."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = self.first
        self.more = nnx.List([nnx.Linear(4, 4, rngs=rngs), self.first])

    def __call__(self, x: Array) -> Array:
        x = self.second(self.first(x))
        return self.more[1](self.more[0](x))


class SharedGrandchild(nnx.Module):
    """One module that two children hold."""

    def __init__(self, rngs: nnx.Rngs):
        shared = nnx.Linear(3, 4, rngs=rngs)
        self.left = Wrapper(shared, nnx.Linear(4, 2, rngs=rngs))
        self.right = Wrapper(shared, nnx.Linear(4, 5, rngs=rngs))

    def __call__(self, x: Array) -> Array:
        return jnp.concatenate([self.left(x), self.right(x)], -1)


class Wrapper(nnx.Module):
    """Two modules in turn."""

    def __init__(self, inner: nnx.Module, outer: nnx.Module):
        self.inner = inner
        self.outer = outer

    def __call__(self, x: Array) -> Array:
        return self.outer(self.inner(x))


class TiedVariables(nnx.Module):
    """The same Param under two paths: an embedding and an output layer's kernel."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 3, rngs=rngs)
        self.head = TransposedHead(self.embed.embedding)

    def __call__(self, ids: Array) -> Array:
        return self.head(self.embed(ids))


class TransposedHead(nnx.Module):
    """Multiplies by the transpose of a kernel that it is given."""

    def __init__(self, kernel: nnx.Param[Array]):
        self.kernel = kernel
        self.alias = kernel

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel.T + 0 * self.alias.sum()


class TiedKernels(nnx.Module):
    """Two layers whose kernels are one Param and whose biases are not."""

    def __init__(self, rngs: nnx.Rngs):
        self.a = nnx.Linear(3, 3, rngs=rngs)
        self.b = nnx.Linear(3, 3, rngs=rngs)
        self.b.kernel = self.a.kernel

    def __call__(self, x: Array) -> Array:
        return self.b(jnp.tanh(self.a(x)))


class Containers(nnx.Module):
    """`nnx.List` and `nnx.Dict`, nested, with statics among the data and more than ten items."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(11)])
        self.mixed = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.relu, 2, None, "text"])
        self.heads = nnx.Dict(
            a=nnx.Linear(4, 2, rngs=rngs),
            deep=nnx.Dict({"items": nnx.List([nnx.Dict({"leaf": nnx.Linear(4, 5, rngs=rngs)})])}),
            params=nnx.Param(jnp.ones(4)),
        )

    def __call__(self, x: Array) -> tuple[Array, Array]:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        x = self.mixed[1](self.mixed[0](x)) * self.heads["params"]
        return self.heads["a"](x), self.heads["deep"]["items"][0]["leaf"](x)


class PlainContainers(nnx.Module):
    """Python lists, tuples and dicts of modules and Params, marked as data."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.data([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.pair = nnx.data((nnx.Linear(3, 4, rngs=rngs), nnx.Param(jnp.ones(4))))
        self.table = nnx.data(
            {"a": nnx.Linear(4, 2, rngs=rngs), "b/c": [nnx.Param(jnp.ones(2)), None]}
        )
        self.by_index = nnx.data({0: nnx.Param(jnp.ones(2)), 10: nnx.Param(jnp.zeros(2))})
        self.empty = nnx.data({"list": [], "tuple": (), "dict": {}})

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        x = self.table["a"](self.pair[0](x) * self.pair[1])
        return x * self.table["b/c"][0] + self.by_index[0] + self.by_index[10]


class Moments(NamedTuple):
    """A plain pytree node."""

    mean: Any
    var: Any


@struct.dataclass
class Normaliser:
    """A `flax.struct` dataclass with a static field."""

    loc: Any
    scale: Any
    epsilon: float = struct.field(pytree_node=False, default=1e-3)


class PytreeAttributes(nnx.Module):
    """NamedTuples and flax dataclasses of arrays and of Variables as attributes."""

    def __init__(self, rngs: nnx.Rngs):
        self.moments = nnx.data(Moments(jnp.zeros(3), nnx.Param(jnp.ones(3))))
        self.normaliser = nnx.data(Normaliser(nnx.BatchStat(jnp.zeros(3)), np.ones(3, np.float32)))
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = (x - self.moments.mean) / jnp.sqrt(self.moments.var[...])
        x = (x - self.normaliser.loc) / (self.normaliser.scale + self.normaliser.epsilon)
        return self.linear(x)


class ArrayLeaves(nnx.Module):
    """Raw jax and numpy arrays as attributes, without a Variable."""

    def __init__(self, rngs: nnx.Rngs):
        self.jax_array = jnp.arange(3.0)
        self.numpy_array = np.arange(3, dtype=np.int32)
        self.key = jax.random.key(3)
        self.scalar = nnx.data(2.5)
        self.count = jnp.zeros((), jnp.int32)
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        self.count = self.count + 1
        noise = jax.random.normal(self.key, x.shape)
        return self.linear(x * self.jax_array + self.numpy_array + noise) * self.scalar


class ParentLink(nnx.Module):
    """A reference cycle: the child keeps its parent."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.child = ChildLink(self, rngs)

    def __call__(self, x: Array) -> Array:
        return self.child(x)


class ChildLink(nnx.Module):
    """Uses a layer of its parent."""

    def __init__(self, parent: ParentLink, rngs: nnx.Rngs):
        self.parent = parent
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.out(self.parent.linear(x))


class SelfLink(nnx.Module):
    """A node that holds itself, directly and in a list."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.me = self
        self.list = nnx.List([self])

    def __call__(self, x: Array) -> Array:
        return self.me.list[0].linear(x)


class NotPytree(nnx.Module, pytree=False):
    """A graph node that is no pytree, with a child that is one."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.label = "static"

    def __call__(self, x: Array) -> Array:
        return self.linear(x)


@nnx.dataclass
class DataclassModule(nnx.Module):
    """Fields declared by `nnx.data` and `nnx.static`."""

    linear: nnx.Linear
    table: Any = nnx.data()
    name: str = nnx.static(default="unnamed")
    scale: float = 2.0

    def __call__(self, x: Array) -> Array:
        return self.linear(x) * self.scale + self.table["bias"]


class NoVariables(nnx.Module):
    """No variable at all."""

    def __init__(self) -> None:
        self.scale = 2

    def __call__(self, x: Array) -> Array:
        return x * self.scale


class EmptyModule(nnx.Module):
    """No attribute at all."""

    def __call__(self, x: Array) -> Array:
        return x


class ClashingNames(nnx.Module):
    """Attributes that share names with Linen's fields, with collections and with list indices."""

    def __init__(self, rngs: nnx.Rngs):
        self.params = nnx.Linear(3, 3, rngs=rngs)
        self.parent = nnx.Param(jnp.ones(3))
        self.scope = nnx.BatchStat(jnp.zeros(3))
        setattr(self, "0", nnx.Param(jnp.ones(3)))
        setattr(self, "a/b", nnx.Param(jnp.ones(3)))
        self.batch_stats = nnx.Dict(kernel=nnx.Cache(jnp.ones(3)))
        self.name = "root"

    def __call__(self, x: Array) -> Array:
        x = self.params(x) * self.parent + self.scope + getattr(self, "0")
        return x * getattr(self, "a/b") * self.batch_stats["kernel"]


# --------------------------------------------------------------------------------------
# static attributes


class Mode(enum.Enum):
    """A static choice."""

    ADD = "add"
    MULTIPLY = "multiply"


class Level(enum.IntEnum):
    """A static choice that is an int."""

    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Config:
    """A user's own frozen settings object."""

    width: int = 4
    act: Callable[[Array], Array] = nnx.gelu


def _double(x: Array) -> Array:
    return 2 * x


class StaticAttributes(nnx.Module):
    """Static attributes of all kinds that are data or importable."""

    def __init__(self, rngs: nnx.Rngs):
        self.function = _double
        self.jax_function = jnp.tanh
        self.ufunc = jax.nn.silu
        self.partial = functools.partial(nnx.leaky_relu, negative_slope=0.2)
        self.builtin = operator.add
        self.dtype = jnp.bfloat16
        self.numpy_dtype = np.dtype("int8")
        self.mode = Mode.MULTIPLY
        self.level = Level.HIGH
        self.pair = (1, ("a", None), 2.5)
        self.nothing = None
        self.flag = True
        self.integer = 3
        self.big = 2**70
        self.real = 0.1
        self.infinite = math.inf
        self.phase = 1 + 2j
        self.text = "a/b [0] ü"
        self.raw = b"\x00\xff"
        self.spec = jax.sharding.PartitionSpec("data", None, ("a", "b"))
        self.precision = jax.lax.Precision.HIGHEST
        self.config = Config()
        self.cls = nnx.Linear
        self.names = frozenset({"a", "b"})
        self.span = range(3)
        self.ellipsis = ...
        self.init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.linear = nnx.Linear(3, 4, kernel_init=self.init, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.partial(self.function(self.linear(x)))
        x = self.config.act(x).astype(self.dtype)
        return self.builtin(x, self.real) if self.mode is Mode.ADD else x * self.integer


class UnhashableStatics(nnx.Module):
    """Static attributes that Python cannot hash (a slice: before Python 3.12)."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = {"depth": 2, "names": ["a", "b"], "more": {"x": None}}
        self.names = ["a", ("b", 1)]
        self.part = slice(0, 2)
        self.choices = {"a", "b"}
        self.linear = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear(x)[:, self.part] * self.table["depth"]


class LiveStatics(nnx.Module):
    """Static attributes that no import can reach: a lambda, a closure, a bound method."""

    def __init__(self, rngs: nnx.Rngs, factor: int = 3):
        self.lambda_ = lambda x: x + 1
        self.linear = nnx.Linear(3, 2, rngs=rngs)

        def scaled(x: Array) -> Array:
            return factor * x

        self.closure = scaled

    def __call__(self, x: Array) -> Array:
        return self.lambda_(self.closure(self.linear(x)))


class ExplicitKinds(nnx.Module):
    """`nnx.data` and `nnx.static` against the default, and a static that changes in a call."""

    def __init__(self, rngs: nnx.Rngs):
        self.scale = nnx.data(0.5)
        self.steps = nnx.data(3)
        self.sizes = nnx.static((2, 3))
        self.maybe = nnx.data(None)
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.mode = "first"

    def __call__(self, x: Array) -> Array:
        return self.linear(x) * self.scale + self.steps + sum(self.sizes)


# --------------------------------------------------------------------------------------
# variables and metadata


class Codebook(nnx.Variable[Array]):
    """A Variable type that has no collection name of its own."""


class FrozenParam(nnx.Param[Array]):
    """A subclass of Param."""


class DeepFrozenParam(FrozenParam):
    """A subclass of a subclass of Param."""


@nnx.register_variable_name("roundtrip_codes")
class RegisteredVariable(nnx.Variable[Array]):
    """A Variable type with a registered collection name."""


class Left:
    """A namespace."""

    class Stat(nnx.Variable[Array]):
        """A Variable type."""


class Right:
    """A namespace."""

    class Stat(nnx.Variable[Array]):
        """A Variable type of the same name as another."""


class DoubledParam(nnx.Param[Array]):
    """A Variable type with a getter of its own."""

    def get_value(self, **kwargs: Any) -> Array:
        return 2 * super().get_value(**kwargs)


class CustomVariables(nnx.Module):
    """Variables of many types."""

    def __init__(self, rngs: nnx.Rngs):
        self.base = nnx.Variable(jnp.ones(3))
        self.codebook = Codebook(jnp.ones(3))
        self.frozen = FrozenParam(rngs.params.normal((3,)))
        self.deep = DeepFrozenParam(jnp.ones(3))
        self.registered = RegisteredVariable(jnp.ones(3))
        self.left = Left.Stat(jnp.zeros(3))
        self.right = Right.Stat(jnp.ones(3))
        self.cache = nnx.Cache(jnp.zeros((), jnp.int32))
        self.stat = nnx.BatchStat(jnp.zeros(3))
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        self.left[...] += x.mean(0)
        self.cache[...] += 1
        x = x * self.base * self.codebook * self.frozen * self.deep * self.registered
        return self.linear(x + self.left * self.right + self.stat)


class OwnGetter(nnx.Module):
    """A Variable whose getter changes the value."""

    def __init__(self, rngs: nnx.Rngs):
        self.scale = DoubledParam(jnp.ones(3))

    def __call__(self, x: Array) -> Array:
        return x * self.scale[...]


class Metadata(nnx.Module):
    """Metadata in today's spellings, none of which needs a mesh."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.linear = nnx.Linear(
            3,
            4,
            kernel_metadata={"out_sharding": ("embed", "mlp"), "eager_sharding": False},
            bias_metadata={
                "out_sharding": ("mlp",),
                "sharding_rules": (("mlp", "model"), ("embed", None)),
                "eager_sharding": False,
            },
            rngs=rngs,
        )
        self.initializer = nnx.Linear(
            4,
            2,
            kernel_init=nnx.with_partitioning(
                init, (None, ("data", "model")), mesh=None, eager_sharding=False
            ),
            rngs=rngs,
        )
        self.spec = nnx.Param(
            jnp.ones((2, 5)),
            out_sharding=jax.sharding.PartitionSpec("data", None),
            eager_sharding=False,
            mesh=None,
        )
        self.empty = nnx.Param(jnp.ones(5), out_sharding=())
        self.none = nnx.Param(jnp.ones(5), out_sharding=None)
        self.own = nnx.Param(
            jnp.ones(5),
            description="own text",
            learning_rate=0.1,
            tags=("a", "b"),
            mode=Mode.ADD,
            tag="dropout",
        )
        self.wrapped = nnx.Param(
            nnx.with_metadata(init, group="head", decay=False)(rngs.params(), (5, 3))
        )

    def __call__(self, x: Array) -> Array:
        x = self.initializer(self.linear(x)) @ self.spec
        return (x * self.empty + self.none * self.own) @ self.wrapped


class UnhashableMetadata(nnx.Module):
    """Metadata that Python cannot hash."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(
            rngs.params.normal((3, 2)), nested={"depth": 2, "shape": [2, 3]}, names=["a"]
        )

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel


class DeprecatedSharding(nnx.Module):
    """The two deprecated spellings of `out_sharding`; flax renames them."""

    def __init__(self, rngs: nnx.Rngs):
        value = rngs.params.normal((3, 4))
        self.names = nnx.Param(value, sharding_names=("a", "b"), eager_sharding=False)
        self.sharding = nnx.Param(value, sharding=("a", "b"), eager_sharding=False)

    def __call__(self, x: Array) -> Array:
        return x @ (self.names + self.sharding)


def _plus_one(variable: nnx.Variable[Any], value: Any) -> Any:
    return value + 1


class DeprecatedHooks(nnx.Module):
    """A deprecated value hook."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jnp.ones((3, 2)), on_get_value=_plus_one)

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel[...]


def _mesh() -> jax.sharding.Mesh:
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((1, 1), ("data", "model"), (auto, auto), devices=jax.devices()[:1])


class EagerSharding(nnx.Module):
    """Parameters that are sharded when they are made, on a mesh in their metadata."""

    def __init__(self, rngs: nnx.Rngs):
        mesh = _mesh()
        self.named = nnx.Param(
            rngs.params.normal((3, 4)), out_sharding=("data", "model"), mesh=mesh
        )
        self.ruled = nnx.Param(
            jnp.ones((4, 2)),
            out_sharding=("mlp", None),
            sharding_rules=(("mlp", "model"),),
            mesh=mesh,
        )
        self.sharding = nnx.Param(
            jnp.ones(2),
            out_sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")),
        )

    def __call__(self, x: Array) -> Array:
        return x @ self.named @ self.ruled + self.sharding


class PytreeVariables(nnx.Module):
    """Variables whose values are a dict, a NamedTuple, a list with a hole, and nothing."""

    def __init__(self, rngs: nnx.Rngs):
        self.weights = nnx.Param({"kernel": rngs.params.normal((3, 3)), "b": {"bias": jnp.ones(3)}})
        self.stats = nnx.BatchStat(Moments(jnp.zeros(3), {"var": jnp.ones(3)}))
        self.items = nnx.Cache([jnp.zeros(2), None, (jnp.ones(3),)])
        self.empty = nnx.Variable({})
        self.none = nnx.Variable(None)

    def __call__(self, x: Array) -> Array:
        weights = self.weights.get_value()
        stats = self.stats.get_value()
        self.stats.set_value(Moments(x.mean(0), {"var": stats.var["var"] + 1}))
        return x @ weights["kernel"] + weights["b"]["bias"] + stats.mean


class DtypeZoo(nnx.Module):
    """Variables of many dtypes and odd shapes, Python numbers and keys among them."""

    def __init__(self, rngs: nnx.Rngs):
        self.half = nnx.Param(rngs.params.normal((3, 2), jnp.bfloat16))
        self.f16 = nnx.Param(jnp.ones(2, jnp.float16))
        self.phase = nnx.Param(jax.lax.complex(jnp.ones(3), jnp.full(3, 0.5)))
        self.scalar = nnx.Param(jnp.float32(2))
        self.empty = nnx.Param(jnp.zeros((0, 3)))
        self.f8 = nnx.Variable(jnp.ones(2, jnp.float8_e4m3fn))
        self.u8 = nnx.Variable(jnp.arange(2, dtype=jnp.uint8))
        self.flags = nnx.Variable(jnp.ones(2, bool))
        self.order = nnx.Variable(jnp.array([2, 0, 1]))
        self.key = nnx.Variable(jax.random.key(1))
        self.raw_key = nnx.Variable(jnp.array([0, 7], jnp.uint32))
        self.number = nnx.Variable(3)
        self.numpy = nnx.Variable(np.arange(2, dtype=np.int16))

    def __call__(self, x: Array) -> Array:
        x = jnp.abs(x * self.phase)[..., self.order[...]] @ self.half.astype(jnp.float32)
        x = x * self.f16 * self.scalar + self.f8.astype(jnp.float32) + self.u8
        x = x + jax.random.normal(self.key[...], x.shape) + self.empty.sum()
        return jnp.where(self.flags[...], x, 0) * self.number.get_value() + self.numpy[...]


class ReferenceVariable(nnx.Module):
    """A Variable that is a mutable array (`ref=True`)."""

    def __init__(self, rngs: nnx.Rngs):
        self.count = nnx.Variable(jnp.zeros((), jnp.int32), ref=True)
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        self.count[...] += 1
        return self.linear(x)


class HijaxVariables(nnx.Module):
    """A Variable that is a jax value of its own type (`hijax=True`)."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(rngs.params.normal((3, 2)), hijax=True)

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel[...]


# --------------------------------------------------------------------------------------
# randomness


class KeepsRngs(nnx.Module):
    """One `Rngs` held by two modules, a fork of it, and a single stream."""

    def __init__(self, rngs: nnx.Rngs):
        self.rngs = rngs
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.noise = Noise(rngs)
        self.fork = rngs.fork()
        self.stream = rngs.noise
        self.stream_fork = rngs.noise.fork()
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.dropout(self.noise(self.linear(x)))
        x = x + jax.random.normal(self.stream(), x.shape)
        x = x + jax.random.normal(self.stream_fork(), x.shape)
        return x + self.fork.params.normal(x.shape) + self.rngs.noise.uniform(x.shape)


class Noise(nnx.Module):
    """Adds noise from a stream of its own name."""

    def __init__(self, rngs: nnx.Rngs):
        self.rngs = rngs

    def __call__(self, x: Array) -> Array:
        return x + jax.random.normal(self.rngs.noise(), x.shape)


class SplitStreams(nnx.Module):
    """A stream with a stack of keys, and one made of a raw key."""

    def __init__(self, rngs: nnx.Rngs):
        self.stack = rngs.noise.split(3)
        self.raw = nnx.Rngs(noise=jax.random.PRNGKey(5))
        self.used = nnx.RngStream(jax.random.key(6), tag="own")
        self.used()

    def __call__(self, x: Array) -> Array:
        keys = jax.random.split(self.used(), 3)
        return (
            x
            + jax.vmap(lambda k: jax.random.normal(k, x.shape))(keys).sum(0)
            + self.raw.noise.normal(x.shape)
        )


class DropoutNet(nnx.Module):
    """Dropout layers with their own, a shared and no rngs."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Dropout(0.25, rng_collection="mask", rngs=rngs.mask)
        self.off = nnx.Dropout(0.0)
        self.at_call = nnx.Dropout(0.5)

    def __call__(self, x: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        x = self.off(self.second(self.first(x)))
        return x if rngs is None else self.at_call(x, rngs=rngs)


def _call_with_rngs(model: Any, x: Array, seed: int) -> Array:
    return model(x, rngs=nnx.Rngs(seed))


# --------------------------------------------------------------------------------------
# transforms


def _stacked(cls: type[Any], count: int, rngs: nnx.Rngs, *sizes: int, axis: int = 0) -> Any:
    """Build `count` modules as one, stacked at `axis`."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}))
    def make(rngs: nnx.Rngs) -> Any:
        return cls(*sizes, rngs=rngs)

    return make(rngs)


class Block(nnx.Module):
    """A residual block with batch statistics and dropout."""

    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(size, size, rngs=rngs)
        self.norm = nnx.BatchNorm(size, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.dropout(jnp.tanh(self.norm(self.linear(x))))


class ScanLayers(nnx.Module):
    """Stacked layers, run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs, layers: int = 3, size: int = 4):
        self.layers = _stacked(Block, layers, rngs, size)

    def __call__(self, x: Array) -> Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: Array, block: Block) -> Array:
            return block(x)

        return forward(x, self.layers)


class ScanRemat(nnx.Module):
    """Stacked layers at axis 1, run by `nnx.scan` of `nnx.remat`, with every size 3."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = _stacked(nnx.Linear, 3, rngs, 3, 3, axis=1)

    def __call__(self, x: Array) -> Array:
        @nnx.scan(in_axes=(nnx.Carry, nnx.StateAxes({nnx.Param: 1, ...: 0})), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x: Array, layer: nnx.Linear) -> Array:
            return jnp.tanh(layer(x))

        return forward(x, self.layers)


class VmapEnsemble(nnx.Module):
    """An ensemble of stacked models."""

    def __init__(self, rngs: nnx.Rngs):
        self.members = _stacked(MLP, 2, rngs, 4, 5, 3)

    def __call__(self, x: Array) -> Array:
        return nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(self.members, x)


class NestedStacks(nnx.Module):
    """A stack of stacks: built by vmap in vmap."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return _stacked(nnx.Linear, 3, rngs, 4, 4)

        self.stack = make(rngs)

    def __call__(self, x: Array) -> Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def layers(x: Array, layer: nnx.Linear) -> Array:
            return layer(x)

        return nnx.vmap(lambda stack, x: layers(x, stack), in_axes=(0, None))(self.stack, x)


class StackedMetadata(nnx.Module):
    """A stack whose new axis has a name in the parameters' sharding."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(
                4,
                4,
                kernel_metadata={"out_sharding": ("in", "out"), "eager_sharding": False},
                use_bias=False,
                rngs=rngs,
            )

        self.layers = make(rngs)

    def __call__(self, x: Array) -> Array:
        @nnx.scan(
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        def forward(x: Array, layer: nnx.Linear) -> Array:
            return layer(x)

        return forward(x, self.layers)


class ControlFlow(nnx.Module):
    """`nnx.cond`, `nnx.switch`, `nnx.while_loop`, `nnx.fori_loop`, `nnx.jit` and `nnx.grad`."""

    def __init__(self, rngs: nnx.Rngs):
        self.a = nnx.Linear(3, 3, rngs=rngs)
        self.b = nnx.Linear(3, 3, rngs=rngs)
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    @nnx.jit
    def head(self, x: Array) -> Array:
        return self.b(x)

    def __call__(self, x: Array, index: Array) -> Array:
        self.count[...] += 1
        x = nnx.cond(index > 0, lambda m, x: m.a(x), lambda m, x: m.b(x), self, x)
        x = nnx.switch(index, [lambda m, x: m.a(x), lambda m, x: m.b(x)], self, x)
        x = nnx.fori_loop(0, 2, lambda i, c: (c[0], c[0](c[1])), (self.a, x))[1]
        _, x, _ = nnx.while_loop(
            lambda c: c[2] < 2, lambda c: (c[0], c[0](c[1]), c[2] + 1), (self.b, x, 0)
        )
        grads = nnx.grad(lambda m, x: m(x).sum())(self.a, x)
        return self.head(x) + grads.kernel.sum()


# --------------------------------------------------------------------------------------
# captured values


class Sows(nnx.Module):
    """`sow` twice under one name, and at a child."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.child = SowChild(rngs)

    def __call__(self, x: Array) -> Array:
        x = self.linear(x)
        self.sow(nnx.Intermediate, "hidden", x)
        self.sow(nnx.Intermediate, "hidden", x + 1)
        self.sow(nnx.BatchStat, "total", x.sum(), init_fn=_zero, reduce_fn=_add)
        return self.child(x)


class SowChild(nnx.Module):
    """A child that sows."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = self.linear(x)
        self.sow(nnx.Intermediate, "out", y)
        return y


def _zero() -> Array:
    return jnp.zeros(())


def _add(a: Array, b: Array) -> Array:
    return a + b


class Perturbs(nnx.Module):
    """`perturb` after a layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.perturb("after", self.linear(x))


def _capture(model: nnx.Module, x: Array) -> tuple[Array, Any]:
    """Run a model and capture what it sows."""
    return nnx.capture(model, nnx.Intermediate, nnx.BatchStat)(x)


def _capture_perturbations(model: nnx.Module, x: Array) -> tuple[Array, Any]:
    """Run a model and capture what it perturbs."""
    return nnx.capture(model, nnx.Perturbation)(x)


# --------------------------------------------------------------------------------------
# realistic models and training


class ConvNet(nnx.Module):
    """Convolution, batch norm, pooling, dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 3, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm(self.conv(x)))
        return self.out(self.dropout(x.mean((1, 2))))


class DecoderBlock(nnx.Module):
    """A pre-norm decoder block with a cache."""

    def __init__(self, features: int, rngs: nnx.Rngs, decode: bool = False):
        self.attention = nnx.MultiHeadAttention(2, features, decode=decode, rngs=rngs)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.mlp = MLP(features, 5, features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        mask = None if self.attention.decode else nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.mlp(x)


class Transformer(nnx.Module):
    """A tied embedding and decoder blocks in a list."""

    def __init__(self, rngs: nnx.Rngs, decode: bool = False):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.blocks = nnx.List([DecoderBlock(4, rngs, decode) for _ in range(2)])
        self.norm = nnx.RMSNorm(4, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class Trainer(nnx.Module):
    """A model, its optimizer and its metrics as one object."""

    def __init__(self, model: nnx.Module, tx: optax.GradientTransformation, wrt: Any = nnx.Param):
        self.model = model
        self.optimizer = nnx.Optimizer(model, tx, wrt=wrt)
        self.metrics = nnx.MultiMetric(loss=metrics.Average("loss"))

    def __call__(self, x: Array) -> Array:
        """One training step towards zero."""

        def loss_fn(model: Any) -> Array:
            return (model(x) ** 2).mean()

        loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, self.optimizer.wrt))(
            self.model
        )
        self.optimizer.update(self.model, grads)
        self.metrics.update(loss=loss)
        return loss


def _trainer(tx: Callable[[], Any], wrt: Any = nnx.Param) -> Callable[[nnx.Rngs], Trainer]:
    return lambda rngs: Trainer(MLP(4, 5, 3, rngs=rngs), tx(), wrt)


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _labels(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


class OptimizerSharding(nnx.Module):
    """A parameter whose optimizer state is sharded otherwise than itself."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(
            4,
            3,
            kernel_metadata={
                "out_sharding": ("in", "out"),
                "optimizer_sharding": ("zero", None),
                "eager_sharding": False,
            },
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        return self.linear(x)


class LoRAModel(nnx.Module):
    """A base model with adapters, of which only the adapters are trained."""

    def __init__(self, rngs: nnx.Rngs):
        base = nnx.Linear(4, 3, rngs=rngs)
        self.adapted = nnx.LoRA(4, 2, 3, base_module=base, rngs=rngs)
        self.head = nnx.LoRALinear(3, 2, lora_rank=1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(self.adapted(x))


def _update(metric: Any, *args: Any, **kwargs: Any) -> Any:
    """Update a metric and compute it."""
    metric.update(*args, **kwargs)
    return metric.compute()


def _draw(rngs: Any) -> tuple[Array, Array]:
    """Draw two keys' data from rngs or from one stream."""
    return jax.random.key_data(rngs()), jax.random.key_data(rngs())


def _optimize(optimizer: nnx.Optimizer[Any], x: Array) -> Array:
    """Take a step with an optimizer whose model is rebuilt here."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
    optimizer.update(model, grads)
    return model.kernel[...]


def _optimize_held(optimizer: nnx.ModelAndOptimizer[Any], x: Array) -> Array:
    """Take a step with an optimizer that holds its model."""
    grads = nnx.grad(lambda m: (m(x) ** 2).mean())(optimizer.model)
    optimizer.update(grads)
    return optimizer.model.kernel[...]


def _average(ema: nnx.EMA, scale: float) -> Array:
    """Update moving averages with a model of constant values."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.full((4, 3), scale)
    ema.update(model)
    return ema.apply_to(model).kernel[...]


def _run_indexed(modules: Any, x: Array) -> Array:
    """Run the modules of a list or of a dict in turn."""
    for module in modules:
        x = module(x)
    return x


def _run_named(modules: Any, x: Array) -> Array:
    """Run the modules of a dict in the order of their names."""
    for name in sorted(modules):
        x = modules[name](x)
    return x


def _run_in_order(modules: Any, x: Array) -> Array:
    """Run the modules of a dict in the order in which they were put there."""
    for name in modules:
        x = modules[name](x)
    return x


def _eval_mode(model: Any) -> Any:
    """Put a model in eval mode."""
    model.eval()
    return model


def _local_class_module(rngs: nnx.Rngs) -> nnx.Module:
    """Build a module of a class that no import can reach."""

    class Local(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.linear(x)

    return Local(rngs)


def _with_cache(model: Any, shape: tuple[int, ...]) -> Any:
    """Give every attention layer a cache for inputs of `shape`."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention):
            module.init_cache(shape)
    return model


def _abstract(build: Callable[[nnx.Rngs], Any]) -> Callable[[nnx.Rngs], Any]:
    """Build without values."""
    return lambda rngs: nnx.eval_shape(build, rngs)


# --------------------------------------------------------------------------------------
# the table


def _layer(name: str, build: Callable[[nnx.Rngs], Any], *args: Any, **options: Any) -> NNXCase:
    """Make a case about the class that `name` starts with."""
    first = name.split("-")[0]
    cls = getattr(nnx, first, None) or getattr(metrics, first)
    return NNXCase(name=name, build=build, args=args, covers=(cls,), **options)


def _case(name: str, build: Callable[[nnx.Rngs], Any], *args: Any, **options: Any) -> NNXCase:
    return NNXCase(name=name, build=build, args=args, **options)


_PARTITIONED: dict[str, Any] = {"out_sharding": (None, "model"), "eager_sharding": False}
_COUNTS: dict[str, Any] = {"changes": (nnx.RngCount,)}
_STATS: dict[str, Any] = {"changes": (nnx.BatchStat,)}
_NOISE: dict[str, Any] = {"seeds": {"default": 0, "noise": 1, "mask": 2, "dropout": 3}}
_STEP: dict[str, Any] = {"changes": (nnx.Param, nnx.OptState, metrics.MetricState)}

LAYERS: tuple[NNXCase, ...] = (
    # linear
    _layer("Linear", lambda rngs: nnx.Linear(4, 3, rngs=rngs), _x(2, 4)),
    _layer("Linear-no-bias", lambda rngs: nnx.Linear(4, 3, use_bias=False, rngs=rngs), _x(5, 2, 4)),
    _layer(
        "Linear-mixed-precision",
        lambda rngs: nnx.Linear(4, 3, dtype=jnp.bfloat16, precision="highest", rngs=rngs),
        _x(2, 4),
    ),
    _layer(
        "Linear-bfloat16",
        lambda rngs: nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=rngs),
        _x(2, 4, dtype=jnp.bfloat16),
    ),
    _layer(
        "Linear-complex",
        lambda rngs: nnx.Linear(4, 3, param_dtype=jnp.complex64, rngs=rngs),
        _x(2, 4),
    ),
    _layer(
        "Linear-lambda-init",
        lambda rngs: nnx.Linear(
            4, 3, kernel_init=lambda key, shape, dtype: jnp.ones(shape, dtype), rngs=rngs
        ),
        _x(2, 4),
    ),
    _layer(
        "Linear-metadata",
        lambda rngs: nnx.Linear(4, 3, kernel_metadata=_PARTITIONED, rngs=rngs),
        _x(2, 4),
    ),
    _layer(
        "LinearGeneral",
        lambda rngs: nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=rngs),
        _x(2, 3, 4),
    ),
    _layer(
        "LinearGeneral-batch",
        lambda rngs: nnx.LinearGeneral(4, 5, batch_axis={0: 2}, rngs=rngs),
        _x(2, 3, 4),
    ),
    _layer(
        "Einsum",
        lambda rngs: nnx.Einsum("btd,dhe->bthe", (4, 3, 5), (3, 5), rngs=rngs),
        _x(2, 2, 4),
    ),
    _layer(
        "Einsum-at-call",
        lambda rngs: nnx.Einsum("bd,de->be", (4, 3), rngs=rngs),
        _x(2, 4),
        "ad,de->ae",
    ),
    _layer(
        "Embed",
        lambda rngs: nnx.Embed(5, 3, rngs=rngs),
        _ids(2, 4, below=5),
        methods=(MethodCall(method="attend", args=(_x(2, 3),)),),
    ),
    _layer(
        "Embed-bfloat16",
        lambda rngs: nnx.Embed(5, 3, dtype=jnp.bfloat16, rngs=rngs),
        _ids(2, below=5),
    ),
    # convolution
    _layer("Conv", lambda rngs: nnx.Conv(2, 3, (2, 3), rngs=rngs), _x(2, 5, 4, 2)),
    _layer("Conv-1d-int-kernel", lambda rngs: nnx.Conv(4, 3, 2, rngs=rngs), _x(2, 5, 4)),
    _layer(
        "Conv-3d",
        lambda rngs: nnx.Conv(2, 3, (2, 2, 2), padding="VALID", rngs=rngs),
        _x(1, 3, 3, 4, 2),
    ),
    _layer(
        "Conv-strided-dilated",
        lambda rngs: nnx.Conv(
            2,
            3,
            (2, 2),
            strides=(2, 1),
            kernel_dilation=(1, 2),
            padding=((1, 0), (0, 1)),
            rngs=rngs,
        ),
        _x(2, 5, 4, 2),
    ),
    _layer(
        "Conv-grouped",
        lambda rngs: nnx.Conv(
            4, 2, (3,), feature_group_count=2, use_bias=False, padding="CIRCULAR", rngs=rngs
        ),
        _x(2, 5, 4),
    ),
    _layer(
        "Conv-causal", lambda rngs: nnx.Conv(4, 3, (2,), padding="CAUSAL", rngs=rngs), _x(2, 5, 4)
    ),
    _layer(
        "Conv-masked",
        lambda rngs: nnx.Conv(4, 3, (2,), mask=jnp.ones((2, 4, 3)).at[0].set(0), rngs=rngs),
        _x(2, 5, 4),
    ),
    _layer("Conv-no-batch", lambda rngs: nnx.Conv(2, 3, (2, 2), rngs=rngs), _x(5, 4, 2)),
    _layer(
        "ConvTranspose", lambda rngs: nnx.ConvTranspose(2, 3, (2, 3), rngs=rngs), _x(2, 5, 4, 2)
    ),
    _layer(
        "ConvTranspose-strided",
        lambda rngs: nnx.ConvTranspose(
            4, 3, (3,), strides=(2,), transpose_kernel=True, padding="VALID", rngs=rngs
        ),
        _x(2, 5, 4),
    ),
    # normalisation
    _layer("BatchNorm", lambda rngs: nnx.BatchNorm(3, rngs=rngs), _x(5, 3), **_STATS),
    _layer("BatchNorm-eval", lambda rngs: _eval_mode(nnx.BatchNorm(3, rngs=rngs)), _x(5, 3)),
    _layer(
        "BatchNorm-bare",
        lambda rngs: nnx.BatchNorm(
            3, use_bias=False, use_scale=False, momentum=0.5, axis=1, rngs=rngs
        ),
        _x(5, 3, 2),
        **_STATS,
    ),
    _layer(
        "BatchNorm-masked",
        lambda rngs: nnx.BatchNorm(3, rngs=rngs),
        _x(5, 3),
        kwargs={"mask": np.array([[True], [True], [False], [True], [False]])},
        **_STATS,
    ),
    _layer("LayerNorm", lambda rngs: nnx.LayerNorm(3, rngs=rngs), _x(2, 3)),
    _layer(
        "LayerNorm-bare",
        lambda rngs: nnx.LayerNorm(3, use_bias=False, use_scale=False, epsilon=1e-2, rngs=rngs),
        _x(2, 3),
    ),
    _layer("RMSNorm", lambda rngs: nnx.RMSNorm(3, rngs=rngs), _x(2, 3)),
    _layer("GroupNorm", lambda rngs: nnx.GroupNorm(4, num_groups=2, rngs=rngs), _x(3, 4)),
    _layer(
        "GroupNorm-size",
        lambda rngs: nnx.GroupNorm(4, num_groups=None, group_size=2, rngs=rngs),
        _x(3, 5, 4),
    ),
    _layer("InstanceNorm", lambda rngs: nnx.InstanceNorm(3, rngs=rngs), _x(2, 5, 3)),
    _layer(
        "WeightNorm",
        lambda rngs: nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
        _x(2, 4),
        # The call overwrites the wrapped layer's kernel with the normalised one.
        changes=(nnx.Param,),
    ),
    _layer(
        "WeightNorm-no-scale",
        lambda rngs: nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), use_scale=False, rngs=rngs),
        _x(2, 4),
        changes=(nnx.Param,),
    ),
    _layer(
        "SpectralNorm",
        lambda rngs: nnx.SpectralNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
        _x(2, 4),
        changes=(nnx.Param, nnx.BatchStat),
    ),
    _layer(
        "SpectralNorm-eval",
        lambda rngs: nnx.SpectralNorm(
            nnx.Conv(4, 3, (2,), rngs=rngs), n_steps=2, update_stats=False, rngs=rngs
        ),
        _x(2, 5, 4),
        changes=(nnx.Param,),
    ),
    # stochastic, activation, combinators
    _layer("Dropout", lambda rngs: nnx.Dropout(0.5, rngs=rngs), _x(4, 5), **_COUNTS),
    _layer("Dropout-eval", lambda rngs: nnx.Dropout(0.5, deterministic=True), _x(4, 5)),
    _layer(
        "Dropout-broadcast",
        lambda rngs: nnx.Dropout(0.5, broadcast_dims=(0,), rng_collection="mask", rngs=rngs),
        _x(4, 5),
        **_COUNTS,
        **_NOISE,
    ),
    _layer("PReLU", lambda rngs: nnx.PReLU(), _x(2, 3)),
    _layer("PReLU-slope", lambda rngs: nnx.PReLU(0.3, param_dtype=jnp.bfloat16), _x(2, 3)),
    _layer(
        "Sequential",
        lambda rngs: nnx.Sequential(
            nnx.Linear(4, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 2, rngs=rngs)
        ),
        _x(2, 4),
    ),
    _layer(
        "Sequential-lambdas",
        lambda rngs: nnx.Sequential(
            nnx.Linear(4, 3, rngs=rngs), lambda x: (x, x), lambda a, b: a + b
        ),
        _x(2, 4),
        importable=False,
    ),
    _layer("Sequential-empty", lambda rngs: nnx.Sequential(), _x(2, 4)),
    _layer(
        "List",
        lambda rngs: nnx.List([nnx.Linear(4, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 2, rngs=rngs)]),
        _x(2, 4),
        call=_run_indexed,
    ),
    _layer(
        "Dict",
        lambda rngs: nnx.Dict({"b": nnx.Linear(4, 3, rngs=rngs), "a": nnx.relu}),
        _x(2, 4),
        call=_run_named,
    ),
    _layer(
        "Dict-order",
        lambda rngs: nnx.Dict({"b": nnx.Linear(4, 3, rngs=rngs), "a": nnx.relu}),
        _x(2, 4),
        call=_run_in_order,
        # `nnx.split` sorts a node's attributes, so under `nnx.jit` "a" runs before "b".
        jittable=False,
    ),
    # attention
    _layer(
        "MultiHeadAttention",
        lambda rngs: nnx.MultiHeadAttention(2, 5, qkv_features=4, decode=False, rngs=rngs),
        _x(2, 3, 5),
    ),
    _layer(
        "MultiHeadAttention-cross",
        lambda rngs: nnx.MultiHeadAttention(
            2, 4, in_kv_features=3, use_bias=False, normalize_qk=True, decode=False, rngs=rngs
        ),
        _x(2, 3, 4),
        _x(2, 5, 3),
        kwargs={"mask": np.ones((2, 1, 3, 5), bool)},
    ),
    _layer(
        "MultiHeadAttention-dropout",
        lambda rngs: nnx.MultiHeadAttention(
            2, 4, dropout_rate=0.5, keep_rngs=True, decode=False, rngs=rngs
        ),
        _x(2, 3, 4),
        kwargs={"deterministic": False},
        **_COUNTS,
    ),
    _layer(
        "MultiHeadAttention-decode",
        lambda rngs: _with_cache(nnx.MultiHeadAttention(2, 4, decode=True, rngs=rngs), (2, 5, 4)),
        _x(2, 1, 4),
        changes=(nnx.Cache,),
    ),
    # recurrence
    _layer(
        "LSTMCell",
        lambda rngs: nnx.LSTMCell(4, 3, rngs=rngs),
        (_x(2, 3), _x(2, 3, seed=1)),
        _x(2, 4),
    ),
    _layer(
        "OptimizedLSTMCell",
        lambda rngs: nnx.OptimizedLSTMCell(4, 3, rngs=rngs),
        (_x(2, 3), _x(2, 3, seed=1)),
        _x(2, 4),
    ),
    _layer("GRUCell", lambda rngs: nnx.GRUCell(4, 3, rngs=rngs), _x(2, 3), _x(2, 4)),
    _layer(
        "SimpleCell",
        lambda rngs: nnx.SimpleCell(3, 3, residual=True, rngs=rngs),
        _x(2, 3),
        _x(2, 3, seed=1),
    ),
    _layer(
        "RNN",
        lambda rngs: nnx.RNN(nnx.LSTMCell(4, 3, rngs=rngs), rngs=rngs),
        _x(2, 5, 4),
        **_COUNTS,
    ),
    _layer(
        "RNN-lengths",
        lambda rngs: nnx.RNN(
            nnx.GRUCell(4, 3, rngs=rngs),
            return_carry=True,
            reverse=True,
            keep_order=True,
            rngs=rngs,
        ),
        _x(2, 5, 4),
        kwargs={"seq_lengths": np.array([5, 3], np.int32)},
        **_COUNTS,
    ),
    _layer(
        "RNN-time-major",
        lambda rngs: nnx.RNN(nnx.SimpleCell(4, 3, rngs=rngs), time_major=True, unroll=2, rngs=rngs),
        _x(5, 2, 4),
        **_COUNTS,
    ),
    _layer(
        "Bidirectional",
        lambda rngs: nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(4, 3, rngs=rngs), rngs=rngs),
            nnx.RNN(nnx.GRUCell(4, 3, rngs=rngs), rngs=rngs),
            rngs=rngs,
        ),
        _x(2, 5, 4),
        **_COUNTS,
    ),
    # adapters
    _layer("LoRA", lambda rngs: nnx.LoRA(4, 2, 3, rngs=rngs), _x(2, 4)),
    _layer(
        "LoRA-base",
        lambda rngs: nnx.LoRA(4, 2, 3, base_module=nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
        _x(2, 4),
    ),
    _layer(
        "LoRA-own-type",
        lambda rngs: nnx.LoRA(4, 2, 3, lora_param_type=FrozenParam, rngs=rngs),
        _x(2, 4),
    ),
    _layer("LoRALinear", lambda rngs: nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs), _x(2, 4)),
    # rngs
    _layer("Rngs", lambda rngs: rngs, call=_draw, **_NOISE, **_COUNTS),
    _layer("RngStream", lambda rngs: rngs.noise, call=_draw, **_NOISE, **_COUNTS),
    # metrics
    _layer(
        "Average",
        lambda rngs: metrics.Average("loss"),
        call=_update,
        kwargs={"loss": _x(4)},
        changes=(metrics.MetricState,),
    ),
    _layer(
        "Welford",
        lambda rngs: metrics.Welford(),
        call=_update,
        kwargs={"values": _x(4)},
        changes=(metrics.MetricState,),
    ),
    _layer(
        "Accuracy",
        lambda rngs: metrics.Accuracy(),
        call=_update,
        kwargs={"logits": _x(4, 3), "labels": _ids(4, below=3)},
        changes=(metrics.MetricState,),
    ),
    _layer(
        "Accuracy-threshold",
        lambda rngs: metrics.Accuracy(threshold=0.5),
        call=_update,
        kwargs={"logits": _x(4), "labels": _ids(4, below=2)},
        changes=(metrics.MetricState,),
    ),
    _layer(
        "MultiMetric",
        lambda rngs: nnx.MultiMetric(accuracy=metrics.Accuracy(), loss=metrics.Average()),
        call=_update,
        kwargs={"logits": _x(4, 3), "labels": _ids(4, below=3), "values": _x(4)},
        changes=(metrics.MetricState,),
    ),
    # training
    _layer(
        "Optimizer",
        lambda rngs: nnx.Optimizer(nnx.Linear(4, 3, rngs=rngs), optax.adam(0.1), wrt=nnx.Param),
        _x(2, 4),
        call=_optimize,
        changes=(nnx.OptState,),
    ),
    _layer(
        "ModelAndOptimizer",
        lambda rngs: nnx.ModelAndOptimizer(nnx.Linear(4, 3, rngs=rngs), optax.sgd(0.1, 0.9)),
        _x(2, 4),
        call=_optimize_held,
        changes=(nnx.Param, nnx.OptState),
    ),
    _layer(
        "EMA",
        lambda rngs: nnx.EMA(nnx.Linear(4, 3, rngs=rngs), decay=0.9),
        0.5,
        call=_average,
        changes=(nnx.Variable,),
    ),
)

if hasattr(nnx, "RoPE"):  # since flax 0.12.11
    LAYERS += (
        _layer("RoPE", lambda rngs: nnx.RoPE(), _x(2, 3, 4)),
        _layer(
            "RoPE-table",
            lambda rngs: nnx.RoPE(embedding_size=4, max_seq_len=5),
            _x(2, 3, 4),
            warns="'.value' access is now deprecated",  # flax's own use
        ),
        NNXCase(
            name="RoPE-attention",
            build=lambda rngs: nnx.MultiHeadAttention(
                2,
                4,
                attention_fn=functools.partial(
                    nnx.dot_product_attention_with_rope, rope=nnx.RoPE()
                ),
                decode=False,
                rngs=rngs,
            ),
            args=(_x(2, 3, 4),),
            covers=(nnx.RoPE, nnx.MultiHeadAttention),
        ),
    )

USER: tuple[NNXCase, ...] = (
    # sharing and containers
    _case("mlp", lambda rngs: MLP(4, 5, 3, rngs=rngs), _x(2, 4)),
    _case("shared-child", SharedChild, _x(2, 4)),
    _case("shared-grandchild", SharedGrandchild, _x(2, 3)),
    _case("tied-variables", TiedVariables, _ids(2, 4, below=5)),
    _case("tied-kernels", TiedKernels, _x(2, 3)),
    _case("containers", Containers, _x(2, 3)),
    _case("plain-containers", PlainContainers, _x(2, 3)),
    _case("pytree-attributes", PytreeAttributes, _x(2, 3)),
    _case("array-leaves", ArrayLeaves, _x(2, 3)),
    _case("cycle-parent", ParentLink, _x(2, 3)),
    _case("cycle-self", SelfLink, _x(2, 3)),
    _case("not-a-pytree", NotPytree, _x(2, 3)),
    _case(
        "dataclass-module",
        lambda rngs: DataclassModule(nnx.Linear(3, 2, rngs=rngs), {"bias": jnp.ones(2)}),
        _x(2, 3),
    ),
    _case("no-variables", lambda rngs: NoVariables(), _x(2, 3)),
    _case("empty-module", lambda rngs: EmptyModule(), _x(2, 3)),
    _case("clashing-names", ClashingNames, _x(2, 3)),
    _case("local-class", _local_class_module, _x(2, 3), importable=False),
    # statics
    _case("static-attributes", StaticAttributes, _x(2, 3)),
    _case("unhashable-statics", UnhashableStatics, _x(2, 3)),
    _case("lambda-and-closure", LiveStatics, _x(2, 3), importable=False),
    _case("explicit-data-and-static", ExplicitKinds, _x(2, 3)),
    # variables and metadata
    _case("custom-variables", CustomVariables, _x(2, 3), changes=(Left.Stat, nnx.Cache)),
    _case("own-getter", OwnGetter, _x(2, 3)),
    _case("metadata", Metadata, _x(2, 3)),
    _case("unhashable-metadata", UnhashableMetadata, _x(2, 3)),
    _case(
        "deprecated-sharding",
        DeprecatedSharding,
        _x(2, 3),
        warns="is deprecated, use 'out_sharding'",
    ),
    _case("deprecated-hooks", DeprecatedHooks, _x(2, 3), warns="Variable hooks are deprecated"),
    _case("eager-sharding", EagerSharding, _x(2, 3)),
    _case("pytree-variables", PytreeVariables, _x(2, 3), **_STATS),
    _case("dtype-zoo", DtypeZoo, _x(2, 3)),
    _case("reference-variable", ReferenceVariable, _x(2, 3), changes=(nnx.Variable,)),
    # `nnx.jit` fails: "DynamicJaxprTracer has no attribute _can_update".
    _case("hijax-variable", HijaxVariables, _x(2, 3), jittable=False),
    # randomness
    _case("keeps-rngs", KeepsRngs, _x(2, 3), **_NOISE, **_COUNTS),
    _case("split-streams", SplitStreams, _x(2, 3), **_NOISE, **_COUNTS),
    _case("dropout-streams", DropoutNet, _x(4, 5), **_NOISE, **_COUNTS),
    _case(
        "dropout-rngs-at-call", DropoutNet, _x(4, 5), 7, call=_call_with_rngs, **_NOISE, **_COUNTS
    ),
    # transforms
    _case("scan-layers", ScanLayers, _x(5, 4), changes=(nnx.BatchStat, nnx.RngCount)),
    _case("scan-remat-equal-dims-axis-1", ScanRemat, _x(3, 3)),
    _case("vmap-ensemble", VmapEnsemble, _x(2, 4)),
    _case("nested-stacks", NestedStacks, _x(5, 4)),
    _case("stacked-metadata", StackedMetadata, _x(2, 4)),
    _case("control-flow", ControlFlow, _x(2, 3), np.array(1, np.int32), **_STATS),
    # captured values
    _case("sow-captured", Sows, _x(2, 3), call=_capture),
    _case(
        "sow-stored",
        Sows,
        _x(2, 3),
        warns="outside of 'nnx.capture",
        changes=(nnx.Intermediate, nnx.BatchStat),
    ),
    _case("perturb-captured", Perturbs, _x(2, 3), call=_capture_perturbations),
    _case(
        "perturb-stored",
        Perturbs,
        _x(2, 3),
        warns="outside of 'nnx.capture",
        changes=(nnx.Perturbation,),
    ),
    # realistic models
    _case("convnet-train", ConvNet, _x(2, 5, 4, 2), changes=(nnx.BatchStat, nnx.RngCount)),
    _case("convnet-eval", lambda rngs: _eval_mode(ConvNet(rngs)), _x(2, 5, 4, 2)),
    _case("transformer", Transformer, _ids(2, 3, below=5)),
    _case(
        "transformer-decode",
        lambda rngs: _with_cache(Transformer(rngs, decode=True), (2, 3, 4)),
        _ids(2, 1, below=5),
        changes=(nnx.Cache,),
    ),
    # training
    _case("train-adam", _trainer(lambda: optax.adam(0.1)), _x(2, 4), **_STEP),
    _case("train-sgd-no-state", _trainer(lambda: optax.sgd(0.1)), _x(2, 4), **_STEP),
    _case(
        "train-chain",
        _trainer(
            lambda: optax.chain(
                optax.clip_by_global_norm(1.0),
                optax.adamw(optax.cosine_decay_schedule(0.1, 5), mask=_is_matrix),
            )
        ),
        _x(2, 4),
        **_STEP,
    ),
    _case(
        "train-masked",
        _trainer(lambda: optax.masked(optax.adam(0.1), _is_matrix)),
        _x(2, 4),
        **_STEP,
    ),
    _case(
        "train-partition",
        _trainer(
            lambda: optax.partition({"matrix": optax.adam(0.1), "vector": optax.sgd(0.1)}, _labels)
        ),
        _x(2, 4),
        **_STEP,
    ),
    _case(
        "train-multi-steps",
        _trainer(lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()),
        _x(2, 4),
        # The first of two micro-steps leaves the parameters as they are.
        changes=(nnx.OptState, metrics.MetricState),
    ),
    _case(
        "train-inject-hyperparams",
        _trainer(lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1)),
        _x(2, 4),
        **_STEP,
    ),
    _case(
        "train-factored",
        _trainer(lambda: optax.adafactor(0.1, min_dim_size_to_factor=2)),
        _x(2, 4),
        **_STEP,
    ),
    _case(
        "train-optimizer-sharding",
        lambda rngs: Trainer(OptimizerSharding(rngs), optax.adam(0.1)),
        _x(2, 4),
        **_STEP,
    ),
    _case(
        "train-lora-only",
        lambda rngs: Trainer(LoRAModel(rngs), optax.adam(0.1), wrt=nnx.LoRAParam),
        _x(2, 4),
        changes=(nnx.LoRAParam, nnx.OptState, metrics.MetricState),
    ),
    _case(
        "train-tied",
        lambda rngs: Trainer(TiedKernels(rngs), optax.adam(0.1)),
        _x(2, 3),
        **_STEP,
    ),
    # models without values
    _case(
        "abstract-mlp", _abstract(lambda rngs: MLP(4, 5, 3, rngs=rngs)), call=None, abstract=True
    ),
    _case("abstract-transformer", _abstract(Transformer), call=None, abstract=True),
    _case("abstract-tied", _abstract(TiedVariables), call=None, abstract=True),
    _case("abstract-metadata", _abstract(Metadata), call=None, abstract=True),
    _case(
        "abstract-trainer", _abstract(_trainer(lambda: optax.adam(0.1))), call=None, abstract=True
    ),
)

CASES: tuple[NNXCase, ...] = LAYERS + USER
