"""Trains a small mixer of handwritten digits on a mesh: parameters and optimizer state split.

`python examples/train_sharded.py` makes eight devices out of the CPU. Two axes of a mesh share the
model: ``data`` splits the batch and (as FSDP does) the parameters, ``model`` splits layers. The
state is born sharded, and each step averages the gradients of two micro-batches.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import linsey

CLASSES = 10
RULES = (("batch", "data"), ("embed", "data"), ("mlp", "model"), ("patches", None))
"""What the names in the model are split over."""


class Mlp(nn.Module):
    """Two layers: `(..., features)` to the same shape."""

    width: int
    """Features in the middle."""
    names: tuple[str, str]
    """Logical names of the outer features and of those in the middle."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Gives the features."""
        init, (outer, inner) = nn.initializers.lecun_normal(), self.names
        up = nn.with_logical_partitioning(init, (outer, inner))
        down = nn.with_logical_partitioning(init, (inner, outer))
        h = nn.gelu(nn.Dense(self.width, kernel_init=up)(x))
        return nn.Dense(x.shape[-1], kernel_init=down)(h)


class Mixer(nn.Module):
    """An MLP-Mixer: images `(batch, 8, 8)` to a score per class."""

    features: int = 64
    """Features of a patch."""
    blocks: int = 2
    """How many times patches, and then features, are mixed."""
    rate: float = 0.1
    """Share of the features that dropout sets to zero in training."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Gives the scores; `train` draws from ``dropout``."""
        x = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, "embed"))
        x = nn.Dense(self.features, kernel_init=init, name="embed")(x)
        for _ in range(self.blocks):
            mixed = Mlp(32, ("patches", "mlp"))(nn.LayerNorm()(x).swapaxes(1, 2))
            x = nn.with_logical_constraint(x + mixed.swapaxes(1, 2), ("batch", None, None))
            x = x + Mlp(256, ("embed", "mlp"))(nn.LayerNorm()(x))
            x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm()(x).mean(axis=1))


def loss(model: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean cross entropy, and how many labels were right."""
    scores = model(images, train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return losses.mean(), jnp.sum(scores.argmax(-1) == labels)


def load(seed: int = 0) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The digits as `(images, labels)` to train on and to test on; images are `(n, 8, 8)`."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[357:], order[:357]
    return (images[train], digits.target[train]), (images[test], digits.target[test])


def make_mesh() -> Mesh:
    """Four devices along ``data``, two along ``model``."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def main(epochs: int = 10, batch: int = 96) -> float:
    """Runs the demo.

    Args:
        epochs: how many times training sees each image.
        batch: images a step.

    Returns:
        The share of the test images that the trained model gets right.
    """
    started = time.perf_counter()
    (images, labels), (test_images, test_labels) = load()
    steps = len(images) // batch

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    sample = jax.ShapeDtypeStruct((1, 8, 8), jnp.float32)
    program = linsey.lower(Mixer(), sample, train=True, rngs=keys)
    exe = program.compile(mesh=make_mesh(), rules=RULES)
    optimizer = optax.adamw(optax.cosine_decay_schedule(4e-3, epochs * steps), weight_decay=1e-2)
    step = exe.train(loss, optimizer, accumulate=2, in_shardings=P("data"))

    state = step.init(keys)
    mu = state.opt_state[0].mu
    print(f"{'parameter':<34} {'shape':<10} {'a device holds':<15} its Adam state is split")
    for name, value in state.values.items():
        shard = value.addressable_shards[0].data.shape
        print(f"{name:<34} {value.shape!s:<10} {shard!s:<15} {tuple(mu[name].sharding.spec)}")

    shuffle = np.random.default_rng(1)
    for epoch in range(epochs):
        order = shuffle.permutation(len(images))[: steps * batch].reshape(steps, batch)
        right = []
        for number, chosen in enumerate(order):
            key = jax.random.fold_in(keys["dropout"], epoch * steps + number)
            rngs = {"dropout": key}
            state, (value, hits) = step(state, images[chosen], labels[chosen], rngs=rngs)
            right.append(hits)
        share = np.sum(right) / (steps * batch)
        print(f"epoch {epoch + 1:2}: loss {float(value):.4f}, right in training {share:.1%}")

    scores, _ = exe(state.values, jnp.asarray(test_images))
    accuracy = float(np.mean(np.argmax(scores, axis=-1) == test_labels))
    took = time.perf_counter() - started
    print(
        f"Test accuracy {accuracy:.1%} on {len(jax.devices())} devices, all of it in {took:.0f} s"
    )
    return accuracy


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
