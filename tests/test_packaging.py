"""What is installed is what lies in the folders, whole and under the right names."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
PACKAGES: list[str] = SETUPTOOLS["packages"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]


def folder_of(package: str) -> Path:
    """The folder that setuptools takes a package from, by its nearest parent in package-dir."""
    parts = package.split(".")
    for end in range(len(parts), 0, -1):
        if folder := FOLDERS.get(".".join(parts[:end])):
            return ROOT.joinpath(folder, *parts[end:])
    raise KeyError(package)


def packages_in_folders() -> set[str]:
    """The name of every folder under package-dir that holds Python code."""
    return {
        ".".join([name, *source.parent.relative_to(ROOT / folder).parts])
        for name, folder in FOLDERS.items()
        for source in (ROOT / folder).rglob("*.py")
    }


def source_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def test_every_folder_with_code_is_listed():
    assert sorted(PACKAGES) == sorted(packages_in_folders())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_listed_package_has_a_folder_with_an_init(package):
    assert (folder_of(package) / "__init__.py").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_installed_files_are_the_source_files(package):
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed: install the project again"
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    assert source_files(installed) == source_files(folder_of(package)), (
        "remove build/ and install the project again"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_ships_its_types(package):
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").is_file()


def test_one_version():
    import linsey

    version = PROJECT["project"]["version"]
    assert importlib.metadata.version("linsey") == version
    assert linsey.__version__ == version


def declared_entry_points() -> list[tuple[str, str, str]]:
    groups = {
        "console_scripts": PROJECT["project"]["scripts"],
        **PROJECT["project"]["entry-points"],
    }
    return [
        (group, name, value) for group, entries in groups.items() for name, value in entries.items()
    ]


@pytest.mark.parametrize(("group", "name", "value"), declared_entry_points())
def test_an_entry_point_is_installed_and_resolves(group, name, value):
    (entry,) = (
        entry
        for entry in importlib.metadata.distribution("linsey").entry_points
        if (entry.group, entry.name) == (group, name)
    )
    assert entry.value == value
    module, attribute = value.split(":")
    assert entry.load() is getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("module", ["linsey", "linsey.ir"])
def test_the_import_loads_neither_jax_nor_flax(module):
    code = f"import sys, {module}; print(sorted({{'jax', 'jaxlib', 'flax'}} & set(sys.modules)))"
    # -I: without the current folder, from which `ir` could be imported by mistake.
    answer = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.stdout, answer.stderr) == ("[]\n", "")
