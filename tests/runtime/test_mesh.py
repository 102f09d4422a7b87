"""Programs on a mesh of eight faked devices: born sharded, run sharded, equal to flax by hand."""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import linsey
from linsey.ir import PartitionError

pytestmark = pytest.mark.mesh

RULES = (("batch", "data"), ("embed", None), ("mlp", "model"), ("layers", None))
X = np.linspace(-1.0, 1.0, 8 * 16, dtype=np.float32).reshape(8, 16)
KEY = {"params": jax.random.key(0)}


@functools.cache
def mesh_of(*shape: int, kind: AxisType = AxisType.Auto, names: Any = ("data", "model")) -> Mesh:
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def grid() -> Mesh:
    """Eight devices; made when a test runs, since other runs have only one."""
    return mesh_of(4, 2)


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


def by_hand(module: Any, rules: Any = RULES) -> tuple[Any, Any]:
    """Variables born sharded, and a jitted apply, as flax's guide does it."""

    mesh = grid()

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
    return variables, jax.jit(apply, in_shardings=into)


@pytest.mark.parametrize("module", [Block(), Stack()], ids=["block", "scan"])
def test_a_sharded_run_equals_flax_by_hand(module: Any) -> None:
    variables, apply = by_hand(module)
    exe = linsey.lower(module, X).compile(mesh=grid(), rules=RULES, in_shardings=(P("data"),))
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


class Net(nnx.Module):
    """Annotated with mesh axes, with batch statistics and dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        up, down = {"out_sharding": (None, "model")}, {"out_sharding": ("model", None)}
        self.up = nnx.Linear(16, 32, kernel_metadata=up, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(32, 16, kernel_metadata=down, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


@pytest.fixture(scope="module")
def net() -> linsey.Program:
    with nnx.use_eager_sharding(False):
        return linsey.lower(lambda rngs: Net(rngs), rngs=nnx.Rngs(0))


def net_by_hand() -> tuple[Any, Any]:
    """The state born sharded, and a jitted call, as NNX's guide does it."""
    with jax.set_mesh(grid()):

        @jax.jit
        def make() -> Any:
            state = nnx.state(Net(nnx.Rngs(0)))
            return jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))

        state = make()
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))

        @jax.jit
        def call(state: Any, x: Any) -> Any:
            model = nnx.merge(graphdef, state)
            return model(x), nnx.state(model)

        batch = jax.device_put(X, NamedSharding(grid(), P("data")))
        return state, call(state, batch)


def test_an_nnx_model_on_a_mesh_equals_flax_by_hand(net: linsey.Program) -> None:
    exe = net.compile(mesh=grid(), in_shardings=P("data"))
    values = exe.init(0)
    state, (expected_y, expected_state) = net_by_hand()

    def same(values: linsey.Values, state: Any) -> None:
        for path, variable in nnx.to_flat_state(state):
            key = next(k for k in values if k.split("/", 1)[1] == "/".join(map(str, path)))
            assert_same(values[key], variable.get_value())

    same(values, state)
    assert values["params/up/kernel"].sharding.spec == P(None, "model")
    assert len(values["params/up/kernel"].addressable_shards) == 8
    assert values["params/up/kernel"].addressable_shards[0].data.shape == (16, 16)
    y, after = exe(values, X)
    assert_same(y, expected_y)
    same(after, expected_state)


@pytest.mark.parametrize("rngs", [0, jax.random.key(0), nnx.Rngs(0)], ids=["int", "key", "Rngs"])
def test_born_sharded_values_are_those_of_init(net: linsey.Program, rngs: Any) -> None:
    expected = net.init(0).values
    for key, value in net.compile(mesh=grid()).init(rngs).items():
        assert_same(value, expected[key])


@pytest.mark.parametrize("source", ["host", "one device", "other mesh", "fewer devices"])
def test_values_from_elsewhere_are_moved(net: linsey.Program, source: str) -> None:
    exe = net.compile(mesh=grid(), in_shardings=P("data"))
    expected, after = exe(exe.init(0), X)
    plain = net.init(0).values
    devices = np.array(jax.devices()[:2]).reshape(1, 2)
    few = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    elsewhere = {
        "host": lambda: jax.tree.map(
            lambda leaf: leaf if "key" in str(leaf.dtype) else np.asarray(leaf), plain
        ),
        "one device": lambda: jax.device_put(plain, jax.devices()[3]),
        "other mesh": lambda: net.compile(mesh=mesh_of(2, 4)).init(0),
        "fewer devices": lambda: net.compile(mesh=few).init(0),
    }[source]()
    y, moved = exe(elsewhere, jax.device_put(X, jax.devices()[5]))
    assert_same(y, expected)
    placed = exe.place(elsewhere)
    for key, value in placed.items():
        assert value.sharding.is_equivalent_to(exe.shardings[key], value.ndim)
        if key.startswith(("batch_stats", "RngCount")):
            assert moved[key].sharding.is_equivalent_to(exe.shardings[key], value.ndim)
            assert_same(moved[key], after[key])
    again = exe.place(placed)
    assert all(again[key] is value for key, value in placed.items())


@pytest.mark.parametrize("pack", [False, True])
def test_keys_and_values_on_one_device(net: linsey.Program, pack: bool) -> None:
    exe = net.compile(mesh=grid(), in_shardings=P("data"), pack=pack)
    values = exe.init(jax.random.key(0))
    committed = exe.init(jax.device_put(jax.random.key(0), jax.devices()[3]))
    for key, value in values.items():
        assert_same(committed[key], value)
    alone = jax.device_put(net.init(0).values, jax.devices()[5])
    assert_same(exe(alone, X)[0], exe(values, X)[0])


def test_packed_values_on_a_mesh(net: linsey.Program) -> None:
    exe = net.compile(mesh=grid(), in_shardings=P("data"), donate=True)
    packed = net.compile(mesh=grid(), in_shardings=P("data"), donate=True, pack=True)
    values, stored = exe.init(0), packed.init(0)
    assert len(jax.tree.leaves(stored)) < len(jax.tree.leaves(values))
    for _ in range(3):
        y, values = exe(values, X)
        z, stored = packed(stored, X)
        assert_same(z, y)
    for key, value in values.items():
        assert_same(stored[key], value)
        assert stored[key].sharding.is_equivalent_to(exe.shardings[key], value.ndim), key
    with pytest.raises(PartitionError, match="at mesh: found explicit axes"):
        net.compile(mesh=mesh_of(4, 2, kind=AxisType.Explicit), pack=True)


def test_what_changes_is_donated_and_stays_sharded(net: linsey.Program) -> None:
    exe = net.compile(mesh=grid(), in_shardings=P("data"), donate=True)
    expected = net.compile(mesh=grid(), in_shardings=P("data"))
    values, other = exe.init(0), expected.init(0)
    for _ in range(3):
        before = values
        y, values = exe(values, X)
        expected_y, other = expected(other, X)
        assert_same(y, expected_y)
        gone = {key for key, value in before.items() if value.is_deleted()}
        assert gone == {
            "batch_stats/norm/mean",
            "batch_stats/norm/var",
            "RngCount/dropout/rngs/count",
        }


def test_the_python_code_is_traced_once() -> None:
    traces = []

    class Traced(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            if not self.is_initializing():
                traces.append(x.shape)
            count = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
            if not self.is_initializing():
                count.value += 1
            return nn.Dense(4)(x)

    exe = linsey.lower(Traced(), X).compile(mesh=grid(), donate=True)
    values = exe.init(0)
    traces.clear()
    for _ in range(3):
        _, values = exe(values, X)
    assert len(traces) == 1
    assert values["counts/calls"] == 3


def test_gradients_are_sharded_as_their_parameters(net: linsey.Program) -> None:
    exe = net.compile(mesh=grid(), in_shardings=P("data"))
    values = exe.init(0)

    def loss(params: linsey.Values) -> Any:
        return jnp.mean(exe(values.replace(params), X)[0] ** 2)

    for key, gradient in jax.jit(jax.grad(loss))(values.select("params")).items():
        assert gradient.sharding.is_equivalent_to(exe.shardings[key], gradient.ndim), key


class Explicit(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return jnp.sin(x @ self.param("kernel", init, (16, 32)))


@pytest.mark.parametrize("placed", [True, False])
def test_explicit_axes(placed: bool) -> None:
    mesh = mesh_of(4, 2, kind=AxisType.Explicit)
    program = linsey.lower(Explicit(), X)
    exe = program.compile(mesh=mesh, in_shardings=P("data"))
    values = exe.init(KEY)
    assert values["params/kernel"].sharding == NamedSharding(mesh, P(None, "model"))
    into = nn.get_sharding(jax.eval_shape(Explicit().init, KEY, X), mesh)
    variables = jax.jit(Explicit().init, out_shardings=into)(KEY, X)
    with jax.set_mesh(mesh):
        batch = jax.device_put(X, NamedSharding(mesh, P("data")))
        expected = jax.jit(Explicit().apply)(variables, batch)
    y, _ = exe(values if placed else program.init(KEY).values, X)
    assert_same(y, expected)
    assert jax.typeof(y) == jax.typeof(expected)


def test_rules_come_from_the_slot_or_from_around() -> None:
    def dense(rules: Any) -> linsey.Program:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"), rules=rules)
        return linsey.lower(nn.Dense(32, kernel_init=init), X)

    own = (("embed", "data"), ("mlp", "model"))
    assert dense(own).compile(mesh=grid()).shardings["params/kernel"].spec == P("data", "model")
    with nn.logical_axis_rules((("embed", "model"),)):
        exe = dense(None).compile(mesh=grid())
        assert dense(own).partition_specs(mesh=grid())["params/kernel"] == P("data", "model")
        given = dense(own).partition_specs(mesh=grid(), rules=[("mlp", "data")])
    assert given["params/kernel"] == P(None, "data")
    assert exe.shardings["params/kernel"].spec == P("model", None)  # the rules of that moment
    assert exe.init(0)["params/kernel"].sharding.spec == P("model", None)


def kernel(names: Any, shape: tuple[int, int] = (16, 32)) -> linsey.Program:
    init = nn.with_partitioning(nn.initializers.ones, names)
    return linsey.lower(nn.Dense(shape[1], kernel_init=init), X[:, : shape[0]])


BAD = {
    "unknown axis": (
        lambda: kernel((None, "modle")).compile(mesh=grid()),
        r"at params/kernel: axis 1 lies on 'modle', by the annotation itself; the mesh has"
        r" data=4, model=2",
    ),
    "unknown axis by a rule": (
        lambda: kernel((None, "mlp")).compile(mesh=grid(), rules=[("mlp", "modle")]),
        r"at params/kernel: axis 1 lies on 'modle', by the rule \('mlp', 'modle'\)",
    ),
    "size": (
        lambda: kernel(("data", None), (15, 32)).compile(mesh=grid()),
        r"at params/kernel: axis 0 of float32\[15,32\] has size 15, which the 4 parts of 'data' do"
        r" not divide \(the mesh has data=4, model=2\), put there by the annotation itself",
    ),
    "rank": (
        lambda: kernel(("data",)).compile(mesh=grid()),
        r"at params/kernel: the partition \('data',\) has 1 entries and the value"
        r" float32\[16,32\] has 2 axes",
    ),
    "one axis twice": (
        lambda: kernel(("data", ("model", "data"))).compile(mesh=grid()),
        r"at params/kernel: axes 0 and 1 both lie on 'data'",
    ),
    "one name twice": (
        lambda: kernel(("data", "data")).compile(mesh=grid()),
        r"at params/kernel: the name 'data' stands at two axes",
    ),
    "rules that are no pairs": (
        lambda: kernel(("data", None)).compile(mesh=grid(), rules=[("data",)]),
        r"at rules: found \('data',\) among them, expected pairs",
    ),
    "no mesh": (
        lambda: kernel((None, None)).compile(in_shardings=P("data")),
        r"at in_shardings: in_shardings are given and no mesh",
    ),
    "an axis of in_shardings": (
        lambda: kernel((None, None)).compile(mesh=grid(), in_shardings=P("batch")),
        r"at in_shardings: .* names 'batch'; the mesh has data, model",
    ),
    "an entry of in_shardings": (
        lambda: kernel((None, None)).compile(mesh=grid(), in_shardings="data"),
        r"at in_shardings: found 'data', expected a PartitionSpec, a Sharding or None",
    ),
}


def test_rules_for_names_of_partitioned() -> None:
    """flax would take them for axes of the mesh, and fail, where a mesh is around."""
    program = kernel((None, "mlp"))
    exe = program.compile(mesh=grid(), rules=[("mlp", "model")], in_shardings=P("data"))
    values = exe.init(0)
    assert values["params/kernel"].sharding.spec == P(None, "model")
    expected = jax.jit(program.compile().__call__)(values, X)[0]
    assert_same(exe(values, X)[0], expected)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.initializers.lecun_normal()
        names = ("embed", "heads", "kv")
        attend = nn.MultiHeadDotProductAttention(
            num_heads=2, kernel_init=nn.with_logical_partitioning(init, names), use_bias=False
        )
        return attend(x[None])


def test_kernels_that_flax_makes_flat() -> None:
    """`nn.DenseGeneral` unboxes its kernel before it has the axes that are named."""
    rules = (("embed", None), ("heads", "model"), ("kv", None))
    program = linsey.lower(Attention(), X)
    exe = program.compile(mesh=grid(), rules=rules)
    values = exe.init(KEY)
    key = "params/MultiHeadDotProductAttention_0/query/kernel"
    assert values[key].sharding.spec == P(None, "model", None)
    variables = flax.traverse_util.unflatten_dict(dict(values.items()), sep="/")
    assert_same(exe(values, X)[0], jax.jit(Attention().apply)(variables, X))


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(PartitionError, match=message):
        make()


def test_arguments_that_do_not_fit_their_shardings(net: linsey.Program) -> None:
    exe = net.compile(mesh=grid(), in_shardings=P("data"))
    values = exe.init(0)
    with pytest.raises(PartitionError, match=r"an array of shape \(7, 16\) cannot be split"):
        exe(values, X[:7])
    exe(values, X)
    with pytest.raises(PartitionError, match=r"an array of shape \(7, 16\) cannot be split"):
        exe(values, X[:7])
    more = net.compile(mesh=grid(), in_shardings=(P("data"), P()))
    with pytest.raises(PartitionError, match=r"an entry for 1; the call has 1 positional"):
        more(values, X)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, inputs: Any, *, mask: Any, scale: float) -> Any:
        return nn.Dense(4)(inputs["x"]) * mask * inputs["by"] * scale


@pytest.mark.parametrize(
    "in_shardings",
    [
        lambda: P("data"),
        lambda: {0: {"x": P("data"), "by": None}, "mask": P("data")},
        lambda: {0: P("data"), "mask": NamedSharding(grid(), P("data", None))},
    ],
    ids=["one for all", "by argument", "prefix"],
)
def test_arguments_of_any_form_have_shardings(in_shardings: Any) -> None:
    inputs = {"x": X, "by": np.ones((8, 1), np.float32)}
    mask = np.ones((8, 4), np.float32)
    program = linsey.lower(Masked(), inputs, mask=mask, scale=2.0)
    exe = program.compile(mesh=grid(), in_shardings=in_shardings())
    y, _ = exe(exe.init(0), inputs, mask=mask, scale=2.0)
    assert y.sharding.is_equivalent_to(NamedSharding(grid(), P("data")), 2)
