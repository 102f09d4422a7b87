"""A program that was written as bytes and read again is the same."""

import jax
from compare import assert_same

import linsey
from linsey.ir import dumps, encode, left_out, loads

# What the user made in the source equals only itself, in a module of flax too: closures (an
# initialiser, an optimizer), partials, arrays. It comes back as data.
BY_IDENTITY = {
    *("Dense-inits", "Conv-masked", "NANOOFp8DotGeneralOp", "Fp8DirectDotGeneralOp"),
    *("array-attribute", "Optimizer", "ModelAndOptimizer", "train-adam", "train-sgd-no-state"),
    *("train-optimizer-sharding", "train-lora-only", "train-tied", "abstract-trainer"),
    *("train-chain", "train-masked", "train-partition", "train-multi-steps", "train-factored"),
    *("train-inject-hyperparams", "optimizer"),
    *("to-linen-sequential", "nnx-linen-trainer", "static-attributes"),
}


def assert_comes_back(name: str, program: linsey.Program, target: str) -> None:
    """Asserts that the graph of a case comes back equal, and emits equal modules and values."""
    is_whole = not left_out(program.graph)
    data = dumps(program.graph, leave_out=not is_whole)
    graph = loads(data)
    assert dumps(graph, leave_out=not is_whole) == data
    if not is_whole:
        return
    assert graph == program.graph
    static, dynamic = linsey.Program(graph=graph, values=program.values).emit(target)
    expected_static, expected_dynamic = program.emit(target)
    if name in BY_IDENTITY:
        assert encode(static) == encode(expected_static)
    else:
        assert static == expected_static
    assert_same(jax.tree.leaves(dynamic), jax.tree.leaves(expected_dynamic))
