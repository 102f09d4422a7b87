"""Models that nobody here wrote, from packages on PyPI, at tiny sizes with random weights."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import pytest
from compare import assert_same
from flax import nnx
from zoo_models import ZOO, ZooModel
from zoo_runs import LINEN, keys, linen_run

import linsey
from linsey.ir import Ref, encode

if importlib.util.find_spec("transformers") is None:
    pytest.skip("the extra `zoo` is not installed", allow_module_level=True)

pytestmark = pytest.mark.zoo


def saved_and_loaded(program: linsey.Program, path: Path) -> linsey.Program:
    """The program from a file, which may import the model's own package and no other."""
    program.save(path)
    source = program.graph.nodes[program.graph.root].source
    assert source is not None
    assert isinstance(source.cls, Ref)
    loaded = linsey.load(path, trust=[source.cls.name.partition(".")[0]])
    assert loaded.graph == program.graph
    loaded.save(path.with_suffix(".again"))
    assert path.with_suffix(".again").read_bytes() == path.read_bytes()
    return loaded


@pytest.mark.parametrize("entry", LINEN, ids=lambda z: z.name)
def test_linen_model(entry: ZooModel, tmp_path: Path) -> None:
    run = linen_run(entry.name)
    module, program, variables = run.module, run.program, run.variables
    exe = program.compile(entry.method, mutable=run.mutable)
    emitted, emitted_variables = program.emit("linen")
    assert emitted == module
    assert_same(emitted_variables, variables)

    expected, updates = jax.jit(run.apply)(variables, run.args, run.kwargs)
    found, after = exe(program.values, *run.args, rngs=run.rngs, **run.kwargs, **entry.static)
    assert_same(found, expected)
    _, state = linsey.Program(graph=program.graph, values=after).emit("linen")
    for name in set(state) & set(updates):
        assert_same(state[name], updates[name])

    loaded = saved_and_loaded(program, tmp_path / "model")
    again, again_variables = loaded.emit("linen")
    assert encode(again) == encode(module)
    assert_same(again_variables, variables)
    exe = loaded.compile(entry.method, mutable=run.mutable)
    found, after_loaded = exe(loaded.values, *run.args, rngs=run.rngs, **run.kwargs, **entry.static)
    assert_same(found, expected)
    assert_same(list(after_loaded.arrays), list(after.arrays))


@pytest.mark.parametrize("entry", [z for z in ZOO if z.api == "nnx"], ids=lambda z: z.name)
def test_nnx_model(entry: ZooModel, tmp_path: Path) -> None:
    make = entry.build()
    args, kwargs = entry.inputs()
    model = make(nnx.Rngs(0))
    program = linsey.lower(make, rngs=nnx.Rngs(0)).init(nnx.Rngs(0))
    _, state = program.emit("nnx")
    assert_same(state, nnx.state(model))
    assert linsey.lower(model).graph == program.graph

    source_graphdef, source_state = nnx.split(model)

    @jax.jit
    def source(state: Any, args: Any, kwargs: Any) -> Any:
        copy = nnx.merge(source_graphdef, state)
        call = copy if entry.method is None else getattr(copy, entry.method)
        return call(*args, **kwargs, **entry.static), nnx.state(copy)

    expected, expected_state = source(source_state, args, kwargs)
    exe = program.compile(entry.method)
    found, values = exe(program.values, *args, **kwargs, **entry.static)
    assert_same(found, expected)
    _, after = linsey.Program(graph=program.graph, values=values).emit("nnx")
    assert_same(after, expected_state)

    loaded = saved_and_loaded(program, tmp_path / "model")
    assert_same(loaded.emit("nnx")[1], state)
    again = linsey.lower(nnx.merge(*loaded.emit("nnx")))
    assert again.graph == program.graph
    exe = loaded.compile(entry.method)
    found, after_loaded = exe(loaded.values, *args, **kwargs, **entry.static)
    assert_same(found, expected)
    assert_same(list(after_loaded.arrays), list(values.arrays))

    module, variables = program.emit("linen")

    @jax.jit
    def as_linen(variables: Any, args: Any, kwargs: Any) -> Any:
        return module.apply(
            variables, *args, mutable=True, method=entry.method, **kwargs, **entry.static
        )[0]

    assert_same(as_linen(variables, args, kwargs), expected)


EXPORTED = {"llama_decode": None, "mamba2": "batch, ...", "resnet": "batch, ..."}


@pytest.mark.parametrize("entry", [z for z in ZOO if z.name in EXPORTED], ids=lambda z: z.name)
def test_an_exported_model(entry: ZooModel, tmp_path: Path) -> None:
    """Three that differ in what they take, give and keep; nobody's package is trusted."""
    args, kwargs = entry.inputs()
    kwargs = {**kwargs, **entry.static}
    streams = dict.fromkeys((*entry.init_rngs, *entry.call_rngs))
    program = linsey.lower(entry.build(), *args, rngs=keys(tuple(streams), 0), **kwargs)
    program = program.init(keys(entry.init_rngs, 0))
    rngs = keys(entry.call_rngs, 7)
    program.save(
        tmp_path / "a",
        export=linsey.Export(args=args, kwargs=kwargs, rngs=rngs, dynamic=EXPORTED[entry.name]),
    )
    loaded = linsey.load(tmp_path / "a")
    found, after = loaded.compile()(loaded.values, *args, rngs=rngs or None, **kwargs)
    expected, wanted = program.compile()(program.values, *args, rngs=rngs or None, **kwargs)
    assert_same(jax.tree.leaves(found), jax.tree.leaves(expected))
    assert_same(after.arrays, wanted.arrays)
