"""Graphs as bytes: equal graphs, equal bytes; anything else is a typed error, at once."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzzing
import graphs
import msgpack
import pytest
from fuzzing import small
from hypothesis import given, settings

from linsey.ir import (
    Const,
    FormatError,
    FormatWarning,
    Graph,
    Instance,
    Live,
    Node,
    Ref,
    Sequence,
    Source,
    VerifyError,
    dumps,
    encode,
    left_out,
    loads,
    problems,
)
from linsey.ir.codec import SCHEMA, VERSION, _columns
from linsey.ir.codec._limits import MAX_DEPTH, MAX_PATH

GOLDEN = Path(__file__).parent.parent / "golden"


@settings(max_examples=150, deadline=None)
@given(graphs.graphs())
def test_any_graph_comes_back_and_gives_equal_bytes(graph: Graph) -> None:
    assert not problems(graph)
    data = dumps(graph)
    back = loads(data)
    assert back == graph
    assert hash(back) == hash(graph)
    assert dumps(back) == data
    assert str(back) == str(graph)
    assert type(back.nodes[0].attrs) is tuple


def test_equal_graphs_give_equal_bytes_however_they_were_made() -> None:
    first, second = small(), pickle.loads(pickle.dumps(small()))
    assert dumps(first) == dumps(second)
    shared = Const("shared")
    one = Graph(nodes=(Node(attrs=(("a", shared), ("b", shared))),))
    two = Graph(nodes=(Node(attrs=(("a", Const("shared")), ("b", Const("sha" + "red")))),))
    assert dumps(one) == dumps(two)
    nan = Graph(nodes=(Node(attrs=(("a", Const(float("nan"))),)),))
    other = Graph(nodes=(Node(attrs=(("a", Const(-float("nan"))),)),))
    assert nan == other
    assert dumps(nan) == dumps(other)


@pytest.mark.parametrize("first", [1, True, 1.0, 1 + 0j, "1", b"1", 0.0, -0.0, 0, False, None, ""])
def test_constants_keep_their_type_and_sign(first: Any) -> None:
    graph = loads(dumps(Graph(nodes=(Node(attrs=(("a", Const(first)),)),))))
    value = graph.nodes[0].attrs[0][1]
    assert isinstance(value, Const)
    assert type(value.value) is type(first)
    assert repr(value.value) == repr(first)


def test_bytes_are_the_same_in_another_process() -> None:
    code = (
        "import sys, fuzzing; from linsey.ir import dumps;"
        " sys.stdout.buffer.write(dumps(fuzzing.small()))"
    )
    places = [os.fspath(Path(fuzzing.__file__).parent)]
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    env["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [env.get("PYTHONPATH")])])
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert out.stdout == dumps(small())


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("graph-*.bin")), ids=lambda path: path.stem)
def test_golden_files_load_for_ever(path: Path) -> None:
    assert loads(path.read_bytes()) == small()


def test_there_is_a_golden_file_of_this_version(request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"graph-{VERSION[0]}.{VERSION[1]}.bin"
    if request.config.getoption("--update-golden") and not path.exists():
        path.write_bytes(dumps(small()))
    _, _, tables = _columns.unseal(path.read_bytes())
    assert tables == _columns.unseal(dumps(small()))[2], "the bytes of a version never change"


def owed(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> str:
    """The version bump that a change of the schema owes."""
    for table, fields in old.items():
        for name, kind in fields.items():
            if new.get(table, {}).get(name) != kind:
                return "major"
    return "none" if old == new else "minor"


def test_a_change_of_the_schema_owes_a_version(request: pytest.FixtureRequest) -> None:
    path = GOLDEN / "schema.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps({"version": VERSION, "schema": SCHEMA}, indent=1) + "\n")
    snapshot = json.loads(path.read_text())
    bump = owed(snapshot["schema"], SCHEMA)
    major, minor = snapshot["version"]
    expected = {"none": (major, minor), "minor": (major, minor + 1), "major": (major + 1, 0)}[bump]
    assert expected == VERSION, f"the schema has changed: set VERSION to {expected}"
    assert bump == "none", "the version is right; now pytest --update-golden"


def test_what_a_change_owes() -> None:
    old = {"Slot": {"name": "text"}}
    assert owed(old, {"Slot": {"name": "text"}}) == "none"
    assert owed(old, {"Slot": {"name": "text", "more": "int"}}) == "minor"
    assert owed(old, {"Slot": {"name": "text"}, "More": {}}) == "minor"
    assert owed(old, {"Slot": {"name": "int"}}) == "major"
    assert owed(old, {"Slot": {}}) == "major"


def test_the_page_names_every_table_and_field() -> None:
    page = (GOLDEN.parent.parent / "docs" / "format.md").read_text()
    for table, fields in SCHEMA.items():
        assert f"`{table}`" in page, table
        for name, kind in fields.items():
            assert f"`{name}`" in page, f"{table}.{name}"
            assert kind.startswith(("[", "Const")) or f"`{kind.rstrip('?')}`" in page, kind


def changed(change: Callable[[list[Any]], None], graph: Graph | None = None) -> bytes:
    """A file with something else in it, and the right checksum."""
    _, writer, tables = _columns.unseal(dumps(graph or small()))
    parts: list[Any] = [list(VERSION), writer, tables]
    change(parts)
    body = msgpack.packb(parts)
    return _columns.MAGIC + hashlib.sha256(body).digest() + body


def test_a_newer_minor_version_is_read_and_kept() -> None:
    def newer(parts: list[Any]) -> None:
        parts[0] = [VERSION[0], VERSION[1] + 1]
        parts[2]["Slot"]["columns"]["color"] = _columns.pack_ints([7])
        parts[2]["Passes"] = {"rows": 1, "columns": {}}

    data = changed(newer)
    with pytest.warns(
        FormatWarning, match=r"newer version, kept and not used: (Slot\.color|Passes)"
    ):
        graph = loads(data)
    assert graph.unknown is not None
    assert sorted(graph.unknown.fields) == ["Passes", "Slot.color"]
    assert replace(graph, unknown=None) == small()
    assert dumps(graph) == data
    assert pickle.loads(pickle.dumps(graph)) == graph
    with pytest.warns(FormatWarning, match=r"has changed since it was read: .* are left out"):
        assert dumps(replace(graph, empty=())) == dumps(replace(small(), empty=()))


def test_a_newer_minor_version_that_needs_what_is_not_known() -> None:
    def newer(parts: list[Any]) -> None:
        parts[0] = [VERSION[0], VERSION[1] + 1]
        parts[1] = "linsey 9.8"
        parts[2]["objects"][0][1] = "Novelty"

    with pytest.raises(FormatError, match=r"written by linsey 9\.8; this linsey reads") as error:
        loads(changed(newer))
    assert error.value.version == (VERSION[0], VERSION[1] + 1)
    assert error.value.writer == "linsey 9.8"
    assert "Install the linsey that wrote it" in str(error.value)


@pytest.mark.parametrize(
    ("version", "fix"), [([2, 0], "Install the linsey"), ([0, 3], "lower the model again")]
)
def test_other_major_versions_are_refused(version: list[int], fix: str) -> None:
    with pytest.raises(FormatError, match=f"found version {version[0]}.{version[1]}") as error:
        loads(changed(lambda parts: parts.__setitem__(0, version)))
    assert fix in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no graph of linsey"),
        (b"PK\x03\x04 something else", "no graph of linsey"),
        (_columns.MAGIC, "damaged: its checksum"),
        ("text", "found str, expected bytes"),
    ],
)
def test_what_is_no_graph(data: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        loads(data)


def test_every_truncation_and_every_changed_byte_is_an_error() -> None:
    assert fuzzing.truncations() == len(dumps(small()))
    data = dumps(small())
    for place in range(len(data)):
        with pytest.raises(FormatError):
            loads(data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :])


def test_mutated_files_give_a_typed_error_or_a_graph() -> None:
    found = fuzzing.mutations(1500, seed=0)
    assert found.files == 1500
    assert 0 < found.graphs < 1500
    assert found.slowest < 1.0


def test_a_file_cannot_stand_for_more_than_it_may() -> None:
    def bomb(depth: int) -> Sequence:
        value: Any = Const(0)
        for _ in range(depth):
            value = Sequence(kind="tuple", items=(value,) * 4)
        return value

    with pytest.raises(FormatError, match="expected at most 1,000,000 parts"):
        dumps(Graph(nodes=(Node(attrs=(("a", bomb(20)),)),)))
    deep: Any = Const(0)
    for _ in range(MAX_DEPTH):
        deep = Sequence(kind="tuple", items=(deep,))
    with pytest.raises(FormatError, match="128 levels"):
        dumps(Graph(nodes=(Node(attrs=(("a", deep),)),)))
    for _ in range(10_000):
        deep = Sequence(kind="tuple", items=(deep,))
    with pytest.raises(FormatError, match="nested too deep"):
        dumps(Graph(nodes=(Node(attrs=(("a", deep),)),)))
    with pytest.raises(FormatError, match="components of a path"):
        dumps(Graph(nodes=(Node(),), empty=(("a",) * (MAX_PATH + 1),)))


def test_a_crafted_file_is_refused() -> None:
    def doubling(parts: list[Any]) -> None:
        # 40 rows, each twice the one before: a value of 2**40 parts.
        tables = parts[2]
        names = tables["objects"][0]
        kinds = ["Const", *["Sequence"] * 40, "Attrs"]
        tables["objects"][1] = _columns.pack_ints([names.index(kind) for kind in kinds])
        one = int(_columns.unpack_ints(tables["Sequence"]["columns"]["kind"])[0])
        tables["Sequence"] = {
            "rows": 40,
            "columns": {
                "kind": _columns.pack_ints([one] * 40),
                "items#": _columns.pack_ints([2] * 40),
                "items": _columns.pack_ints([n for n in range(40) for _ in range(2)]),
            },
        }
        tables["Attrs"]["columns"]["items.1"] = _columns.pack_ints([40])
        tables["Node"]["columns"]["attrs"] = _columns.pack_ints([42])

    with pytest.raises(FormatError, match="expected at most"):
        loads(changed(doubling, Graph(nodes=(Node(attrs=(("a", encode((1,))),)),))))

    def forward(parts: list[Any]) -> None:
        parts[2]["Sequence"]["columns"]["items"] = _columns.pack_ints([1])

    with pytest.raises(FormatError, match="does not come before it"):
        loads(changed(forward, Graph(nodes=(Node(attrs=(("a", encode((1,))),)),))))

    def huge(parts: list[Any]) -> None:
        parts[2]["Node"]["rows"] = 2**60

    with pytest.raises(FormatError, match="damaged"):
        loads(changed(huge))


def test_a_graph_that_is_not_sound_is_not_written() -> None:
    with pytest.raises(VerifyError, match="%5 is not one of 1 nodes"):
        dumps(Graph(nodes=(Node(children=(("a", 5),)),)))


def test_what_cannot_be_data_is_listed_with_its_place_and_the_remedy() -> None:
    class Local:
        pass

    graph = Graph(
        nodes=(
            Node(attrs=(("act", encode(lambda x: x)), ("n", encode(3))), children=(("a", 1),)),
            Node(source=Source(dialect="nnx", cls=encode(Local))),
        )
    )
    with pytest.raises(FormatError, match="2 values cannot be data") as error:
        dumps(graph)
    assert "  act: the lambda " in str(error.value)
    assert "  a/class: the class " in str(error.value)
    assert "Move it to the top of a module." in str(error.value)
    assert [each.path for each in left_out(graph)] == ["act", "a/class"]
    read = loads(dumps(graph, leave_out=True))
    value = read.nodes[0].attrs[0][1]
    assert isinstance(value, Live)
    assert "<lambda>" in value.text
    assert dumps(read, leave_out=True) == dumps(graph, leave_out=True)


def test_what_is_no_attribute_value_is_refused() -> None:
    with pytest.raises(FormatError, match="found object, expected an attribute value"):
        dumps(Graph(nodes=(Node(attrs=(("a", object()),)),)))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="a constant of type list"):
        dumps(Graph(nodes=(Node(attrs=(("a", Const([])),)),)))


def test_reading_imports_nothing() -> None:
    value = Instance(cls=Ref(name="antigravity:fly"), fields=())
    data = dumps(Graph(nodes=(Node(attrs=(("a", value),)),)))
    before = set(sys.modules)
    loads(data)
    assert "antigravity" not in sys.modules
    assert set(sys.modules) == before
