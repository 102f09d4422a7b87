"""Graphs and errors as values: immutable, compared by content, pickled without loss."""

import dataclasses
import os
import pickle
import subprocess
import sys
from typing import Any

import jax
import pytest
from flax import linen as nn

import linsey
from linsey.ir import (
    Const,
    EmitError,
    Graph,
    Hole,
    LinseyError,
    LoweringError,
    Node,
    Partition,
    PluginError,
    Ref,
    Sequence,
    Signature,
    Slot,
    Source,
    StackAxis,
    Stream,
    Template,
    TensorType,
    TreeType,
    Values,
    ValuesError,
    VerifyError,
    Wrapper,
    encode,
    slot_index,
)

FLOATS = TensorType(shape=(4, 3), dtype="float32")


def full_graph() -> Graph:
    """A graph with something in every field."""
    return Graph(
        nodes=(
            Node(
                source=Source(dialect="nnx", cls=Ref(name="builtins:object", live=object)),
                attrs=(("width", encode(3)), ("sizes", encode([1, 2.5, None]))),
                children=(("inner", 1), ("again", 1)),
                signatures=(
                    Signature(method="__call__", inputs=(("0", FLOATS), ("train", Const(True)))),
                ),
            ),
            Node(
                slots=(("kernel", 0), ("mu", 1)),
                streams=(("dropout", 0),),
                wrapper=Wrapper(cls=Ref(name="builtins:list"), slots=(("key", 2), ("count", 3))),
            ),
        ),
        slots=(
            Slot(
                collection="params",
                paths=(("inner", "kernel"), ("again", "kernel")),
                type=FLOATS,
                partition=Partition(axes=("data", None), spec=encode(("data", None))),
                stack=(StackAxis(axis=0, length=4, name="layers"),),
            ),
            Slot(
                collection="opt",
                paths=(("inner", "mu"),),
                type=TreeType(
                    structure=Template(structure=Sequence(kind="list", items=(Hole(index=0),))),
                    leaves=(FLOATS,),
                ),
                mirrors=0,
            ),
            Slot(
                collection="RngKey",
                paths=(("inner", "key"),),
                type=TensorType(shape=(), dtype="key<fry>"),
            ),
            Slot(
                collection="RngCount",
                paths=(("inner", "count"),),
                type=TensorType(shape=(), dtype="uint32"),
                raw=True,
            ),
        ),
        streams=(Stream(name="dropout", derivation="count", key=2, count=3),),
        empty=(("cache",),),
    )


def every_value(graph: Any) -> list[Any]:
    """A graph and every dataclass inside it."""
    if isinstance(graph, tuple):
        return [value for item in graph for value in every_value(item)]
    if isinstance(graph, type) or not dataclasses.is_dataclass(graph):
        return []
    fields = [getattr(graph, field.name) for field in dataclasses.fields(graph)]
    return [graph, *(value for item in fields for value in every_value(item))]


@pytest.mark.parametrize("value", every_value(full_graph()), ids=lambda value: type(value).__name__)
def test_nothing_can_be_edited_in_place(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
    with pytest.raises((AttributeError, TypeError)):
        value.something_new = None


def test_graphs_are_compared_by_content() -> None:
    first, second = full_graph(), full_graph()
    assert first is not second
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"root": 1},
        {"empty": ()},
        {"streams": ()},
        {"slots": full_graph().slots[:-1]},
        {"nodes": full_graph().nodes[:-1]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_counts(change: dict[str, Any]) -> None:
    graph = full_graph()
    hash(graph)
    changed = dataclasses.replace(graph, **change)
    assert changed != graph
    assert hash(changed) != hash(graph)


def test_a_hash_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = 0
    original = Node.__hash__

    def counting(node: Node) -> int:
        nonlocal hashed
        hashed += 1
        return original(node)

    monkeypatch.setattr(Node, "__hash__", counting)
    graph = full_graph()
    first = hash(graph)
    assert hashed == len(graph.nodes)
    assert hash(graph) == first
    assert hashed == len(graph.nodes)


def test_the_live_objects_do_not_count() -> None:
    named = Source(dialect="linen", cls=Ref(name="builtins:object", live=object))
    assert named == Source(dialect="linen", cls=Ref(name="builtins:object"))


def test_a_graph_is_pickled_without_loss() -> None:
    graph = full_graph()
    hash(graph)
    found = pickle.loads(pickle.dumps(graph))
    assert found == graph
    assert hash(found) == hash(graph)
    assert str(found) == str(graph)


def test_the_graph_of_a_real_module_is_pickled_without_loss() -> None:
    module = nn.Sequential([nn.Dense(2), nn.relu, nn.LayerNorm()])
    graph = linsey.lower(module, jax.ShapeDtypeStruct((1, 3), "float32")).graph
    found = pickle.loads(pickle.dumps(graph))
    assert found == graph
    assert hash(found) == hash(graph)


WRITE = """
import pickle, sys
from linsey.ir import Graph, Node, Slot, TensorType, slot_index
kind = TensorType(shape=(3,), dtype="float32")
slot = Slot(collection="params", paths=(("w",),), type=kind)
graph = Graph(nodes=(Node(slots=(("w", 0),)),), slots=(slot,))
index = slot_index(graph)
hash(graph), hash(index)
sys.stdout.buffer.write(pickle.dumps((graph, index)))
"""


def test_what_another_process_pickled_is_found_in_a_set() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    made = subprocess.run(
        [sys.executable, "-c", WRITE], env=environment, capture_output=True, check=True
    )
    graph, index = pickle.loads(made.stdout)
    kind = TensorType(shape=(3,), dtype="float32")
    slot = Slot(collection="params", paths=(("w",),), type=kind)
    here = Graph(nodes=(Node(slots=(("w", 0),)),), slots=(slot,))
    assert graph == here
    assert index == slot_index(here)
    assert graph in {here}
    assert index in {slot_index(here)}


def test_values_are_pickled() -> None:
    values = Values(slot_index(full_graph()), (1, 2, 3, 4))
    found = pickle.loads(pickle.dumps(values))
    assert found.index == values.index
    assert found.arrays == values.arrays
    assert found["params/again/kernel"] == 1


def test_attributes_are_read_by_name() -> None:
    node = full_graph().nodes[0]
    assert node.attr("width") == 3
    assert node.attr("sizes") == [1, 2.5, None]
    with pytest.raises(KeyError, match="depth"):
        node.attr("depth")


def test_the_texts_of_small_types() -> None:
    graph = full_graph()
    assert str(FLOATS) == "float32[4,3]"
    assert str(graph.slots[1].type) == "tree(float32[4,3])"
    assert str(graph.slots[0].partition) == "P('data', None)"
    assert str(graph.slots[0].stack[0]) == "layers:0=4"
    assert graph.slots[0].key == "params/inner/kernel"
    assert graph.signatures == graph.nodes[0].signatures


ERRORS = [
    LinseyError("found 3"),
    LoweringError("found 3, expected 4", path="params/w", fix="Pass 4."),
    EmitError("found 3", path="call"),
    ValuesError("found 3", fix="Pass 4."),
    PluginError("found 3", path="a", fix="b"),
    VerifyError(("slot a", "slot b")),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_pickled_without_loss(error: LinseyError) -> None:
    error.add_note("Lowered from Net.")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert isinstance(found, LinseyError)
    assert str(found) == str(error)
    assert (found.message, found.path, found.fix) == (error.message, error.path, error.fix)
    assert found.__notes__ == error.__notes__
    assert found.args == error.args
    assert vars(found) == vars(error)


def test_an_error_has_three_parts() -> None:
    assert str(ERRORS[0]) == "found 3"
    assert str(ERRORS[1]) == "at params/w: found 3, expected 4\nPass 4."
    assert str(ERRORS[2]) == "at call: found 3"
    assert str(ERRORS[3]) == "found 3\nPass 4."
