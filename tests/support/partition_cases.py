"""Small annotated modules, in every spelling of Linen and NNX, alone and in lifted transforms.

Of linsey, only the wrappers of its bridge are used here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, struct
from flax.core import meta
from flax.linen import partitioning
from flax.nnx import bridge
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import linsey.bridge
from linsey.bridge import flax12

Array = jax.Array
MESH_AXES = ("data", "model")
RULES = (("embed", "model"), ("mlp", "model"), ("mlp", "data"), ("layers", None), ("heads", "data"))
X = jax.ShapeDtypeStruct((2, 4), jnp.float32)
INIT = nn.initializers.lecun_normal()


def mesh(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    """A mesh of one device: enough to annotate for."""
    return jax.make_mesh((1, 1), MESH_AXES, axis_types=(axis_type,) * 2, devices=jax.devices()[:1])


# --------------------------------------------------------------------------------------
# Linen: boxes


class Tagged(nn.Partitioned[Any]):
    """A box with a field of its own."""

    tag: str = struct.field(default="none", pytree_node=False)


class TaggedLogically(nn.LogicallyPartitioned):
    """The same for logical names."""

    tag: str = struct.field(default="none", pytree_node=False)


class Turned(nn.Partitioned[Any]):
    """A box that gives another spec than its names."""

    def get_partition_spec(self) -> P:
        """The names, backwards."""
        return P(*reversed(self.names))


class Plain(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A box that knows nothing of partitions."""

    value: Any

    def unbox(self) -> Any:
        """The value."""
        return self.value

    def replace_boxed(self, val: Any) -> "Plain":
        """A box around another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> "Plain":
        """The same box."""
        return self

    remove_axis = add_axis


def _in(box: Callable[..., Any], **fields: Any) -> Callable[..., Any]:
    return lambda key, shape: box(INIT(key, shape), **fields)


LINEN_INITS: dict[str, Callable[..., Any]] = {
    "partitioned": nn.with_partitioning(INIT, ("data", "model")),
    "partitioned-spec": nn.with_partitioning(INIT, P("data", None)),
    "partitioned-tuple": nn.with_partitioning(INIT, (("data", "model"), None)),
    "partitioned-unconstrained": nn.with_partitioning(INIT, (P.UNCONSTRAINED, "model")),
    "partitioned-none": nn.with_partitioning(INIT, (None, None)),
    "partitioned-nothing": nn.with_partitioning(INIT, ()),
    "partitioned-short": nn.with_partitioning(INIT, ("data",)),
    "partitioned-empty-name": nn.with_partitioning(INIT, ("", "model")),
    "partitioned-mesh": nn.with_partitioning(INIT, ("data", "model"), mesh=mesh()),
    "logical": nn.with_logical_partitioning(INIT, ("embed", "mlp")),
    "logical-unmapped": nn.with_logical_partitioning(INIT, ("embed", "other")),
    "logical-none": nn.with_logical_partitioning(INIT, (None, "mlp")),
    "logical-unconstrained": nn.with_logical_partitioning(INIT, ("mlp", P.UNCONSTRAINED)),
    "logical-rules": nn.with_logical_partitioning(
        INIT, ("embed", "mlp"), rules=(("embed", "data"), ("mlp", "data"), ("mlp", "model"))
    ),
    "logical-mesh": nn.with_logical_partitioning(INIT, ("embed", "mlp"), mesh=mesh()),
    "subclass": _in(Tagged, names=("data", "model"), tag="mine"),
    "subclass-logical": _in(TaggedLogically, names=("embed", "mlp"), tag="mine"),
    "subclass-spec": _in(Turned, names=("data", None)),
    "other-box": _in(Plain),
    "none": INIT,
}
"""An initialiser of a kernel, by what it is annotated with."""


class Dense(nn.Module):
    """A kernel whose initialiser annotates it, and a counter in another collection."""

    name_of: str = "partitioned"

    @nn.compact
    def __call__(self, x: Array, _: Any = None) -> Array:
        kernel = self.param("kernel", LINEN_INITS[self.name_of], (x.shape[-1], 4))
        cache = self.variable("cache", "last", lambda: meta.Partitioned(x * 0, ("data", None)))
        return x @ kernel + cache.value.sum()


NAMED = {nn.PARTITION_NAME: "layers"}
ENS = {nn.PARTITION_NAME: "ens"}


class Lifted(nn.Module):
    """A module in lifted transforms."""

    make: Callable[..., nn.Module]
    """Makes the module, by its name."""
    lift: str
    """Which: ``scan``, ``vmap``, ``scan-vmap``."""
    axis: int = 0
    """Where the parameters are stacked; the cache is at 0."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        make, axis = self.make, self.axis

        class Body(nn.Module):
            @nn.compact
            def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
                return make(name="inner")(x), None

        lifted: Any = Body
        axes = {"params": axis, "cache": 0}
        keys = {"params": True}
        if self.lift.endswith("vmap"):
            lifted = _mean(
                _vmap(Body, {**axes, "nnx": None}, NAMED if self.lift == "vmap" else ENS)
            )
        if self.lift.startswith("scan"):
            lifted = nn.scan(
                lifted, axes, variable_broadcast="nnx", split_rngs=keys, length=2,
                metadata_params=NAMED,
            )  # fmt: skip
        return lifted(name="lifted")(x, None)[0]


def _vmap(target: Any, axes: Any, named: Any) -> Any:
    return nn.vmap(
        target, axes, {"params": True}, in_axes=None, out_axes=(0, None), axis_size=3,
        metadata_params=named,
    )  # fmt: skip


def _mean(lifted: Any) -> Any:
    class Mean(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
            return lifted(name="each")(x, None)[0].mean(0), None

    return Mean


LIFTS = [("scan", 0), ("scan", 1), ("vmap", 0), ("vmap", 2), ("scan-vmap", 0), ("scan-vmap", 1)]


# --------------------------------------------------------------------------------------
# Linen: axes in a collection of their own


class WithAxes(nn.Module):
    """`param_with_axes` and `variable_with_axes`."""

    @nn.compact
    def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
        kernel = partitioning.param_with_axes("kernel", INIT, (4, 4), axes=("embed", "mlp"))
        scale = partitioning.param_with_axes("scale", nn.initializers.ones, (4,), axes=(None,))
        self.param("free", nn.initializers.zeros, (4,))
        last = partitioning.variable_with_axes(
            "cache", "last", jnp.zeros, (3, 4), axes=("t", "mlp")
        )
        return x @ kernel * scale + last.value.sum(), None


class LiftedWithAxes(nn.Module):
    """The same in a transform: `plain`, `scan_with_axes`, `vmap_with_axes`, `scan` or `vmap`."""

    lift: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        axes, keys = {"params": 1, "cache": 0}, {"params": True}
        both = ("params", "cache")
        if self.lift == "scan_with_axes":
            lifted = partitioning.scan_with_axes(
                WithAxes, axes, split_rngs=keys, length=2, axes_collections=both
            )
            return lifted(name="lifted")(x, None)[0]
        if self.lift == "vmap_with_axes":
            lifted = partitioning.vmap_with_axes(
                WithAxes, axes, keys, in_axes=None, out_axes=(0, None), axis_size=3,
                partitioning_axis_names=dict.fromkeys(both, "ens"),
            )  # fmt: skip
            return lifted(name="lifted")(x)[0].mean(0)
        kept = ("params_axes", "cache_axes")
        if self.lift == "scan":
            lifted = nn.scan(WithAxes, axes, variable_broadcast=kept, split_rngs=keys, length=2)
            return lifted(name="lifted")(x, None)[0]
        if self.lift == "vmap":
            axes |= dict.fromkeys(kept)
            lifted = nn.vmap(WithAxes, axes, keys, in_axes=None, out_axes=(0, None), axis_size=3)
            return lifted(name="lifted")(x)[0].mean(0)
        return WithAxes(name="lifted")(x)[0]


# --------------------------------------------------------------------------------------
# NNX


class Block(nnx.Module):
    """A kernel with an annotation, and a variable without one."""

    def __init__(self, rngs: nnx.Rngs, spec: Any = ("data", "model"), **metadata: Any) -> None:
        kernel = INIT(rngs.params(), (4, 4))
        self.kernel = nnx.Param(kernel, out_sharding=spec, **metadata)
        self.count = nnx.Variable(jnp.zeros(()))

    def __call__(self, x: Array) -> Array:
        return x @ self.kernel[...]


class Layers(nnx.Module):
    """flax's own layers, annotated in each way that they take."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        spec = ("data", "model")
        annotated = nnx.with_partitioning(INIT, spec, mine=1)
        self.partitioning = nnx.Linear(4, 4, kernel_init=annotated, rngs=rngs)
        rules = (("embed", "data"), ("mlp", None))
        metadata = {"out_sharding": ("embed", "mlp"), "sharding_rules": rules, "mine": "kept"}
        self.metadata = nnx.Linear(4, 4, kernel_metadata=metadata, use_bias=False, rngs=rngs)
        with_metadata = nnx.with_metadata(INIT, out_sharding=P("data", None), mine=(1, 2))
        self.with_metadata = nnx.Linear(4, 4, kernel_init=with_metadata, rngs=rngs)
        boxed = bridge.with_partitioning(INIT, spec)
        self.boxed = nnx.Linear(4, 4, kernel_init=boxed, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.boxed(self.with_metadata(self.metadata(self.partitioning(x))))


def stack(make: Callable[[nnx.Rngs], Any], *axes: int) -> Callable[[nnx.Rngs], Any]:
    """A module stacked once for each axis, innermost first, by `nnx.vmap`."""
    for number, axis in enumerate(axes):
        state_axes = nnx.StateAxes({nnx.Param: axis, ...: 0})

        def stacked(
            rngs: nnx.Rngs, inner: Any = make, number: int = number, at: Any = state_axes
        ) -> Any:
            lifted = nnx.vmap(
                lambda rngs: inner(rngs), in_axes=0, out_axes=at,
                transform_metadata={nnx.PARTITION_NAME: f"stack{number}"},
            )  # fmt: skip
            return nnx.split_rngs(splits=number + 2)(lifted)(rngs)

        make = stacked
    return make


# --------------------------------------------------------------------------------------
# mixes


class Wrapped(nnx.Module):
    """An NNX module that holds an annotated Linen module in a ToNNX."""

    def __init__(self, rngs: nnx.Rngs, wrapper: Any = bridge.ToNNX, module: Any = None) -> None:
        self.inner = wrapper(Dense() if module is None else module, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.inner(x)


@dataclass(frozen=True)
class ToLinen:
    """Makes `Block` as a Linen module; hashable and equal by value, as a module's field."""

    which: str

    def __call__(self, name: str | None = None) -> nn.Module:
        maker: Any = {
            "flax": bridge.to_linen,
            "linsey": linsey.bridge.to_linen,
            "flax12": flax12.to_linen,
        }[self.which]
        return maker(Block, name=name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PureLinen:
    """Makes `Dense` in the same way."""

    which: str = "partitioned"

    def __call__(self, name: str | None = None) -> nn.Module:
        return Dense(self.which, name=name)
