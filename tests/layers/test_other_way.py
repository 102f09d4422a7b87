"""NNX's own layers, with each of the fields of the grid, give NNX's numbers as Linen modules."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx
from layer_checks import lowered
from layer_grid import ALIASES, IS_FULL, ROWS, Point, call_of, points

import linsey
from linsey._layers import row_for_op

POINTS = [
    point
    for cls in ROWS
    if cls not in ALIASES
    for point in points(cls, is_full=IS_FULL)
    if "axis_name" not in point.fields and "rng_collection" not in point.fields
]


def layer_of(model: Any, cls: type) -> Any:
    """The layer of a class in a model, or None where it came out hosted."""
    found = (module for _, module in nnx.iter_graph(model) if type(module) is cls)
    return next(found, None)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.cls.__name__}-{point.label}")
def test_a_layer(point: Point) -> None:
    call = call_of(point, is_scanned=False)
    row = row_for_op("nnx", ROWS[point.cls].op)
    assert row is not None
    source = layer_of(nnx.merge(*lowered(call).emit("nnx")), row.cls)
    options = dict(call.kwargs)
    if source is None or options.keys() & {"inputs_kv", "rng", "dropout_rng", "sow_weights"}:
        return
    report = linsey.lower(source).report("linen")[""]
    assert report.became == "native" or report.reason
    module, variables = linsey.to_linen(source)
    keys = {"dropout": jax.random.key(1)}
    if point.cls is nn.Dropout:  # it has no stream: its key is an argument
        found = module.apply(variables, *call.args, rng=keys["dropout"], **options)
        assert_same(found, source(*call.args, rngs=keys["dropout"], **options))
        return
    args = [each if hasattr(each, "astype") else jnp.asarray(each) for each in call.args]
    if getattr(source, "dropout_rate", 0) and not options.get("deterministic", False):
        return
    if hasattr(source, "initialize_carry"):
        args.insert(0, source.initialize_carry(args[0].shape, rngs=nnx.Rngs(0)))
    mutable = [name for name in variables if name != "params"]
    if IS_FULL or point.label == "default":
        graphdef, state = nnx.split(source)

        @jax.jit
        def linen(*args: Any) -> Any:
            return module.apply(variables, *args, mutable=mutable, **options)[0]

        @jax.jit
        def own(state: Any, *args: Any) -> Any:
            return nnx.merge(graphdef, state)(*args, **options)

        assert_same(linen(*args), own(state, *args))
    found, updates = module.apply(variables, *args, mutable=mutable, **options)
    expected = source(*args, **options)
    assert_same(found, expected)
    _, after = linsey.to_linen(source)
    assert_same({**variables, **updates}, after)
