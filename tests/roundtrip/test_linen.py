"""Every Linen case, lowered and emitted both ways, gives the numbers of Linen itself."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from calls import split_call
from compare import assert_same
from flax import nnx
from linen_cases import CASES, LinenCase, covered_layers, public_layers
from stored import assert_comes_back

import linsey

# Long-running file: this decides how xdist spreads it.
pytestmark = pytest.mark.filterwarnings("ignore:.*float8.*:UserWarning")


@contextlib.contextmanager
def expected_warnings(case: LinenCase) -> Iterator[None]:
    if case.warns is None:
        yield
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"(?s).*(?:{case.warns})")
            yield


class Prepared:
    """A case with its module, keys, variables and program."""

    def __init__(self, case: LinenCase) -> None:
        self.case = case
        self.module = case.build()
        args, kwargs = case.init_inputs
        self.init_keys = case.keys(case.init_rngs)
        self.call_keys = case.keys(case.call_rngs)
        self.variables = self.module.init(self.init_keys, *args, method=case.method, **kwargs)
        self.program = linsey.lower(
            self.module, *args, rngs=self.init_keys, method=case.method, **kwargs
        ).init(self.init_keys)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """What Linen gives, always as (output, updates)."""
        made = self.module.apply(
            variables, *args, rngs=self.call_keys, mutable=self.case.mutable, **kwargs
        )
        return (made, {}) if self.case.mutable is False else made


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def prepared(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    with expected_warnings(request.param):
        yield Prepared(request.param)


def state_of(values: linsey.Values, updates: Any, program: linsey.Program) -> Any:
    """From values, the variables that `updates` has and the program knows."""
    _, variables = linsey.Program(graph=program.graph, values=values).emit("linen")
    return {name: tree for name, tree in variables.items() if name in updates}


def test_linen_case(prepared: Prepared) -> None:
    case, program = prepared.case, prepared.program

    # Emitting into Linen gives back the module and the variables, boxes included.
    module, variables = program.emit("linen")
    assert module == prepared.module
    assert_same(variables, prepared.variables)
    assert_comes_back(case.name, program, "linen")

    # Eager: the emitted NNX module gives Linen's numbers.
    expected, updates = prepared.apply(prepared.variables, *case.args, **case.kwargs)
    native = program.report()[""].became != "native"  # which does not take rngs= and mutable=
    model = nnx.merge(*program.emit("nnx", native=native))
    hash(nnx.graphdef(model))
    found = model(*case.args, rngs=prepared.call_keys, mutable=case.mutable, **case.kwargs)
    assert_same(found, expected)
    for method in case.methods:
        other = prepared.module.apply(
            prepared.variables,
            *method.args,
            method=method.method,
            rngs=prepared.call_keys,
            **method.kwargs,
        )
        assert_same(
            getattr(nnx.merge(*program.emit("nnx", native=native)), method.method)(
                *method.args, rngs=prepared.call_keys, mutable=False, **method.kwargs
            ),
            other,
        )

    # Under jit: the executable gives Linen's numbers and state.
    dynamic, merge = split_call(case.args, case.kwargs)

    @jax.jit
    def jitted(variables: Any, dynamic: Any) -> Any:
        args, kwargs = merge(dynamic)
        return prepared.apply(variables, *args, **kwargs)

    expected, updates = jitted(prepared.variables, dynamic)
    exe = program.compile(mutable=case.mutable)
    found, after = exe(program.values, *case.args, rngs=prepared.call_keys, **case.kwargs)
    assert_same(found, expected)
    state = state_of(after, updates, program)
    assert_same(state, {name: updates[name] for name in state})

    # Lowering again, with the variables, is the same program.
    args, kwargs = case.init_inputs
    again = linsey.lower(
        prepared.module,
        *args,
        rngs=prepared.init_keys,
        method=case.method,
        variables=prepared.variables,
        **kwargs,
    )
    assert again.graph == program.graph
    assert hash(again.graph) == hash(program.graph)
    assert nnx.graphdef(nnx.merge(*again.emit("nnx"))) == program.emit("nnx")[0]

    if case.differentiable:
        assert_gradients_are_linens(prepared)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _total(tree: Any) -> Any:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    return sum((jnp.sum(jnp.abs(leaf) ** 2) for leaf in leaves), jnp.zeros(()))


def assert_gradients_are_linens(prepared: Prepared) -> None:
    case = prepared.case
    if not jax.tree.leaves(prepared.variables.get("params", {})):
        return
    dynamic, merge = split_call(case.args, case.kwargs)
    rest = {name: tree for name, tree in prepared.variables.items() if name != "params"}

    # Like for like: the executable is jitted itself, so Linen's apply is too.
    @jax.jit
    def applied(variables: Any, dynamic: Any) -> Any:
        args, kwargs = merge(dynamic)
        return prepared.apply(variables, *args, **kwargs)[0]

    @jax.jit
    @jax.grad
    def source(params: Any) -> Any:
        return _total(applied({**rest, "params": params}, dynamic))

    exe = prepared.program.compile(mutable=case.mutable)

    @jax.jit
    @jax.grad
    def ours(params: linsey.Values) -> Any:
        values = prepared.program.values.replace(params)
        return _total(exe(values, *case.args, rngs=prepared.call_keys, **case.kwargs)[0])

    found = prepared.program.values.replace(ours(prepared.program.values.select("params")))
    _, gradients = linsey.Program(graph=prepared.program.graph, values=found).emit("linen")
    assert_same(gradients["params"], source(prepared.variables["params"]))


def test_every_layer_of_flax_linen_has_a_case() -> None:
    missing = {layer.__name__ for layer in public_layers() - covered_layers()}
    assert not missing
