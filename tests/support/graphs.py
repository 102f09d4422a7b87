"""Graphs that Hypothesis builds: sound ones, of every kind of node, slot, stream and value."""

import math
from typing import Any

from hypothesis import strategies as st

from linsey.ir import (
    UNCONSTRAINED,
    Array,
    Call,
    Const,
    DType,
    EnumValue,
    Graph,
    Hole,
    Instance,
    Map,
    Node,
    NodeRef,
    Partition,
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
    Wrapper,
)

TEXTS = st.sampled_from(
    ["", "w", "kernel", "a/b", "[0]", "\\e", "ü", "\ud800", "layers_0"]
) | st.text(max_size=6)
KEYS = TEXTS | st.integers(-(2**40), 2**40)
PATHS = st.lists(KEYS, max_size=4).map(tuple)
NAMES = st.sampled_from(["flax.linen:Dense", "my_models.parts:Block.Inner", "builtins:dict"])
CONSTANTS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.complex_numbers(),
    TEXTS,
    st.binary(max_size=8),
    st.just(...),
)
SIZES = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
DTYPES = st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "int4", "key<fry>", "int"])
TENSORS = st.builds(TensorType, shape=SIZES, dtype=DTYPES)


def many(values: Any, size: int = 3) -> Any:
    return st.lists(values, max_size=size).map(tuple)


def _array(shape: tuple[int, ...], make: str, fill: int) -> Array:
    return Array(dtype="uint8", shape=shape, data=bytes([fill]) * math.prod(shape), make=make)


SMALL = st.lists(st.integers(0, 3), max_size=2).map(tuple)
ARRAYS = st.builds(_array, SMALL, st.sampled_from(["jax", "numpy", "uint8"]), st.integers(0, 255))
LEAVES = st.one_of(
    CONSTANTS.map(Const),
    st.builds(DType, name=DTYPES),
    st.builds(Ref, name=NAMES),
    ARRAYS,
    st.builds(Hole, index=st.integers(0, 5)),
    st.just(NodeRef(node=0)),
)


def _larger(values: Any) -> Any:
    named = many(st.tuples(TEXTS, values))
    return st.one_of(
        st.builds(Sequence, kind=st.sampled_from(["tuple", "list", "set"]), items=many(values)),
        st.builds(Map, cls=values, items=many(st.tuples(values, values))),
        st.builds(EnumValue, cls=values, name=TEXTS),
        st.builds(Instance, cls=values, fields=named, share=st.none() | st.integers(0, 9)),
        st.builds(Call, function=values, args=many(values), kwargs=named),
        st.builds(Template, structure=values),
    )


VALUES = st.recursive(LEAVES, _larger, max_leaves=8)
ATTRS = many(st.tuples(KEYS, VALUES))
TEMPLATES = st.builds(Template, structure=VALUES)
TYPES = TENSORS | st.builds(TreeType, structure=TEMPLATES, leaves=many(TENSORS))
AXES = st.one_of(st.none(), TEXTS, many(TEXTS), st.just(UNCONSTRAINED))
PARTITIONS = st.builds(
    Partition,
    axes=many(AXES),
    logical=st.booleans(),
    spec=VALUES,
    rules=VALUES,
    mesh=VALUES,
)
SIGNATURES = st.builds(
    Signature,
    method=TEXTS,
    inputs=many(st.tuples(TEXTS, TYPES | VALUES), 2),
    output=st.none() | TYPES,
)
SOURCES = st.builds(Source, dialect=st.sampled_from(["linen", "nnx", "haiku"]), cls=VALUES)


@st.composite
def graphs(draw: Any) -> Graph:
    """A sound graph of a few nodes and slots."""
    node_count = draw(st.integers(1, 4))
    slot_count = draw(st.integers(0, 4))
    stream_count = draw(st.integers(0, 2))
    slot_numbers = st.none() | st.integers(0, slot_count - 1) if slot_count else st.none()
    slots = []
    for number in range(slot_count):
        kind = draw(TYPES)
        stack = ()
        if isinstance(kind, TensorType) and kind.shape and draw(st.booleans()):
            stack = (
                StackAxis(
                    axis=0, length=kind.shape[0], name=draw(st.none() | TEXTS), owner=draw(PATHS)
                ),
            )
        slots.append(
            Slot(
                collection=draw(st.sampled_from(["params", "cache"])),
                paths=tuple((number, *draw(PATHS)) for _ in range(draw(st.integers(1, 2)))),
                kind=draw(st.none() | VALUES),
                type=kind,
                partition=draw(st.none() | PARTITIONS),
                stack=stack,
                lifetime=draw(st.sampled_from(["persistent", "ephemeral"])),
                raw=draw(st.booleans()),
                mirrors=draw(slot_numbers),
                metadata=draw(ATTRS),
                box=draw(st.none() | TEMPLATES),
            )
        )
    streams = []
    for _ in range(stream_count):
        counts = slot_count > 0 and draw(st.booleans())
        streams.append(
            Stream(
                name=draw(TEXTS),
                derivation="count" if counts else "path",
                use=draw(st.sampled_from(["init", "call"])),
                key=draw(st.integers(0, slot_count - 1)) if counts else None,
                count=draw(st.integers(0, slot_count - 1)) if counts else None,
            )
        )
    owners = [draw(st.integers(0, node_count - 1)) for _ in slots]
    parents = [None, *(draw(st.integers(0, number)) for number in range(node_count - 1))]
    nodes = []
    for number in range(node_count):
        own = tuple((f"v{slot}", slot) for slot, owner in enumerate(owners) if owner == number)
        children = tuple(
            (draw(KEYS) if place == 0 else f"c{child}", child)
            for place, child in enumerate(n for n, above in enumerate(parents) if above == number)
        )
        held = draw(st.booleans())
        wrapper = Wrapper(
            cls=draw(VALUES), attrs=draw(ATTRS), children=((0, 0),), slots=own if held else ()
        )
        nodes.append(
            Node(
                op=draw(st.sampled_from(["module", "container", "scope"])),
                source=draw(st.none() | SOURCES),
                attrs=draw(ATTRS),
                children=children,
                slots=() if held else own,
                streams=many_streams(draw, stream_count),
                signatures=draw(many(SIGNATURES, 2)),
                wrapper=wrapper if held else None,
            )
        )
    return Graph(
        nodes=tuple(nodes),
        slots=tuple(slots),
        streams=tuple(streams),
        empty=draw(many(PATHS, 2)),
    )


def many_streams(draw: Any, count: int) -> tuple[tuple[str, int], ...]:
    if not count:
        return ()
    return tuple(
        (draw(TEXTS), draw(st.integers(0, count - 1))) for _ in range(draw(st.integers(0, 2)))
    )
