"""A mixed classifier of handwritten digits, compiled and trained: `make demo`.

The encoder is Linen, the head is NNX, and flax's own bridge joins them. linsey lowers the whole to
one graph, emits it as NNX and as Linen, checks that both give the source's numbers bit for bit, and
trains it through the compiled program.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx, traverse_util
from flax.nnx import bridge
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits

import linsey

CLASSES = 10


class Head(nnx.Module):
    """From features to a score per class: `(batch, inputs)` to `(batch, classes)`."""

    def __init__(self, inputs: int, hidden: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(inputs, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Gives the scores."""
        return self.out(nnx.relu(self.hidden(x)))


class Classifier(nn.Module):
    """Two convolutions and an NNX head: `(batch, 8, 8, 1)` to `(batch, classes)`."""

    widths: tuple[int, ...] = (32, 64)
    """Channels of each convolution."""
    rate: float = 0.4
    """Share of the features that dropout sets to zero in training."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Gives the scores; `train` uses the batch's statistics and draws from ``dropout``."""
        for width in self.widths:
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return bridge.to_linen(Head, x.shape[-1], 64, CLASSES, name="head")(x)


def load(seed: int = 0) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The digits as `(images, labels)` to train on and to test on; images are `(n, 8, 8, 1)`."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[360:], order[:360]
    return (images[train], digits.target[train]), (images[test], digits.target[test])


def assert_same(found: Any, expected: Any, what: str) -> None:
    """Raises unless two pytrees agree in structure and in every bit of every array."""
    same_tree = jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    if not same_tree or not all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in leaves
    ):
        raise AssertionError(f"{what}: not the numbers of the source")


def run_linen(module: nn.Module, variables: Any, x: jax.Array, keys: Any) -> Any:
    """Scores and new statistics; with keys in training mode, without in evaluation mode."""
    if keys is None:
        return module.apply(variables, x), {}
    y, updates = module.apply(variables, x, train=True, rngs=keys, mutable=["batch_stats"])
    return y, updates


def run_nnx(graphdef: Any, state: Any, x: jax.Array, keys: Any) -> Any:
    """The same of the NNX model."""
    # A copy: without it, an eager call would write its statistics into `state`.
    model = nnx.merge(graphdef, state, copy=True)
    if keys is None:
        return model(x), {}
    y = model(x, train=True, rngs=keys)
    return y, {"batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))}


def check(source: nn.Module, program: linsey.Program, variables: Any, x: jax.Array) -> list[str]:
    """Compares what was emitted with the source; gives a line for each thing that agrees.

    Like is compared with like: eager with eager and jit with jit. (In jit, XLA may fuse operations,
    which can move the last bit.)
    """
    module, emitted = program.emit("linen")
    assert_same(emitted, variables, "initial values")
    lines = ["initial values"]
    graphdef, state = program.emit("nnx")
    exe = program.compile()
    values = program.values
    assert values is not None

    for mode, keys in (("evaluation", None), ("training", {"dropout": jax.random.key(7)})):
        for how, wrap in (("eager", lambda run: run), ("jit", jax.jit)):
            expected = wrap(functools.partial(run_linen, source))(variables, x, keys)
            as_linen = wrap(functools.partial(run_linen, module))(emitted, x, keys)
            as_nnx = wrap(functools.partial(run_nnx, graphdef))(state, x, keys)
            assert_same(as_linen, expected, f"Linen, {mode}, {how}")
            assert_same(as_nnx, expected, f"NNX, {mode}, {how}")
            lines.append(f"{mode}, {how}: Linen and NNX")

        y, after = exe(values, x, train=keys is not None, rngs=keys)
        stats = traverse_util.flatten_dict(expected[1], sep="/")
        assert_same((y, {name: after[name] for name in stats}), (expected[0], stats), mode)
        lines.append(f"{mode}, jit: the executable")
    return lines


def main(epochs: int = 12, batch: int = 64, samples: int | None = None) -> float:
    """Runs the demo.

    Args:
        epochs: how many times training sees each image.
        batch: images a step.
        samples: how many of the images to train on; None: all 1437.

    Returns:
        The share of the test images that the trained model gets right.
    """
    started = time.perf_counter()
    console = Console()
    (images, labels), (test_images, test_labels) = load()
    images, labels = images[:samples], labels[:samples]

    source = Classifier()
    sample = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    program = linsey.lower(source, sample, train=True, rngs=keys)
    console.rule("The graph")
    console.print(str(program), highlight=False, markup=False, soft_wrap=True)

    console.rule("Bit for bit the source")
    program = program.init(keys)
    variables = source.init(keys, jnp.zeros(sample.shape, sample.dtype), train=True)
    for line in check(source, program, variables, jnp.asarray(images[:16])):
        console.print(f"[green]same[/green]  {line}")

    console.rule("Training")
    exe = program.compile()
    steps = len(images) // batch
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * steps))
    values = exe.init(keys)
    state = optimizer.init(values.select("params"))

    @jax.jit
    def step(values: Any, state: Any, x: Any, labels: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            scores, after = exe(values.replace(params), x, train=True, rngs={"dropout": key})
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
            return losses.mean(), after

        params = values.select("params")
        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return after.replace(optax.apply_updates(params, updates)), state, value

    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    shuffle, key = np.random.default_rng(1), jax.random.key(2)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=epochs * steps, epoch=0, loss=float("nan"))
        for epoch in range(1, epochs + 1):
            order = shuffle.permutation(len(images))[: steps * batch].reshape(steps, batch)
            for number, chosen in enumerate(order):
                dropout = jax.random.fold_in(key, (epoch - 1) * steps + number)
                values, state, value = step(values, state, images[chosen], labels[chosen], dropout)
                progress.advance(task)
            progress.update(task, epoch=epoch, loss=float(value))

    scores, _ = exe(values, jnp.asarray(test_images), train=False)
    accuracy = float(np.mean(np.argmax(scores, axis=-1) == test_labels))
    took = time.perf_counter() - started
    console.print(f"Test accuracy [bold]{accuracy:.1%}[/bold], all of it in {took:.0f} s")
    return accuracy


if __name__ == "__main__":
    main()
