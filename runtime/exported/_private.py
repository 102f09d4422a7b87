"""Private names of jax that exporting needs, each with its reason; checked with jax 0.10 and 0.12.

An exported program runs on any mesh only where no constraint is inside: one that jax lowered for a
mesh of one device says "replicated" on every other. No public switch leaves constraints out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.interpreters.mlir import _lowerings  # the rules by primitive: one is put back
from jax._src.pjit import sharding_constraint_p  # with_sharding_constraint, as traced

from linsey.runtime import _flax


class _Active(threading.local):
    is_on = False


_active = _Active()
_lock = threading.Lock()


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Inside the block jax writes no names of files: they would say who exported, and where."""
    config: Any = jax.config  # its members are not annotated
    wanted = {
        "jax_hlo_source_file_canonicalization_regex": ".*",
        "jax_include_full_tracebacks_in_locations": False,
    }
    before = {name: getattr(config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            config.update(name, value)


@contextlib.contextmanager
def on_any_mesh() -> Iterator[None]:
    """Inside the block this thread traces and lowers without constraints and without a mesh.

    Code that needs a mesh to resolve the axes that it names finds the axes of the mesh in force,
    each of size 1.
    """
    names = jax.sharding.get_abstract_mesh().axis_names
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    mesh = jax.sharding.AbstractMesh((1,) * len(names), names, axis_types=auto)
    no_mesh: Any = None  # which its annotation forbids
    with (
        _lock,
        jax.set_mesh(no_mesh),
        jax.sharding.use_abstract_mesh(mesh),
        _flax.tracing(None),
        _without_paths(),
    ):
        entry: Any = _lowerings[sharding_constraint_p]

        def lowered(ctx: Any, value: Any, **params: Any) -> Any:
            return [value] if _active.is_on else entry.rule(ctx, value, **params)

        _lowerings[sharding_constraint_p] = dataclasses.replace(entry, rule=lowered)
        _active.is_on = True
        try:
            yield
        finally:
            _lowerings[sharding_constraint_p] = entry
            _active.is_on = False
