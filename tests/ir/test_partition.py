"""The rules from logical to mesh axes: those of flax.linen.logical_to_mesh_axes, bit for bit."""

from typing import Any

import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from linsey.ir import (
    UNCONSTRAINED,
    Const,
    Partition,
    PartitionError,
    Slot,
    TensorType,
    misfits,
    place,
    read_rules,
    shards,
)

NAMES = st.sampled_from(["batch", "embed", "mlp", "heads", "layers"])
MESH_NAMES = st.sampled_from(["data", "fsdp", "model"])
TARGETS = st.one_of(
    st.none(),
    MESH_NAMES,
    st.just(UNCONSTRAINED),
    st.lists(MESH_NAMES, min_size=1, max_size=3, unique=True).map(tuple),
)
AXES = st.one_of(st.none(), NAMES, st.just(UNCONSTRAINED), st.just(("data", "fsdp")))


def slot(*axes: Any, logical: bool = True, shape: tuple[int, ...] | None = None) -> Slot:
    partition = Partition(axes=axes, logical=logical, spec=Const(None))
    kind = TensorType(shape=(4,) * len(axes) if shape is None else shape, dtype="float32")
    return Slot(collection="params", paths=(("w",),), type=kind, partition=partition)


def to_jax(axis: Any) -> Any:
    return P.UNCONSTRAINED if axis is UNCONSTRAINED else axis


@given(st.lists(AXES, max_size=4), st.lists(st.tuples(NAMES, TARGETS), max_size=8))
def test_the_rules_are_those_of_linen(axes: list[Any], rules: list[tuple[str, Any]]) -> None:
    named = [axis for axis in axes if isinstance(axis, str)]
    if len(set(named)) < len(named):
        with pytest.raises(ValueError, match="more than once"):
            nn.logical_to_mesh_axes(tuple(map(to_jax, axes)), tuple(rules))
        with pytest.raises(PartitionError, match=r"at params/w: the name '\w+' stands at two axes"):
            place(slot(*axes), read_rules(rules))
        return
    expected = nn.logical_to_mesh_axes(
        tuple(map(to_jax, axes)), tuple((name, to_jax(target)) for name, target in rules)
    )
    found = place(slot(*axes), read_rules(rules))
    assert P(*map(to_jax, found.axes)) == expected
    assert found.unmapped == tuple(n for n in named if n not in dict(rules))


@pytest.mark.parametrize(
    ("axes", "rules", "expected"),
    [
        (("batch", "length", "heads"), [("batch", "x"), ("heads", "y")], ("x", None, "y")),
        (("batch", "heads"), [("batch", "x"), ("heads", "x"), ("heads", "y")], ("x", "y")),
        (("batch", "heads"), [("heads", "x"), ("batch", "x")], (None, "x")),
        (("batch",), [("batch", None), ("batch", "x")], (None,)),
        (("batch", "embed"), [("batch", ["x", "y"]), ("embed", "y")], (("x", "y"), None)),
        (("batch", "embed"), [("batch", UNCONSTRAINED)], (UNCONSTRAINED, None)),
    ],
    ids=["first match", "used once", "order of rules", "None is a match", "tuple", "free"],
)
def test_cases_by_hand(axes: Any, rules: Any, expected: Any) -> None:
    assert place(slot(*axes), read_rules(rules)).axes == expected


@pytest.mark.parametrize(
    ("rules", "mesh_axes", "expected"),
    [
        (None, None, ("model", "embed")),
        (None, ("model",), ("model", "embed")),
        ([("embed", "data")], ("data", "model"), ("model", "data")),
        ([("embed", "model")], ("data", "model"), (None, "model")),
        ([("model", None)], ("data", "model"), (None, None)),
        ([], ("data", "model"), ("model", None)),
        ([], None, ("model", "embed")),
    ],
    ids=["no rules", "unknown stays", "mesh axis stays", "used", "mapped", "dropped", "no mesh"],
)
def test_names_that_are_not_logical_may_be_axes_of_the_mesh(
    rules: Any, mesh_axes: Any, expected: Any
) -> None:
    read = None if rules is None else read_rules(rules)
    assert place(slot("model", "embed", logical=False), read, mesh_axes).axes == expected


def test_a_slot_without_annotation_is_replicated() -> None:
    assert place(slot(), read_rules([("a", "x")])).axes == ()
    bare = Slot(collection="params", paths=(("w",),), type=TensorType(shape=(2,), dtype="int32"))
    assert place(bare, None).axes == ()


@pytest.mark.parametrize("rules", ["embed", {"embed": "model"}, [("embed",)], [(1, "model")]])
def test_rules_that_are_no_pairs(rules: Any) -> None:
    with pytest.raises(PartitionError, match=r"at rules: found .*, expected pairs"):
        read_rules(rules)


def test_every_misfit_is_told() -> None:
    mesh = {"data": 4, "model": 2}
    uneven = slot("data", "model", logical=False, shape=(6, 3))
    told = [str(problem) for problem in misfits(uneven, place(uneven, None), mesh)]
    assert len(told) == 2
    assert "axis 0 of float32[6,3] has size 6, which the 4 parts of 'data' do not divide" in told[0]
    assert "axis 1 of float32[6,3] has size 3, which the 2 parts of 'model'" in told[1]
    assert not list(misfits(uneven, place(uneven, None), mesh, uneven=True))
    assert shards(("data", "model"), mesh) == 8
    assert shards(UNCONSTRAINED, mesh) == shards(None, mesh) == 1
