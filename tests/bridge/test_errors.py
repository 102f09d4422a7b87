"""What the bridge refuses: each error says where, what was found, and what to do."""

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from linsey import bridge
from linsey.ir import BridgeError, EmitError, LinseyError

Array = jax.Array

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
ONES = jnp.ones((4, 4))
KEY = jax.random.key(0)
DROP = nn.Dropout(0.5, deterministic=False)


def _dense() -> bridge.ToNNX:
    return bridge.ToNNX(nn.Dense(2), rngs=KEY).lazy_init(X)


def _linear() -> tuple[Any, dict[str, Any]]:
    module = bridge.to_linen(nnx.Linear, 3, 2)
    return module, dict(module.init(KEY, X))


def _check(error: LinseyError) -> None:
    """All three parts are there, and the error survives pickle with its fields."""
    assert error.path
    assert error.message
    assert error.fix
    assert str(error) == f"at {error.path}: {error.message}\n{error.fix}"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (again.path, again.message, again.fix) == (error.path, error.message, error.fix)


# --------------------------------------------------------------------------------------
# what a wrapper cannot be made of


class Twice(nnx.Module):
    def __call__(self, x: Array) -> Array:
        return x * 2


class NoCall(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def _function(x: Array) -> Array:
    return x


_LINEAR = nnx.Linear(3, 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "path", "found", "fix"),
    [
        (
            lambda: bridge.ToNNX(nn.Dense),
            "ToNNX",
            "found the class Dense, expected an instance of a Linen module",
            r"Pass an instance, Dense\(\.\.\.\)",
        ),
        (
            lambda: bridge.ToNNX(_LINEAR),
            "ToNNX",
            "found a Linear, expected an instance of a Linen module",
            "It is an NNX module already: use it as it is",
        ),
        (
            lambda: bridge.ToNNX(nnx.Linear),
            "ToNNX",
            "found the class Linear, expected an instance of a Linen module",
            "It is an NNX module already",
        ),
        (
            lambda: bridge.ToNNX(3),
            "ToNNX",
            "found a int, expected an instance of a Linen module",
            "Pass a flax.linen module",
        ),
        (
            lambda: bridge.ToNNX(nn.Dense(2).bind({"params": {"kernel": X}})),
            "Dense",
            "found a bound Linen module, expected an unbound one",
            "unbind",
        ),
        (
            lambda: bridge.ToLinen(nn.Dense(2)),
            "ToLinen",
            "found a Dense, which is a Linen module already",
            "Use it as it is; ToLinen takes the class of an NNX module",
        ),
        (
            lambda: bridge.ToLinen(nn.Dense),
            "ToLinen",
            "found the class Dense, which is a Linen module already",
            "Use it as it is",
        ),
        (
            lambda: bridge.ToLinen(_LINEAR, args=(3, 2)),
            "ToLinen",
            "found a Linear that exists, and arguments to make one",
            r"Pass the module alone, or the class: ToLinen\(Linear, args=",
        ),
        (
            lambda: bridge.to_linen(_LINEAR, use_bias=False),
            "ToLinen",
            "found a Linear that exists, and arguments to make one",
            "Pass the module alone",
        ),
        (
            lambda: bridge.ToLinen(3),
            "ToLinen",
            "found int, expected the class of an NNX module, a factory or a module",
            r"bridge.to_linen\(nnx.Linear, 3, 2\)",
        ),
        (
            lambda: bridge.ToLinen(lambda: "text").init(KEY, X),
            "",
            "the factory made a str, expected an NNX module",
            "Return the NNX module",
        ),
        (
            lambda: bridge.ToLinen(lambda rngs: nn.Dense(2)).init(KEY, X),
            "",
            "the factory made a Dense, expected an NNX module",
            "Return the NNX module",
        ),
        (
            lambda: bridge.lazy_init(nnx.Linear, X),
            "lazy_init",
            "found the class Linear, expected an instance of an NNX module",
            r"Pass Linear\(\.\.\.\)",
        ),
        (
            lambda: bridge.lazy_init(_function, X),
            "lazy_init",
            "found function, which is neither an NNX module nor a bound method of one",
            r"lazy_init\(model.decode, x\)",
        ),
        (
            lambda: bridge.lazy_init(nn.Dense(2), X),
            "lazy_init",
            "found Dense, which is neither an NNX module nor a bound method of one",
            "Pass the module, or a method of it",
        ),
        (
            lambda: bridge.lazy_init(NoCall(), X),
            "lazy_init",
            "NoCall cannot be called: it has no __call__",
            "Pass the method to initialise by",
        ),
        (
            lambda: bridge.functional(_LINEAR),
            "functional",
            "found a Linear, expected the class of an NNX module",
            "Pass the class",
        ),
        (
            lambda: bridge.functional(nn.Dense),
            "functional",
            "found Dense, expected the class of an NNX module",
            "Pass the class",
        ),
        (
            lambda: bridge.functional(nnx.Linear)(3, 2).apply(nnx.State({})),
            "Linear",
            "apply was called before init",
            "module.init",
        ),
        (
            lambda: bridge.register_variable_name_type_pair("errors_none", int),
            "errors_none",
            "found <class 'int'> for the collection 'errors_none', expected a subclass",
            "Pass the class itself",
        ),
        (
            lambda: bridge.register_variable_name_type_pair("params", nnx.BatchStat),
            "params",
            r"the collection 'params' is that of flax.*Param already",
            "overwrite=True",
        ),
    ],
)
def test_what_a_wrapper_cannot_be_made_of(
    make: Callable[[], Any], path: str, found: str, fix: str
) -> None:
    with pytest.raises(BridgeError, match=found) as caught:
        make()
    with pytest.raises(BridgeError, match=fix):
        raise caught.value
    if path:
        assert caught.value.path == path
    _check(caught.value)


def test_a_name_that_is_taken_stays_that_of_its_class() -> None:
    with pytest.raises(BridgeError, match="already"):
        bridge.register_variable_name_type_pair("params", nnx.BatchStat)
    assert nnx.variable_type_from_name("params") is nnx.Param
    assert nnx.variable_name_from_type(nnx.BatchStat) == "batch_stats"


# --------------------------------------------------------------------------------------
# before lazy_init


def test_a_call_before_lazy_init() -> None:
    model = bridge.ToNNX(nn.Dense(2), rngs=KEY)
    with pytest.raises(BridgeError, match="called before lazy_init: there are no variables") as e:
        model(X)
    assert "Dense" in e.value.path
    assert "bridge.lazy_init(model, ...)" in e.value.fix
    _check(e.value)


def test_a_call_before_lazy_init_below_an_nnx_module() -> None:
    class Outer(nnx.Module):
        def __init__(self) -> None:
            self.inner = nnx.List([bridge.ToNNX(nn.Dense(2), rngs=KEY)])

        def __call__(self, x: Array) -> Array:
            return self.inner[0](x)

    with pytest.raises(BridgeError, match="called before lazy_init"):
        Outer()(X)
    with pytest.raises(BridgeError, match="called before lazy_init"):
        nnx.jit(lambda model, x: model(x))(Outer(), X)


def test_a_method_before_lazy_init() -> None:
    class Codec(nn.Module):
        def setup(self) -> None:
            self.encoder = nn.Dense(2)

        def encode(self, x: Array) -> Array:
            return self.encoder(x)

    with pytest.raises(BridgeError, match="called before lazy_init"):
        bridge.ToNNX(Codec(), rngs=KEY).encode(X)


def test_a_method_that_lazy_init_did_not_reach() -> None:
    class Codec(nn.Module):
        def setup(self) -> None:
            self.encoder, self.decoder = nn.Dense(2), nn.Dense(3)

        def encode(self, x: Array) -> Array:
            return self.encoder(x)

        def decode(self, z: Array) -> Array:
            return self.decoder(z)

    model = bridge.ToNNX(Codec(), rngs=KEY)
    bridge.lazy_init(model.encode, X)
    with pytest.raises(BridgeError, match="the variables are not those of the module") as caught:
        model.decode(jnp.ones((4, 2)))
    assert "decoder" in str(caught.value)
    _check(caught.value)


# --------------------------------------------------------------------------------------
# unknown names


def test_an_unknown_attribute_of_a_fresh_wrapper() -> None:
    with pytest.raises(
        AttributeError, match=r"ToNNX\(Dense\) has no collection.*'params'.*lazy_init"
    ):
        bridge.ToNNX(nn.Dense(2)).params  # noqa: B018


def test_an_unknown_collection() -> None:
    model = _dense()
    pattern = r"ToNNX\(Dense\) has no collection, attribute or method 'batch_stats'; it has params"
    with pytest.raises(AttributeError, match=pattern):
        model.batch_stats  # noqa: B018
    assert not hasattr(model, "batch_stats")
    assert getattr(model, "batch_stats", None) is None


def test_an_unknown_method_of_linen() -> None:
    with pytest.raises(AttributeError, match="encode"):
        _dense()(X, method="encode")
    with pytest.raises(AttributeError, match="no collection, attribute or method 'encode'"):
        _dense().encode(X)


@pytest.mark.parametrize("name", ["method", "nnx_method"])
@pytest.mark.parametrize("mutable", [False, True])
def test_an_unknown_method_of_nnx(name: str, mutable: bool) -> None:
    module, variables = _linear()
    with pytest.raises(AttributeError, match="encode"):
        module.apply(variables, X, mutable=mutable, **{name: "encode"})


def test_an_unknown_method_of_nnx_at_init() -> None:
    module, _ = _linear()
    with pytest.raises(AttributeError, match="encode"):
        module.init(KEY, X, nnx_method="encode")


# --------------------------------------------------------------------------------------
# two variable types with one name


def test_two_variable_classes_of_one_name() -> None:
    def twin() -> Any:
        return type("ErrorsTwin", (nnx.Variable,), {"__module__": "my.models"})

    class Model(nnx.Module):
        def __init__(self, first: Any, second: Any):
            self.first = first(jnp.ones(3))
            self.block = nnx.List([nnx.Dict(second=second(jnp.ones(3)))])

        def __call__(self, x: Array) -> Array:
            return x * self.first

    first, second = twin(), twin()
    with pytest.raises(BridgeError, match="two Variable classes are called 'ErrorsTwin'") as caught:
        bridge.to_linen(Model, first, second).init(KEY, X)
    assert caught.value.path == "block/[0]/second"
    assert "my.models.ErrorsTwin" in caught.value.message
    assert "bridge.register_variable_name_type_pair('other', ErrorsTwin)" in caught.value.fix
    _check(caught.value)

    bridge.register_variable_name_type_pair("errors_other_twin", second)
    variables = bridge.to_linen(Model, first, second).init(KEY, X)
    assert sorted(variables) == ["ErrorsTwin", "errors_other_twin", "nnx"]


# --------------------------------------------------------------------------------------
# variables of another structure: ToNNX


def test_to_nnx_without_one_of_its_variables() -> None:
    model = _dense()
    del model.params["kernel"]
    with pytest.raises(BridgeError, match="the variables are not those of the module") as caught:
        model(X)
    assert "kernel" in caught.value.message
    assert "put back the variables" in caught.value.fix
    _check(caught.value)


def test_to_nnx_without_a_collection() -> None:
    model = bridge.ToNNX(nn.BatchNorm(use_running_average=True), rngs=KEY).lazy_init(X)
    del model.batch_stats
    with pytest.raises(BridgeError, match="the variables are not those of the module"):
        model(X)


def test_to_nnx_with_a_variable_of_another_shape() -> None:
    model = _dense()
    model.params["kernel"] = nnx.Param(jnp.ones((5, 2)))
    with pytest.raises(BridgeError, match="the variables are not those of the module") as caught:
        model(X)
    assert "(5, 2)" in caught.value.message
    assert "(3, 2)" in caught.value.message
    _check(caught.value)


def test_to_nnx_with_an_input_of_another_shape() -> None:
    with pytest.raises(BridgeError, match=r"\(3, 2\)"):
        _dense()(jnp.ones((4, 5)))


def test_to_nnx_with_a_plain_array() -> None:
    model = _dense()
    model.params["kernel"] = jnp.ones((3, 2))
    with pytest.raises(BridgeError, match=r"found \w*Array\w*, expected a Variable") as caught:
        model(X)
    assert caught.value.path == "params/kernel"
    assert "v[...] = array" in caught.value.fix
    _check(caught.value)


# --------------------------------------------------------------------------------------
# variables of another structure: ToLinen


def _without(variables: Any, *names: str) -> Any:
    return {name: tree for name, tree in variables.items() if name not in names}


@pytest.fixture(params=[False, True], ids=["plain", "mutable"], name="mutable")
def _mutable(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_to_linen_without_its_graphdef(mutable: bool) -> None:
    module, variables = _linear()
    with pytest.raises(BridgeError, match="found nothing, expected the graphdef") as caught:
        module.apply(_without(variables, "nnx"), X, mutable=mutable)
    assert caught.value.path == "nnx/graphdef"
    assert "Pass all the variables that init returned" in caught.value.fix
    _check(caught.value)


def test_to_linen_without_its_graphdef_in_a_lifted_transform() -> None:
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            stacked = nn.vmap(
                bridge.ToLinen,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=2,
            )
            return stacked(nnx.Linear, args=(3, 2), name="linear")(x)

    with pytest.raises(BridgeError, match="found nothing, expected the graphdef") as caught:
        Stack().apply(Stack().init(KEY, X), X)
    assert caught.value.path == "nnx/linear/graphdef"
    assert "variable_axes={'params': 0, 'nnx': None}" in caught.value.fix


def test_to_linen_with_another_thing_for_its_graphdef(mutable: bool) -> None:
    module, variables = _linear()
    with pytest.raises(BridgeError, match="found str, expected the graphdef"):
        module.apply({**variables, "nnx": {"graphdef": "text"}}, X, mutable=mutable)


def test_to_linen_without_one_of_its_variables(mutable: bool) -> None:
    module, variables = _linear()
    params = _without(variables["params"], "kernel")
    with pytest.raises(EmitError, match="the variable is missing") as caught:
        module.apply({**variables, "params": params}, X, mutable=mutable)
    assert caught.value.path == "params/kernel"
    assert "init" in caught.value.fix
    _check(caught.value)


def test_to_linen_without_a_collection(mutable: bool) -> None:
    module, variables = _linear()
    with pytest.raises(EmitError, match="the variable is missing") as caught:
        module.apply(_without(variables, "params"), X, mutable=mutable)
    assert caught.value.path in ("params/kernel", "params/bias")


def test_to_linen_below_a_parent_without_one_of_its_variables() -> None:
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return bridge.to_linen(nnx.Linear, 3, 2, name="child")(x)

    variables = Parent().init(KEY, X)
    params = {"child": _without(variables["params"]["child"], "bias")}
    with pytest.raises(EmitError, match="the variable is missing") as caught:
        Parent().apply({**variables, "params": params}, X)
    assert caught.value.path == "params/child/bias"


def test_to_linen_with_a_variable_of_another_shape(mutable: bool) -> None:
    module, variables = _linear()
    params = {**variables["params"], "kernel": jnp.ones((5, 2))}
    with pytest.raises(EmitError, match=r"found the shape \(5, 2\), expected .*3.*2") as caught:
        module.apply({**variables, "params": params}, X, mutable=mutable)
    assert caught.value.path == "params/kernel"
    _check(caught.value)


def test_to_linen_with_a_variable_of_another_shape_under_jit() -> None:
    module, variables = _linear()
    params = {**variables["params"], "kernel": jnp.ones((5, 2))}
    with pytest.raises(EmitError, match=r"found the shape \(5, 2\)"):
        jax.jit(module.apply)({**variables, "params": params}, X)


def test_to_linen_with_a_variable_that_it_does_not_have(mutable: bool) -> None:
    module, variables = _linear()
    params = {**variables["params"], "scale": jnp.ones((2,))}
    with pytest.raises((BridgeError, EmitError), match="scale") as caught:
        module.apply({**variables, "params": params}, X, mutable=mutable)
    assert caught.value.path == "params/scale"
    _check(caught.value)


def test_to_linen_with_a_plain_value_where_a_tree_is() -> None:
    class Nested(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.linear(x)

    module = bridge.to_linen(Nested)
    variables = module.init(KEY, X)
    with pytest.raises(BridgeError, match="at params/linear: the module has no such variable"):
        module.apply({**variables, "params": {"linear": jnp.ones(3)}}, X)


def test_to_linen_with_a_collection_that_a_call_made_and_the_structure_does_not_know() -> None:
    class Grows(nnx.Module):
        def __call__(self, x: Array) -> Array:
            if not hasattr(self, "count"):
                self.count = nnx.BatchStat(jnp.zeros(()))
            self.count[...] += 1
            return x * self.count[...]

    module = bridge.to_linen(Grows)
    variables = module.init({}, X)
    _, updates = module.apply(variables, X, mutable=["batch_stats"])
    with pytest.raises(BridgeError, match=r"at batch_stats/count: the module has no such variable"):
        module.apply({**variables, **updates}, X)
    _, updates = module.apply(variables, X, mutable=["batch_stats", "nnx"])
    y, _ = module.apply({**variables, **updates}, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, 2 * X)


def test_to_nnx_from_outside_of_the_trace_that_calls_it() -> None:
    model = bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)).lazy_init(X)
    with pytest.raises(BridgeError, match="made outside of the trace") as caught:
        jax.jit(lambda x: model(x))(X)
    assert "rngs=" in caught.value.fix
    np.testing.assert_array_equal(jax.jit(lambda x: model(x, rngs={}))(X), model(X))


# --------------------------------------------------------------------------------------
# streams


def test_lazy_init_without_streams() -> None:
    with pytest.raises(BridgeError, match="a PRNG stream is missing; there are: none") as caught:
        bridge.ToNNX(nn.Dense(2)).lazy_init(X)
    assert "Dense" in caught.value.path
    assert "nnx.Rngs" in caught.value.fix
    _check(caught.value)


def test_lazy_init_without_the_stream_it_needs() -> None:
    with pytest.raises(BridgeError, match="a PRNG stream is missing; there are: dropout"):
        bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(dropout=0)).lazy_init(X)


def test_a_call_of_to_nnx_without_the_stream_it_needs() -> None:
    with pytest.raises(BridgeError, match="a PRNG stream is missing; there are: none") as caught:
        bridge.ToNNX(DROP)(ONES)
    assert "rngs=" in caught.value.fix
    model = bridge.ToNNX(DROP, rngs=nnx.Rngs(dropout=0)).lazy_init(ONES)
    with pytest.raises(BridgeError, match="a PRNG stream is missing; there are: noise"):
        model(ONES, rngs={"noise": KEY})


@pytest.mark.parametrize("wrap", [False, True], ids=["root", "below"])
def test_init_of_to_linen_without_the_stream_it_needs(wrap: bool) -> None:
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return bridge.to_linen(nnx.Dropout, 0.5, name="drop")(x)

    module = Parent() if wrap else bridge.to_linen(nnx.Dropout, 0.5)
    with pytest.raises(BridgeError, match="a PRNG stream is missing; given: params") as caught:
        module.init(KEY, ONES)
    assert "dropout" in caught.value.message
    assert "init({'params': key, 'dropout': key2}, x)" in caught.value.fix
    assert caught.value.path == ("drop" if wrap else "Dropout")
    _check(caught.value)


def test_init_of_to_linen_without_params() -> None:
    with pytest.raises(BridgeError, match="a PRNG stream is missing; given: dropout"):
        bridge.to_linen(nnx.Linear, 3, 2).init({"dropout": KEY}, X)


def test_init_of_to_linen_without_a_stream_that_its_call_needs() -> None:
    class Draws(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.rngs = rngs

        def __call__(self, x: Array) -> Array:
            return x * jax.random.normal(self.rngs.noise(), x.shape)

    with pytest.raises(BridgeError, match=r"a PRNG stream is missing.*noise"):
        bridge.to_linen(Draws).init(KEY, X)


def test_to_nnx_inside_to_linen_without_the_stream_it_needs() -> None:
    class Inner(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.drop = bridge.ToNNX(DROP)

        def __call__(self, x: Array) -> Array:
            return self.drop(x)

    with pytest.raises(BridgeError, match="a PRNG stream is missing; there are: none"):
        bridge.to_linen(Inner).init({"params": KEY, "dropout": KEY}, ONES)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_call_of_to_linen_that_would_repeat_its_draw(jit: bool) -> None:
    module = bridge.to_linen(nnx.Dropout, 0.5)
    variables = module.init({"params": KEY, "dropout": KEY}, ONES)
    call = jax.jit(module.apply) if jit else module.apply
    with pytest.raises(EmitError, match="drew a key from this stream") as caught:
        call(variables, ONES)
    assert caught.value.path == "rngs"
    assert "mutable=['RngCount']" in caught.value.fix
    assert "rngs=" in caught.value.fix
    _check(caught.value)


def test_a_stream_at_apply_that_the_module_does_not_have() -> None:
    module = bridge.to_linen(nnx.Dropout, 0.5)
    variables = module.init({"params": KEY, "dropout": KEY}, ONES)
    with pytest.raises(LinseyError, match="dropuot") as caught:
        module.apply(variables, ONES, rngs={"dropuot": KEY})
    _check(caught.value)


@pytest.mark.parametrize("rngs", ["0", 1.5, [0], True, jnp.ones(3)])
def test_what_streams_cannot_be_made_of(rngs: Any) -> None:
    with pytest.raises(BridgeError, match=r"found \w+ for PRNG") as caught:
        bridge.ToNNX(nn.Dense(2), rngs=rngs)
    assert caught.value.path == "rngs"
    assert "nnx.Rngs" in caught.value.fix
    _check(caught.value)


@pytest.mark.parametrize("rngs", ["0", 1.5, [0], True])
def test_what_the_keys_of_a_call_cannot_be(rngs: Any) -> None:
    with pytest.raises(LinseyError, match=r"found \w+ for PRNG keys") as caught:
        _dense()(X, rngs=rngs)
    assert caught.value.path == "rngs"
    _check(caught.value)


# --------------------------------------------------------------------------------------
# the types


@pytest.mark.parametrize("kind", [BridgeError, EmitError])
def test_errors_are_linsey_errors_and_pickle(kind: type[LinseyError]) -> None:
    assert issubclass(kind, LinseyError)
    error = kind("found 3, expected 4", path="params/w", fix="Pass 4.")
    _check(error)
    assert str(error) == "at params/w: found 3, expected 4\nPass 4."


def test_bridge_errors_are_value_errors_as_those_of_flax() -> None:
    assert issubclass(BridgeError, ValueError)


def test_an_error_that_was_raised_pickles_with_its_notes() -> None:
    with pytest.raises(BridgeError) as caught:
        bridge.ToNNX(nn.Dense(2), rngs=KEY)(X)
    caught.value.add_note("while testing")
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.__notes__ == ["while testing"]
    assert str(again) == str(caught.value)
