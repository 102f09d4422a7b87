"""Frontends and backends come through entry points; one that is missing or broken says so."""

import importlib.metadata
import re
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

import linsey
from linsey import plugins
from linsey.backends import Backend, Called
from linsey.frontends import Frontend, Lowered, Request
from linsey.ir import (
    Graph,
    Node,
    PluginError,
    Ref,
    Slot,
    Source,
    TensorType,
    Values,
    encode,
    slot_index,
)

X = jnp.ones((2, 3))
FRONTENDS, BACKENDS = "linsey.frontends", "linsey.backends"


class Toy:
    """A model of a framework that linsey does not know: ``x * scale + shift``."""

    def __init__(self, scale: float, shift: float) -> None:
        self.scale = scale
        self.shift = shift


def lower_toy(request: Request) -> Lowered:
    source = request.source
    kind = TensorType(shape=(), dtype="float32")
    graph = Graph(
        nodes=(
            Node(
                source=Source(dialect="toy", cls=Ref(name=f"{__name__}:Toy", live=Toy)),
                attrs=(("kind", encode("affine")),),
                slots=(("scale", 0), ("shift", 1)),
            ),
        ),
        slots=tuple(
            Slot(collection="params", paths=((name,),), type=kind) for name in ("scale", "shift")
        ),
    )
    arrays = jnp.float32(source.scale), jnp.float32(source.shift)
    return Lowered(graph=graph, values=Values(slot_index(graph), arrays))


class ToyRunner:
    default_mutable: Any = None

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __call__(self, arrays: Any, args: Any, kwargs: Any, **options: Any) -> Called:
        scale, shift = arrays
        return Called(output=args[0] * scale + shift, arrays=[scale, shift + 1])


def emit_toy(graph: Graph, values: Values | None) -> Toy:
    assert values is not None
    return Toy(float(values["params/scale"]), float(values["params/shift"]))


toy_frontend = Frontend(name="toy", accepts=lambda source: isinstance(source, Toy), lower=lower_toy)
toy_backend = Backend(name="toy", emit=emit_toy, runner=ToyRunner)

HERE = __name__
Register = Callable[..., None]


class Owned(EntryPoint):
    """An entry point of a distribution that is not installed."""

    @property
    def dist(self) -> Any:
        return types.SimpleNamespace(name=vars(self)["owner"])

    def load(self) -> Any:
        return vars(self)["load_it"]()


def entry(group: str, name: str, value: str, owner: str, load: Callable[[], Any]) -> EntryPoint:
    made = Owned(name, value, group)
    vars(made).update(owner=owner, load_it=load)
    return made


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Register]:
    """Adds entry points to those that are installed."""
    added: list[EntryPoint] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        installed = importlib.metadata.entry_points(group=group)
        return [*installed, *(each for each in added if each.group == group)]

    def add(group: str, name: str, value: str, owner: str, load: Callable[[], Any]) -> None:
        added.append(entry(group, name, value, owner, load))
        plugins._scan.cache_clear()

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    plugins._scan.cache_clear()
    yield add
    plugins._scan.cache_clear()


def fail() -> Any:
    raise ImportError("libtoy.so: cannot open shared object file")


def test_the_built_in_ones_come_by_entry_points() -> None:
    assert plugins.names(FRONTENDS)[:2] == ("linen", "nnx")
    assert plugins.names(BACKENDS)[:2] == ("linen", "nnx")
    for group in (FRONTENDS, BACKENDS):
        installed = {each.name: each for each in importlib.metadata.entry_points(group=group)}
        for name in ("linen", "nnx"):
            assert plugins.load(group, name) is installed[name].load()
            assert plugins.load(group, name).name == name


def test_an_object_that_nobody_accepts() -> None:
    with pytest.raises(PluginError) as caught:
        linsey.lower(Toy(2.0, 1.0), X)
    assert str(caught.value) == (
        f"at linsey.lower: no frontend accepts a {HERE}.Toy; there are: linen, nnx\n"
        "Pass a Linen module, an NNX module or a factory of one; or register a frontend for it"
        " under the entry-point group linsey.frontends (a linsey.frontends.Frontend)."
    )


def test_a_target_that_nobody_emits() -> None:
    program = linsey.lower(nn.Dense(2), X)
    with pytest.raises(PluginError) as caught:
        program.emit("toy")
    assert str(caught.value) == (
        "at linsey.backends: nothing is registered under the name 'toy'; there are: linen, nnx\n"
        "Install the package that provides it, or register it under linsey.backends."
    )


def test_a_plug_in_works_from_end_to_end(register: Register) -> None:
    register(FRONTENDS, "toy", "toylib:frontend", "toylib", lambda: toy_frontend)
    register(BACKENDS, "toy", "toylib:backend", "toylib", lambda: toy_backend)
    assert plugins.names(FRONTENDS) == ("linen", "nnx", "toy")

    program = linsey.lower(Toy(2.0, 1.0))
    assert "toy.Toy(kind='affine')" in str(program)
    assert dict(program.values.items()) == {"params/scale": 2.0, "params/shift": 1.0}

    found, after = program.compile()(program.values, X)
    assert_same(found, X * 2 + 1)
    assert_same(after["params/shift"], jnp.float32(2.0))
    assert after["params/scale"] is program.values["params/scale"]

    emitted = program.emit("toy")
    assert (emitted.scale, emitted.shift) == (2.0, 1.0)


def test_a_factory_may_make_what_a_plug_in_accepts(register: Register) -> None:
    register(FRONTENDS, "toy", "toylib:frontend", "toylib", lambda: toy_frontend)
    program = linsey.lower(lambda: Toy(2.0, 1.0))
    assert program.graph == linsey.lower(Toy(3.0, 4.0)).graph


def test_a_program_whose_dialect_has_no_backend(register: Register) -> None:
    register(FRONTENDS, "toy", "toylib:frontend", "toylib", lambda: toy_frontend)
    program = linsey.lower(Toy(2.0, 1.0))
    with pytest.raises(PluginError, match="nothing is registered under the name 'toy'"):
        program.compile()


def test_built_in_ones_are_asked_first(register: Register) -> None:
    asked: list[Any] = []

    def accepts(source: Any) -> bool:
        asked.append(source)
        return True

    greedy = Frontend(name="aaa", accepts=accepts, lower=lower_toy)
    register(FRONTENDS, "aaa", "greedy:frontend", "greedy", lambda: greedy)
    linsey.lower(nn.Dense(2), X)
    linsey.lower(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    assert not asked
    toy = Toy(2.0, 1.0)
    linsey.lower(toy)
    assert asked == [toy]


def test_two_distributions_that_claim_one_name(register: Register) -> None:
    register(FRONTENDS, "toy", "toylib:frontend", "toylib", lambda: toy_frontend)
    register(FRONTENDS, "toy", "othertoys:frontend", "othertoys", lambda: toy_frontend)
    linsey.lower(nn.Dense(2), X)  # nobody needs that name here
    with pytest.raises(PluginError) as caught:
        linsey.lower(Toy(2.0, 1.0))
    assert caught.value.__notes__ == [
        "at linsey.frontends:toy: two distributions claim the name: othertoys (othertoys:frontend)"
        " and toylib (toylib:frontend)\nUninstall one of them."
    ]


def test_the_same_entry_point_twice_is_no_clash(register: Register) -> None:
    for _ in range(2):  # one distribution may be found twice on the path
        register(FRONTENDS, "toy", "toylib:frontend", "toylib", lambda: toy_frontend)
    assert plugins.names(FRONTENDS) == ("linen", "nnx", "toy")


def test_a_broken_plug_in_breaks_nothing_until_it_is_needed(register: Register) -> None:
    register(FRONTENDS, "toy", "toylib:frontend", "toylib", fail)
    register(BACKENDS, "toy", "toylib:backend", "toylib", fail)
    program = linsey.lower(nn.Dense(2), X).init(0)
    assert_same(program.emit("linen")[1], nn.Dense(2).init(jax.random.key(0), X))
    reason = (
        "toylib failed to load: ImportError: libtoy.so: cannot open shared object file\n"
        "Install what it needs; or mend or uninstall it."
    )
    with pytest.raises(PluginError) as caught:
        program.emit("toy")
    assert str(caught.value) == f"at linsey.backends:toy: {reason}"
    assert isinstance(caught.value.__cause__, ImportError)

    with pytest.raises(PluginError, match=re.escape(f"no frontend accepts a {HERE}.Toy")) as caught:
        linsey.lower(Toy(2.0, 1.0))
    assert caught.value.__notes__ == [f"at linsey.frontends:toy: {reason}"]


def test_a_plug_in_is_not_imported_before_it_is_used(register: Register) -> None:
    loaded: list[str] = []

    def load() -> Any:
        loaded.append("toy")
        return toy_backend

    register(BACKENDS, "toy", "toylib:backend", "toylib", load)
    linsey.lower(nn.Dense(2), X).init(0).emit("nnx")
    assert not loaded
    assert "toy" in plugins.names(BACKENDS)
    assert not loaded
