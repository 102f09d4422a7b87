"""What README.md and the pages under docs/ show is run as it stands there."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from linsey.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

MODELS = """
import flax.linen as nn


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))


def make_classifier():
    return Classifier()
"""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    """The part of README under a heading of the second level."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def pages_with_code() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        page.relative_to(ROOT).as_posix()
        for page in pages
        if blocks(page.read_text(encoding="utf-8"), "python")
    ]


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code as a file of its own in a fresh process, from an empty folder."""
    file = folder / "page.py"
    file.write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-W", "error", str(file)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


@pytest.mark.parametrize("name", pages_with_code())
def test_the_python_blocks_of_a_page_run_in_order(name, tmp_path, monkeypatch):
    """As a module of its own, from an empty folder; one that fakes devices in its own process."""
    code = "\n".join(blocks((ROOT / name).read_text(encoding="utf-8"), "python"))
    if "device_count" in code:
        done = run(code, tmp_path)
        assert done.returncode == 0, done.stderr
        return
    module = "page_" + re.sub(r"\W", "_", name)
    (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(module)


def test_the_first_block_runs_alone_and_needs_only_jax_flax_and_linsey(tmp_path):
    first = blocks(section("Use"), "python")[0]
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(first))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    assert imported == {"jax", "flax", "linsey"}
    done = run(first, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "head: %3 nnx.Head()" in done.stdout


def test_the_commands_run(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands = "".join(blocks(section("Command line"), "sh")).strip().splitlines()
    assert commands
    for command in commands:
        program, *args = shlex.split(command)
        assert program == "linsey"
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
        assert "Summary" in result.output


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
