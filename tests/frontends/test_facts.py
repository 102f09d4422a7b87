"""What lowering observes: stacked axes, streams, shared modules, calls; what it leaves alone."""

from typing import Any

import jax
import jax.numpy as jnp
import linen_cases
import pytest
from flax import linen as nn
from flax import nnx

import linsey
from linsey.ir import Slot, describe, find_node, shared_nodes, tied_slots

X = jnp.ones((3, 3))


class CachedDense(nn.Module):
    """A parameter, a cache and a statistic, all of equal sizes."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3))
        count = self.variable("cache", "count", jnp.zeros, (3, 3))
        return x @ kernel + count.value, None


class AllEqual(nn.Module):
    """``nn.vmap(nn.scan(...))``: parameters stack at axes 1 and 2, the cache at 0; all sizes 3."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scanned = nn.scan(
            CachedDense,
            variable_axes={"params": 1, "cache": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        ensemble = nn.vmap(
            scanned,
            variable_axes={"params": 2, "cache": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
            metadata_params={nn.PARTITION_NAME: "ens"},
        )
        return ensemble()(x)[0]


def slot(program: linsey.Program, key: str) -> Slot:
    return next(slot for slot in program.graph.slots if slot.key == key)


def stack_of(program: linsey.Program, key: str) -> list[tuple[int, int, str | None]]:
    return [(axis.axis, axis.length, axis.name) for axis in slot(program, key).stack]


def test_the_stacked_axes_of_each_slot_are_observed_when_all_sizes_are_equal() -> None:
    program = linsey.lower(AllEqual(), X)
    owner = "VmapScanCachedDense_0"
    assert stack_of(program, f"params/{owner}/kernel") == [(2, 3, "ens"), (1, 3, "layers")]
    assert stack_of(program, f"cache/{owner}/count") == [(0, 3, "ens"), (0, 3, "layers")]
    assert {axis.owner for axis in slot(program, f"params/{owner}/kernel").stack} == {(owner,)}


def test_the_same_holds_inside_a_to_nnx() -> None:
    model = nnx.bridge.ToNNX(AllEqual(), rngs=nnx.Rngs(0)).lazy_init(X)
    program = linsey.lower(nnx.Dict(inner=model), X, method=lambda holder, x: holder["inner"](x))
    key = "params/inner/VmapScanCachedDense_0/kernel"
    assert stack_of(program, key) == [(2, 3, "ens"), (1, 3, "layers")]


def test_a_lift_over_a_function_belongs_to_the_module_that_runs_it() -> None:
    case = next(case for case in linen_cases.CASES if case.name == "vmap-function")
    program = linsey.lower(case.build(), *case.args, **case.kwargs)
    owners = {axis.owner for entry in program.graph.slots for axis in entry.stack}
    assert owners == {()}


def test_remat_and_jit_stack_nothing() -> None:
    case = next(case for case in linen_cases.CASES if case.name == "jit-class-and-method")
    program = linsey.lower(case.build(), *case.args, **case.kwargs)
    assert not any(entry.stack for entry in program.graph.slots)


def test_a_jitted_module_shows_its_inside_although_it_was_traced_before() -> None:
    case = next(case for case in linen_cases.CASES if case.name == "jit-class-and-method")
    module = case.build()
    first = linsey.lower(module, *case.args, **case.kwargs)
    module.init(jax.random.key(0), *case.args, **case.kwargs)
    second = linsey.lower(module, *case.args, **case.kwargs)
    assert first.graph == second.graph
    assert len(second.graph.nodes) > 2


class Noisy(nn.Module):
    """Draws from a stream of its own, and from dropout."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(3)(x) + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dropout(0.5, deterministic=False)(x)


def test_streams_are_told_apart_by_who_draws_from_them() -> None:
    program = linsey.lower(Noisy(), X)
    assert {(s.name, s.use) for s in program.graph.streams} == {
        ("params", "init"),
        ("noise", "call"),
        ("dropout", "call"),
    }
    root = program.graph.nodes[program.graph.root]
    assert [name for name, _ in root.streams] == ["noise"]


class Sharing(nn.Module):
    """One Dense under two parents."""

    def setup(self) -> None:
        self.shared = nn.Dense(3)
        self.first = nn.Sequential([self.shared, nn.relu])
        self.second = nn.Sequential([self.shared, nn.tanh])

    def __call__(self, x: Any) -> Any:
        return self.second(self.first(x))


def test_a_shared_module_is_one_node_with_several_users() -> None:
    program = linsey.lower(Sharing(), X)
    node = find_node(program.graph, ("shared",))
    assert shared_nodes(program.graph) == (node,)
    assert len(program.graph.slots) == 2


def test_a_tied_variable_is_one_slot_with_several_paths() -> None:
    model = nnx.Dict(a=nnx.Linear(3, 3, rngs=nnx.Rngs(0)), b=nnx.Linear(3, 3, rngs=nnx.Rngs(1)))
    model["b"].kernel = model["a"].kernel
    program = linsey.lower(model)
    (tied,) = tied_slots(program.graph)
    assert program.graph.slots[tied].paths == (("a", "kernel"), ("b", "kernel"))
    assert program.values is not None
    assert program.values["params/b/kernel"] is program.values["params/a/kernel"]


def test_calls_are_observed_with_types_and_static_arguments() -> None:
    program = linsey.lower(
        nn.BatchNorm(), jax.ShapeDtypeStruct((4, 3), "float32"), use_running_average=True
    )
    (call,) = program.graph.signatures
    assert call.method == "__call__"
    assert str(call.inputs[0][1]) == "float32[4,3]"
    assert call.inputs[1][0] == "use_running_average"
    assert describe(call.inputs[1][1]) == "True"  # type: ignore[arg-type]
    assert str(call.output) == "float32[4,3]"


def test_lowering_allocates_and_computes_nothing() -> None:
    huge = jax.ShapeDtypeStruct((8, 100_000), "float32")
    program = linsey.lower(nn.Dense(1_000_000), huge)
    assert str(slot(program, "params/kernel").type) == "float32[100000,1000000]"
    factory = linsey.lower(lambda rngs: nnx.Linear(100_000, 1_000_000, rngs=rngs))
    assert str(slot(factory, "params/kernel").type) == "float32[100000,1000000]"
    graphdef, state = factory.emit("nnx")
    assert isinstance(state["kernel"].get_value(), jax.ShapeDtypeStruct)
    assert nnx.merge(graphdef, state).in_features == 100_000


def test_flax_is_left_as_it_was() -> None:
    from flax.core import lift, meta, scope
    from flax.nnx.bridge import ToNNX

    before = (scope.Scope.make_rng, scope.Scope.put_variable, scope.Scope.param, ToNNX.__call__)
    linsey.lower(Noisy(), X)
    with pytest.raises(linsey.LinseyError):
        linsey.lower(Noisy(), X, X)
    after = (scope.Scope.make_rng, scope.Scope.put_variable, scope.Scope.param, ToNNX.__call__)
    assert before == after
    assert lift.meta is meta


def test_equal_models_lower_to_equal_graphs_also_with_lambdas() -> None:
    def make() -> nn.Module:
        return nn.Sequential([nn.Dense(3), lambda x: x * 2, nn.Dense(3)])

    first, second = linsey.lower(make(), X), linsey.lower(make(), X)
    assert first.graph == second.graph
    assert hash(first.graph) == hash(second.graph)
    assert first.graph != linsey.lower(nn.Sequential([nn.Dense(3), lambda x: x * 3]), X).graph


def test_frontends_of_two_threads_do_not_disturb_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    alone = [linsey.lower(module, X).graph for module in (AllEqual(), Noisy(), Sharing())]
    with ThreadPoolExecutor(3) as pool:
        together = list(
            pool.map(lambda module: linsey.lower(module, X).graph, (AllEqual(), Noisy(), Sharing()))
        )
    assert together == alone


class Inner(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(nn.Dense(3)(x))


JittedInner = nn.jit(Inner)


def test_a_jitted_class_shows_its_inside_although_it_was_traced_before() -> None:
    JittedInner().init(jax.random.key(0), X)
    program = linsey.lower(nn.Sequential([JittedInner()]), X)
    assert {"Dense_0", "Dense_1"} <= {path[-2] for s in program.graph.slots for path in s.paths}
    node = find_node(program.graph, ("layers_0",))
    assert len(program.graph.nodes[node].children) == 2


def test_a_lifted_class_prints_as_the_calls_that_made_it() -> None:
    assert "linen.vmap(scan(CachedDense))()" in str(linsey.lower(AllEqual(), X))


class TwoCollections(nn.Module):
    """A module whose visiting order is not the order of its collections."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.BatchNorm(use_running_average=False)(nn.LayerNorm()(x))


@pytest.mark.parametrize("make", [TwoCollections, AllEqual, Sharing, Noisy])
def test_an_emitted_model_lowers_to_an_equal_graph(make: Any) -> None:
    program = linsey.lower(make(), X, rngs={"params": 0, "noise": 1, "dropout": 2}).init()
    again = linsey.lower(nnx.merge(*program.emit("nnx")))
    assert again.graph.slots == program.graph.slots
    assert again.graph == program.graph
    assert again.emit("nnx")[0] == program.emit("nnx")[0]
    together = jax.tree.map(
        lambda a, b: a + b, *(p.values.select("params") for p in (program, again))
    )
    assert len(together) > 0


def test_one_collection_for_all_variables_is_told_apart() -> None:
    variables = nn.Dense(3).init(jax.random.key(0), X)
    with pytest.raises(linsey.LinseyError, match="this seems to be one of them"):
        linsey.lower(nn.Dense(3), X, variables=variables["params"])


def test_a_variable_is_no_factory() -> None:
    with pytest.raises(linsey.LinseyError, match=r"no frontend accepts a .*Param"):
        linsey.lower(nnx.Param(X))
