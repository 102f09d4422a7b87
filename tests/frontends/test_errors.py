"""Bad input to `linsey.lower` and to `Program.init`: where, what was found, what to do."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

import linsey
from linsey.ir import EmitError, LoweringError, ValuesError

X = jnp.ones((2, 3))


class Block(nn.Module):
    features: int = 4

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(self.features)(x) + x


class Net(nn.Module):
    def setup(self) -> None:
        self.first = nn.Dense(4)
        self.block = Block(5)

    def encode(self, x: Any) -> Any:
        return self.first(x)

    def __call__(self, x: Any) -> Any:
        return self.block(self.first(x))


class Good(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4)(x)
        return nn.BatchNorm(use_running_average=True)(x)


class NoisyInit(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x))


class Tower(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.linear(x)


class Handle:
    """Neither an array nor a module."""


class Holder(nnx.Module):
    def __init__(self, value: Any) -> None:
        self.inner = nnx.Dict(deep=nnx.Variable(value))


class HoldsData(nnx.Module):
    def __init__(self, value: Any) -> None:
        self.inner = nnx.data(value)


def bound_module() -> nn.Module:
    module = Good()
    return module.bind(module.init(jax.random.key(0), X))


def message_of(error: Exception) -> tuple[type, str]:
    return type(error), str(error)


def failure(*args: Any, **kwargs: Any) -> tuple[type, str]:
    """The error that lowering raises: its class and its text."""
    with pytest.raises(linsey.LinseyError) as caught:
        linsey.lower(*args, **kwargs)
    assert caught.value.path
    assert caught.value.fix
    return type(caught.value), str(caught.value)


# the wrong kind of object


def test_a_bound_module() -> None:
    assert failure(bound_module(), X) == (
        LoweringError,
        "at Good: found a bound module, expected an unbound one\n"
        "Pass the module as it was constructed, or the first result of `module.unbind()`.",
    )


def test_unbinding_is_what_to_do_about_a_bound_module() -> None:
    module, variables = bound_module().unbind()
    program = linsey.lower(module, X, variables=variables)
    assert_same(program.emit("linen")[1], variables)


def test_a_linen_class() -> None:
    assert failure(Good, X) == (
        LoweringError,
        "at Good: found the class Good, expected an instance of it\n"
        "Pass Good(...) with its hyper-parameters.",
    )


def test_an_nnx_class_that_needs_more_than_rngs() -> None:
    assert failure(Tower, X) == (
        LoweringError,
        "at Tower: found the class Tower, which needs width, rngs; expected a module, or a factory"
        " that needs no more than rngs\n"
        "Pass an instance, or `lambda rngs: Tower(..., rngs=rngs)`.",
    )


def test_what_it_says_to_do_about_an_nnx_class_works() -> None:
    program = linsey.lower(lambda rngs: Tower(2, rngs=rngs), X)
    assert program.graph.slots[0].type.shape == (2,)


def test_a_factory_that_needs_more_than_rngs() -> None:
    def make(width: int, rngs: nnx.Rngs) -> nnx.Module:
        return Tower(width, rngs=rngs)

    assert failure(make) == (
        LoweringError,
        "at make: found the function make, which needs width, rngs; expected a module, or a factory"
        " that needs no more than rngs\n"
        "Pass an instance, or `lambda rngs: make(..., rngs=rngs)`.",
    )


def test_a_factory_that_raises() -> None:
    def make() -> nnx.Module:
        raise ValueError("no such preset")

    assert failure(make) == (
        LoweringError,
        "at make: the factory raised ValueError: no such preset\n"
        "Calling it under jax.eval_shape raises it too; mend the factory.",
    )


def test_a_factory_of_something_else() -> None:
    kind, text = failure(lambda: 3)
    assert issubclass(kind, linsey.LinseyError)
    assert "no frontend accepts a builtins.int" in text


# sample inputs


def test_missing_sample_inputs() -> None:
    kind, text = failure(Net())
    assert kind is LoweringError
    assert text.startswith("at Net: the sample inputs do not fit __call__(self, x")
    assert "missing a required argument: 'x'" in text
    assert text.endswith(
        "\nPass sample inputs (arrays or jax.ShapeDtypeStruct) as you pass them to init."
    )


def test_too_many_sample_inputs() -> None:
    kind, text = failure(Net(), X, X)
    assert kind is LoweringError
    assert "too many positional arguments" in text


def test_a_method_that_is_not_there() -> None:
    assert failure(Net(), X, method="decode") == (
        LoweringError,
        "at Net: Net has no method 'decode'\n"
        "Pass method= with the name of a method, or a function of the module.",
    )


def test_sample_inputs_of_a_wrong_shape_name_the_submodule() -> None:
    kind, text = failure(Net(), X)
    assert kind is LoweringError
    first, _, fix = text.rpartition("\n")
    assert first.startswith("at block: initialising the module raised ")
    assert "(2, 5), (2, 4)" in first
    assert fix == (
        "The same call of `module.init` raises it too; mend the module or the sample inputs."
    )


def test_the_error_of_the_module_is_the_cause() -> None:
    with pytest.raises(LoweringError) as caught:
        linsey.lower(Net(), X)
    assert isinstance(caught.value.__cause__, TypeError | ValueError)


def test_sample_inputs_of_a_wrong_shape_for_nnx() -> None:
    kind, text = failure(Tower(2, rngs=nnx.Rngs(0)), jnp.ones((2, 7)))
    assert kind is LoweringError
    assert text.startswith("at Tower: calling the model raised TypeError: dot_general requires")
    assert "The same call of the model raises it too" in text


def test_an_nnx_method_that_is_not_there() -> None:
    assert failure(Tower(2, rngs=nnx.Rngs(0)), X, method="encode") == (
        LoweringError,
        "at Tower: Tower has no method 'encode'\n"
        "Pass method= with the name of a method of the model.",
    )


def test_a_lazy_bridge_without_sample_inputs() -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense = nnx.bridge.ToNNX(nn.Dense(2), rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.dense(x)

    assert failure(Model(nnx.Rngs(0))) == (
        LoweringError,
        "at dense: 1 ToNNX inside have no variables yet, and there are no sample inputs\n"
        "Pass sample inputs to lower, or call bridge.lazy_init(model, ...) first.",
    )


# PRNG keys


def test_a_stream_that_is_missing_at_lowering() -> None:
    kind, text = failure(NoisyInit(), X, rngs={"noise": jax.random.key(0)})
    assert kind is LoweringError
    assert text.startswith("at Dense_0: a PRNG stream is missing; given: noise.")
    assert '"params"' in text
    assert text.endswith("Pass rngs= with a key for every stream that the module draws from.")


def test_a_stream_that_is_missing_at_init() -> None:
    program = linsey.lower(NoisyInit(), X, rngs={"params": 0, "dropout": 0})
    with pytest.raises(LoweringError) as caught:
        program.init({"dropout": jax.random.key(0)})
    text = str(caught.value)
    assert text.startswith("at NoisyInit: a PRNG stream is missing; given: dropout. Dense_0 needs")
    assert text.endswith("Pass rngs= with a key for every stream that the module draws from.")
    assert program.values is None


@pytest.mark.parametrize(
    "rngs", ["0", 1.5, True, [0], object()], ids=["text", "float", "bool", "list", "object"]
)
def test_what_is_no_key(rngs: Any) -> None:
    kind, text = failure(Good(), X, rngs=rngs)
    assert issubclass(kind, linsey.LinseyError)
    assert text == (
        f"at rngs: found {type(rngs).__name__} for PRNG keys, expected an int seed, a jax key, a"
        " dict of keys by stream name, or nnx.Rngs\n"
        "Pass for example rngs=0 or rngs={'params': jax.random.key(0)}."
    )


@pytest.mark.parametrize(
    "key", ["0", None, jnp.ones(3), jnp.ones((2, 2))], ids=["text", "none", "floats", "matrix"]
)
def test_a_stream_whose_key_is_no_key(key: Any) -> None:
    kind, text = failure(Good(), X, rngs={"params": key})
    assert issubclass(kind, linsey.LinseyError)
    assert text.startswith("at rngs")


def test_keys_for_a_live_nnx_module() -> None:
    assert failure(Tower(2, rngs=nnx.Rngs(0)), rngs=0) == (
        LoweringError,
        "at rngs: found rngs=, but a live NNX module holds its own\n"
        "Lower a factory, `lambda rngs: Model(..., rngs=rngs)`, to choose the seed.",
    )


def test_keys_for_a_factory_that_takes_none() -> None:
    assert failure(lambda: Tower(2, rngs=nnx.Rngs(0)), rngs=0) == (
        LoweringError,
        "at rngs: found rngs=, but the factory takes none\n"
        "Let the factory take an argument called rngs.",
    )
    program = linsey.lower(lambda: Tower(2, rngs=nnx.Rngs(0)))
    with pytest.raises(LoweringError, match="at rngs: found rngs, but the factory takes none"):
        program.init(0)


def test_a_live_module_cannot_be_initialised_again() -> None:
    program = linsey.lower(Tower(2, rngs=nnx.Rngs(0)))
    with pytest.raises(EmitError) as caught:
        program.init(0)
    assert str(caught.value) == (
        "at init: this program cannot be initialised: it was lowered from a live module, or"
        " loaded\n"
        "Use program.values; or lower the Linen module, or a factory of the NNX one."
    )


# variables that do not fit


def test_variables_that_do_not_fit_are_all_listed() -> None:
    variables = Good().init(jax.random.key(0), X)
    params = variables["params"]
    dense, norm = params["Dense_0"], params["BatchNorm_0"]
    broken = {
        "params": {
            "Dense_0": {"kernel": dense["kernel"][:, :3], "bias": dense["bias"].astype(jnp.int32)},
            "BatchNorm_0": {"bias": norm["bias"]},
            "Dense_1": {"kernel": dense["kernel"]},
        },
        "batch_stats": variables["batch_stats"],
        "cache": {"index": jnp.zeros(())},
    }
    assert failure(Good(), X, variables=broken) == (
        ValuesError,
        "at variables: the variables are not those of the module, 5 differ:\n"
        "  params/BatchNorm_0/scale: missing, expected float32[4]\n"
        "  params/Dense_0/bias: found int32[4], expected float32[4]\n"
        "  params/Dense_0/kernel: found float32[3,3], expected float32[3,4]\n"
        "  params/Dense_1/kernel: not a variable of this module\n"
        "  cache/index: not a variable of this module\n"
        "Initialise by the same method and inputs as those given to lower.",
    )


def test_a_missing_collection() -> None:
    variables = Good().init(jax.random.key(0), X)
    kind, text = failure(Good(), X, variables={"params": variables["params"]})
    assert kind is ValuesError
    assert "batch_stats/BatchNorm_0/mean: missing, expected float32[4]" in text
    assert "batch_stats/BatchNorm_0/var: missing, expected float32[4]" in text


def test_a_tree_in_place_of_an_array() -> None:
    variables = nn.Dense(2).init(jax.random.key(0), X)
    broken = {"params": {**variables["params"], "kernel": {"q": variables["params"]["kernel"]}}}
    kind, text = failure(nn.Dense(2), X, variables=broken)
    assert kind is ValuesError
    assert "params/kernel: found tree(float32[3,2]), expected float32[3,2]" in text


def test_an_object_in_place_of_an_array() -> None:
    variables = nn.Dense(2).init(jax.random.key(0), X)
    broken = {"params": {**variables["params"], "kernel": Handle()}}
    kind, text = failure(nn.Dense(2), X, variables=broken)
    assert kind is ValuesError
    assert "params/kernel: expected an array or a number, found Handle" in text


def test_variables_that_are_no_dict() -> None:
    assert failure(Good(), X, variables=[X]) == (
        ValuesError,
        "at variables: found list, expected a dict of collections\n"
        "Pass what `module.init` returned.",
    )


def test_variables_for_an_nnx_module() -> None:
    assert failure(Tower(2, rngs=nnx.Rngs(0)), variables={}) == (
        LoweringError,
        "at variables: found variables=, but an NNX module holds its own\n"
        "Put the values into the model with nnx.update, and lower that.",
    )


# unsupported objects inside a tree


def test_an_unsupported_object_in_a_variable() -> None:
    assert failure(Holder(Handle())) == (
        LoweringError,
        "at inner/deep: expected an array or a number, found Handle in a Variable\n"
        "Keep in Variables only arrays, numbers and pytrees of them.",
    )


def test_a_string_in_a_variable() -> None:
    kind, text = failure(Holder("text"))
    assert kind is LoweringError
    assert text.startswith("at inner/deep: expected an array or a number, found str in a Variable")


def test_an_unsupported_object_marked_as_data() -> None:
    assert failure(HoldsData(Handle())) == (
        LoweringError,
        "at inner: expected an array or a number, found Handle as data\n"
        "Mark it nnx.static(...), or give an array.",
    )


@pytest.mark.parametrize(
    "source", [nnx.Linear, Handle(), None, 3], ids=["class", "object", "none", "int"]
)
def test_every_error_has_its_three_parts(source: Any) -> None:
    _, text = failure(source)
    assert re.fullmatch(r"at \S+: .+\n.+", text, re.DOTALL)
