"""Linen's layers in neutral terms."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import linen
from flax.linen import dtypes
from flax.nnx.nn import dtypes as nnx_dtypes

from linsey._layers.functions import (
    AsArguments,
    AsTuple,
    LinenAttention,
    NNXAttention,
    WithoutSharding,
    WithSharding,
)
from linsey._layers.table import Field, Place, RefusedError, Row, Shapes, fields, params
from linsey.ir.ops import Shape

Found = Mapping[str, Any]


def _read_promote(function: Any) -> Any:
    if function is dtypes.promote_dtype:
        return None
    return function.function if isinstance(function, AsArguments) else AsTuple(function)


def _write_promote(function: Any) -> Any:
    if function is None:
        return dtypes.promote_dtype
    return function.function if isinstance(function, AsTuple) else AsArguments(function)


def _read_dot(function: Any) -> Any:
    if function is None:
        return None
    is_own = isinstance(function, WithSharding)
    return function.function if is_own else WithoutSharding(function)


def _write_dot(function: Any) -> Any:
    if function is None:
        return None
    is_own = isinstance(function, WithoutSharding)
    return function.function if is_own else WithSharding(function)


def tupled(value: Any) -> Any:
    """Lists as tuples, to any depth: NNX takes lists for trees, and flax no lists as keys."""
    return tuple(map(tupled, value)) if isinstance(value, list | tuple) else value


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tupled(value) if isinstance(value, list | tuple) else (value,)


def _tupled(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name=name, own=name, read=tupled) for name in names)


PROMOTE = Field(name="promote_dtype", own="promote_dtype", read=_read_promote, write=_write_promote)
_DOT = Field(name="dot_general", own="dot_general", read=_read_dot, write=_write_dot)
_CONV_FUNCTION = Field(
    name="conv_general_dilated", own="conv_general_dilated", read=_read_dot, write=_write_dot
)
_TYPES = fields("dtype", "param_dtype")
_INITS = frozenset({"kernel_init", "bias_init"})
_WEIGHTS = params("kernel", "bias")


def _in_features(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    return {"in_features": _axis(shapes, "kernel", -2)}


def _axis(shapes: Shapes, name: str, axis: int) -> int:
    if name not in shapes or len(shapes[name]) < abs(axis):
        raise RefusedError(f"it has no {name}")
    return shapes[name][axis]


def _dense_general(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    kernel = shapes.get("kernel", ())
    batch, axis = found["batch_axis"], found["axis"]
    if tuple(range(len(batch))) != batch:
        raise RefusedError(f"batch_dims={batch} are not the leading axes in order")
    return {
        "batch_axis": tuple(zip(batch, kernel, strict=False)),
        "in_features": kernel[len(batch) : len(batch) + len(axis)],
    }


def _einsum(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    return {"bias_shape": shapes.get("bias")}


def _einsum_bias(neutral: Mapping[str, Any]) -> None:
    """Linen tells the shape of the bias from the equation; NNX takes what it is given."""
    text, shape = neutral["einsum_str"], neutral["bias_shape"]
    if shape is None or text is None:
        return
    operands, _, result = text.replace(" ", "").partition("->")
    sizes = dict(zip(operands.partition(",")[2], neutral["kernel_shape"], strict=False))
    if "." in text or tuple(sizes[name] for name in result if name in sizes) != tuple(shape):
        raise RefusedError(f"its bias of shape {shape} is not the one that {text} asks for")


def _conv(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    return {"in_features": _axis(shapes, "kernel", -2) * found["feature_group_count"]}


def _conv_transpose(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    return {"in_features": _axis(shapes, "kernel", -1 if found["transpose_kernel"] else -2)}


def _norm(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    if not shapes:
        return {"num_features": _input_features(found, inputs)}
    shape = next(iter(shapes.values()))
    if len(shape) != 1:
        raise RefusedError(f"it normalises over {len(shape)} feature axes")
    return {"num_features": shape[0]}


def _input_features(found: Found, inputs: Shape | None) -> int:
    axis = found.get("feature_axes", found.get("axis", -1))
    if inputs is None or not isinstance(axis, int) or not -len(inputs) <= axis < len(inputs):
        raise RefusedError("neither variables nor an observed input tell its number of features")
    return inputs[axis]


def _group_norm(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    if found["reduction_axes"] is not None:
        raise RefusedError("reduction_axes is given: flax.nnx.GroupNorm repeats another axis then")
    return _norm(found, shapes, inputs)


def _attention(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    key, value = shapes.get("key_kernel", ()), shapes.get("value_kernel", ())
    if key[:1] != value[:1]:
        raise RefusedError("keys and values have another number of features")
    query, out = shapes.get("query_kernel", ()), shapes.get("out_kernel", ())
    cached = shapes.get("cached_key")
    for name, size in {"qkv_features": query[1] * query[2], "out_features": out[-1]}.items():
        if (found[name] or query[0]) != size:
            raise RefusedError(f"{name}={found[name]}, and its variables have {size}")
    return {
        "in_features": query[0],
        "in_kv_features": key[0],
        "qkv_features": query[1] * query[2],
        "out_features": out[-1],
        "cache_shape": None if cached is None else cached[:-2],
    }


def _cell(found: Found, shapes: Shapes, inputs: Shape | None) -> dict[str, Any]:
    kernel = "ii_kernel" if "ii_kernel" in shapes else "in_kernel"
    return {"in_features": _axis(shapes, kernel, 0)}


def _full_precision(neutral: Mapping[str, Any]) -> None:
    if neutral["param_dtype"] in (jnp.bfloat16, jnp.float16):
        # Linen asks the initialiser at each call, and an NNX layer no longer has its own.
        raise RefusedError("the initialiser of Linen's cells makes no half precision")


def _read_attention(function: Any) -> Any:
    is_own = isinstance(function, NNXAttention)
    return function.function if is_own else LinenAttention(function)


def _write_attention(function: Any) -> Any:
    is_own = isinstance(function, LinenAttention)
    return function.function if is_own else NNXAttention(function)


def _plain_promotion(neutral: Mapping[str, Any]) -> None:
    promote = neutral["promote_dtype"]
    if promote is None:
        return
    if promote is not nnx_dtypes.promote_dtype:
        raise RefusedError("Linen's normalisations promote nothing, and promote_dtype is set")
    # What NNX promotes first, Linen promotes in the operations, unless a dtype is asked for.
    if neutral["dtype"] is not None or neutral["param_dtype"] not in _NARROW:
        raise RefusedError("it casts its inputs before it takes statistics, Linen's casts after")


_NORM_LIMITS = (
    "it normalises over several feature axes",
    "it has no variables, and no call was observed that tells its number of features",
)


def _norm_row(op: str, cls: type, *more: Field, names: tuple[str, ...] = (), **options: Any) -> Row:
    """A normalisation: all of Linen's have these fields."""
    return Row(
        op=op,
        cls=cls,
        fields=(
            *_TYPES,
            *fields("epsilon", "use_scale", "axis_name", "use_fast_variance"),
            *_tupled("axis_index_groups", *names),
            *more,
        ),
        fixed={"force_float32_reductions": True},
        ignored=frozenset({"scale_init", "bias_init"}),
        check=_plain_promotion,
        implied=frozenset({"promote_dtype"}),
        **{"infer": _norm, "limits": _NORM_LIMITS, **options},
    )


def _plain_head_norms(neutral: Mapping[str, Any]) -> None:
    if neutral["normalize_qk"]:
        _plain_promotion({**neutral, "promote_dtype": neutral["ln_promote_dtype"]})


_NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)
_BIAS = fields("use_bias")
_SCALE_BIAS = params("scale", "bias")
_GATES = {
    f"{side}{gate}_{what}": f"{side}{gate}/{what}"
    for gate in "ifgo"
    for side, what in (("i", "kernel"), ("h", "kernel"), ("h", "bias"))
}
_STATS = {name: Place(collection="batch_stats", path=(name,)) for name in ("mean", "var")}


def _cell_row(op: str, cls: type, *own: str, slots: Mapping[str, Place], reason: str = "") -> Row:
    return Row(
        op=op,
        cls=cls,
        fields=(*_TYPES, *fields("activation_fn", *own, hidden_features="features")),
        ignored=frozenset({"recurrent_kernel_init", "carry_init", *_INITS}),
        slots=slots,
        infer=_cell,
        check=_full_precision,
        reason=reason,
    )


def _attention_row(cls: type) -> Row:
    parts = ("query", "key", "value", "out")
    return Row(
        op="multi_head_attention",
        cls=cls,
        fields=(
            *_TYPES,
            *fields("num_heads", "broadcast_dropout", "dropout_rate", "deterministic"),
            *fields("precision", "use_bias", "decode", "normalize_qk"),
            Field(
                name="attention_fn",
                own="attention_fn",
                read=_read_attention,
                write=_write_attention,
            ),
            *(
                Field(name=name, own=name, read=_read_dot, write=_write_dot)
                for name in ("qkv_dot_general", "out_dot_general")
            ),
            *fields("qkv_features", "out_features"),
        ),
        fixed={
            "force_fp32_for_softmax": False,
            "qkv_dot_general_cls": None,
            "out_dot_general_cls": None,
            "qk_attn_weights_einsum_cls": None,
            "attn_weights_value_einsum_cls": None,
        },
        ignored=frozenset({"out_kernel_init", "out_bias_init", *_INITS}),
        slots={
            **params(**{f"{name}_kernel": f"{name}/kernel" for name in parts}),
            **params(**{f"{name}_bias": f"{name}/bias" for name in parts}),
            **params(query_ln_scale="query_ln/scale", key_ln_scale="key_ln/scale"),
            **{
                name: Place(collection="cache", path=(name,))
                for name in ("cached_key", "cached_value", "cache_index")
            },
        },
        infer=_attention,
        limits=("keys and values have another number of features",),
        implied=frozenset({"cache_shape", "ln_promote_dtype"}),
        check=_plain_head_norms,
    )


_NO_NNX = "flax.nnx has no such layer"
ROWS: tuple[Row, ...] = (
    Row(
        op="dense",
        cls=linen.Dense,
        fields=(*_TYPES, *fields("use_bias", "precision", out_features="features"), PROMOTE, _DOT),
        fixed={"dot_general_cls": None},
        ignored=_INITS,
        slots=_WEIGHTS,
        infer=_in_features,
    ),
    Row(
        op="dense_general",
        cls=linen.DenseGeneral,
        fields=(
            *_TYPES,
            *fields("use_bias", "precision"),
            Field(name="out_features", own="features", read=_as_tuple),
            Field(name="axis", own="axis", read=_as_tuple),
            Field(
                name="batch_axis",
                own="batch_dims",
                read=_as_tuple,
                write=lambda pairs: tuple(axis for axis, _ in pairs),
            ),
            PROMOTE,
            _DOT,
        ),
        fixed={"dot_general_cls": None},
        ignored=_INITS,
        slots=_WEIGHTS,
        infer=_dense_general,
        limits=("`batch_dims` are not the leading axes in order",),
    ),
    Row(
        op="einsum",
        cls=linen.Einsum,
        fields=(
            *_TYPES,
            *fields("einsum_str", "use_bias", "precision", "preferred_element_type"),
            Field(name="kernel_shape", own="shape", read=tupled),
            PROMOTE,
        ),
        ignored=_INITS,
        slots=_WEIGHTS,
        infer=_einsum,
        implied=frozenset({"bias_shape"}),
        check=_einsum_bias,
    ),
    Row(
        op="conv",
        cls=linen.Conv,
        fields=(
            *_TYPES,
            *fields("use_bias", "precision", "feature_group_count", out_features="features"),
            *_tupled("strides", "padding", "input_dilation", "kernel_dilation"),
            Field(name="kernel_size", own="kernel_size", read=_as_tuple),
            PROMOTE,
            _CONV_FUNCTION,
        ),
        fixed={"mask": None, "conv_general_dilated_cls": None},
        ignored=_INITS,
        slots=_WEIGHTS,
        infer=_conv,
    ),
    Row(op="conv_local", cls=linen.ConvLocal, reason=_NO_NNX),
    Row(
        op="conv_transpose",
        cls=linen.ConvTranspose,
        fields=(
            *_TYPES,
            *fields("use_bias", "precision", "transpose_kernel", "preferred_element_type"),
            *fields(out_features="features"),
            *_tupled("strides", "padding", "kernel_dilation"),
            Field(name="kernel_size", own="kernel_size", read=_as_tuple),
            PROMOTE,
        ),
        fixed={"mask": None},
        ignored=_INITS,
        slots=_WEIGHTS,
        infer=_conv_transpose,
    ),
    Row(
        op="embed",
        cls=linen.Embed,
        fields=(*_TYPES, *fields("num_embeddings", "features"), PROMOTE),
        ignored=frozenset({"embedding_init"}),
        slots=params("embedding"),
        methods=frozenset({"__call__", "attend"}),
    ),
    _norm_row(
        "batch_norm",
        linen.BatchNorm,
        *_BIAS,
        *fields("momentum", "use_running_average"),
        names=("axis",),
        slots={**_SCALE_BIAS, **_STATS},
    ),
    _norm_row(
        "layer_norm",
        linen.LayerNorm,
        *_BIAS,
        names=("reduction_axes", "feature_axes"),
        slots=_SCALE_BIAS,
    ),
    _norm_row(
        "rms_norm",
        linen.RMSNorm,
        names=("reduction_axes", "feature_axes"),
        slots=params("scale"),
    ),
    _norm_row(
        "group_norm",
        linen.GroupNorm,
        *_BIAS,
        *fields("num_groups", "group_size"),
        names=("reduction_axes",),
        slots=_SCALE_BIAS,
        infer=_group_norm,
        limits=("`reduction_axes` is given: NNX's repeats another axis then", *_NORM_LIMITS),
    ),
    _norm_row(
        "instance_norm", linen.InstanceNorm, *_BIAS, names=("feature_axes",), slots=_SCALE_BIAS
    ),
    Row(
        op="weight_norm",
        cls=linen.WeightNorm,
        reason="flax.nnx.WeightNorm overwrites the kernel at each call, Linen's does not",
    ),
    Row(
        op="spectral_norm",
        cls=linen.SpectralNorm,
        reason="flax.nnx.SpectralNorm overwrites the kernel at each call, Linen's does not",
    ),
    Row(
        op="dropout",
        cls=linen.Dropout,
        fields=(*fields("rate", "deterministic", "rng_collection"), *_tupled("broadcast_dims")),
    ),
    Row(
        op="prelu",
        cls=linen.PReLU,
        fields=fields("param_dtype", "negative_slope_init"),
        slots=params("negative_slope"),
    ),
    _attention_row(linen.MultiHeadDotProductAttention),
    _attention_row(linen.MultiHeadAttention),
    _attention_row(linen.SelfAttention),
    _cell_row("lstm_cell", linen.LSTMCell, "gate_fn", slots=params(**_GATES)),
    _cell_row(
        "optimized_lstm_cell",
        linen.OptimizedLSTMCell,
        "gate_fn",
        slots=params(**_GATES),
        # Compiled, gradients of the biases differ in the last bit.
        reason="flax.nnx.OptimizedLSTMCell keeps its kernels joined, and rounds otherwise",
    ),
    _cell_row(
        "simple_cell",
        linen.SimpleCell,
        "residual",
        slots=params(in_kernel="i/kernel", in_bias="i/bias", hn_kernel="h/kernel"),
    ),
    Row(
        op="gru_cell",
        cls=linen.GRUCell,
        reason="flax.nnx.GRUCell has no bias for the state's part of the candidate",
    ),
    Row(op="mgu_cell", cls=linen.MGUCell, reason=_NO_NNX),
    Row(op="conv_lstm_cell", cls=linen.ConvLSTMCell, reason=_NO_NNX),
    Row(
        op="rnn",
        cls=linen.RNN,
        reason="the two APIs make the first carry by other rules; its cell comes out native",
    ),
    Row(
        op="bidirectional",
        cls=linen.Bidirectional,
        reason="its RNNs make their first carries by Linen's rule; their cells come out native",
    ),
    Row(
        op="sequential",
        cls=linen.Sequential,
        reason="it hands keyword arguments on by another rule; its layers come out native",
    ),
)

_FP8 = "an operation in eight bits, for a field of a layer, which is hosted then"
NO_LAYERS: Mapping[str, str] = MappingProxyType(
    {
        "Module": "the base class",
        "RNNCellBase": "the base class of cells",
        "Fp8DotGeneral": _FP8,
        "Fp8DotGeneralOp": _FP8,
        "Fp8DirectDotGeneralOp": _FP8,
        "NANOOFp8DotGeneralOp": _FP8,
        "Fp8Einsum": _FP8,
    }
)
"""The other public modules, and what they are."""
