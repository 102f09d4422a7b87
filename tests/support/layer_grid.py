"""A grid over the fields of each Linen layer that linsey writes as NNX's own.

For each field a few values besides its default; a point of the grid sets one of them, or several
that a seeded generator drew. A field that no table names is an error: see `unknown_fields`.
"""

import dataclasses
import functools
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from linsey._layers import rows

IS_FULL = os.environ.get("LINSEY_GRID") == "full"
"""Whether there are all points, and their numbers are compared; otherwise there are some, most of
whose operations are only counted."""

ROWS = {row.cls: row for row in rows("linen").values() if not row.reason}
"""The layers of the grid."""

ALIASES = (nn.MultiHeadAttention, nn.SelfAttention)
"""Those that compute as another one of them does."""


# --------------------------------------------------------------------------------------
# functions that layers take


def promotes_to_half(*args: Any, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """A promotion that is not Linen's: to bfloat16, whatever is asked for."""
    return [None if each is None else jnp.asarray(each, jnp.bfloat16) for each in args]


def doubled_dot(lhs: Any, rhs: Any, dimensions: Any, precision: Any = None, **options: Any) -> Any:
    """A dot_general that can be told from JAX's, and takes no ``out_sharding``."""
    assert "out_sharding" not in options
    return 2 * lax.dot_general(lhs, rhs, dimensions, precision=precision, **options)


def doubled_dot_class() -> Callable[..., Any]:
    """A ``dot_general_cls``."""
    return doubled_dot


def negated_conv(*args: Any, **options: Any) -> Any:
    """A conv_general_dilated that can be told from JAX's, and takes no ``out_sharding``."""
    assert "out_sharding" not in options
    return -lax.conv_general_dilated(*args, **options)


def negated_conv_class() -> Callable[..., Any]:
    """A ``conv_general_dilated_cls``."""
    return negated_conv


def negated_einsum_class() -> Callable[..., Any]:
    """A class of einsums for the attention."""
    return lambda *args, **options: -jnp.einsum(*args, **options)


def linear_attention(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    """An ``attention_fn`` that takes few of Linen's arguments."""
    weights = jnp.einsum("...qhd,...khd->...hqk", query, key)
    weights = weights if mask is None else jnp.where(mask, weights, 0)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def watching_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    *,
    deterministic: bool,
    dropout_rng: Any,
    dropout_rate: float,
    broadcast_dropout: bool,
    dtype: Any,
    precision: Any,
    force_fp32_for_softmax: bool,
    qk_attn_weights_einsum: Any,
    attn_weights_value_einsum: Any,
) -> Any:
    """An ``attention_fn`` whose numbers depend on all that it is told."""
    told = (deterministic, dropout_rng is None, dropout_rate, broadcast_dropout, dtype is None)
    more = (precision is None, force_fp32_for_softmax, qk_attn_weights_einsum is None)
    factor = sum(2.0**-place * float(each) for place, each in enumerate((*told, *more)))
    out = linear_attention(query, key, value, mask)
    if dropout_rng is not None:
        factor += jax.random.uniform(dropout_rng).astype(out.dtype)
    return out * factor + (attn_weights_value_einsum is None)


# --------------------------------------------------------------------------------------
# values of fields


@dataclass(frozen=True, slots=True)
class Along:
    """A value that needs other settings beside it."""

    value: Any
    others: Mapping[str, Any]


_normal = nn.initializers.normal(0.5)
_INITS = (_normal,)
_WRITTEN: dict[str, tuple[Any, ...]] = {
    "dtype": (jnp.float32, jnp.bfloat16, jnp.float16),
    "param_dtype": (jnp.bfloat16, jnp.float16),
    "use_bias": (False,),
    "use_scale": (False,),
    "precision": ("highest", lax.Precision.HIGH, ("default", "highest")),
    "preferred_element_type": (jnp.float32,),
    "promote_dtype": (promotes_to_half,),
    "dot_general": (doubled_dot,),
    "dot_general_cls": (doubled_dot_class,),
    "epsilon": (0.1, 0.0),
    "momentum": (0.5, 0.0, 1.0),
    "axis_name": ("i",),
    "axis_index_groups": (((0,),),),
    "use_fast_variance": (False,),
    "force_float32_reductions": (False,),
    "gate_fn": (nn.relu, nn.hard_sigmoid),
    "activation_fn": (nn.relu, nn.gelu),
    "residual": (True,),
    **dict.fromkeys(
        ("kernel_init", "bias_init", "scale_init", "embedding_init", "recurrent_kernel_init"),
        _INITS,
    ),
    **dict.fromkeys(("out_kernel_init", "out_bias_init", "carry_init"), _INITS),
}
"""By the name of a field, where its layer's own table has nothing."""

_HALVES = {"@input": (jnp.bfloat16, jnp.float16, jnp.int32)}
_MASKED = {"@call": ({"mask": True},)}
_NORM = {
    **_HALVES,
    **_MASKED,
    "@shape": ((2, 1), (3, 2, 4)),
}
_DOT_PARTS = {"qkv_dot_general": (doubled_dot,), "out_dot_general": (doubled_dot,)}
_DROPS = {"dropout_rate": 0.5, "deterministic": False}
_ATTENTION: dict[str, tuple[Any, ...]] = {
    **_HALVES,
    **_DOT_PARTS,
    "num_heads": (1, 4),
    "qkv_features": (6,),
    "out_features": (5,),
    "broadcast_dropout": (False, Along(False, _DROPS)),
    "dropout_rate": (
        *(Along(0.5, {"deterministic": deterministic}) for deterministic in (True, False)),
        *(Along(rate, {"@call": {"deterministic": False}}) for rate in (0.5, 1.0)),
        Along(0.5, {"@call": {"deterministic": True}}),
        Along(0.5, {"deterministic": False, "@call": {"deterministic": None}}),
        Along(0.5, {"@call": {"deterministic": False, "dropout_rng": True}}),
        Along(0.5, {"deterministic": True, "@call": {"dropout_rng": True}}),
        Along(0.5, {"deterministic": False, "@call": {"mask": True, "sow_weights": True}}),
    ),
    "deterministic": (True, False),
    "attention_fn": (
        linear_attention,
        watching_attention,
        Along(watching_attention, _DROPS),
        Along(watching_attention, {"@call": {"dropout_rng": True}}),
        Along(
            watching_attention,
            {"dropout_rate": 0.5, "deterministic": True, "@call": {"dropout_rng": True}},
        ),
    ),
    "decode": (True, Along(True, {"normalize_qk": True, "dtype": jnp.bfloat16})),
    "normalize_qk": (True, Along(True, {"dtype": jnp.bfloat16})),
    "force_fp32_for_softmax": (True, Along(True, {"dtype": jnp.bfloat16})),
    "qkv_dot_general_cls": (doubled_dot_class,),
    "out_dot_general_cls": (doubled_dot_class,),
    "qk_attn_weights_einsum_cls": (
        Along(
            negated_einsum_class,
            {"attn_weights_value_einsum_cls": negated_einsum_class},
        ),
    ),
    "attn_weights_value_einsum_cls": (
        Along(negated_einsum_class, {"qk_attn_weights_einsum_cls": negated_einsum_class}),
    ),
    "@call": ({"mask": True}, {"sow_weights": True}),
    "@shape": ((3, 4), (2, 1, 3, 4)),
}
_CROSS = {**_ATTENTION, "@inputs": ("k", "kv", "inputs_kv", "other width")}
_CELL: dict[str, tuple[Any, ...]] = {
    **_HALVES,
    "features": (1, 4),
    "param_dtype": tuple(
        Along(dtype, {"recurrent_kernel_init": _normal}) for dtype in (jnp.bfloat16, jnp.float16)
    ),
    "@shape": ((4,), (2, 3, 4)),
}
_OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "dense": {**_HALVES, "features": (1, 4), "@shape": ((4,), (2, 1, 4))},
    "dense_general": {
        **_HALVES,
        "features": ((3, 2), (5,)),
        "axis": (1, (-1,), (1, 2), (-1, -2), (2, 0), Along((0, 1, 2), {"features": (2, 2)})),
        "batch_dims": (
            (0,),
            Along((0, 1), {"features": (2, 3)}),
            Along((0,), {"axis": (2, 1), "features": (2, 3), "use_bias": False}),
            Along((1, 0), {"features": (2, 3)}),
        ),
    },
    "einsum": {
        **_HALVES,
        "shape": (
            Along((3, 4, 5), {"einsum_str": "abc,bcd->ad"}),
            Along((3, 4, 5), {"einsum_str": "... b c , b c d -> ... b d"}),
            Along((4, 3), {"einsum_str": "...a,ab->...b", "use_bias": False}),
            Along((2, 3), {"einsum_str": "abc,ab->c", "use_bias": False}),
        ),
        "einsum_str": (
            Along(None, {"@call": {"einsum_str": "abc,cd->abd"}}),
            Along(None, {"@call": {"einsum_str": "abc,cd->bad"}, "use_bias": False}),
        ),
        "preferred_element_type": (jnp.float32, Along(jnp.float32, {"dtype": jnp.bfloat16})),
    },
    "conv": {
        **_HALVES,
        "features": (1, 2),
        "kernel_size": (
            (1, 1),
            Along((3,), {"@shape": (2, 5, 2)}),
            Along((2, 1, 2), {"@shape": (1, 3, 3, 2, 2)}),
        ),
        "strides": (2, (2, 1), [1, 2], None),
        "padding": (
            *("VALID", "CIRCULAR", "REFLECT", 1, (1, 0), ((1, 0), (0, 2)), [2, (0, 1)]),
            Along("CAUSAL", {"kernel_size": (3,), "@shape": (2, 5, 2)}),
            Along("CIRCULAR", {"strides": (2, 1), "kernel_dilation": 2}),
        ),
        "input_dilation": (
            *(Along(value, {"padding": ((1, 1), (2, 0))}) for value in (2, (1, 2))),
            None,
        ),
        "kernel_dilation": (2, (2, 1), None),
        "feature_group_count": (2, Along(2, {"use_bias": False, "strides": 2})),
        "mask": (np.ones((3, 2, 2, 4), np.float32) * (np.arange(4) % 2).astype(np.float32),),
        "conv_general_dilated": (negated_conv,),
        "conv_general_dilated_cls": (negated_conv_class,),
        "@shape": ((5, 4, 2), (2, 1, 5, 4, 2)),
    },
    "conv_transpose": {
        **_HALVES,
        "features": (1, 2),
        "kernel_size": ((1, 1), Along((3,), {"@shape": (2, 5, 2)}), Along(3, {"@shape": (5, 2)})),
        "strides": ((2, 1), (1, 2), [2, 2]),
        "padding": (
            *("VALID", "CIRCULAR", 1, ((1, 0), (0, 2))),
            Along("CIRCULAR", {"strides": (2, 1)}),
        ),
        "kernel_dilation": ((2, 1), (1, 2)),
        "mask": (np.ones((3, 2, 2, 4), np.float32) * (np.arange(4) % 2).astype(np.float32),),
        "transpose_kernel": (True, Along(True, {"strides": (2, 1)})),
        "preferred_element_type": (jnp.float32, Along(jnp.float32, {"dtype": jnp.bfloat16})),
        "@shape": ((5, 4, 2), (2, 1, 5, 4, 2)),
    },
    "embed": {
        "num_embeddings": (1, 2),
        "features": (1, 4),
        "@input": (jnp.uint8, jnp.int16),
        "@shape": ((), (3,), (2, 1, 2)),
    },
    "batch_norm": {
        **_NORM,
        "use_running_average": (
            *(Along(value, {"@call": {}}) for value in (True, False)),
            *(Along(value, {"@call": {"use_running_average": None}}) for value in (True, False)),
            Along(False, {"@call": {"mask": True}, "axis_name": "i"}),
        ),
        "axis": (1, (-1,), 0, Along((1, 2), {"@shape": (3, 2, 4)})),
        "axis_name": (
            "i",
            Along("i", {"use_fast_variance": False}),
            Along("i", {"use_running_average": True, "@call": {}}),
        ),
        "@call": (
            {"use_running_average": True},
            {"use_running_average": False, "mask": True},
        ),
    },
    "layer_norm": {
        **_NORM,
        "reduction_axes": (0, (0, 1), (-1, 1), (1,), [-1]),
        "feature_axes": (1, (-1,), (1, 2), Along((-1, 0), {"@shape": (3, 4)})),
    },
    "rms_norm": {
        **_NORM,
        "reduction_axes": (0, (0, 1), (-1, 1), (1,), [-1]),
        "feature_axes": (1, (-1,), (1, 2), Along((-1, 0), {"@shape": (3, 4)})),
    },
    "group_norm": {
        **_NORM,
        "num_groups": (1, 4, Along(None, {"group_size": 2})),
        "group_size": (
            Along(1, {"num_groups": None}),
            Along(2, {"num_groups": None}),
            Along(4, {"num_groups": None}),
        ),
        "reduction_axes": (-1, (1, -1), (1, 2), (-1,)),
        "@shape": ((2, 4), (2, 3, 2, 4)),
    },
    "instance_norm": {
        **_NORM,
        "feature_axes": (1, (-1,), (1, 2), (2,)),
        "@shape": ((2, 1), (2, 3, 2, 4)),
    },
    "dropout": {
        "@input": (jnp.bfloat16, jnp.float16),
        "rate": (
            *(0.0, 1.0, 0.1),
            Along(1.0, {"deterministic": True, "@call": {}}),
        ),
        "broadcast_dims": ((0,), (0, -1), (1,)),
        "deterministic": (
            *(Along(value, {"@call": {}}) for value in (True, False)),
            Along(False, {"@call": {"deterministic": None}}),
            Along(False, {"@call": {"rng": True}}),
        ),
        "rng_collection": ("noise", Along("noise", {"@call": {"deterministic": True}})),
        "@call": (
            {"deterministic": True},
            {"deterministic": False, "rng": True},
            {"positional": (False,)},
            {"positional": (True,)},
        ),
        "@shape": ((4,), (2, 3, 2)),
    },
    "prelu": {
        **_HALVES,
        "negative_slope_init": (0.3, -1.0),
        "@shape": ((), (2, 3, 2)),
    },
    "multi_head_attention": _CROSS,
    **dict.fromkeys(("lstm_cell", "simple_cell"), _CELL),
}
_BASE: dict[str, dict[str, Any]] = {
    "dense": {"features": 3, "@shape": (2, 4)},
    "dense_general": {"features": 3, "@shape": (2, 3, 4)},
    "einsum": {"shape": (4, 3), "einsum_str": "abc,cd->abd", "@shape": (2, 3, 4)},
    "conv": {"features": 4, "kernel_size": (3, 2), "@shape": (2, 5, 4, 2)},
    "conv_transpose": {"features": 4, "kernel_size": (3, 2), "@shape": (2, 5, 4, 2)},
    "embed": {"num_embeddings": 5, "features": 3, "@shape": (2, 3), "@input": jnp.int32},
    "batch_norm": {"@shape": (3, 4), "@call": {"use_running_average": False}},
    "layer_norm": {"@shape": (2, 3, 4)},
    "rms_norm": {"@shape": (2, 3, 4)},
    "group_norm": {"num_groups": 2, "@shape": (2, 3, 4)},
    "instance_norm": {"@shape": (2, 3, 4)},
    "dropout": {"rate": 0.5, "@shape": (4, 5), "@call": {"deterministic": False}},
    "prelu": {"@shape": (2, 3)},
    "multi_head_attention": {"num_heads": 2, "@shape": (2, 3, 4)},
    "lstm_cell": {"features": 3, "@shape": (2, 4)},
    "simple_cell": {"features": 3, "@shape": (2, 4)},
}
_WITHOUT = {nn.SelfAttention: ("@inputs",)}
_RESIDUAL = {nn.SimpleCell: {"residual": (Along(True, {"@shape": (2, 3)}),)}}


def values_of(cls: type[nn.Module]) -> dict[str, tuple[Any, ...]]:
    """The values of each field of a layer, and of each setting of its call (``@call`` ...)."""
    own = {**_OWN[ROWS[cls].op], **_RESIDUAL.get(cls, {})}
    found = {name: own.get(name, _WRITTEN.get(name, ())) for name in field_names(cls)}
    found |= {name: values for name, values in own.items() if name.startswith("@")}
    return {name: found[name] for name in found if name not in _WITHOUT.get(cls, ())}


def field_names(cls: type[nn.Module]) -> list[str]:
    """The fields of a Linen layer."""
    return [each.name for each in dataclasses.fields(cls) if each.name not in ("parent", "name")]


def unknown_fields(cls: type[nn.Module]) -> list[str]:
    """The fields of a layer of which the grid has no value."""
    return [name for name in field_names(cls) if not values_of(cls)[name]]


# --------------------------------------------------------------------------------------
# points


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One layer with its fields, and how it is called."""

    cls: type[nn.Module]
    """Its class."""
    settings: Mapping[str, Any]
    """Its fields, and settings of the call, which begin with ``@``."""
    label: str
    """What is set, for a test's name."""

    @property
    def fields(self) -> dict[str, Any]:
        """What its constructor takes."""
        return {name: value for name, value in self.settings.items() if not name.startswith("@")}

    @property
    def seed(self) -> int:
        """A number that is the same in each process."""
        return zlib.crc32(f"{self.cls.__name__} {self.label}".encode())


def base(cls: type[nn.Module]) -> dict[str, Any]:
    """The settings of a layer from which the points differ."""
    return {"@call": {}, "@input": jnp.float32, **_BASE[ROWS[cls].op]}


def points(cls: type[nn.Module], *, is_full: bool) -> list[Point]:
    """The default of a layer, and one value of one field at a time.

    Args:
        cls: the layer.
        is_full: whether each value is taken, or the first of each field.
    """
    found = [Point(cls=cls, settings=base(cls), label="default")]
    for name, values in values_of(cls).items():
        chosen = values if is_full else values[:1]
        found += [_point(cls, {name: value}) for value in chosen]
    return found


def draw(cls: type[nn.Module], seed: int) -> Point:
    """A point with two to five values that are not the default, which Linen takes."""
    rng = random.Random(f"{cls.__name__} {seed}")
    table = values_of(cls)
    while True:
        names = rng.sample(sorted(table), min(len(table), rng.randint(2, 5)))
        point = _point(cls, {name: rng.choice(table[name]) for name in names})
        try:
            call = call_of(point, is_scanned=True)
            apply = functools.partial(call.module.apply, rngs=call.keys, mutable=call.mutable)
            jax.eval_shape(functools.partial(apply, **call.kwargs), call.variables, *call.args)
        except Exception:  # Linen has an error of its own for each
            continue
        return point


def _point(cls: type[nn.Module], chosen: Mapping[str, Any]) -> Point:
    settings = base(cls)
    for name, value in chosen.items():
        settings[name] = value.value if isinstance(value, Along) else value
        settings |= value.others if isinstance(value, Along) else {}
    label = ",".join(f"{name}={_shown(value)}" for name, value in chosen.items())
    return Point(cls=cls, settings=settings, label=label)


def _shown(value: Any) -> str:
    if isinstance(value, Along):
        more = ",".join(f"{name}={_shown(each)}" for name, each in value.others.items())
        return f"{_shown(value.value)}({more})"
    if isinstance(value, np.ndarray):
        return f"array{list(value.shape)}"
    if isinstance(value, Mapping):
        return "+".join(f"{name}:{_shown(each)}" for name, each in value.items()) or "nothing"
    return getattr(value, "__name__", None) or str(value).replace(" ", "")


# --------------------------------------------------------------------------------------
# calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A module of user code around a layer, and how it is called."""

    module: nn.Module
    """The user code."""
    variables: Mapping[str, Any]
    """Variables of it, all random."""
    args: tuple[Any, ...]
    """Inputs."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword inputs."""
    init: tuple[Any, ...] = ()
    """The inputs by which it is initialised."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the call."""
    init_keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the initialisation."""

    @property
    def mutable(self) -> list[str]:
        """The collections that the call changes."""
        sown = ["intermediates"] if self.kwargs.get("sow_weights") else []
        return [name for name in self.variables if name != "params"] + sown


class Plain(nn.Module):
    """User code that calls a layer."""

    make: Callable[[], nn.Module]
    named_axis: str | None = None
    """The axis that a vmap around the layer names."""

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.named_axis is None:
            return use(self.make(), args, kwargs)
        lifted = nn.vmap(
            lambda module, *inner: use(module.make(), inner, kwargs),
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False, "dropout": True, "noise": True},
            axis_name=self.named_axis,
        )
        return lifted(self, *args)


class Scanned(Plain):
    """User code that calls a layer in each step of a scan, inside of remat."""

    stacked_axis: int = 0
    """The axis by which the parameters are stacked."""

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def step(module: Any, carry: Any, _: Any) -> Any:
            out = Plain(module.make, module.named_axis)(*args, **kwargs)
            return carry + total(out), out

        scan = nn.scan(
            nn.remat(step),
            variable_axes={"params": self.stacked_axis, "batch_stats": 0, "cache": 0},
            split_rngs={"params": True, "dropout": True, "noise": True},
            length=2,
        )
        return scan(self, jnp.zeros(()), None)


class Both(Plain):
    """User code with both."""

    stacked_axis: int = 0

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = Plain(self.make, self.named_axis)(*args, **kwargs)
        return plain, Scanned(self.make, self.named_axis, self.stacked_axis)(*args, **kwargs)


def use(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """What user code does with a layer: it calls it, and other methods that the class has."""
    kwargs = dict(kwargs)
    if isinstance(layer, nn.RNNCellBase):
        (inputs,) = args
        carry = layer.initialize_carry(jax.random.key(3), inputs.shape)
        carry, first = layer(carry, inputs, **kwargs)
        return layer(carry, inputs, **kwargs), first
    out = layer(*args, *kwargs.pop("positional", ()), **kwargs)
    return (out, layer.attend(out)) if isinstance(layer, nn.Embed) else out


def total(tree: Any) -> Any:
    """A number that depends on each element of each floating array."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum((jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in leaves), jnp.zeros(()))


def call_of(point: Point, *, is_scanned: bool) -> Call:
    """User code around the layer of a point, with inputs and variables.

    Raises:
        Exception: whatever Linen raises where it refuses the point.
    """
    rng = np.random.default_rng(point.seed)
    settings = point.settings
    args = _inputs(point, rng)
    named = settings.get("axis_name")
    kwargs = dict(settings["@call"])
    make_key = jax.random.key if point.seed % 2 else jax.random.PRNGKey
    if kwargs.get("mask") is True:
        kwargs["mask"] = _mask(point, args, rng)
    for name in ("rng", "dropout_rng"):
        if kwargs.get(name) is True:
            kwargs[name] = make_key(7)
    if settings.get("@inputs") == "inputs_kv":
        *args, kwargs["inputs_kv"] = args
        args = tuple(args)
    if named is not None:
        args = tuple(np.stack([each, each[::-1]]) for each in args)
    if point.seed % 4 or settings["@input"] != jnp.float32:
        args = tuple(map(jnp.asarray, args))
    init = args
    if settings.get("decode"):
        args = tuple(each[..., :1, :] for each in args)
        if isinstance(kwargs.get("mask"), np.ndarray):
            kwargs["mask"] = kwargs["mask"][..., :1, :]
    make = functools.partial(point.cls, **point.fields)
    init_keys = {name: make_key(place) for place, name in enumerate(("params", "dropout", "noise"))}
    keys = {"dropout": make_key(11), "noise": make_key(12)}

    module: nn.Module = Plain(make, named)
    if is_scanned:
        module = Both(make, named, 0 if point.cls is nn.PReLU else point.seed // 2 % 2)
    shapes = jax.eval_shape(functools.partial(module.init, **kwargs), init_keys, *init)
    return Call(
        module=module,
        variables=filled(shapes, rng),
        args=args,
        kwargs=kwargs,
        init=init,
        keys=keys,
        init_keys=init_keys,
    )


def _inputs(point: Point, rng: np.random.Generator) -> tuple[Any, ...]:
    shape, dtype = point.settings["@shape"], point.settings["@input"]
    if ROWS[point.cls].op == "embed":
        return (np.asarray(rng.integers(0, point.settings["num_embeddings"], shape), dtype),)

    def array(shape: Any) -> Any:
        return np.asarray(rng.standard_normal(shape) * 2, dtype)

    query = array(shape)
    kind = point.settings.get("@inputs")
    if kind is None:
        return (query,)
    length = shape[-2] if point.settings.get("decode") else 5
    width = 6 if kind == "other width" else shape[-1]
    key = array((*shape[:-2], length, width))
    if kind in ("kv", "other width"):
        return (query, key, array((*shape[:-2], length, width)))
    return (query, key)


def _mask(point: Point, args: Any, rng: np.random.Generator) -> Any:
    if ROWS[point.cls].op == "multi_head_attention":
        heads = point.settings["num_heads"]
        lengths = (args[0].shape[-2], args[-1].shape[-2])
        mask = rng.random((*args[0].shape[:-2], heads, *lengths)) < 0.7
        return mask | np.eye(*lengths, dtype=bool)
    mask = rng.random(args[0].shape) < 0.7
    return mask | (np.arange(mask.shape[0]) == 0).reshape(-1, *[1] * (mask.ndim - 1))


def filled(shapes: Any, rng: np.random.Generator) -> Any:
    """Random variables of these shapes; variances are positive."""

    def fill(path: Any, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.ones(leaf.shape, leaf.dtype)
        value = rng.standard_normal(leaf.shape)
        is_variance = path[-1].key == "var"
        return jnp.asarray(np.abs(value) + 0.1 if is_variance else value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


# --------------------------------------------------------------------------------------
# operations

RELABELS = frozenset({"reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose"})
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_jvp_call"})


def operations(jaxpr: Any) -> dict[str, int]:
    """How many operations of each kind a jaxpr has, in those that it calls too.

    The kind is the primitive, the dtypes that it gives, and its precision. Those that only write a
    shape anew, or that stand for what they are given, are left out, and so are calls by themselves.
    """
    found: dict[str, int] = {}
    for equation in _equations(jaxpr):
        name = equation.primitive.name
        if name not in RELABELS and name not in _CALLS:
            dtypes = [getattr(each.aval, "dtype", None) for each in equation.outvars]
            precision = equation.params.get("precision")
            kind = f"{name} {[*map(str, dtypes)]} {precision or ''}"
            found[kind] = found.get(kind, 0) + 1
    return found


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                if hasattr(each, "eqns") or hasattr(each, "jaxpr"):
                    yield from _equations(each)
