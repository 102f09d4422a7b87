"""Programs on a mesh of eight faked devices: born sharded, run sharded, equal to flax by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import linsey
from linsey.ir import PartitionError

pytestmark = pytest.mark.mesh

RULES = (("batch", "data"), ("embed", None), ("mlp", "model"), ("layers", None))
X = np.linspace(-1.0, 1.0, 8 * 16, dtype=np.float32).reshape(8, 16)
KEY = {"params": jax.random.key(0)}


def mesh_of(*shape: int, kind: AxisType = AxisType.Auto, names: Any = ("data", "model")) -> Mesh:
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


MESH = mesh_of(4, 2)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        init = nn.initializers.lecun_normal()
        up = nn.with_logical_partitioning(init, ("embed", "mlp"))
        down = nn.with_logical_partitioning(init, ("mlp", "embed"))
        h = nn.Dense(32, kernel_init=up, name="up")(x)
        h = nn.with_logical_constraint(h, ("batch", "mlp"))
        h = nn.BatchNorm(use_running_average=not train)(h)
        return x + nn.Dense(16, kernel_init=down, name="down")(nn.gelu(h))


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        def body(block: Any, x: Any, _: Any) -> Any:
            return block(x, train), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(Block(name="block"), x, None)[0]


def by_hand(module: Any, mesh: Mesh = MESH, rules: Any = RULES) -> tuple[Any, Any, Any]:
    """Variables born sharded, their shardings, and a jitted apply, as flax's guide does it."""

    def init(keys: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
            return module.init(keys, X)

    abstract = jax.eval_shape(init, KEY)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)
    variables = jax.jit(init, out_shardings=shardings)(KEY)

    def apply(variables: Any, x: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
            return module.apply(variables, x, True, mutable=["batch_stats"])

    into = (shardings, NamedSharding(mesh, P("data")))
    return variables, shardings, jax.jit(apply, in_shardings=into)


@pytest.mark.parametrize("module", [Block(), Stack()], ids=["block", "scan"])
def test_a_sharded_run_equals_flax_by_hand(module: Any) -> None:
    variables, shardings, apply = by_hand(module)
    exe = linsey.lower(module, X).compile(mesh=MESH, rules=RULES, in_shardings=(P("data"),))
    values = exe.init(KEY)
    plain = nn.unbox(variables)
    for key, value in values.items():
        expected: Any = plain
        for name in key.split("/"):
            expected = expected[name]
        assert value.sharding.is_equivalent_to(expected.sharding, value.ndim), key
        assert_same(value, expected)
    y, after = exe(values, X, True)
    expected_y, updates = apply(variables, X)
    assert_same(y, expected_y)
    for key, value in after.items():
        if key.startswith("batch_stats"):
            expected = updates
            for name in key.split("/"):
                expected = expected[name]
            assert_same(value, nn.unbox(expected))
        assert value.sharding.is_equivalent_to(exe.shardings[key], value.ndim)
