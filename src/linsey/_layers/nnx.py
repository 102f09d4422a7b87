"""NNX's layers in neutral terms."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from linsey._layers.functions import keep_dtypes
from linsey._layers.linen import tupled
from linsey._layers.table import (
    Field,
    Place,
    RefusedError,
    Row,
    Shapes,
    class_of,
    fields,
    params,
)
from linsey.ir.ops import Shape

Found = Mapping[str, Any]


def _default(name: str, default: Any) -> Field:
    """A field of which neutral None is a value of NNX's."""
    return Field(
        name=name,
        own=name,
        read=lambda value: None if value is default else value,
        write=lambda value: default if value is None else value,
    )


PROMOTE = _default("promote_dtype", dtypes.promote_dtype)
_KEEP = _default("promote_dtype", keep_dtypes)
_TYPES = fields("dtype", "param_dtype")
_WEIGHTS = params("kernel", "bias")
_PREFERRED = fields("preferred_element_type")


def _tupled(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name=name, own=name, read=tupled) for name in names)


def _einsum(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    return {"use_bias": "bias" in shapes, "bias_shape": shapes.get("bias")}


def _num_features(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    if not shapes:
        raise RefusedError("it has no variables, which would tell its number of features")
    # NNX keeps both, one of which follows from the other.
    return {"num_features": next(iter(shapes.values()))[0], "group_size": None}


def _cache_shape(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    cached = shapes.get("cached_key")
    return {"cache_shape": None if cached is None else cached[:-2]}


def _norm_row(op: str, cls: type, *names: str, tuples: tuple[str, ...] = (), **options: Any) -> Row:
    return Row(
        op=op,
        cls=cls,
        fields=(
            *_TYPES,
            *fields("num_features", "epsilon", "use_scale", "axis_name", "use_fast_variance"),
            *fields(*names),
            *_tupled("axis_index_groups", *tuples),
            _KEEP,
        ),
        **options,
    )


def _joined(path: str, side: str, what: str) -> Place:
    parts = tuple(f"{side}{gate}_{what}" for gate in "ifgo")
    return Place(collection="params", path=tuple(path.split("/")), parts=parts)


def _cell_row(op: str, cls: type, *own: str, slots: Mapping[str, Place], **options: Any) -> Row:
    return Row(
        op=op,
        cls=cls,
        fields=(
            *_TYPES,
            *fields("in_features", "hidden_features", "activation_fn", *own),
            PROMOTE,
        ),
        fixed={"rngs": None},
        ignored=frozenset({"carry_init"}),
        slots=slots,
        # The default takes no half precision; the values come from elsewhere.
        make={"recurrent_kernel_init": nnx.initializers.zeros_init()},
        **options,
    )


_STATS = {name: Place(collection="batch_stats", path=(name,)) for name in ("mean", "var")}
_SCALE_BIAS = params("scale", "bias")
_PARTS = ("query", "key", "value", "out")
_LSTM = {
    f"{side}{gate}_{what}": f"{side}{gate}{'_' if (side, gate) == ('i', 'f') else ''}/{what}"
    for gate in "ifgo"
    for side, what in (("i", "kernel"), ("h", "kernel"), ("h", "bias"))
}

ROWS: tuple[Row, ...] = (
    Row(
        op="dense",
        cls=nnx.Linear,
        fields=(
            *_TYPES,
            *fields("in_features", "out_features", "use_bias", "precision"),
            *_PREFERRED,
            PROMOTE,
            _default("dot_general", lax.dot_general),
        ),
        slots=_WEIGHTS,
    ),
    Row(
        op="dense_general",
        cls=nnx.LinearGeneral,
        fields=(
            *_TYPES,
            *fields("in_features", "out_features", "axis", "use_bias", "precision", "dot_general"),
            *_PREFERRED,
            Field(
                name="batch_axis",
                own="batch_axis",
                read=lambda sizes: tuple(sizes.items()),
                write=lambda pairs: MappingProxyType(dict(pairs)),
            ),
            PROMOTE,
        ),
        fixed={"dot_general_cls": None},
        slots=_WEIGHTS,
    ),
    Row(
        op="einsum",
        cls=nnx.Einsum,
        fields=(
            *_TYPES,
            *fields("precision"),
            Field(
                name="einsum_str",
                own="einsum_str",
                write=lambda text: "a,b->ab" if text is None else text,
            ),
            *_tupled("kernel_shape", "bias_shape"),
            *_PREFERRED,
            PROMOTE,
        ),
        implied=frozenset({"use_bias"}),
        infer=_einsum,
        fixed={"einsum_op": jnp.einsum},
        slots=_WEIGHTS,
        set_after={"einsum_str": "einsum_str"},
    ),
    Row(
        op="conv",
        cls=nnx.Conv,
        fields=(
            *_TYPES,
            *fields("in_features", "out_features", "use_bias", "precision", "feature_group_count"),
            *_tupled("kernel_size", "strides", "padding", "input_dilation", "kernel_dilation"),
            *_PREFERRED,
            PROMOTE,
            _default("conv_general_dilated", lax.conv_general_dilated),
        ),
        fixed={"mask": None},
        ignored=frozenset({"kernel_shape"}),
        slots=_WEIGHTS,
    ),
    Row(
        op="conv_transpose",
        cls=nnx.ConvTranspose,
        fields=(
            *_TYPES,
            *fields("in_features", "out_features", "use_bias", "precision", "transpose_kernel"),
            *_tupled("kernel_size", "strides", "padding", "kernel_dilation"),
            *_PREFERRED,
            PROMOTE,
        ),
        fixed={"mask": None},
        ignored=frozenset({"kernel_shape"}),
        slots=_WEIGHTS,
    ),
    Row(
        op="embed",
        cls=nnx.Embed,
        fields=(*_TYPES, *fields("num_embeddings", "features"), PROMOTE),
        slots=params("embedding"),
        set_after={"dtype": "dtype"},
        methods=frozenset({"__call__", "attend"}),
    ),
    _norm_row(
        "batch_norm",
        nnx.BatchNorm,
        *("use_bias", "momentum", "use_running_average"),
        tuples=("axis",),
        slots={**_SCALE_BIAS, **_STATS},
    ),
    _norm_row(
        "layer_norm",
        nnx.LayerNorm,
        "use_bias",
        tuples=("reduction_axes", "feature_axes"),
        slots=_SCALE_BIAS,
    ),
    _norm_row(
        "rms_norm",
        nnx.RMSNorm,
        tuples=("reduction_axes", "feature_axes"),
        slots=params("scale"),
    ),
    _norm_row(
        "group_norm",
        nnx.GroupNorm,
        *("use_bias", "num_groups", "group_size"),
        tuples=("reduction_axes",),
        ignored=frozenset({"feature_axis"}),
        slots=_SCALE_BIAS,
        infer=_num_features,
        limits=("it has neither a scale nor a bias",),
    ),
    _norm_row(
        "instance_norm", nnx.InstanceNorm, "use_bias", tuples=("feature_axes",), slots=_SCALE_BIAS
    ),
    Row(
        op="weight_norm",
        cls=nnx.WeightNorm,
        reason="it overwrites the kernel at each call, Linen's does not",
    ),
    Row(
        op="spectral_norm",
        cls=nnx.SpectralNorm,
        reason="it overwrites the kernel at each call, Linen's does not",
    ),
    Row(
        op="dropout",
        cls=nnx.Dropout,
        fields=(*fields("rate", "deterministic", "rng_collection"), *_tupled("broadcast_dims")),
        fixed={"rngs": None},
        make={"rngs": None},
    ),
    Row(
        op="prelu",
        cls=nnx.PReLU,
        fields=(*_TYPES, *fields("negative_slope_init"), PROMOTE),
        slots=params("negative_slope"),
    ),
    Row(
        op="multi_head_attention",
        cls=nnx.MultiHeadAttention,
        fields=(
            *_TYPES,
            *fields("num_heads", "in_features", "in_kv_features", "qkv_features", "out_features"),
            *fields("broadcast_dropout", "dropout_rate", "deterministic", "precision"),
            *fields("use_bias", "attention_fn", "decode", "normalize_qk"),
            *fields("qkv_dot_general", "out_dot_general"),
            Field(
                name="promote_dtype",
                own="qkv_promote_dtype",
                read=PROMOTE.read,
                write=PROMOTE.write,
            ),
            _default("ln_promote_dtype", keep_dtypes),
        ),
        fixed={
            "qkv_dot_general_cls": None,
            "out_dot_general_cls": None,
            "out_promote_dtype": dtypes.promote_dtype,
            "rngs": None,
        },
        ignored=frozenset({"head_dim", "num_kv_heads"}),
        slots={
            **params(**{f"{name}_kernel": f"{name}/kernel" for name in _PARTS}),
            **params(**{f"{name}_bias": f"{name}/bias" for name in _PARTS}),
            **params(query_ln_scale="query_ln/scale", key_ln_scale="key_ln/scale"),
            **{
                name: Place(collection="cache", path=(name,))
                for name in ("cached_key", "cached_value", "cache_index")
            },
        },
        infer=_cache_shape,
        implied=frozenset({"cache_shape"}),
        make={"keep_rngs": False},
    ),
    _cell_row("lstm_cell", nnx.LSTMCell, "gate_fn", slots=params(**_LSTM)),
    _cell_row(
        "optimized_lstm_cell",
        nnx.OptimizedLSTMCell,
        "gate_fn",
        slots={
            "i_kernel": _joined("dense_i/kernel", "i", "kernel"),
            "h_kernel": _joined("dense_h/kernel", "h", "kernel"),
            "h_bias": _joined("dense_h/bias", "h", "bias"),
        },
    ),
    _cell_row(
        "simple_cell",
        nnx.SimpleCell,
        "residual",
        slots=params(
            in_kernel="dense_i/kernel", in_bias="dense_i/bias", hn_kernel="dense_h/kernel"
        ),
    ),
    Row(
        op="gru_cell",
        cls=nnx.GRUCell,
        reason="flax.linen.GRUCell has one bias more, for the state's part of the candidate",
    ),
    Row(op="rnn", cls=nnx.RNN, reason="the two APIs make the first carry by other rules"),
    Row(
        op="bidirectional",
        cls=nnx.Bidirectional,
        reason="its RNNs make their first carries by NNX's rule",
    ),
    Row(op="sequential", cls=nnx.Sequential),
    Row(op="lora", cls=nnx.LoRA, reason="flax.linen has no such layer"),
    Row(op="lora_linear", cls=nnx.LoRALinear, reason="flax.linen has no such layer"),
    Row(
        op="rope",
        cls=class_of(nnx, "RoPE"),
        reason="flax.linen has no such layer",
        since="0.12.12",
    ),
)

NO_LAYERS: Mapping[str, str] = MappingProxyType(
    {
        "Module": "the base class",
        "RNNCellBase": "the base class of cells",
        "List": "a container",
        "Dict": "a container",
    }
)
"""The other public modules, and what they are."""
