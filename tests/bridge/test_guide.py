"""The user's guide, block by block: what each of its 18 Python blocks does, with ``linsey.bridge``.

The guide was written for an older flax. What flax and jax have renamed since is written in today's
spelling here: ``bridge.register_variable_name_type_pair``, ``jax.lax.with_sharding_constraint``,
``out_sharding``, ``jax.set_mesh``, ``v[...] += 1``, and ``rngs/key``, ``rngs/count`` for the stream
of nnx.Dropout. All else is as the guide has it. What it prints is asserted.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import variablelib
from jax import numpy as jnp
from jax.experimental import mesh_utils

from linsey import bridge

pytestmark = [
    # The guide reads and writes `variable.value`, which flax now wants written `variable[...]`.
    pytest.mark.filterwarnings(
        "ignore:'.value' (access|setter) is now deprecated:DeprecationWarning"
    ),
]


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """What a block registers, or what is registered on the fly, is forgotten after it."""
    monkeypatch.setattr(variablelib, "VariableTypeCache", dict(variablelib.VariableTypeCache))


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# The models of the guide


class LinenDot(nn.Module):
    out_dim: int
    w_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        w = self.param("w", self.w_init, (x.shape[-1], self.out_dim))
        return x @ w


class NNXOuter(nnx.Module):
    def __init__(self, out_dim: int, rngs: nnx.Rngs):
        self.dot = bridge.ToNNX(LinenDot(out_dim), rngs=rngs)
        self.b = nnx.Param(jax.random.uniform(rngs.params(), (1, out_dim)))

    def __call__(self, x):
        return self.dot(x) + self.b


class NNXDot(nnx.Module):
    def __init__(self, in_dim: int, out_dim: int, rngs: nnx.Rngs):
        self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (in_dim, out_dim)))

    def __call__(self, x: jax.Array):
        return x @ self.w


class LinenOuter(nn.Module):
    out_dim: int

    @nn.compact
    def __call__(self, x):
        dot = bridge.to_linen(NNXDot, x.shape[-1], self.out_dim)
        b = self.param("b", nn.initializers.lecun_normal(), (1, self.out_dim))
        return dot(x) + b


class LinenMultiCollections(nn.Module):
    out_dim: int
    in_dim: int = 4  # the guide takes it from the global x

    def setup(self):
        self.w = self.param("w", nn.initializers.lecun_normal(), (self.in_dim, self.out_dim))
        self.b = self.param("b", nn.zeros_init(), (self.out_dim,))
        self.count = self.variable("counter", "count", lambda: jnp.zeros((), jnp.int32))

    def __call__(self, x):
        if not self.is_initializing():
            self.count.value += 1
        y = x @ self.w + self.b
        self.sow("intermediates", "dot_sum", jnp.sum(y))
        return y


class Count(nnx.Variable):
    pass


class NNXMultiCollections(nnx.Module):
    def __init__(self, din, dout, rngs):
        self.w = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (din, dout)))
        self.lora = nnx.LoRA(din, 3, dout, rngs=rngs)
        self.count = Count(jnp.array(0))

    def __call__(self, x):
        self.count[...] += 1
        return (x @ self.w.value) + self.lora(x)


class LinenDotWithPartitioning(nn.Module):
    out_dim: int

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        w = self.param("w", init, (x.shape[-1], self.out_dim))
        return x @ w


class NNXDotWithParititioning(nnx.Module):
    def __init__(self, in_dim: int, out_dim: int, rngs: nnx.Rngs):
        init_fn = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
        self.w = nnx.Param(init_fn(rngs.params(), (in_dim, out_dim)))

    def __call__(self, x: jax.Array):
        return x @ self.w


class NNXVmapped(nnx.Module):
    def __init__(self, out_dim: int, vmap_axis_size: int, rngs: nnx.Rngs):
        self.linen_dot = bridge.ToNNX(nn.Dense(out_dim, use_bias=False), rngs=rngs)
        self.vmap_axis_size = vmap_axis_size

    def __call__(self, x):
        @nnx.split_rngs(splits=self.vmap_axis_size)
        @nnx.vmap(in_axes=(0, 0), axis_size=self.vmap_axis_size)
        def vmap_fn(submodule, x):
            return submodule(x)

        return vmap_fn(self.linen_dot, x)


class LinenVmapped(nn.Module):
    dout: int

    @nn.compact
    def __call__(self, x):
        inner = nn.vmap(
            bridge.ToLinen,
            variable_axes={"params": 0, "nnx": None},
            split_rngs={"params": True},
        )(nnx.Linear, args=(x.shape[-1], self.dout))
        return inner(x)


# Imports


def test_block_1_the_import_line_is_all_that_changes():
    names = {name for name in dir(nnx.bridge) if not name.startswith("_")}
    modules = {"interop", "module", "variables", "wrappers"}
    assert names - modules <= set(dir(bridge))


# The basics: Linen -> NNX


def test_block_2_a_linen_module_is_initialised_by_lazy_init_and_then_called():
    x = normal(42, (4, 32))
    model = bridge.ToNNX(LinenDot(64), rngs=nnx.Rngs(0))
    bridge.lazy_init(model, x)
    y = model(x)

    assert model.params["w"].shape == (32, 64)
    assert y.shape == (4, 64)
    # "=> `y = model.apply(var, x)` in Linen"
    w = model.params["w"].value
    assert jnp.array_equal(y, LinenDot(64).apply({"params": {"w": w}}, x))

    model.params["w"].value = normal(1, (32, 64))
    assert not jnp.array_equal(y, model(x))
    assert jnp.array_equal(model(x), x @ normal(1, (32, 64)))


def make_outer() -> tuple[Any, jax.Array]:
    x = normal(42, (4, 32))
    return bridge.lazy_init(NNXOuter(64, rngs=nnx.Rngs(0)), x), x


def test_block_3_lazy_init_of_a_pure_nnx_module_reaches_what_it_holds():
    model, x = make_outer()
    w, b = model.dot.params["w"], model.b
    assert (w.shape, b.shape) == ((32, 64), (1, 64))
    y = model(x)
    assert y.shape == (4, 64)
    assert jnp.array_equal(y, x @ w.value + b.value)


def test_block_4_a_linen_weight_is_an_nnx_param_around_a_jax_array():
    model, _ = make_outer()
    assert isinstance(model.dot.params["w"], nnx.Param)
    assert isinstance(model.dot.params["w"].value, jax.Array)


# The basics: NNX -> Linen


def make_linen_dot() -> tuple[Any, Any, jax.Array]:
    x = normal(42, (4, 32))
    model = bridge.ToLinen(NNXDot, args=(32, 64))
    return model, model.init(jax.random.key(0), x), x


def test_block_5_an_nnx_class_and_its_arguments_are_a_linen_module():
    model, variables, x = make_linen_dot()
    y = model.apply(variables, x)
    assert sorted(variables.keys()) == ["nnx", "params"]
    assert variables["params"]["w"].value.shape == (32, 64)
    assert y.shape == (4, 64)
    assert jnp.array_equal(y, x @ variables["params"]["w"].value)


def test_block_6_the_nnx_collection_holds_the_graphdef():
    _, variables, _ = make_linen_dot()
    assert list(variables["nnx"]) == ["graphdef"]
    # nnx.graph.NodeDef in the guide; a GraphDef is how flax calls the whole of it now.
    assert isinstance(variables["nnx"]["graphdef"], nnx.GraphDef)
    assert not jax.tree.leaves(variables["nnx"])  # "static data"


def test_block_7_to_linen_is_short_for_tolinen():
    short = bridge.to_linen(NNXDot, 32, out_dim=64)
    assert (short == bridge.ToLinen(NNXDot, args=(32,), kwargs={"out_dim": 64})) is True
    assert short != bridge.ToLinen(NNXDot, args=(32,), kwargs={"out_dim": 65})


def test_block_8_a_param_is_an_nnxmeta_around_a_jax_array():
    _, variables, _ = make_linen_dot()
    assert type(variables["params"]["w"]) is bridge.NNXMeta
    assert isinstance(variables["params"]["w"].value, jax.Array)


def test_block_9_to_linen_inside_a_linen_module():
    x = normal(42, (4, 32))
    model = LinenOuter(out_dim=64)
    y, variables = model.init_with_output(jax.random.key(0), x)
    w, b = variables["params"]["ToLinen_0"]["w"].value, variables["params"]["b"]
    assert (w.shape, b.shape, y.shape) == ((32, 64), (1, 64), (4, 64))
    assert jnp.array_equal(y, x @ w + b)
    assert jnp.array_equal(y, model.apply(variables, x))


# Handling RNG keys


def test_block_10_tonnx_draws_from_its_own_streams_and_reseed_repeats_the_first_call():
    x = normal(42, (4, 32))
    model = bridge.ToNNX(nn.Dropout(rate=0.5, deterministic=False), rngs=nnx.Rngs(dropout=0))
    bridge.lazy_init(model, x)
    y1, y2 = model(x), model(x)
    assert not jnp.array_equal(y1, y2)

    nnx.reseed(model, dropout=0)
    assert jnp.array_equal(y1, model(x))
    assert jnp.array_equal(y2, model(x))


def make_dropout() -> tuple[Any, Any, jax.Array]:
    x = normal(42, (4, 32))
    model = bridge.to_linen(nnx.Dropout, rate=0.5)
    return model, model.init({"dropout": jax.random.key(0)}, x), x


def test_block_11_tolinen_advances_its_stored_streams_or_takes_keys():
    model, variables, x = make_dropout()
    key = variables["RngKey"]["rngs"]["key"].value
    assert key.shape == ()
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert variables["RngCount"]["rngs"]["count"].value == 0

    # NNX style
    y1, updates = model.apply(variables, x, mutable=["RngCount"])
    assert list(updates) == ["RngCount"]
    variables |= updates
    assert variables["RngCount"]["rngs"]["count"].value == 1
    y2, updates = model.apply(variables, x, mutable=["RngCount"])
    assert updates["RngCount"]["rngs"]["count"].value == 2
    assert not jnp.array_equal(y1, y2)

    # Linen style
    y3 = model.apply(variables, x, rngs={"dropout": jax.random.key(1)})
    y4 = model.apply(variables, x, rngs={"dropout": jax.random.key(2)})
    assert not jnp.array_equal(y3, y4)
    again = model.apply(variables, x, rngs={"dropout": jax.random.key(1)})
    assert jnp.array_equal(y3, again)


# NNX variable types vs. Linen collections


def make_collections(rngs: Any) -> tuple[Any, jax.Array]:
    x = normal(42, (2, 4))
    return bridge.lazy_init(bridge.ToNNX(LinenMultiCollections(3), rngs=rngs), x), x


def test_block_12_each_collection_is_an_attribute_of_variables_of_its_type():
    model, x = make_collections(nnx.Rngs(0))
    assert type(model.params["w"]) is nnx.Param
    assert type(model.params["b"]) is nnx.Param
    assert jnp.array_equal(model.params["b"].value, jnp.zeros(3))
    count = model.counter["count"]
    assert isinstance(count, nnx.Variable)
    assert type(count).__name__ == "counter"
    assert type(count) is nnx.variable_type_from_name("counter")
    assert count.value == 0

    y = model(x, mutable=True)
    sown = model.intermediates["dot_sum"]
    assert isinstance(sown, tuple)
    assert [type(each) for each in sown] == [nnx.Intermediate]
    assert jnp.array_equal(sown[0].value, jnp.sum(y))
    assert model.counter["count"].value == 1


def test_block_13_split_tells_the_types_apart_and_merge_puts_them_together():
    model, x = make_collections(nnx.Rngs(0))
    y = model(x, mutable=True)

    count_type = type(model.counter["count"])
    static, params, counter, the_rest = nnx.split(model, nnx.Param, count_type, ...)
    assert sorted(params["params"].keys()) == ["b", "w"]
    assert list(counter["counter"].keys()) == ["count"]
    assert sorted(the_rest.keys()) == ["intermediates", "rngs"]

    model = nnx.merge(static, params, counter, the_rest)
    assert jnp.array_equal(y, model(x, mutable=True))
    assert model.counter["count"].value == 2


def make_lora() -> tuple[Any, Any, jax.Array]:
    bridge.register_variable_name_type_pair("Count", Count, overwrite=True)
    xkey, pkey, dkey = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(xkey, (2, 4))
    model = bridge.to_linen(NNXMultiCollections, 4, 3)
    return model, model.init({"params": pkey, "dropout": dkey}, x), x


def test_block_14_each_variable_type_is_a_collection():
    model, var, x = make_lora()
    assert sorted(var.keys()) == ["Count", "LoRAParam", "nnx", "params"]
    (w,) = var["params"].values()
    assert type(w) is bridge.NNXMeta
    assert w.var_type is nnx.Param
    assert w.value.shape == (4, 3)
    assert not any(w.metadata.values())  # flax had five empty hooks there, and has none now
    assert var["Count"]["count"].var_type is Count

    y, updates = model.apply(var, x, mutable=["Count"])
    assert updates["Count"]["count"].value == var["Count"]["count"].value + 1
    lora = nn.unbox(var["LoRAParam"]["lora"])
    assert jnp.array_equal(y, x @ w.value + x @ lora["lora_a"] @ lora["lora_b"])


# Partition metadata


def make_mesh() -> jax.sharding.Mesh:
    devices = mesh_utils.create_device_mesh((2, 4))
    return jax.sharding.Mesh(devices=devices, axis_names=("in", "out"))


def assert_spread(array: jax.Array, mesh: jax.sharding.Mesh) -> None:
    """Asserts that a (32, 64) array lies on the 2x4 mesh as ``P('in', 'out')`` says."""
    expected = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("in", "out"))
    assert array.sharding.is_equivalent_to(expected, 2)
    assert {shard.data.shape for shard in array.addressable_shards} == {(16, 16)}
    assert len({str(shard.index) for shard in array.addressable_shards}) == 8


@pytest.mark.mesh
def test_block_15_the_partition_of_a_linen_param_goes_with_the_nnx_one():
    @jax.jit
    def create_sharded_nnx_module(x):
        model = bridge.lazy_init(bridge.ToNNX(LinenDotWithPartitioning(64), rngs=nnx.Rngs(0)), x)
        static, state = nnx.split(model)
        sharded_state = jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))
        return static, sharded_state

    assert len(jax.devices()) == 8
    mesh = make_mesh()
    x = normal(42, (4, 32))
    with jax.set_mesh(mesh):
        model = nnx.merge(*create_sharded_nnx_module(x))

    assert type(model.params["w"]) is nnx.Param
    assert model.params["w"].out_sharding == ("in", "out")
    assert_spread(model.params["w"].value, mesh)
    assert model(x).shape == (4, 64)


@pytest.mark.mesh
def test_block_16_the_partition_of_an_nnx_param_goes_with_the_linen_one():
    mesh = make_mesh()
    x = normal(42, (4, 32))
    model = bridge.to_linen(NNXDotWithParititioning, 32, 64)
    with jax.set_mesh(mesh):
        variables = jax.jit(model.init)(jax.random.key(0), x)

    assert type(variables["params"]["w"]) is bridge.NNXMeta
    assert variables["params"]["w"].metadata["out_sharding"] == ("in", "out")
    assert_spread(variables["params"]["w"].value, mesh)

    unboxed = nn.unbox(variables)
    assert isinstance(unboxed["params"]["w"], jax.Array)
    assert jnp.array_equal(unboxed["params"]["w"], variables["params"]["w"].value)


# Lifted transforms


def test_block_17_nnx_vmap_over_tonnx():
    x = normal(0, (4, 32))
    model = bridge.lazy_init(NNXVmapped(64, 4, rngs=nnx.Rngs(0)), x)
    kernel = model.linen_dot.params["kernel"].value
    assert kernel.shape == (4, 32, 64)
    assert len(np.unique(kernel[:, 0, 0])) == 4  # the keys were split: four other kernels
    y = model(x)
    assert y.shape == (4, 64)
    assert jnp.array_equal(y, jax.vmap(jnp.matmul)(x, kernel))


def test_block_18_linen_vmap_over_tolinen():
    x = normal(42, (4, 32))
    model = LinenVmapped(64)
    var = model.init(jax.random.key(0), x)
    kernel = var["params"]["VmapToLinen_0"]["kernel"].value
    assert kernel.shape == (4, 32, 64)
    assert len(np.unique(kernel[:, 0, 0])) == 4
    y = model.apply(var, x)
    assert y.shape == (4, 64)
    assert jnp.array_equal(y, jax.vmap(jnp.matmul)(x, kernel))


# What the guide prints. jax made other numbers of a key then; the old way can still be asked for.


def printed(*rows: list[float]) -> Any:
    """Numbers of the guide, as close as they are printed there."""
    return pytest.approx(np.array(rows, "float32"), rel=1e-5)


def test_the_numbers_of_block_12():
    with jax.threefry_partitionable(False):
        # The guide has nnx.Rngs(0). flax forks that now before it is used, and a seed not.
        model, x = make_collections(0)
        model(x)
    assert np.asarray(model.params["w"][...]) == printed(
        [0.35401407, 0.38010964, -0.20674096],
        [-0.7356256, 0.35613298, -0.5099556],
        [-0.4783049, 0.4310735, 0.30137998],
        [-0.6102254, -0.2668519, -1.053598],
    )
    (dot_sum,) = model.intermediates["dot_sum"]
    assert float(dot_sum[...]) == pytest.approx(6.932987, rel=1e-5)


def test_the_numbers_of_block_14():
    with jax.threefry_partitionable(False):
        _, var, _ = make_lora()
    assert np.asarray(var["params"]["w"].value) == printed(
        [0.2916921, 0.22780475, 0.06553137],
        [0.17487915, -0.34043145, 0.24764155],
        [0.6420431, 0.6220095, -0.44769976],
        [0.11161668, 0.83873135, -0.7446058],
    )


def test_the_key_of_block_11():
    with jax.threefry_partitionable(False):
        _, variables, _ = make_dropout()
        shown = jax.random.wrap_key_data(jnp.array([1428664606, 3351135085], jnp.uint32))
        # nnx.Dropout now forks the stream that it is given.
        forked = nnx.Rngs(dropout=shown).fork().dropout.key[...]
    assert jnp.array_equal(variables["RngKey"]["rngs"]["key"].value, forked)
