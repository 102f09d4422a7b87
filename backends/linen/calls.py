"""How Linen code calls a layer, as the NNX module in its place is called."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx

from linsey._layers.functions import LinenAttention

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class ScopeStream(nnx.RngStream):
    """A stream that draws from the scope of a Linen module, by Linen's derivation."""

    def __init__(self, module: linen.Module, name: str) -> None:
        object.__setattr__(self, "_draw", lambda: module.make_rng(name))

    def __call__(self) -> Any:
        """A key."""
        return self._draw()


class ScopeRngs(nnx.Rngs):
    """The streams of the scope of a Linen module, as an NNX module takes them."""

    def __init__(self, module: linen.Module) -> None:
        object.__setattr__(self, "_module", module)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return ScopeStream(self._module, name)

    def __getitem__(self, name: str) -> Any:
        """The stream of a name."""
        return ScopeStream(self._module, name)

    def __call__(self) -> Any:
        """A key of the stream ``default``."""
        return self["default"]()


def adapted(
    op: str, module: linen.Module, made: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Arguments:
    """The arguments for an NNX module, from those for the Linen module in whose place it stands.

    Args:
        op: the neutral layer.
        module: the bound Linen module.
        made: the NNX module.
        args: positional arguments of the call.
        kwargs: its keyword arguments.
    """
    adapt = _ADAPTERS.get(op)
    if adapt is None:
        return args, dict(kwargs)
    return adapt(module, made, args, dict(kwargs))


def with_modes(module: linen.Module, made: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds what the Linen module was constructed with, and the NNX module takes at its call.

    Linen code may say ``deterministic`` and ``use_running_average`` in either place.
    """
    found = {
        name: getattr(module, name)
        for name in ("deterministic", "use_running_average")
        if getattr(module, name, None) is not None and _takes(type(made), name)
    }
    return {**found, **kwargs}


def _dropout(
    module: linen.Module, made: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    inputs, *rest = args
    given = dict(zip(("deterministic", "rng"), rest, strict=False)) | kwargs
    key = given.pop("rng", None)
    return _with_keys(module, made, (inputs,), given, key)


def _attention(
    module: linen.Module, made: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    if isinstance(module, linen.SelfAttention):
        warnings.warn(
            "SelfAttention will be deprecated soon. Use MultiHeadDotProductAttention instead.",
            DeprecationWarning,
            stacklevel=3,
        )
        names = ("mask", "deterministic", "dropout_rng", "sow_weights")
        kwargs |= dict(zip(names, args[1:], strict=False))
        args = args[:1]
    if "inputs_kv" in kwargs:
        both = kwargs.pop("inputs_kv")
        if both is not None:
            if len(args) > 1 or kwargs.get("inputs_k") is not None:
                raise ValueError("inputs_kv cannot be given beside inputs_k and inputs_v")
            kwargs |= {"inputs_k": both, "inputs_v": both}
    key, function = kwargs.pop("dropout_rng", None), getattr(made, "attention_fn", None)
    if key is not None and isinstance(function, LinenAttention):
        made.attention_fn = replace(function, dropout_rng=key)
    return _with_keys(module, made, args, kwargs, key)


def _with_keys(
    module: linen.Module, made: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any
) -> Arguments:
    """Adds ``rngs``: the key that the caller gave, or the streams of the scope."""
    if not _takes(type(made), "rngs"):
        return args, kwargs
    own = getattr(made, "rngs", None)
    name = getattr(made, "rng_collection", "dropout")
    if key is not None:
        kwargs["rngs"] = _Once(key)
    elif own is None or module.has_rng(name):
        kwargs["rngs"] = ScopeRngs(module)
    return args, kwargs


class _Once(nnx.RngStream):
    """A stream that gives one key."""

    def __init__(self, key: Any) -> None:
        object.__setattr__(self, "_key", key)

    def __call__(self) -> Any:
        return self._key


def _takes(cls: type, name: str) -> bool:
    try:
        return name in inspect.signature(cls.__call__).parameters
    except (TypeError, ValueError, AttributeError):
        return False


def _norm(
    module: linen.Module, made: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    if kwargs.get("mask") is not None:
        kwargs["mask"] = jnp.asarray(kwargs["mask"], bool)
    return args, kwargs


_ADAPTERS: Mapping[str, Callable[..., Arguments]] = {
    "dropout": _dropout,
    "multi_head_attention": _attention,
    **dict.fromkeys(("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"), _norm),
}
"""By neutral layer; where none is given, both APIs are called alike."""
