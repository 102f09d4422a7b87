"""Questions about a graph: sharing, dominators, and a part as a graph of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compare import assert_same
from flax import linen as nn
from flax import nnx

import linsey
from linsey.ir import (
    Graph,
    LinseyError,
    Node,
    NodeRef,
    Ref,
    Sequence,
    Slot,
    StackAxis,
    Stream,
    TensorType,
    Values,
    Wrapper,
    digraph,
    dominators,
    encode,
    extract,
    find_node,
    node_paths,
    shared_nodes,
    slot_index,
    tied_slots,
    verify,
)

KIND = TensorType(shape=(4, 2), dtype="float32")
SCALAR = TensorType(shape=(), dtype="uint32")

#      0
#    /   \
#   1     2      5 is shared by 1 and 2, and 3 is inside of 1 only
#   |\   / \
#   3 \ /   4
#      5
DIAMOND = verify(
    Graph(
        nodes=(
            Node(children=(("left", 1), ("right", 2)), slots=(("w", 0),)),
            Node(children=(("inner", 3), ("both", 5))),
            Node(children=(("both", 5), (0, 4)), attrs=(("other", NodeRef(node=5)),)),
            Node(slots=(("w", 1),), streams=(("noise", 1),)),
            Node(slots=(("w", 2), ("mu", 3))),
            Node(slots=(("w", 4), ("key", 5), ("count", 6)), streams=(("dropout", 0),)),
        ),
        slots=(
            Slot(collection="params", paths=(("w",),), type=KIND),
            Slot(
                collection="params",
                paths=(("left", "inner", "w"),),
                type=KIND,
                stack=(StackAxis(axis=0, length=4, owner=("left",)),),
            ),
            Slot(
                collection="params",
                paths=(("right", 0, "w"),),
                type=KIND,
                stack=(StackAxis(axis=0, length=4),),
            ),
            Slot(collection="opt", paths=(("right", 0, "mu"),), type=KIND, mirrors=2),
            Slot(
                collection="params",
                paths=(("left", "both", "w"), ("right", "both", "w")),
                type=KIND,
                mirrors=0,
            ),
            Slot(
                collection="RngKey",
                paths=(("left", "both", "key"), ("right", "both", "key")),
                type=SCALAR,
            ),
            Slot(
                collection="RngCount",
                paths=(("left", "both", "count"), ("right", "both", "count")),
                type=SCALAR,
            ),
        ),
        streams=(
            Stream(name="dropout", derivation="count", key=5, count=6),
            Stream(name="noise", derivation="path"),
        ),
        empty=(("cache",), ("cache", "left", "inner", "x"), ("cache", "right")),
    )
)
CYCLE = verify(
    Graph(
        nodes=(
            Node(children=(("a", 1),)),
            Node(children=(("back", 0), ("self", 1), ("b", 2)), slots=(("w", 0),)),
            Node(children=(("up", 1),)),
        ),
        slots=(Slot(collection="params", paths=(("a", "w"),), type=KIND),),
    )
)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.linear(x))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = Block(rngs)
        self.blocks = nnx.List([self.first, Block(rngs)])
        self.head = nnx.Linear(3, 3, rngs=rngs)
        self.head.kernel = self.first.linear.kernel

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))


class Whole(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(Encoder(name="encoder")(x))


def test_shared_nodes_have_several_parents() -> None:
    assert shared_nodes(DIAMOND) == (5,)
    # The root is no child of a parent: one edge back is its only use.
    assert shared_nodes(CYCLE) == (1,)


def test_a_node_that_is_an_attribute_of_one_and_a_child_of_another_is_shared() -> None:
    graph = Graph(
        nodes=(
            Node(children=(("a", 1), ("b", 2))),
            Node(),
            Node(attrs=(("parts", encode([])), ("block", NodeRef(node=1)))),
        )
    )
    assert shared_nodes(graph) == (1,)


def test_tied_slots_have_several_paths() -> None:
    assert tied_slots(DIAMOND) == (4, 5, 6)
    graph = linsey.lower(Model(nnx.Rngs(0))).graph
    tied = {graph.slots[number].key for number in tied_slots(graph)}
    assert tied == {
        "params/blocks/[0]/linear/bias",
        "params/blocks/[0]/linear/kernel",
        "RngKey/blocks/[0]/dropout/rngs/key",
        "RngCount/blocks/[0]/dropout/rngs/count",
    }


def test_dominators() -> None:
    assert dominators(DIAMOND) == {0: 0, 1: 0, 2: 0, 3: 1, 4: 2, 5: 0}
    assert dominators(CYCLE) == {0: 0, 1: 0, 2: 1}
    assert dominators(Graph(nodes=(Node(),))) == {0: 0}


def test_the_paths_of_nodes_are_the_shortest() -> None:
    assert node_paths(DIAMOND) == {
        0: (),
        1: ("left",),
        2: ("right",),
        3: ("left", "inner"),
        4: ("right", 0),
        5: ("left", "both"),
    }
    assert node_paths(CYCLE) == {0: (), 1: ("a",), 2: ("a", "b")}


def test_a_node_is_found_by_each_of_its_paths() -> None:
    assert find_node(DIAMOND, ()) == 0
    assert find_node(DIAMOND, ("left", "both")) == find_node(DIAMOND, ("right", "both")) == 5
    assert find_node(CYCLE, ("a", "back", "a", "self", "b", "up")) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("left", "outer"), "at left/outer: no child 'outer'; there are: 'inner', 'both'"),
        (("right", "0"), "at right/0: no child '0'; there are: 'both', 0"),
        (("left", "inner", 1, "x"), "at left/inner/[1]: no child 1; there are: none"),
    ],
)
def test_a_path_of_nothing_names_the_children(path: tuple[str | int, ...], message: str) -> None:
    for ask in (find_node, extract):
        with pytest.raises(LinseyError) as caught:
            ask(DIAMOND, path)
        assert str(caught.value) == (
            f"{message}\nGive the path of a node as `print(program)` shows it."
        )


def test_the_edges_are_named() -> None:
    edges = digraph(DIAMOND).edges(data="name")
    assert sorted(edges, key=str) == [
        (0, 1, "left"),
        (0, 2, "right"),
        (1, 3, "inner"),
        (1, 5, "both"),
        (2, 4, 0),
        (2, 5, "both"),
    ]
    wrapped = Wrapper(cls=Ref(name="builtins:object"), children=(("rngs", 1),))
    graph = Graph(nodes=(Node(wrapper=wrapped), Node()))
    assert list(digraph(graph).edges(data="name")) == [(0, 1, "rngs")]


def test_a_part_is_a_graph_of_its_own() -> None:
    part = verify(extract(DIAMOND, ("right",)))
    assert part == Graph(
        nodes=(
            Node(children=(("both", 2), (0, 1)), attrs=(("other", NodeRef(node=2)),)),
            Node(slots=(("w", 0), ("mu", 1))),
            Node(slots=(("w", 2), ("key", 3), ("count", 4)), streams=(("dropout", 0),)),
        ),
        slots=(
            Slot(
                collection="params",
                paths=((0, "w"),),
                type=KIND,
                stack=(StackAxis(axis=0, length=4),),
            ),
            Slot(collection="opt", paths=((0, "mu"),), type=KIND, mirrors=0),
            Slot(collection="params", paths=(("both", "w"),), type=KIND),
            Slot(collection="RngKey", paths=(("both", "key"),), type=SCALAR),
            Slot(collection="RngCount", paths=(("both", "count"),), type=SCALAR),
        ),
        streams=(Stream(name="dropout", derivation="count", key=3, count=4),),
        empty=(("cache",),),
    )


def test_the_owner_of_a_stacked_axis_is_counted_from_the_part() -> None:
    part = verify(extract(DIAMOND, ("left",)))
    inner = next(slot for slot in part.slots if slot.path == ("inner", "w"))
    assert inner.stack == (StackAxis(axis=0, length=4, owner=()),)
    assert part.empty == (("cache", "inner", "x"),)


def test_the_whole_is_a_part_of_itself() -> None:
    assert extract(DIAMOND, ()) == DIAMOND
    assert verify(extract(CYCLE, ())) == CYCLE


def test_a_part_of_a_cycle_is_sound() -> None:
    part = verify(extract(CYCLE, ("a", "b")))
    assert len(part.nodes) == 3
    assert find_node(part, ("up", "back", "a", "b")) == 0


def test_references_inside_of_attributes_are_renumbered() -> None:
    graph = Graph(
        nodes=(
            Node(children=(("skip", 1), ("part", 2))),
            Node(),
            Node(children=(("x", 3),), attrs=(("layers", encode((1,))), ("held", held(3)))),
            Node(),
        )
    )
    part = verify(extract(graph, ("part",)))
    assert part.nodes[0].attrs[1] == ("held", held(1))


def held(node: int) -> Any:
    """An attribute that is a tuple with a module in it."""
    return Sequence(kind="tuple", items=(NodeRef(node=node),))


def test_a_part_of_a_linen_model_runs() -> None:
    x = jnp.ones((2, 3))
    variables = Whole().init(jax.random.key(0), x)
    program = linsey.lower(Whole(), x, variables=variables)
    graph = verify(extract(program.graph, ("encoder",)))
    below = {
        f"{slot.collection}/encoder/{'/'.join(map(str, slot.path))}": slot for slot in graph.slots
    }
    arrays = tuple(program.values[key] for key in below)
    part = linsey.Program(graph=graph, values=Values(slot_index(graph), arrays))
    module, found = part.emit("linen")
    expected = {name: tree["encoder"] for name, tree in variables.items() if "encoder" in tree}
    assert_same(found, expected)
    assert_same(module.apply(found, x), Encoder().apply(expected, x))


class Repeated(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        block = nnx.Linear(3, 3, rngs=rngs)
        self.blocks = nnx.List([block] * 12)


def test_a_part_that_is_shared_many_times_has_its_own_paths() -> None:
    graph = linsey.lower(Repeated(nnx.Rngs(0))).graph
    for number in (0, 11):
        part = verify(extract(graph, ("blocks", number)))
        assert {slot.path for slot in part.slots} == {("bias",), ("kernel",)}


def test_a_part_of_an_nnx_model_is_sound() -> None:
    graph = linsey.lower(Model(nnx.Rngs(0))).graph
    for path in node_paths(graph).values():
        verify(extract(graph, path))
