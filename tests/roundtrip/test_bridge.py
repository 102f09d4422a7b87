"""Mixed trees through linsey's own wrappers, of both faces and with flax's, lose nothing."""

import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

import linsey
from linsey import bridge
from linsey.bridge import flax12

FACES: Mapping[str, ModuleType] = {"guide": bridge, "flax12": flax12, "flax": nnx.bridge}
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
CALL_KEYS = {"dropout": jax.random.key(2)}
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)

Array = jax.Array

pytestmark = pytest.mark.filterwarnings(r"ignore:Using 'Module.sow\(\)' outside")


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0, dropout=1)


# --------------------------------------------------------------------------------------
# parts without wrappers; each takes and gives (batch, 4)


class Momentum(nnx.Variable[Any]):
    """Not registered."""


class NNXPart(nnx.Module):
    def __init__(self, act: Callable[..., Any] = jnp.tanh, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.act = act

    def __call__(self, x: Array) -> Array:
        return self.act(self.norm(self.linear(x)))

    def half(self, x: Array) -> Array:
        return self.linear(x)


class NNXDrop(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.part = NNXPart(rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.drop(self.part(x))


class NNXOdd(nnx.Module):
    """A Variable class that nobody registered, one Variable in two places, a boxed one, a sow."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.momentum = Momentum(jnp.zeros(4), note="kept")
        self.items = nnx.List(
            [nnx.Linear(4, 4, rngs=rngs), nnx.data({"rngs": nnx.Param(jnp.ones(4))})]
        )
        self.tied = self.items[0]
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        with nnx.use_eager_sharding(False):
            self.kernel = nnx.Param(init(rngs.params(), (4, 4)))
        self.kernel.set_metadata(eager_sharding=True)  # which a Linen box does not carry

    def __call__(self, x: Array) -> Array:
        self.momentum[...] += x.mean(0)
        y = self.tied(self.items[0](x)) * self.items[1]["rngs"]
        self.sow(nnx.Intermediate, "hidden", y)
        return y @ self.kernel[...] + self.momentum[...]


class LinenPart(nn.Module):
    act: Callable[..., Any] = jnp.tanh

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(4)(x))
        return self.act(x)


class LinenDrop(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dropout(0.5, deterministic=False)(LinenPart()(x))


class LinenOdd(nn.Module):
    """Equal names in two collections, names that the wrappers use, boxes, a sow."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", nn.with_partitioning(init, (None, "model")), (4, 4))
        ema = self.variable("ema", "kernel", jnp.zeros, (4, 4))
        total = self.variable("eval", "total", jnp.zeros, (4,))
        if not self.is_initializing() and self.is_mutable_collection("ema"):
            ema.value = 0.5 * ema.value + kernel
        if not self.is_initializing() and self.is_mutable_collection("eval"):
            total.value += x.mean(0)
        for name in ("rngs", "module", "train"):
            x = nn.Dense(4, name=name)(x)
        self.sow("intermediates", "hidden", x)
        return x @ (kernel + ema.value) + self.param("lazy_init", init, (1, 4)) + total.value


# --------------------------------------------------------------------------------------
# towers: the faces take turns on the way down


class LinenLevel(nn.Module):
    faces: tuple[str, ...]
    drop: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(4, name="dense")(x)
        if not self.faces:
            return (LinenDrop() if self.drop else nn.Dense(4))(x)
        face, *rest = self.faces
        return FACES[face].to_linen(NNXLevel, tuple(rest), self.drop, name="below")(x)


class NNXLevel(nnx.Module):
    def __init__(self, faces: tuple[str, ...], drop: bool = True, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        if faces:
            face, *rest = faces
            self.below = FACES[face].ToNNX(LinenLevel(tuple(rest), drop), rngs=rngs)
        elif drop:
            self.below = NNXDrop(rngs=rngs)
        else:
            self.below = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.below(self.dense(x))


TOWERS = [
    ("guide",) * 2,
    ("flax12",) * 2,
    ("guide", "flax12"),
    ("flax12", "guide"),
    ("guide", "guide", "guide"),
    ("guide", "flax"),
    ("flax12", "flax"),
]

# --------------------------------------------------------------------------------------
# Linen roots


class Holds(nn.Module):
    """A ToLinen beside Linen modules, in a list and a dict, one used twice."""

    face: str

    def setup(self) -> None:
        to_linen = FACES[self.face].to_linen
        shared = to_linen(nnx.Linear, 4, 4)
        self.layers = [shared, nn.Dense(4), shared]
        self.heads = {"a": to_linen(NNXOdd), "b": LinenOdd()}

    def __call__(self, x: Array) -> Any:
        for layer in self.layers:
            x = layer(x)
        return {name: head(x) for name, head in self.heads.items()}


class HasFields(nn.Module):
    """Wrapped outside, with a method of the NNX module."""

    parts: Any

    @nn.compact
    def __call__(self, x: Array) -> Any:
        return self.parts[1](x), self.parts[0](x, nnx_method="half")


class Block(nn.Module):
    face: str
    cls: Any

    @nn.compact
    def __call__(self, x: Array, _: Any) -> Any:
        return FACES[self.face].to_linen(self.cls, name="inner")(x), None


class Lifted(nn.Module):
    face: str
    lift: str
    cls: Any = NNXPart

    @nn.compact
    def __call__(self, x: Array) -> Any:
        face = FACES[self.face]
        metadata = {nn.PARTITION_NAME: "layers"}
        split = {"params": True, "dropout": True}
        if self.lift == "remat":
            return nn.remat(face.ToLinen)(self.cls, name="lifted")(x)
        axes: dict[str, Any] = {"params": 0, "batch_stats": 0, "Momentum": 0, "momentum": 0}
        axes |= {"RngKey": 0, "RngCount": 0}
        if self.lift == "vmap":
            lifted = nn.vmap(
                face.ToLinen,
                in_axes=None,
                axis_size=2,
                variable_axes={**axes, "nnx": None},
                split_rngs=split,
                metadata_params=metadata,
            )
            return lifted(self.cls, name="lifted")(x)

        lifted = nn.scan(
            Block,
            length=2,
            variable_axes=axes,
            variable_broadcast="nnx",
            split_rngs=split,
            metadata_params=metadata,
        )
        return lifted(self.face, self.cls, name="lifted")(x, None)[0]


class GuideRenamed(bridge.ToLinen): ...


class Flax12Renamed(flax12.ToLinen): ...


SUBCLASSES = {"guide": GuideRenamed, "flax12": Flax12Renamed}


def make_part(rngs: nnx.Rngs) -> NNXPart:
    return NNXPart(lambda x: jnp.sin(x), rngs=rngs)


class Case(NamedTuple):
    make: Callable[[str], Any]
    """Makes the root by the name of a face."""
    draws: bool = False
    """Whether a call draws from a stream that no state holds, or that must be mutable."""


# The slow cases, with one face each; the others are run with both.
ONE_FACE = {"scan-dropout": "guide", "scan-odd": "flax12", "scan": "guide"}


def cases(table: Mapping[str, Any]) -> list[Any]:
    return [
        pytest.param(case, face, id=f"{face}-{name}")
        for name, case in table.items()
        for face in ("guide", "flax12")
        if ONE_FACE.get(name, face) == face
    ]


LINEN = {
    "root-dropout": Case(lambda f: FACES[f].to_linen(NNXDrop), draws=True),
    "root-odd": Case(lambda f: FACES[f].to_linen(NNXOdd)),
    "root-instance": Case(lambda f: FACES[f].ToLinen(NNXPart(rngs=rngs()))),
    "root-instance-dropout": Case(lambda f: FACES[f].ToLinen(NNXDrop(rngs=rngs())), draws=True),
    "root-factory": Case(lambda f: FACES[f].to_linen(make_part)),
    "root-subclass": Case(lambda f: SUBCLASSES[f](NNXPart, (lambda x: jnp.cos(x),))),
    "root-unboxed": Case(lambda f: FACES[f].to_linen(NNXOdd, metadata_fn=None)),
    "holds": Case(Holds),
    "fields": Case(
        lambda f: HasFields([FACES[f].to_linen(NNXPart), SUBCLASSES[f](NNXPart(rngs=rngs()))])
    ),
    "vmap": Case(lambda f: Lifted(f, "vmap")),
    "scan-odd": Case(lambda f: Lifted(f, "scan", NNXOdd)),
    "scan-dropout": Case(lambda f: Lifted(f, "scan", NNXDrop), draws=True),
    "remat": Case(lambda f: Lifted(f, "remat", NNXOdd)),
}
LINEN_CASES = cases(LINEN) + [
    pytest.param(
        Case(lambda _, faces=faces: LinenLevel(faces, "flax" not in faces), "flax" not in faces),
        "",
        id="-".join(("tower", *faces)),
    )
    for faces in TOWERS
]


def check_text(program: linsey.Program) -> None:
    text = str(program)
    assert "nnx/graphdef" not in text
    assert not re.search("to_nnx__(?!rngs)", text)
    assert not re.search(r"%\d+ \w+\.\w*(ToNNX|ToLinen|Renamed)\(", text)
    for line in text.splitlines():
        if " via " in line:
            kinds = r"nnx\.\S+\(.*via .*(ToLinen|Renamed)|linen\.\S+\(.*via .*(ToNNX|Wrapper)"
            assert re.search(kinds, line), line


def by_key(program: linsey.Program) -> tuple[dict[str, Any], dict[str, Any]]:
    """The slots, and their values."""
    slots = {slot.key: slot for slot in program.graph.slots}
    return slots, {key: program.values[key] for key in slots}


def mutable_of(variables: Any) -> list[str]:
    return [name for name in variables if name not in ("params", "nnx")]


@pytest.mark.parametrize(("case", "face"), LINEN_CASES)
def test_linen_root(case: Case, face: str) -> None:
    module = case.make(face)
    variables = module.init(KEYS, X)
    program = linsey.lower(module, X, rngs=KEYS)
    check_text(program)
    assert linsey.lower(module, X, rngs=KEYS).graph == program.graph
    program = program.init(KEYS)
    given = linsey.lower(module, X, rngs=KEYS, variables=variables)
    assert given.graph == program.graph
    assert_same(given.emit("linen")[1], variables)

    emitted, emitted_variables = program.emit("linen")
    assert emitted == module
    assert_same(emitted_variables, variables)

    call: dict[str, Any] = {"rngs": CALL_KEYS, "mutable": mutable_of(variables)}
    wanted = module.apply(variables, X, **call)
    assert_same(emitted.apply(emitted_variables, X, **call), wanted)

    def step(variables: Any, x: Any, keys: Any) -> Any:
        return module.apply(variables, x, rngs=keys, mutable=call["mutable"])

    wanted_jit, updates = jax.jit(step)(variables, X, CALL_KEYS)
    found, values = program.compile()(program.values, X, rngs=CALL_KEYS)
    assert_same(found, wanted_jit)
    _, after = linsey.Program(graph=program.graph, values=values).emit("linen")
    assert_same({name: after[name] for name in updates}, updates)

    model = nnx.merge(*program.emit("nnx"))
    again = linsey.lower(model)
    check_text(again)
    if program.graph.nodes[program.graph.root].source.dialect == "linen":
        assert_same(model(X, rngs=CALL_KEYS), wanted[0])
        held = linsey.to_nnx(module, X, rngs=KEYS, variables=variables)
        assert_same(held(X, rngs=CALL_KEYS), wanted[0])
        after_call = linsey.lower(held).emit("linen")[1]
        assert_same({name: after_call[name] for name in wanted[1]}, wanted[1])
        assert_same(again.emit("linen")[1], variables)
        assert by_key(again)[0] == by_key(program)[0]
    elif not case.draws:
        assert_same(model(X), wanted[0])
        assert_same(linsey.to_nnx(module, X, rngs=KEYS)(X), wanted[0])
    assert_same(by_key(again)[1], by_key(program)[1])


# --------------------------------------------------------------------------------------
# NNX roots


class Mixed(nnx.Module):
    """A ToNNX as attribute, in a List, in a dict; one of them twice."""

    def __init__(self, face: str, rngs: nnx.Rngs):
        to_nnx = FACES[face].ToNNX
        shared = to_nnx(LinenPart(), rngs=rngs)
        self.first = shared
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), to_nnx(nn.Dense(4), rngs=rngs)])
        self.heads = nnx.data({"a": shared, "b": to_nnx(LinenOdd(), rngs=rngs)})
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Any:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return {name: self.drop(head(x)) for name, head in self.heads.items()}


class Stacked(nnx.Module):
    """Layers that `nnx.vmap` made."""

    def __init__(self, face: str, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> Any:
            model = FACES[face].ToNNX(LinenDrop(), rngs=rngs)
            return FACES[face].lazy_init(model, jnp.ones((3, 4)))

        self.layers = make(rngs)

    def __call__(self, x: Array) -> Array:
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)


class GuideWrapper(bridge.ToNNX): ...


class Flax12Wrapper(flax12.ToNNX): ...


NAMED = {"guide": GuideWrapper, "flax12": Flax12Wrapper}
WRAPPED: dict[str, Callable[[str], nn.Module]] = {
    "dropout": lambda _: LinenDrop(),
    "odd": lambda _: LinenOdd(),
    "instance": lambda face: nn.Sequential([FACES[face].ToLinen(NNXDrop(rngs=rngs()))]),
    "to-linen": lambda face: nn.Sequential([FACES[face].to_linen(NNXPart)]),
    "holds": Holds,
    "scan": lambda face: Lifted(face, "scan"),
}
NNX: dict[str, Callable[[str], Any]] = {
    **{
        name: lambda face, make=make: FACES[face].ToNNX(make(face), rngs=rngs())
        for name, make in WRAPPED.items()
    },
    "subclass": lambda face: NAMED[face](LinenPart(lambda x: jnp.cos(x)), rngs=rngs()),
    "mixed": lambda face: Mixed(face, rngs()),
    "stacked": lambda face: Stacked(face, rngs()),
}
NNX_CASES = cases(NNX) + [
    pytest.param(
        lambda _, faces=faces: NNXLevel(faces, "flax" not in faces, rngs=rngs()),
        "",
        id="-".join(("tower", *faces)),
    )
    for faces in TOWERS
]


def state_of(model: Any) -> Any:
    """All but what calls sow."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Intermediate)))


@pytest.mark.parametrize(("make", "face"), NNX_CASES)
def test_nnx_root(make: Callable[[str], Any], face: str) -> None:
    is_ready = face and make is NNX["stacked"]
    models = [make(face) for _ in range(2)]
    program = linsey.lower(models[0], X)
    if not is_ready:
        program = program.init()
        for model in models:
            bridge.lazy_init(model, X)
        assert_same(state_of(nnx.merge(*program.emit("nnx"))), state_of(models[0]))
        program = linsey.lower(models[0], X)
    check_text(program)
    assert linsey.lower(models[0], X).graph == program.graph
    graphdef, state = nnx.split(models[0])
    emitted_graphdef, emitted_state = program.emit("nnx")
    model = nnx.merge(emitted_graphdef, emitted_state)
    assert_same(state_of(model), state_of(models[0]))
    if not nnx.state(models[0], nnx.Intermediate):
        assert emitted_graphdef == graphdef
        assert_same(emitted_state, state)
    assert linsey.lower(model, X).graph == program.graph

    @jax.jit
    def step(state: Any, x: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return model(x), state_of(model)

    wanted, updated = step(state, X)
    found, values = program.compile()(program.values, X)
    assert_same(found, wanted)
    after = linsey.Program(graph=program.graph, values=values).emit("nnx")
    assert_same(state_of(nnx.merge(*after)), updated)

    module, variables = linsey.to_linen(models[0], X)
    wanted = models[1](X)
    kept = state_of(models[1])
    found, changes = module.apply(variables, X, mutable=mutable_of(variables))
    assert_same(found, wanted)
    again = linsey.lower(module, X, variables={**variables, **changes})
    check_text(again)
    back = nnx.merge(*again.emit("nnx"))
    assert_same(state_of(back), kept)
    assert_same(model(X), wanted)
    assert_same(state_of(model), kept)


@pytest.mark.parametrize("face", ["guide", "flax12"])
def test_sown_values_are_left_out(face: str) -> None:
    model = bridge.lazy_init(FACES[face].ToNNX(LinenOdd(), rngs=rngs()), X)
    model(X)
    emitted = nnx.merge(*linsey.lower(model).emit("nnx"))
    assert not jax.tree.leaves(nnx.state(emitted, nnx.Intermediate))
    kept = nnx.Not(nnx.Intermediate)
    assert_same(nnx.state(emitted, kept), nnx.state(model, kept))


def test_a_to_linen_that_has_no_place_for_a_graphdef_below_it_is_refused() -> None:
    module = LinenLevel(("flax12", "flax12", "guide"))
    with pytest.raises(linsey.LinseyError, match="stores its graphdef"):
        linsey.lower(module, X, rngs=KEYS)


@pytest.mark.parametrize("face", ["guide", "flax12"])
def test_wrappers_with_nothing_between_them_are_refused(face: str) -> None:
    to_linen, to_nnx = FACES[face].to_linen, FACES[face].ToNNX
    with pytest.raises(linsey.LinseyError, match="with nothing between it and the ToNNX"):
        linsey.lower(to_nnx(to_linen(NNXPart), rngs=rngs()), X)
    with pytest.raises(linsey.LinseyError, match="with nothing between it and the ToLinen"):
        linsey.lower(to_linen(to_nnx, LinenPart()), X, rngs=KEYS)
