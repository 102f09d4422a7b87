"""Linen layers that follow NNX where Linen's own do not: in what is called, never in numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from linsey.ir import EmitError, format_path


class NNXDropout(linen.Dropout):
    """A dropout layer that draws the masks of the ``nnx.Dropout`` that it was.

    It keeps that layer's stream, in ``RngKey`` and ``RngCount``. A key that a call brings, as
    ``rng=`` or in ``apply(rngs=...)``, is used in its place.
    """

    at_construction: bool | None = None
    """What NNX calls ``deterministic``: a call may say otherwise."""
    has_stream: bool = True
    """Whether it has a stream of its own."""

    @linen.compact
    def __call__(self, inputs: Any, deterministic: bool | None = None, rng: Any = None) -> Any:
        """Drops a part of the inputs, an array of any shape.

        Raises:
            EmitError: the stream cannot advance, so that the next call would draw the same mask.
        """
        chosen = self.at_construction if deterministic is None else deterministic
        if self.has_stream and self.is_initializing():
            self._stream()
        is_random = not chosen and self.rate not in (0.0, 1.0)
        if is_random and rng is None and self.has_stream and not self._is_given():
            rng = self._draw()
        return super().__call__(inputs, chosen, rng)

    def _is_given(self) -> bool:
        return self.scope is not None and self.scope.has_rng(self.rng_collection)

    def _stream(self) -> tuple[Any, Any]:
        key = self.variable("RngKey", "rngs", lambda: {"key": self.make_rng("params")})
        zero = {"count": jnp.zeros((), jnp.uint32)}
        return key, self.variable("RngCount", "rngs", lambda: zero)

    def _draw(self) -> Any:
        key, count = self._stream()
        if not self.is_mutable_collection("RngCount"):
            raise EmitError(
                "the call drew a key from this stream, and its counter cannot change: the next"
                " call would draw the same",
                path=format_path((*self.path, "rngs")),
                fix="Pass mutable=['RngCount'] and store what comes back, or rngs= with a key.",
            )
        drawn = jax.random.fold_in(key.value["key"], count.value["count"])
        count.value = {"count": count.value["count"] + 1}
        return drawn


class NNXBatchNorm(linen.BatchNorm):
    """A batch normalisation by NNX's rules.

    Its calls may say otherwise than its construction, and no gradient goes through the statistics
    that it stores.
    """

    at_construction: bool | None = None
    """What NNX calls ``use_running_average``."""

    @linen.compact
    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        """Normalises an array of shape ``[batch..., features]``."""
        chosen = self.at_construction if use_running_average is None else use_running_average
        y = super().__call__(x, chosen, mask=mask)
        if not chosen and not self.is_initializing():
            for name in ("mean", "var"):
                stored: Any = self.get_variable("batch_stats", name)
                self.put_variable("batch_stats", name, jax.lax.stop_gradient(stored))
        return y


class NNXEinsum(linen.Einsum):
    """An einsum whose calls may name another equation than its construction, as in NNX."""

    at_construction: str | None = None
    """What NNX calls ``einsum_str``."""

    @linen.compact
    def __call__(self, inputs: Any, einsum_str: str | None = None) -> Any:
        """Contracts an array with the kernel, as the equation says."""
        return super().__call__(inputs, self.at_construction if einsum_str is None else einsum_str)


class NNXSequential(linen.Sequential):
    """A sequence whose keyword arguments go where ``nnx.Sequential`` takes them."""

    @linen.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layers, one after the other."""
        return nnx.Sequential.__call__(self, *args, **kwargs)  # type: ignore[arg-type]
