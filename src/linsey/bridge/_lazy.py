"""`lazy_init`."""

from __future__ import annotations

from typing import Any

from flax import nnx

from linsey.frontends import initializing
from linsey.ir import BridgeError


def lazy_init(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Initialises the Linen modules inside an NNX module by calling it once.

    It stands where Linen code calls ``module.init``. Every `ToNNX` that the call reaches gets its
    variables, and what it sows. Variables that are there already stay as they are: a model that
    gets a new part is completed by it, and not trained anew.

    Args:
        fn: an NNX module, a `ToNNX`, or a bound method of one (``model.decode``).
        args: sample inputs.
        kwargs: keyword inputs.

    Returns:
        `fn`, so that making and initialising a model fit on one line.

    Raises:
        BridgeError: `fn` is neither; the Linen code inside needs a PRNG stream that is not there.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn, nnx
        >>> from linsey import bridge
        >>> model = bridge.lazy_init(bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)), jnp.ones((1, 3)))
        >>> model.params["kernel"].shape
        (3, 2)
    """
    module = fn if isinstance(fn, nnx.Module) else getattr(fn, "__self__", None)
    if not isinstance(module, nnx.Module) or not callable(fn):
        raise BridgeError(_not_a_module(fn), path="lazy_init", fix=_remedy(fn))
    with initializing(module):
        fn(*args, **kwargs)
    return fn


def _not_a_module(fn: Any) -> str:
    if isinstance(fn, type):
        return f"found the class {fn.__name__}, expected an instance of an NNX module"
    if isinstance(fn, nnx.Module):
        return f"{type(fn).__name__} cannot be called: it has no __call__"
    kind = type(fn).__name__
    return f"found {kind}, which is neither an NNX module nor a bound method of one"


def _remedy(fn: Any) -> str:
    if isinstance(fn, type):
        return f"Pass {fn.__name__}(...) with its arguments."
    if isinstance(fn, nnx.Module):
        return "Pass the method to initialise by, as in lazy_init(model.encode, x)."
    return "Pass the module, or a method of it as in lazy_init(model.decode, x)."
