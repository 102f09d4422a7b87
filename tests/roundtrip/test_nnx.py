"""Every NNX case, lowered and emitted both ways, gives the numbers of NNX itself."""

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
from nnx_cases import CASES, NNXCase, covered_classes, public_classes
from stored import assert_comes_back

import linsey

REFUSED = {"reference-variable", "hijax-variable"}
APPLY = next(case.call for case in CASES if case.name == "Linear")
LOWERED = [case for case in CASES if case.name not in REFUSED]
RUN = [case for case in LOWERED if case.call is not None and not case.abstract]


@contextlib.contextmanager
def expected_warnings(case: NNXCase) -> Iterator[None]:
    if case.warns is None:
        yield
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"(?s).*(?:{case.warns})")
            yield


def flat_state(module: Any) -> dict[Any, Any]:
    state = nnx.to_flat_state(nnx.state(module))
    return {
        path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in state
    }


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_emitting_into_nnx_gives_the_module_back(case: NNXCase) -> None:
    with expected_warnings(case):
        model = case.build(case.make_rngs())
        program = linsey.lower(model)
        graphdef, state = program.emit("nnx")
        expected_graphdef, expected_state = nnx.split(model)
        assert graphdef == expected_graphdef
        assert_same(state, expected_state)
        assert linsey.lower(nnx.merge(graphdef, state)).graph == program.graph
        assert nnx.graphdef(nnx.merge(graphdef, state)) == expected_graphdef
        assert_comes_back(case.name, program, "nnx")


@pytest.mark.parametrize(
    "case", [case for case in RUN if case.jittable], ids=lambda case: case.name
)
def test_the_executable_gives_nnx_numbers(case: NNXCase) -> None:
    with expected_warnings(case):
        call = case.call
        program = linsey.lower(case.build(case.make_rngs()))
        graphdef, state = nnx.split(case.build(case.make_rngs()))
        dynamic, merge = split_call(case.args, case.kwargs)

        @jax.jit
        def source(state: Any, dynamic: Any) -> Any:
            model = nnx.merge(graphdef, state)
            args, kwargs = merge(dynamic)
            return call(model, *args, **kwargs), nnx.split(model)

        expected, split = source(state, dynamic)
        found, values = program.compile(method=call)(program.values, *case.args, **case.kwargs)
        assert_same(found, expected)
        after = nnx.merge(*linsey.Program(graph=program.graph, values=values).emit("nnx"))
        wanted = flat_state(nnx.merge(*split))
        for path, leaf in flat_state(after).items():
            # jit makes arrays of Python numbers.
            is_number = isinstance(leaf, int | float | complex)
            assert_same(jnp.asarray(leaf) if is_number else leaf, wanted[path])


CALLED = [case for case in RUN if case.call is APPLY]


@pytest.mark.parametrize("case", CALLED, ids=lambda case: case.name)
def test_hosted_in_linen_gives_nnx_numbers(case: NNXCase) -> None:
    with expected_warnings(case):
        source = case.build(case.make_rngs())
        module, variables = linsey.to_linen(case.build(case.make_rngs()), native=False)
        expected = source(*case.args, **case.kwargs)
        found, updates = module.apply(variables, *case.args, mutable=True, **case.kwargs)
        assert_same(found, expected)
        after = linsey.lower(module, variables=known(updates, variables))
        state = flat_state(source)
        for path, leaf in flat_state(nnx.merge(*after.emit("nnx"))).items():
            assert_same(leaf, state[path])
        for method in case.methods:
            expected = getattr(source, method.method)(*method.args, **method.kwargs)
            found, _ = module.apply(
                updates, *method.args, method=method.method, mutable=True, **method.kwargs
            )
            assert_same(found, expected)


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
def test_as_linen_modules_they_give_nnx_numbers(case: NNXCase) -> None:
    with expected_warnings(case):
        source = case.build(case.make_rngs())
        if linsey.lower(source).report()[""].became != "native":
            return
        module, variables = linsey.to_linen(case.build(case.make_rngs()))
        expected = source(*case.args, **case.kwargs)
        found, updates = module.apply(variables, *case.args, mutable=True, **case.kwargs)
        assert_same(found, expected)
        _, after = linsey.to_linen(source)
        assert_same(known({**variables, **updates}, after), after)


def known(updates: Any, like: Any) -> Any:
    """Of some variables, those that `like` has too; what a call has sown is left out."""
    if not isinstance(like, dict):
        return updates
    return {name: known(updates[name], below) for name, below in like.items()}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_lowered_is_refused(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.build(case.make_rngs())
    with pytest.raises(linsey.LinseyError, match="mutable reference or a hijax value"):
        linsey.lower(model)


def test_every_class_of_flax_nnx_has_a_case() -> None:
    missing = {cls.__name__ for cls in public_classes() - covered_classes()}
    assert not missing
