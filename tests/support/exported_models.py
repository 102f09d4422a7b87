"""Models for exported programs, which another process must not be able to import."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import core, nnx, struct
from flax import linen as nn
from jax.sharding import PartitionSpec


class Net(nn.Module):
    """Dense, statistics and dropout, with partitions; static and optional arguments."""

    @nn.compact
    def __call__(self, x: Any, mask: Any = None, train: bool = False) -> Any:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.Dense(16, kernel_init=init)(x)
        x = nn.with_logical_constraint(x, ("batch", "mlp"))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.5)(nn.gelu(x), deterministic=not train)
        self.sow("intermediates", "hidden", x)
        x = nn.Dense(8)(x)
        return {"out": x if mask is None else x * mask, "rows": x.shape[0]}


class Coder(nnx.Module):
    """Two methods, randomness and a counter in its state, and a constraint that needs a mesh."""

    def __init__(self, rngs: nnx.Rngs, axis: str | None = None) -> None:
        names = {} if axis is None else {"out_sharding": (None, "model")}
        self.up = nnx.Linear(8, 16, kernel_metadata=names, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.int32(0))
        self.axis = axis

    def __call__(self, x: Any) -> Any:
        return self.decode(self.encode(x))

    def encode(self, x: Any, scale: float = 1.0) -> Any:
        self.calls.set_value(self.calls.get_value() + 1)
        return self.dropout(jax.nn.relu(self.up(x))) * scale

    def decode(self, code: Any) -> Any:
        out = self.down(code)
        if self.axis is not None:
            out = jax.lax.with_sharding_constraint(out, PartitionSpec(self.axis))
        return out


class Attention(nn.Module):
    """A causal layer of any batch and length."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        return nn.LayerNorm()(x).mean(1)


class Conv(nn.Module):
    """Convolutions and pooling of images of any size."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.max_pool(nn.Conv(4, (3, 3))(x), (2, 2), (1, 1))
        return nn.Dense(2)(x.mean((1, 2)))


@struct.dataclass
class Output:
    """A result of a class of its own."""

    hidden: Any
    pair: Any
    none: Any = None


class Pair(NamedTuple):
    """A named tuple."""

    first: Any
    second: Any


class Typed(nn.Module):
    """Takes and gives objects of classes."""

    @nn.compact
    def __call__(self, pair: Pair, extra: Any = None) -> Output:
        hidden = nn.Dense(4)(pair.first + pair.second)
        return Output(hidden=core.freeze({"x": hidden}), pair=Pair(hidden, [hidden]))


class Weak(nnx.Module):
    """A number in a slot."""

    def __init__(self) -> None:
        self.scale = nnx.Variable(0.5)

    def __call__(self, x: Any, by: Any) -> Any:
        return x * self.scale.get_value() * by


class Odd(nn.Module):
    """What cannot be exported, or not differentiated, one case each."""

    what: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4)(x)
        match self.what:
            case "callback":
                jax.debug.print("{}", x.sum())
            case "loop":
                x = jax.lax.while_loop(lambda v: v.sum() > 1, lambda v: v / 2, x)
            case "size":
                x = x.reshape(x.shape[0] // 2, 2, 4) if x.shape[0] >= 4 else x
            case "text":
                return "text"
        return x
