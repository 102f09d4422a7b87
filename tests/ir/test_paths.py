"""Paths and their text: reversible for every legal name."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from linsey.ir import as_key, format_path, parse_path

NAMES = st.text() | st.text(alphabet="[]\\/-e0 1")
PATHS = st.lists(NAMES | st.integers(), max_size=5).map(tuple)


@given(PATHS)
@example(())
@example(("",))
@example(("", ""))
@example(("\\e", "e", "\\"))
@example(("[0]", 0, "0", "]", "["))
@example(("a/b", "a", "b", "/", "//"))
@example((-1, 10**30))
@example(("\\[0]", "\\/", "é", "\n", "\x00"))
def test_the_text_of_a_path_is_reversible(path: tuple[str | int, ...]) -> None:
    found = parse_path(format_path(path))
    assert found == path
    assert [type(key) for key in found] == [type(key) for key in path]


@given(PATHS, PATHS)
def test_different_paths_have_different_texts(
    first: tuple[str | int, ...], second: tuple[str | int, ...]
) -> None:
    assert (format_path(first) == format_path(second)) == (first == second)


@given(PATHS, NAMES)
def test_a_child_extends_the_text_of_its_parent(path: tuple[str | int, ...], name: str) -> None:
    if path:
        assert format_path((*path, name)) == f"{format_path(path)}/{format_path((name,))}"


def test_a_name_of_digits_is_no_index() -> None:
    assert format_path(("10",)) == "10"
    assert format_path((10,)) == "[10]"
    assert parse_path("a/10") == ("a", "10")
    assert parse_path("a/[10]") == ("a", 10)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("params", "Dense_0", "kernel"), "params/Dense_0/kernel"),
        (("layers", 0, "kernel"), "layers/[0]/kernel"),
        ((-3,), "[-3]"),
        (("a/b",), r"a\/b"),
        (("a\\b",), r"a\\b"),
        (("[0]",), r"\[0]"),
        (("a[0]",), "a[0]"),
        (("", "a", ""), r"\e/a/\e"),
        ((), ""),
    ],
)
def test_the_text_is_this(path: tuple[str | int, ...], text: str) -> None:
    assert format_path(path) == text
    assert parse_path(text) == path


@pytest.mark.parametrize("text", ["a//b", "/a", "a/", "/", "a/\\e/"])
def test_an_empty_component_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a path component: expected .* for an empty name"):
        parse_path(text)


@pytest.mark.parametrize(
    "text", ["[x]", "[1", "[]", "a/[1]b", "[ 1]", "[1.0]", "[-]", "[--1]", "[²]"]
)
def test_a_broken_index_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an index: expected \[n\]"):
        parse_path(text)


@pytest.mark.parametrize("text", ["a\\", "\\", "a/b\\"])
def test_an_unfinished_escape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a path component"):
        parse_path(text)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("a", "a"), (3, 3), (True, "True"), (None, "None"), (("a", 1), "('a', 1)"), (1.5, "1.5")],
)
def test_any_key_of_a_mapping_has_a_place_in_a_path(key: object, expected: str | int) -> None:
    assert as_key(key) == expected
    assert type(as_key(key)) is type(expected)
