"""How Linen code calls a layer, as the NNX module in its place is called."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx

from linsey._layers.functions import LinenAttention
from linsey.backends.nnx.native import MODES

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class DrawnStream(nnx.RngStream):
    """A stream that is not one of NNX's own: a function gives its keys."""

    draw: Callable[[], Any]

    def __init__(self, draw: Callable[[], Any]) -> None:
        object.__setattr__(self, "draw", draw)

    def __call__(self) -> Any:
        """A key."""
        return self.draw()


class ScopeRngs(nnx.Rngs):
    """The streams of the scope of a Linen module, as an NNX module takes them."""

    def __init__(self, module: linen.Module) -> None:
        object.__setattr__(self, "_module", module)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return DrawnStream(functools.partial(self._module.make_rng, name))

    def __getitem__(self, name: str) -> Any:
        """The stream of a name."""
        return DrawnStream(functools.partial(self._module.make_rng, name))

    def __call__(self) -> Any:
        """A key of the stream ``default``."""
        return self["default"]()


def adapted(
    op: str,
    module: linen.Module,
    made: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    prefers_own: bool = False,
) -> Arguments:
    """The arguments for an NNX module, from those for the Linen module in whose place it stands.

    Args:
        op: the neutral layer.
        module: the bound Linen module.
        made: the NNX module.
        args: positional arguments of the call.
        kwargs: its keyword arguments.
        prefers_own: whether a stream of the module's own comes before those of the scope.
    """
    adapt = _ADAPTERS.get(op)
    if adapt is None:
        return args, dict(kwargs)
    args, kwargs = adapt(module, made, args, dict(kwargs))
    if isinstance(kwargs.get("rngs"), ScopeRngs) and _uses_own(module, made, prefers_own):
        del kwargs["rngs"]
    return args, kwargs


def _uses_own(module: linen.Module, made: Any, prefers_own: bool) -> bool:
    has_own = getattr(made, "rngs", None) is not None
    return has_own and (
        prefers_own or not module.has_rng(getattr(made, "rng_collection", "dropout"))
    )


def with_modes(module: linen.Module, made: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds what the Linen module was constructed with, and the NNX module takes at its call.

    Linen code may say ``deterministic`` and ``use_running_average`` in either place.
    """
    found = {
        name: getattr(module, name)
        for name in sorted(MODES)
        if getattr(module, name, None) is not None and _takes(type(made), name)
    }
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name in found.keys() & given.keys():
        linen.merge_param(name, found[name], given[name])  # which refuses to be told twice
    return {**found, **given}


def _dropout(
    module: linen.Module, made: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    inputs, *rest = args
    given = dict(zip(("deterministic", "rng"), rest, strict=False))
    if given.get("deterministic") is not None and kwargs.get("deterministic") is not None:
        linen.merge_param("deterministic", given["deterministic"], kwargs["deterministic"])
    given |= kwargs
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
    kwargs["rngs"] = ScopeRngs(module) if key is None else DrawnStream(lambda: key)
    return args, kwargs


def _takes_now(cls: Any, name: str) -> bool:
    try:
        return name in inspect.signature(cls.__call__).parameters
    except (TypeError, ValueError, AttributeError):
        return False


_takes: Callable[[Any, str], bool] = functools.lru_cache(maxsize=1 << 10)(_takes_now)
"""Whether the call of a class takes an argument of a name."""


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
