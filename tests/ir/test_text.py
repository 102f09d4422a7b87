"""The printed graph of a few programs, in full: read the diff when one changes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import linsey
from linsey.ir import Const, Graph, Node, Slot, TensorType, format_graph

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


class MLP(nn.Module):
    widths: tuple[int, ...] = (4, 2)

    @nn.compact
    def __call__(self, x: Any, *, scale: float = 1.0) -> Any:
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1], use_bias=False, name="head")(x) * scale


class Autoencoder(nnx.Module):
    """One block twice, and a decoder that shares the encoder's kernel."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.Linear(3, 3, rngs=rngs)
        self.block = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.blocks = nnx.List([self.block, self.block])
        self.decoder = nnx.Linear(3, 3, rngs=rngs)
        self.decoder.kernel = self.encoder.kernel
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.encoder(x)
        for block in self.blocks:
            x = block(x)
        return self.decoder(self.dropout(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.tanh(nn.Dense(3, kernel_init=init)(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=4,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(name="layers")(x, None)[0]


class Ensemble(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        members = nn.vmap(
            Stack,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=5,
            metadata_params={nn.PARTITION_NAME: "members"},
        )
        return members(name="members")(x)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))


class Head(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.linear(x)


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = bridge.ToNNX(Encoder(), rngs=rngs)
        self.head = Head(2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.encoder(x))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


class Small(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 2, rngs=rngs)


def optimizer() -> linsey.Program:
    return linsey.lower(nnx.Optimizer(Small(nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param))


PROGRAMS: dict[str, Callable[[], linsey.Program]] = {
    "mlp": lambda: linsey.lower(MLP(), X, scale=2.0),
    "shared_tied_nnx": lambda: linsey.lower(Autoencoder, X, rngs=nnx.Rngs(params=0, dropout=1)),
    "scan_in_vmap_partitioned": lambda: linsey.lower(Ensemble(), X),
    "mixed": lambda: linsey.lower(Classifier, X),
    "cnn": lambda: linsey.lower(
        CNN(),
        jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32),
        rngs={"params": 0, "dropout": 1},
        train=True,
    ),
    "nnx_optimizer": optimizer,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_printed_graph(name: str, assert_golden: Callable[[str, str], None]) -> None:
    with nnx.use_eager_sharding(False):
        assert_golden(name, str(PROGRAMS[name]()))


@pytest.mark.parametrize("name", PROGRAMS)
def test_equal_graphs_print_alike(name: str) -> None:
    with nnx.use_eager_sharding(False):
        first, second = PROGRAMS[name](), PROGRAMS[name]()
    assert first.graph == second.graph
    assert str(first) == str(second)


def test_a_graph_prints_as_its_program() -> None:
    program = PROGRAMS["mlp"]()
    assert str(program) == str(program.graph) == format_graph(program.graph)


def test_names_are_escaped() -> None:
    graph = Graph(
        nodes=(
            Node(children=(("a/b", 1), ("", 2), (0, 1))),
            Node(slots=(("[w]", 0),)),
            Node(attrs=(("_hidden", Const(1)), ("none", Const(None)), ("long", Const("x" * 99)))),
        ),
        slots=(
            Slot(
                collection="params",
                paths=(("a/b", "[w]"), (0, "[w]")),
                type=TensorType(shape=(2,), dtype="int8"),
            ),
        ),
        empty=(("cache", "a/b"),),
    )
    assert str(graph) == "\n".join(
        [
            "graph 3 nodes, 1 slots",
            "%0 module",
            r"  a\/b: %1 module",
            r"    params/\[w]: int8[2] also [0]/\[w]",
            r"  \e: %2 module",
            "  [0]: -> %1",
            r"empty cache/a\/b",
        ]
    )


def test_a_cycle_is_printed_once() -> None:
    graph = Graph(nodes=(Node(children=(("me", 0), ("you", 1))), Node(children=(("up", 0),))))
    assert str(graph) == (
        "graph 2 nodes, 0 slots\n%0 module\n  me: -> %0\n  you: %1 module\n    up: -> %0"
    )
