"""The tests run as they are meant to: on the installed package, with the devices they ask for."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_installed_package_is_under_test():
    import linsey

    assert not Path(linsey.__file__).is_relative_to(ROOT / "src")


@pytest.mark.parametrize("folder", ["backends", "frontends", "ir", "runtime"])
def test_a_source_folder_is_no_package_of_its_own(folder):
    assert importlib.util.find_spec(folder) is None, (
        f"`import {folder}` finds the source folder: call `pytest`, not `python -m pytest`"
    )


@pytest.mark.mesh
def test_the_mesh_run_has_eight_devices():
    import jax

    assert jax.device_count() == 8, (
        "run the mesh tests with XLA_FLAGS=--xla_force_host_platform_device_count=8"
    )
