"""What makes a layer of one API compute as that of the other: values of its public fields.

Linen's and NNX's layers take functions that promote, multiply and attend, and call them in two
ways. These stand between, and are found again when a layer goes back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx

from linsey._collections import kind_of_collection
from linsey.ir import EmitError


def keep_dtypes(args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Promotes nothing: a value for the ``promote_dtype`` of NNX's normalisations.

    Linen's take statistics of the inputs as they come, and cast the result only.
    """
    return args


@dataclass(frozen=True)
class AsTuple:
    """A ``promote_dtype`` of Linen's form, ``f(a, b, dtype=...)``, in NNX's: ``f((a, b), ...)``."""

    function: Callable[..., Any]

    def __call__(self, args: Any, /, **options: Any) -> Any:
        """Promotes."""
        return self.function(*args, **options)


@dataclass(frozen=True)
class AsArguments:
    """A ``promote_dtype`` of NNX's form in Linen's."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Promotes."""
        return self.function(args, **options)


@dataclass(frozen=True)
class WithoutSharding:
    """A ``dot_general`` or convolution that knows no ``out_sharding``, which NNX always passes."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, out_sharding: Any = None, **options: Any) -> Any:
        """Multiplies.

        Raises:
            EmitError: the caller wants a sharding, which the function cannot give.
        """
        if out_sharding is not None:
            raise EmitError(
                "the function of the Linen layer takes no out_sharding",
                path=getattr(self.function, "__name__", str(self.function)),
                fix="Leave out_sharding out, or give the layer a function that takes it.",
            )
        return self.function(*args, **options)


@dataclass(frozen=True)
class WithSharding:
    """A ``dot_general`` or convolution of NNX, which is always passed ``out_sharding``."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Multiplies."""
        return self.function(*args, out_sharding=None, **options)


@dataclass(frozen=True)
class LinenAttention:
    """The ``attention_fn`` of a Linen layer, called as NNX calls one."""

    function: Callable[..., Any]
    force_fp32_for_softmax: bool = False
    dropout_rng: Any = None
    """The key of a call. Linen hands it on even where nothing is dropped, NNX does not."""

    def __call__(self, *args: Any, module: Any = None, is_causal: bool = False, **kw: Any) -> Any:
        """Attends: arrays of shape ``[batch..., length, heads, depth]``."""
        if is_causal:
            length, width = args[0].shape[-3], args[1].shape[-3]
            causal = jnp.tril(jnp.ones((1, length, width), bool))
            kw["mask"] = linen.combine_masks(kw.get("mask"), causal)
        kw["force_fp32_for_softmax"] = self.force_fp32_for_softmax
        kw["qk_attn_weights_einsum"] = kw["attn_weights_value_einsum"] = None
        if kw.get("dropout_rng") is None:
            kw["dropout_rng"] = self.dropout_rng
        known = inspect.signature(self.function).parameters
        given = {name: value for name, value in kw.items() if name in known}
        if module is not None:
            given["module"] = _Sower(module)
        return self.function(*args, **given)


@dataclass(frozen=True)
class NNXAttention:
    """The ``attention_fn`` of an NNX layer, called as Linen calls one."""

    function: Callable[..., Any]

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        mask: Any = None,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
    ) -> Any:
        """Attends: arrays of shape ``[batch..., length, heads, depth]``."""
        return self.function(
            query,
            key,
            value,
            mask=mask,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            module=None if module is None else _LinenSower(module),
            is_causal=False,
        )


class _Sower:
    """An NNX module as a Linen function sows into it."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def sow(self, collection: str, name: str, value: Any) -> None:
        self._module.sow(kind_of_collection(collection), name, value)


class _LinenSower:
    """A Linen module as an NNX function sows into it."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def sow(self, kind: Any, name: str, value: Any) -> None:
        self._module.sow(nnx.variable_name_from_type(kind), name, value)
