"""Neutral layers: what a layer is, whichever API it was written in.

One entry per layer: its fields, its variables with their shapes, and the streams that it draws
from. Each dialect says in a table of its own how its class is written in these terms (see
``linsey._layers``), so that a new dialect needs one row per layer and no pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Fields = Mapping[str, Any]
Shape = tuple[int, ...]


class Required:
    """Stands for the default of a field that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


def _always(fields: Fields) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSlot:
    """One variable of a neutral layer."""

    name: str
    """Its neutral name: ``kernel``, ``query_bias`` …"""
    shape: Callable[[Fields], Shape]
    """Its shape, without stacked axes, from the layer's fields."""
    when: Callable[[Fields], bool] = _always
    """Whether a layer of these fields has it; always, where nothing is said."""
    collection: str = "params"
    """Its Linen collection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """A neutral layer."""

    name: str
    """The value of `linsey.ir.Node.op`."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Its hyper-parameters with their defaults. Functions that only an initialisation calls are
    none: values travel by themselves."""
    slots: tuple[OpSlot, ...] = ()
    """Its variables."""
    holds: bool = False
    """Whether it is made of other layers: a container, a cell around dense layers, a wrapper."""

    def shapes(self, fields: Fields) -> dict[str, Shape]:
        """The shape of each variable that a layer of these fields has.

        Example:
            >>> OPS["dense"].shapes({"in_features": 3, "out_features": 4, "use_bias": True})
            {'kernel': (3, 4), 'bias': (4,)}
        """
        return {slot.name: slot.shape(fields) for slot in self.slots if slot.when(fields)}


def _if(name: str) -> Callable[[Fields], bool]:
    return lambda fields: bool(fields[name])


def _weights(
    kernel: Callable[[Fields], Shape], bias: Callable[[Fields], Shape]
) -> tuple[OpSlot, ...]:
    return (
        OpSlot(name="kernel", shape=kernel),
        OpSlot(name="bias", shape=bias, when=_if("use_bias")),
    )


def _norm_slots(fields: tuple[str, ...] = ("scale", "bias")) -> tuple[OpSlot, ...]:
    return tuple(
        OpSlot(name=name, shape=lambda f: (f["num_features"],), when=_if(f"use_{name}"))
        for name in fields
    )


_TYPES = {"dtype": None, "param_dtype": "float32"}
_MATMUL = {**_TYPES, "precision": None, "promote_dtype": None, "preferred_element_type": None}
_STATS = {"axis_name": None, "axis_index_groups": None, "use_fast_variance": True}
_NORM = {**_TYPES, "num_features": REQUIRED, "use_scale": True, "promote_dtype": None, **_STATS}
_CONV = {
    "in_features": REQUIRED,
    "out_features": REQUIRED,
    "kernel_size": REQUIRED,
    "padding": "SAME",
    "use_bias": True,
    **_MATMUL,
}


def _dense_general(fields: Fields) -> Shape:
    batch = tuple(size for _, size in fields["batch_axis"])
    return (*batch, *fields["in_features"], *fields["out_features"])


def _dense_general_bias(fields: Fields) -> Shape:
    return (*(size for _, size in fields["batch_axis"]), *fields["out_features"])


def _conv(fields: Fields) -> Shape:
    channels = fields["in_features"] // fields["feature_group_count"]
    return (*fields["kernel_size"], channels, fields["out_features"])


def _conv_transpose(fields: Fields) -> Shape:
    channels = (fields["in_features"], fields["out_features"])
    return (*fields["kernel_size"], *(channels[::-1] if fields["transpose_kernel"] else channels))


def _features(fields: Fields) -> Shape:
    return (fields["out_features"],)


def _attention_slots() -> tuple[OpSlot, ...]:
    def heads(fields: Fields) -> Shape:
        return (fields["num_heads"], fields["qkv_features"] // fields["num_heads"])

    slots = []
    for name in ("query", "key", "value"):
        width = "in_features" if name == "query" else "in_kv_features"
        slots += [
            OpSlot(name=f"{name}_kernel", shape=lambda f, width=width: (f[width], *heads(f))),  # type: ignore[misc]
            OpSlot(name=f"{name}_bias", shape=heads, when=_if("use_bias")),
        ]
    slots += [
        OpSlot(name=f"{name}_scale", shape=lambda f: heads(f)[1:], when=_if("normalize_qk"))
        for name in ("query_ln", "key_ln")
    ]
    slots += [
        OpSlot(name="out_kernel", shape=lambda f: (*heads(f), f["out_features"])),
        OpSlot(name="out_bias", shape=_features, when=_if("use_bias")),
    ]

    def cache(fields: Fields) -> Shape:
        return (*fields["cache_shape"], *heads(fields))

    slots += [
        OpSlot(name=name, shape=cache, when=_if("cache_shape"), collection="cache")
        for name in ("cached_key", "cached_value")
    ]
    index = OpSlot(
        name="cache_index", shape=lambda _: (), when=_if("cache_shape"), collection="cache"
    )
    return (*slots, index)


def _gates(gates: str, *, hidden_bias: bool, input_bias: bool) -> tuple[OpSlot, ...]:
    """The kernels of a cell, gate by gate: from the inputs (``ii_kernel``) and from the state."""

    def kernel(side: str) -> Callable[[Fields], Shape]:
        width = "in_features" if side == "i" else "hidden_features"
        return lambda f: (f[width], f["hidden_features"])

    slots = []
    for side, has_bias in (("i", input_bias), ("h", hidden_bias)):
        for gate in gates:
            slots.append(OpSlot(name=f"{side}{gate}_kernel", shape=kernel(side)))
            if has_bias:
                slots.append(
                    OpSlot(name=f"{side}{gate}_bias", shape=lambda f: (f["hidden_features"],))
                )
    return tuple(slots)


_CELL = {
    "in_features": REQUIRED,
    "hidden_features": REQUIRED,
    "activation_fn": REQUIRED,
    **_TYPES,
    "promote_dtype": None,
}

_ENTRIES = (
    Op(
        name="dense",
        fields={
            "in_features": REQUIRED,
            "out_features": REQUIRED,
            "use_bias": True,
            "dot_general": None,
            **_MATMUL,
        },
        slots=_weights(lambda f: (f["in_features"], f["out_features"]), _features),
    ),
    Op(
        name="dense_general",
        fields={
            "in_features": REQUIRED,
            "out_features": REQUIRED,
            "axis": (-1,),
            "batch_axis": (),
            "use_bias": True,
            "dot_general": None,
            **_MATMUL,
        },
        slots=_weights(_dense_general, _dense_general_bias),
    ),
    Op(
        name="einsum",
        fields={
            "einsum_str": None,
            "kernel_shape": REQUIRED,
            "use_bias": True,
            "bias_shape": None,
            **_MATMUL,
        },
        slots=(
            OpSlot(name="kernel", shape=lambda f: tuple(f["kernel_shape"])),
            OpSlot(
                name="bias",
                shape=lambda f: tuple(f["bias_shape"] or ()),
                when=_if("use_bias"),
            ),
        ),
    ),
    Op(
        name="conv",
        fields={
            **_CONV,
            "strides": 1,
            "input_dilation": 1,
            "kernel_dilation": 1,
            "feature_group_count": 1,
            "conv_general_dilated": None,
        },
        slots=_weights(_conv, _features),
    ),
    Op(name="conv_local"),
    Op(
        name="conv_transpose",
        fields={**_CONV, "strides": None, "kernel_dilation": None, "transpose_kernel": False},
        slots=_weights(_conv_transpose, _features),
    ),
    Op(
        name="embed",
        fields={
            "num_embeddings": REQUIRED,
            "features": REQUIRED,
            **_TYPES,
            "promote_dtype": None,
        },
        slots=(OpSlot(name="embedding", shape=lambda f: (f["num_embeddings"], f["features"])),),
    ),
    Op(
        name="batch_norm",
        fields={
            **_NORM,
            "use_bias": True,
            "use_running_average": None,
            "axis": -1,
            "momentum": 0.99,
            "epsilon": 1e-5,
        },
        slots=(
            *_norm_slots(),
            OpSlot(name="mean", shape=lambda f: (f["num_features"],), collection="batch_stats"),
            OpSlot(name="var", shape=lambda f: (f["num_features"],), collection="batch_stats"),
        ),
    ),
    Op(
        name="layer_norm",
        fields={
            **_NORM,
            "use_bias": True,
            "epsilon": 1e-6,
            "reduction_axes": -1,
            "feature_axes": -1,
        },
        slots=_norm_slots(),
    ),
    Op(
        name="rms_norm",
        fields={**_NORM, "epsilon": 1e-6, "reduction_axes": -1, "feature_axes": -1},
        slots=_norm_slots(("scale",)),
    ),
    Op(
        name="group_norm",
        fields={
            **_NORM,
            "use_bias": True,
            "epsilon": 1e-6,
            "num_groups": 32,
            "group_size": None,
            "reduction_axes": None,
        },
        slots=_norm_slots(),
    ),
    Op(
        name="instance_norm",
        fields={**_NORM, "use_bias": True, "epsilon": 1e-6, "feature_axes": -1},
        slots=_norm_slots(),
    ),
    Op(name="weight_norm", holds=True),
    Op(name="spectral_norm", holds=True),
    Op(
        name="dropout",
        fields={
            "rate": REQUIRED,
            "broadcast_dims": (),
            "deterministic": None,
            "rng_collection": "dropout",
        },
    ),
    Op(
        name="prelu",
        fields={"negative_slope_init": 0.01, **_TYPES, "promote_dtype": None},
        slots=(OpSlot(name="negative_slope", shape=lambda _: ()),),
    ),
    Op(
        name="multi_head_attention",
        fields={
            "num_heads": REQUIRED,
            "in_features": REQUIRED,
            "in_kv_features": REQUIRED,
            "qkv_features": REQUIRED,
            "out_features": REQUIRED,
            **_TYPES,
            "broadcast_dropout": True,
            "dropout_rate": 0.0,
            "deterministic": None,
            "precision": None,
            "use_bias": True,
            "attention_fn": REQUIRED,
            "decode": False,
            "normalize_qk": False,
            "promote_dtype": None,
            "ln_promote_dtype": None,
            "qkv_dot_general": None,
            "out_dot_general": None,
            "cache_shape": None,
        },
        slots=_attention_slots(),
    ),
    Op(
        name="lstm_cell",
        fields={**_CELL, "gate_fn": REQUIRED},
        slots=_gates("ifgo", hidden_bias=True, input_bias=False),
    ),
    Op(
        name="optimized_lstm_cell",
        fields={**_CELL, "gate_fn": REQUIRED},
        slots=_gates("ifgo", hidden_bias=True, input_bias=False),
    ),
    Op(
        name="simple_cell",
        fields={**_CELL, "residual": False},
        slots=_gates("n", hidden_bias=False, input_bias=True),
    ),
    Op(name="gru_cell", holds=True),
    Op(name="mgu_cell", holds=True),
    Op(name="conv_lstm_cell", holds=True),
    Op(name="rnn", holds=True),
    Op(name="bidirectional", holds=True),
    Op(name="sequential", holds=True),
    Op(name="lora", holds=True),
    Op(name="lora_linear", holds=True),
    Op(name="rope"),
)

OPS: Mapping[str, Op] = MappingProxyType({op.name: op for op in _ENTRIES})
"""All neutral layers, by name."""
