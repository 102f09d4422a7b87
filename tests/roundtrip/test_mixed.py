"""Mixed trees, through flax's own bridge and subclasses of it, give the numbers of flax."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from calls import split_call
from compare import assert_same
from flax import nnx
from mixed_cases import CASES, MixedCase
from stored import assert_comes_back

import linsey
from linsey.ir import Node

LINEN = [case for case in CASES if case.api == "linen" and case.flax_runs]
NNX = [case for case in CASES if case.api == "nnx" and case.flax_runs]
BROKEN = [case for case in CASES if not case.flax_runs]


@contextlib.contextmanager
def surroundings(case: MixedCase) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if not case.eager_sharding:
            stack.enter_context(nnx.use_eager_sharding(False))
        if case.warns is not None:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=f"(?s).*(?:{case.warns})")
        yield


def is_wrapper(node: Node) -> bool:
    names = ("ToNNX", "ToLinen")
    return node.source is not None and str(node.source.cls).endswith(names)


def by_key(program: linsey.Program) -> dict[str, Any]:
    return {slot.key: slot for slot in program.graph.slots}


def source_apply(case: MixedCase, module: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
    made = module.apply(
        variables, *args, rngs=case.keys(case.call_rngs), mutable=case.mutable, **kwargs
    )
    return (made, {}) if case.mutable is False else made


@pytest.mark.parametrize("case", LINEN, ids=lambda case: case.name)
def test_linen_root(case: MixedCase) -> None:
    with surroundings(case):
        module, keys = case.make(), case.keys(case.init_rngs)
        call_keys = case.keys(case.call_rngs)
        variables = module.init(keys, *case.args, **case.kwargs)
        program = linsey.lower(module, *case.args, rngs=keys, **case.kwargs).init(keys)
        assert not any(map(is_wrapper, program.graph.nodes))

        emitted, emitted_variables = program.emit("linen")
        assert emitted == module
        assert_same(emitted_variables, variables)
        assert_comes_back(case.name, program, "linen")

        expected, _ = source_apply(case, module, variables, *case.args, **case.kwargs)
        if case.name == "to-linen-subclass-call":
            with pytest.raises(linsey.LinseyError, match="changes what ToLinen does in a call"):
                program.emit("nnx")
            return
        model = nnx.merge(*program.emit("nnx"))
        is_nnx = program.graph.nodes[0].source.dialect == "nnx"
        if not is_nnx:
            found = model(*case.args, rngs=call_keys, mutable=case.mutable, **case.kwargs)
            assert_same(found, expected)
        elif call_keys is None:  # a real NNX module, which keeps its own keys
            assert_same(model(*case.args, **case.kwargs), expected)

        dynamic, merge = split_call(case.args, case.kwargs)

        @jax.jit
        def jitted(variables: Any, dynamic: Any) -> Any:
            args, kwargs = merge(dynamic)
            return source_apply(case, module, variables, *args, **kwargs)

        expected, updates = jitted(variables, dynamic)
        exe = program.compile(mutable=case.mutable)
        found, values = exe(program.values, *case.args, rngs=call_keys, **case.kwargs)
        assert_same(found, expected)
        _, after = linsey.Program(graph=program.graph, values=values).emit("linen")
        for name in set(after) & set(updates):
            assert_same(after[name], updates[name])

        if not is_nnx:
            again = linsey.lower(nnx.merge(*program.emit("nnx")))
            assert by_key(again) == by_key(program)
            assert_same(again.emit("linen")[1], variables)


@pytest.mark.parametrize("case", NNX, ids=lambda case: case.name)
def test_nnx_root(case: MixedCase) -> None:
    with surroundings(case):
        models = [case.make() for _ in range(2)]
        for model in models:
            nnx.bridge.lazy_init(model, *case.args, **case.kwargs)
        program = linsey.lower(models[0], *case.args, **case.kwargs)
        assert not any(map(is_wrapper, program.graph.nodes))
        graphdef, state = program.emit("nnx")
        expected_graphdef, expected_state = nnx.split(models[0])
        assert graphdef == expected_graphdef
        assert_same(state, expected_state)
        assert_comes_back(case.name, program, "nnx")

        if "mutable" not in case.kwargs:  # the call's own argument, which Module.apply takes too
            module, variables = program.emit("linen")
            expected = models[1](*case.args, **case.kwargs)
            found, _ = module.apply(variables, *case.args, mutable=["RngCount"], **case.kwargs)
            assert_same(found, expected)

        if not case.jittable:
            return
        dynamic, merge = split_call(case.args, case.kwargs)

        @jax.jit
        def source(state: Any, dynamic: Any) -> Any:
            args, kwargs = merge(dynamic)
            model = nnx.merge(expected_graphdef, state)
            return model(*args, **kwargs), nnx.split(model)

        expected, split = source(expected_state, dynamic)
        found, values = program.compile()(program.values, *case.args, **case.kwargs)
        assert_same(found, expected)
        _, after = linsey.Program(graph=program.graph, values=values).emit("nnx")
        wanted = dict(nnx.to_flat_state(split[1]))
        for path, leaf in nnx.to_flat_state(after):
            assert_same(leaf, wanted[path])


@pytest.mark.parametrize("case", NNX, ids=lambda case: case.name)
def test_lazily_initialised_by_lowering(case: MixedCase) -> None:
    with surroundings(case):
        ready = case.make()
        nnx.bridge.lazy_init(ready, *case.args, **case.kwargs)
        program = linsey.lower(case.make(), *case.args, **case.kwargs)
        if program.values is None:
            program = program.init()
            assert_same(nnx.state(nnx.merge(*program.emit("nnx"))), nnx.state(ready))


BROKEN_LINEN = [case for case in BROKEN if case.api == "linen"]


@pytest.mark.parametrize("case", BROKEN_LINEN, ids=lambda case: case.name)
def test_what_flax_cannot_run(case: MixedCase) -> None:
    with surroundings(case):
        module, keys = case.make(), case.keys(case.init_rngs)
        program = linsey.lower(module, *case.args, rngs=keys, **case.kwargs).init(keys)
        exe, call_keys = program.compile(mutable=case.mutable), case.keys(case.call_rngs)
        found, _ = exe(program.values, *case.args, rngs=call_keys, **case.kwargs)
        again, _ = exe(program.values, *case.args, rngs=call_keys, **case.kwargs)
        assert_same(found, again)
        changed = program.values.select("params")
        changed = jax.tree.map(lambda leaf: leaf + 1, changed)
        other, _ = exe(program.values.replace(changed), *case.args, rngs=call_keys, **case.kwargs)
        assert not jax.numpy.array_equal(jax.tree.leaves(found)[0], jax.tree.leaves(other)[0])


BROKEN_NNX = [case for case in BROKEN if case.api == "nnx"]


@pytest.mark.parametrize("case", BROKEN_NNX, ids=lambda case: case.name)
def test_what_flax_cannot_hold_is_refused(case: MixedCase) -> None:
    with surroundings(case), pytest.raises(linsey.LinseyError) as caught:
        linsey.lower(case.make(), *case.args, **case.kwargs)
    assert caught.value.path
    assert caught.value.fix
