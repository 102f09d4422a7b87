"""A Llama-3-405B-like decoder in Linen with logical axis names, and its plan for a mesh.

`python examples/decoder.py` plans the full size, 405,853,388,800 parameters, for 512 devices.
Nothing is allocated; it takes a few seconds.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import linsey
from linsey.runtime.plan import plan

RULES = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("head_dim", None),
    ("length", None),
    ("layers", None),
    ("norm", None),
)
"""Parameters over ``fsdp`` and ``tensor``, the batch over ``data`` and ``fsdp``."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder; the defaults are those of Llama 3 405B."""

    layers: int = 126
    """How many layers."""
    width: int = 16384
    """Features between the layers."""
    hidden: int = 53248
    """Features inside an MLP."""
    heads: int = 128
    """Heads of the queries."""
    kv_heads: int = 8
    """Heads of the keys and values; divides `heads`."""
    vocab: int = 128256
    """Number of tokens."""
    theta: float = 500_000.0
    """Base of the rotary frequencies."""
    dtype: Any = jnp.bfloat16
    """Of the parameters and of the computation."""


TINY = Sizes(layers=2, width=16, hidden=32, heads=4, kv_heads=2, vocab=64, dtype=jnp.float32)
"""A size for tests."""


# Not nn.DenseGeneral: it makes its kernel flat, and flax 0.12 would constrain that flat array by a
# name for each axis of the whole one.
_INITIAL = functools.partial(nn.initializers.variance_scaling, 1.0, "fan_in", "truncated_normal")


def _named(initializer: Any, *names: str | None) -> Any:
    return nn.with_logical_partitioning(initializer, names)


def _rotated(x: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding; `x` is ``(batch, length, heads, head_dim)``."""
    length, size = x.shape[1], x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    sin, cos = jnp.sin(angles)[:, None, :], jnp.cos(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Norm(nn.Module):
    """Root mean square normalisation."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Gives ``(..., width)`` of mean square one, scaled."""
        scale = _named(nn.initializers.ones, "norm")
        dtype = self.sizes.dtype
        norm = nn.RMSNorm(epsilon=1e-5, dtype=dtype, param_dtype=dtype, scale_init=scale)
        return norm(x)


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, length, width)`` to the same."""
        sizes = self.sizes
        head_dim = sizes.width // sizes.heads

        def project(name: str, heads: int, axis: str) -> jax.Array:
            init = _named(_INITIAL(in_axis=0, out_axis=(1, 2)), "embed", axis, "head_dim")
            kernel = self.param(name, init, (sizes.width, heads, head_dim), sizes.dtype)
            y = jnp.einsum("...d,dhk->...hk", x, kernel)
            return nn.with_logical_constraint(y, ("batch", "length", axis, "head_dim"))

        query = _rotated(project("query", sizes.heads, "heads"), sizes.theta)
        key = _rotated(project("key", sizes.kv_heads, "kv_heads"), sizes.theta)
        value = project("value", sizes.kv_heads, "kv_heads")
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        init = _named(_INITIAL(in_axis=(0, 1), out_axis=2), "heads", "head_dim", "embed")
        kernel = self.param("out", init, (sizes.heads, head_dim, sizes.width), sizes.dtype)
        y = jnp.einsum("...hk,hkd->...d", y, kernel)
        return nn.with_logical_constraint(y, ("batch", "length", "embed"))


class MLP(nn.Module):
    """A gated feed-forward layer (SwiGLU)."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, length, width)`` to the same."""
        sizes = self.sizes

        def dense(name: str, features: int, *names: str) -> Any:
            return nn.Dense(
                features,
                use_bias=False,
                dtype=sizes.dtype,
                param_dtype=sizes.dtype,
                kernel_init=_named(nn.initializers.lecun_normal(), *names),
                name=name,
            )

        gate = dense("gate", sizes.hidden, "embed", "mlp")(x)
        up = dense("up", sizes.hidden, "embed", "mlp")(x)
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", "length", "mlp"))
        y = dense("down", sizes.width, "mlp", "embed")(y)
        return nn.with_logical_constraint(y, ("batch", "length", "embed"))


class Layer(nn.Module):
    """One layer: attention, then the MLP, each with its norm and a residual sum."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """Maps ``(batch, length, width)`` to the same; the pair is what `nn.scan` takes."""
        x = x + Attention(self.sizes, name="attention")(Norm(self.sizes, name="norm_1")(x))
        x = x + MLP(self.sizes, name="mlp")(Norm(self.sizes, name="norm_2")(x))
        return x, None


class Decoder(nn.Module):
    """A decoder: ``(batch, length)`` tokens to ``(batch, length, vocab)`` scores."""

    sizes: Sizes = Sizes()
    """Its sizes."""
    scanned: bool = False
    """Whether its layers are one stack under `nn.scan`, or each a module of its own."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Gives the scores of the next tokens."""
        sizes = self.sizes
        x = nn.Embed(
            sizes.vocab,
            sizes.width,
            dtype=sizes.dtype,
            param_dtype=sizes.dtype,
            embedding_init=_named(nn.initializers.normal(0.02), "vocab", "embed"),
            name="embed",
        )(tokens)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        layer = nn.remat(Layer, prevent_cse=not self.scanned)
        if self.scanned:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=sizes.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(sizes, name="layers")(x, None)
        else:
            for number in range(sizes.layers):
                x, _ = layer(sizes, name=f"layers_{number}")(x, None)
        x = Norm(sizes, name="norm")(x)
        return nn.Dense(
            sizes.vocab,
            use_bias=False,
            dtype=sizes.dtype,
            param_dtype=sizes.dtype,
            kernel_init=_named(nn.initializers.lecun_normal(), "embed", "vocab"),
            name="scores",
        )(x)


def tiny() -> Decoder:
    """A decoder that runs anywhere."""
    return Decoder(TINY)


def tiny_scanned() -> Decoder:
    """The same, its layers in one stack."""
    return Decoder(TINY, scanned=True)


def unrolled() -> Decoder:
    """The full size, each layer a module of its own."""
    return Decoder()


def scanned() -> Decoder:
    """The full size, its layers in one stack."""
    return Decoder(scanned=True)


def main(decoder: Decoder, batch: int = 512, length: int = 8192) -> None:
    """Lowers a decoder and prints its plan for a mesh of 16 by 16 by 2 devices."""
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    program = linsey.lower(decoder, tokens)
    print(plan(program.graph, {"data": 16, "fsdp": 16, "tensor": 2}, RULES))


if __name__ == "__main__":
    main(unrolled() if "--unrolled" in sys.argv else scanned())
