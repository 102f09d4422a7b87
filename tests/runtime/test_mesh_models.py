"""Models of many kinds on a mesh: each equals a sharded jit of its source, bit for bit."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx
from flax.linen import partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import linsey
from linsey import checkpoint

pytestmark = pytest.mark.mesh

RULES = (
    ("batch", "data"),
    ("layers", "data"),
    ("expert", "model"),
    ("embed", None),
    ("mlp", "model"),
    ("vocab", "model"),
)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
CALL_KEYS = {"dropout": jax.random.key(2)}
X = np.sin(np.arange(8 * 4 * 16, dtype=np.float32)).reshape(8, 4, 16)
TOKENS = (np.arange(8 * 4) % 13).reshape(8, 4).astype(np.int32)


@functools.cache
def mesh_of(*shape: int, names: tuple[str, ...] = ("data", "model")) -> Mesh:
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def named(init: Any, *names: str | None) -> Any:
    return nn.with_logical_partitioning(init, names)


class Block(nn.Module):
    """Dropout, a sown value, and both kinds of constraint."""

    @nn.compact
    def __call__(self, x: Any, mask: Any) -> tuple[Any, None]:
        init = nn.initializers.lecun_normal()
        h = nn.LayerNorm(scale_init=named(nn.initializers.ones, "embed"))(x)
        h = nn.Dense(32, kernel_init=named(init, "embed", "mlp"))(h)
        h = nn.with_logical_constraint(h, ("batch", None, "mlp"))
        h = nn.Dropout(0.2, deterministic=False)(nn.gelu(h)) * mask
        h = jax.lax.with_sharding_constraint(h, P("data", None, "model"))
        self.sow("intermediates", "mean", h.mean())
        return x + nn.Dense(16, kernel_init=named(init, "mlp", "embed"))(h), None


class Decoder(nn.Module):
    """A scan over rematerialized blocks, and a tied embedding; ``axis``: where params stack."""

    axis: int = 0

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(16, 16, embedding_init=named(nn.initializers.normal(), "vocab", "embed"))
        scan = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": self.axis, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=4,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scan(name="layers")(embed(tokens), (tokens > 2)[..., None])
        return embed.attend(x)


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(16, kernel_init=named(nn.initializers.lecun_normal(), "embed", "mlp"))(x)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        gate = nn.softmax(nn.Dense(4)(x))
        every = nn.vmap(
            Expert,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=4,
            metadata_params={nn.PARTITION_NAME: "expert"},
        )
        y = nn.with_logical_constraint(every(name="experts")(x), ("expert", "batch", None, None))
        return jnp.einsum("ebtd,bte->btd", y, gate)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = named(nn.initializers.lecun_normal(), "embed", "mlp")
        return nn.RNN(nn.LSTMCell(16, kernel_init=init))(x)


class Decoding(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        step = x if self.is_initializing() else x[:, :1]
        return nn.MultiHeadDotProductAttention(num_heads=4, decode=True)(step)


class ShardMapped(nn.Module):
    """Communicates by hand, on the mesh that it finds."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel = self.param("kernel", named(nn.initializers.normal(), "embed", "mlp"), (16, 32))

        def body(x: Any, kernel: Any) -> Any:
            return x @ kernel + jax.lax.psum(x.sum(), "data")

        into, out = (P("data"), P(None, "model")), P("data", None, "model")
        return jax.shard_map(body, in_specs=into, out_specs=out)(x, kernel)


@contextlib.contextmanager
def around(mesh: Mesh) -> Iterator[None]:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        yield


def by_name(tree: Any) -> dict[str, Any]:
    found, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(tree))
    return {"/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in p): v for p, v in found}


CASES = {
    "decoder": (Decoder(), TOKENS, ["intermediates"]),
    "decoder, stacked at axis 1": (Decoder(axis=1), TOKENS, False),
    "experts": (Experts(), X, False),
    "recurrent": (Recurrent(), X, False),
    "decoding": (Decoding(), X, ["cache"]),
    "shard_map": (ShardMapped(), X, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_linen_model_equals_its_source(name: str) -> None:
    module, x, mutable = CASES[name]
    mesh = mesh_of(4, 2)

    def init(keys: Any) -> Any:
        with around(mesh):
            return module.init(keys, x)

    def apply(variables: Any, x: Any, keys: Any) -> Any:
        with around(mesh):
            out = module.apply(variables, x, rngs=keys, mutable=mutable)
        return out if mutable else (out, {})

    into = nn.logical_to_mesh_sharding(
        nn.get_partition_spec(jax.eval_shape(init, KEYS)), mesh, RULES
    )
    variables = jax.jit(init, out_shardings=into)(KEYS)
    batch = NamedSharding(mesh, P("data"))
    y, updates = jax.jit(apply, in_shardings=(into, batch, None))(variables, x, CALL_KEYS)

    with jax.set_mesh(mesh):  # a constraint by a bare spec needs it, in flax too
        program = linsey.lower(module, x, rngs=KEYS)
    exe = program.compile(
        mesh=mesh, rules=RULES, in_shardings=P("data"), mutable=mutable, pack=True
    )
    values = exe.init(KEYS)
    expected = by_name(variables)
    assert set(values) == {key for key in expected if not key.startswith("intermediates")}
    for key, value in values.items():
        assert_same(value, expected[key])
        assert value.sharding.is_equivalent_to(expected[key].sharding, value.ndim), key
    found, after = exe(values, x, rngs=CALL_KEYS)
    assert_same(found, y)
    assert found.sharding.is_equivalent_to(y.sharding, y.ndim)
    changed = by_name(updates)
    for key in after:
        assert_same(after[key], changed.get(key, expected[key]))


class WithAxes(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                init = nn.initializers.lecun_normal()
                up = partitioning.param_with_axes("up", init, (16, 32), axes=("embed", "mlp"))
                down = partitioning.param_with_axes("down", init, (32, 16), axes=("mlp", "embed"))
                return x + jnp.tanh(x @ up) @ down, None

        scan = partitioning.scan_with_axes(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=4,
            axis_name="layers",
            axes_collections=("params",),
        )
        return scan(name="layers")(x, None)[0]


def test_scan_with_axes_lies_as_its_axes_say() -> None:
    abstract: Any = jax.eval_shape(WithAxes().init, KEYS, X)
    names = partitioning.get_axis_names(abstract["params_axes"])
    specs = linsey.lower(WithAxes(), X).partition_specs(mesh=mesh_of(4, 2), rules=RULES)
    for name in ("up", "down"):
        assert specs[f"params/layers/{name}"] == nn.logical_to_mesh_axes(
            names["layers"][name], RULES
        )
    assert specs["params/layers/up"] == P("data", None, "model")


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        up, down = {"out_sharding": ("embed", "mlp")}, {"out_sharding": ("mlp", "embed")}
        self.up = nnx.Linear(16, 32, kernel_metadata=up, rngs=rngs)
        self.down = nnx.Linear(32, 16, kernel_metadata=down, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(x + self.down(self.dropout(nnx.relu(self.up(x)))))


class Layers(nnx.Module):
    """Layers stacked by vmap, each with its own keys, and run by scan."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        name = {nnx.PARTITION_NAME: "layers"}

        @nnx.split_rngs(splits=4)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=name)
        def make(rngs: nnx.Rngs) -> Layer:
            return Layer(rngs)

        self.layers = make(rngs)

    def __call__(self, x: Any) -> Any:
        name = {nnx.PARTITION_NAME: "layers"}

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata=name)
        def run(x: Any, layer: Layer) -> Any:
            return layer(x)

        return run(x, self.layers)


def layers() -> linsey.Program:
    with nnx.use_eager_sharding(False):
        return linsey.lower(lambda rngs: Layers(rngs), rngs=0)


def test_an_nnx_stack_equals_its_source() -> None:
    mesh, x = mesh_of(4, 2), X[:, 0]
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES), nnx.use_eager_sharding(False):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Layers(nnx.Rngs(0))))
        specs = nnx.get_partition_spec(abstract)

        @jax.jit
        def make() -> Any:
            return jax.lax.with_sharding_constraint(nnx.state(Layers(nnx.Rngs(0))), specs)

        @jax.jit
        def call(state: Any, x: Any) -> Any:
            model = nnx.merge(graphdef, state)
            return model(x), nnx.state(model)

        state = make()
        y, updated = call(state, jax.device_put(x, NamedSharding(mesh, P("data"))))
    exe = layers().compile(mesh=mesh, rules=RULES, in_shardings=P("data"), pack=True)
    values = exe.init(0)
    found, after = exe(values, x)
    assert_same(found, y)
    for old, new in ((values, state), (after, updated)):
        expected = {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(new)}
        assert {key.split("/", 1)[1] for key in old} == set(expected)
        for key, value in old.items():
            assert_same(value, expected[key.split("/", 1)[1]])
    for path, variable in nnx.to_flat_state(state):
        key = next(k for k in values if k.split("/", 1)[1] == "/".join(map(str, path)))
        assert values[key].sharding.is_equivalent_to(
            variable.get_value().sharding, variable.get_value().ndim
        ), key


def test_a_checkpoint_of_a_packed_stack_goes_onto_another_mesh(tmp_path: Any) -> None:
    program, x = layers(), X[:, 0]
    first = program.compile(mesh=mesh_of(4, 2), rules=RULES, in_shardings=P("data"), pack=True)
    second = program.compile(mesh=mesh_of(2, 4), rules=RULES, in_shardings=P("data"))
    _, values = first(first.init(0), x)
    checkpoint.save(tmp_path / "step", program, values)
    restored = checkpoint.restore(tmp_path / "step", program, shardings=second.shardings)
    for key, value in restored.items():
        assert_same(value, values[key])
        assert value.sharding.is_equivalent_to(second.shardings[key], value.ndim)
    assert_same(second(restored, x)[0], second(second.place(values), x)[0])


def test_a_model_that_is_sharded_already_goes_onto_any_mesh() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            kernel = {"out_sharding": (None, "model")}
            self.linear = nnx.Linear(16, 32, kernel_metadata=kernel, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return jnp.tanh(self.linear(x))

    with jax.set_mesh(mesh_of(4, 2)):
        model = Net(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    program, x = linsey.lower(model), X[:, 0]
    for shape in ((4, 2), (2, 4), (8, 1), (2, 2)):
        mesh = mesh_of(*shape)
        into = jax.tree.map(functools.partial(NamedSharding, mesh), nnx.get_partition_spec(state))
        batch = NamedSharding(mesh, P("data"))
        call = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x), in_shardings=(None, batch))
        exe = program.compile(mesh=mesh, in_shardings=P("data"))
        assert_same(exe(program.values, x)[0], call(jax.device_put(state, into), x))


def test_an_executable_runs_inside_code_for_any_mesh() -> None:
    exe = linsey.lower(Expert(), X).compile(mesh=mesh_of(4, 2), rules=RULES, in_shardings=P("data"))
    values = exe.init(KEYS)
    y, _ = exe(values, X)

    def call(values: Any, x: Any) -> Any:
        return exe(values, x)[0]

    for mesh in (mesh_of(4, 2), mesh_of(2, 4)):
        with jax.set_mesh(mesh):
            assert_same(jax.jit(call)(values, X), y)
            assert_same(call(values, X), y)
    twice, _ = jax.lax.scan(lambda x, _: (call(values, x), None), X, None, length=2)
    assert_same(twice, call(values, y))
    assert_same(jax.vmap(lambda x: call(values, x))(np.stack([X, X]))[1], y)
