"""The rules of the graph: for each a graph that breaks it, and what is said then."""

from dataclasses import replace

import pytest

from linsey.ir import (
    Graph,
    Hole,
    Node,
    Ref,
    Slot,
    StackAxis,
    Stream,
    Template,
    TensorType,
    TreeType,
    VerifyError,
    Wrapper,
    problems,
    verify,
)

KIND = TensorType(shape=(4, 3), dtype="float32")


def slot(*path: str | int, collection: str = "params", **fields: object) -> Slot:
    return Slot(collection=collection, paths=(path,), **{"type": KIND, **fields})


def wrapped(**fields: object) -> Wrapper:
    return Wrapper(cls=Ref(name="builtins:object"), **fields)


def of_slot(made: Slot) -> Graph:
    return Graph(nodes=(Node(slots=(("w", 0),)),), slots=(made,))


SOUND = Graph(
    nodes=(
        Node(children=(("a", 1), ("b", 1), ("c", 2)), slots=(("w", 0), ("w", 1))),
        Node(slots=(("v", 2),), streams=(("dropout", 0),)),
        Node(wrapper=wrapped(children=(("rngs", 3),), slots=(("key", 3),))),
        Node(slots=(("count", 4),), children=(("up", 0),)),
    ),
    slots=(
        slot("w", stack=(StackAxis(axis=1, length=3), StackAxis(axis=0, length=4))),
        slot("w", collection="batch_stats"),
        slot("a", "v", mirrors=0, type=TensorType(shape=(0,), dtype="int8")),
        slot("c", "key"),
        slot("c", "rngs", "count"),
    ),
    streams=(
        Stream(name="dropout", derivation="count", key=3, count=4),
        Stream(name="params", derivation="path"),
    ),
)

BROKEN: list[tuple[str, Graph, tuple[str, ...]]] = [
    ("no-nodes", Graph(nodes=()), ("root 0 is not one of 0 nodes",)),
    ("root", Graph(nodes=(Node(),), root=1), ("root 1 is not one of 1 nodes",)),
    ("negative-root", Graph(nodes=(Node(),), root=-1), ("root -1 is not one of 1 nodes",)),
    (
        "child-index",
        Graph(nodes=(Node(children=(("a", 1), (0, -1))),)),
        (
            "node %0 child 'a': %1 is not one of 1 nodes",
            "node %0 child 0: %-1 is not one of 1 nodes",
        ),
    ),
    (
        "slot-index",
        Graph(nodes=(Node(slots=(("w", 0),)),)),
        ("node %0 slot 'w': 0 is not one of 0 slots",),
    ),
    (
        "stream-index",
        Graph(nodes=(Node(streams=(("dropout", 2),)),)),
        ("node %0 stream 'dropout': 2 is not one of 0 streams",),
    ),
    (
        "indices-of-a-wrapper",
        Graph(nodes=(Node(wrapper=wrapped(children=(("rngs", 5),), slots=(("key", 6),))),)),
        (
            "node %0 child 'rngs': %5 is not one of 1 nodes",
            "node %0 slot 'key': 6 is not one of 0 slots",
        ),
    ),
    (
        "indices-of-a-stream",
        Graph(
            nodes=(Node(),),
            streams=(Stream(name="dropout", derivation="count", key=1, count=-1),),
        ),
        (
            "stream 'dropout' key: 1 is not one of 0 slots",
            "stream 'dropout' count: -1 is not one of 0 slots",
        ),
    ),
    (
        "mirrored-index",
        of_slot(slot("w", mirrors=1)),
        ("slot params/w mirrors 1, which is not one of 1 slots",),
    ),
    (
        "unreachable-node",
        Graph(nodes=(Node(), Node(children=(("loop", 1),)))),
        ("node %1 cannot be reached from the root",),
    ),
    (
        "slot-of-nobody",
        Graph(nodes=(Node(),), slots=(slot("layers", 0, "w"),)),
        ("slot params/layers/[0]/w belongs to no node",),
    ),
    (
        "slot-of-an-unreachable-node",
        Graph(nodes=(Node(), Node(slots=(("w", 0),))), slots=(slot("w"),)),
        ("node %1 cannot be reached from the root", "slot params/w belongs to no node"),
    ),
    (
        "children-of-one-name",
        Graph(nodes=(Node(children=(("a", 1), ("a", 1))), Node())),
        ("node %0 has 2 children named 'a'",),
    ),
    (
        "slots-of-one-name",
        Graph(nodes=(Node(slots=(("w", 0), ("w", 1))),), slots=(slot("w"), slot("v"))),
        ("node %0 has 2 slots named 'w' in 'params'",),
    ),
    (
        "slots-of-one-path",
        Graph(nodes=(Node(slots=(("w", 0), ("v", 1))),), slots=(slot("w"), slot("w"))),
        ("slots 0 and 1 have the same path params/w",),
    ),
    (
        "slot-without-path",
        Graph(nodes=(Node(slots=(("w", 0),)),), slots=(replace(slot("w"), paths=()),)),
        ("slot 0 has no path",),
    ),
    (
        "negative-size",
        of_slot(slot("w", type=TensorType(shape=(2, -1), dtype="int8"))),
        ("slot params/w has a negative size: int8[2,-1]",),
    ),
    (
        "stacked-axis-out-of-range",
        of_slot(slot("w", stack=(StackAxis(axis=2, length=4),))),
        ("slot params/w float32[4,3] has no stacked axis axis:2=4",),
    ),
    (
        "stacked-axis-of-another-length",
        of_slot(slot("w", stack=(StackAxis(axis=0, length=5, name="layers"),))),
        ("slot params/w float32[4,3] has no stacked axis layers:0=5",),
    ),
    (
        "inner-stacked-axis",
        of_slot(slot("w", stack=(StackAxis(axis=0, length=4), StackAxis(axis=1, length=3)))),
        ("slot params/w float32[4,3] has no stacked axis axis:1=3",),
    ),
    (
        "counting-stream-without-slots",
        Graph(
            nodes=(Node(streams=(("dropout", 0),)),),
            streams=(Stream(name="dropout", derivation="count"),),
        ),
        ("stream 'dropout' counts, but has no slot for its key or its counter",),
    ),
]


def test_a_sound_graph_comes_back() -> None:
    assert problems(SOUND) == ()
    assert verify(SOUND) is SOUND


def test_a_value_that_is_a_tree_is_sound() -> None:
    tree = TreeType(structure=Template(structure=Hole(index=0)), leaves=(KIND,))
    assert problems(of_slot(slot("w", type=tree))) == ()


@pytest.mark.parametrize(
    ("graph", "expected"), [entry[1:] for entry in BROKEN], ids=[entry[0] for entry in BROKEN]
)
def test_each_rule(graph: Graph, expected: tuple[str, ...]) -> None:
    assert problems(graph) == expected
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert caught.value.problems == expected


def test_all_problems_are_collected() -> None:
    graph = Graph(
        nodes=(
            Node(children=(("a", 0), ("a", 0)), slots=(("w", 0), ("v", 1)), streams=(("s", 0),)),
            Node(),
        ),
        slots=(
            slot("w", type=TensorType(shape=(-1,), dtype="int8")),
            slot("w"),
            slot("x", stack=(StackAxis(axis=5, length=4),)),
        ),
        streams=(Stream(name="s", derivation="count"),),
    )
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert str(caught.value) == (
        "the graph is not valid, 7 problems:\n"
        "  node %0 has 2 children named 'a'\n"
        "  slots 0 and 1 have the same path params/w\n"
        "  node %1 cannot be reached from the root\n"
        "  slot params/x belongs to no node\n"
        "  slot params/w has a negative size: int8[-1]\n"
        "  slot params/x float32[4,3] has no stacked axis axis:5=4\n"
        "  stream 's' counts, but has no slot for its key or its counter\n"
        "Graphs are made by frontends and passes; report the one that made this graph."
    )


def test_one_problem_is_in_the_singular() -> None:
    with pytest.raises(VerifyError, match="the graph is not valid, 1 problem:\n  node %1 cannot"):
        verify(Graph(nodes=(Node(), Node())))
