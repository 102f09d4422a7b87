"""docs/layers.md is what the tables say, and no layer of flax is missing there."""

from pathlib import Path

from flax import nnx
from linen_cases import public_layers

from linsey._layers import linen as linen_table
from linsey._layers import nnx as nnx_table
from linsey._layers.page import MARK, page, write

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"


def test_the_page_is_what_the_tables_say(tmp_path: Path) -> None:
    """With each flax alike, and so it stays when it is written again."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(MARK)[2] == f"\n{page()}", "make layers, and read it"
    copy = tmp_path / "layers.md"
    copy.write_text(text, encoding="utf-8")
    write(str(copy))
    assert copy.read_text(encoding="utf-8") == text


def test_the_page_says_from_which_flax_on_there_is_a_layer() -> None:
    assert "`nnx.RoPE` (from flax 0.12.12 on)" in page()


def test_every_module_of_linen_is_in_the_table() -> None:
    known = {row.cls for row in linen_table.ROWS}
    missing = {cls.__name__ for cls in public_layers() - known} - linen_table.NO_LAYERS.keys()
    assert not missing


def test_every_module_of_nnx_is_in_the_table() -> None:
    exported = [getattr(nnx, name) for name in dir(nnx)]
    modules = {each for each in exported if isinstance(each, type) and issubclass(each, nnx.Module)}
    known = {row.cls for row in nnx_table.ROWS}
    missing = {cls.__name__ for cls in modules - known} - nnx_table.NO_LAYERS.keys()
    assert not missing


def test_a_row_of_a_class_that_flax_lacks_says_since_when_there_is_one() -> None:
    rows = (*linen_table.ROWS, *nnx_table.ROWS)
    assert all(row.since for row in rows if not row.cls.__module__.startswith("flax."))
