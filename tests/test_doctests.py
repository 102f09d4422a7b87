"""The examples in the docstrings of the installed package, in README.md and in docs/ are true."""

import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_with_examples() -> list[str]:
    """The modules of the package whose text holds an example; found without importing one."""
    spec = importlib.util.find_spec("linsey")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    return sorted(
        ".".join(("linsey", *path.relative_to(package).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for path in package.rglob("*.py")
        if ">>> " in path.read_text(encoding="utf-8")
    )


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def check(test: doctest.DocTest) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    failed = runner.run(test, out=report.append).failed
    assert not failed, "".join(report)


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstrings(name):
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests, "the module holds an example that doctest does not find"
    for test in tests:
        check(test)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page):
    name = page.relative_to(ROOT).as_posix()
    # The fences go, so that none is taken for a line of output. The lines keep their numbers.
    text = re.sub(r"^ *```.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    check(doctest.DocTestParser().get_doctest(text, {}, name, name, 0))
