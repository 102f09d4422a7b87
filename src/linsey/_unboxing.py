"""Linen's boxes without the constraint that they put on a value when they are unboxed.

Shared by frontends and the runtime. ``nn.Partitioned.unbox`` and ``nn.LogicallyPartitioned.unbox``
are public; inside the blocks of this file they are replaced, for the thread that is in the block.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import jax
from flax.core import meta
from flax.linen import spmd

When: TypeAlias = Literal["never", "where it fits"]


class _Active(threading.local):
    when: When | None = None


_active = _Active()
_lock = threading.Lock()
_uses = 0
_originals = {owner: owner.unbox for owner in (meta.Partitioned, spmd.LogicallyPartitioned)}


def _replacement(owner: Any) -> Any:
    def unbox(self: Any, apply_constraint: bool = True) -> Any:
        skips = _active.when == "never" or (_active.when is not None and not _fits(self))
        return _originals[owner](self, apply_constraint=apply_constraint and not skips)

    return unbox


def _fits(box: Any) -> bool:
    """Whether flax can put the constraint of a box on its value."""
    mesh = meta.get_global_mesh() if box.mesh is None else box.mesh
    if mesh is None:
        return True
    if any(axis == jax.sharding.AxisType.Explicit for axis in mesh.axis_types):
        return False  # there it asserts, and a value that was just made lies nowhere yet
    if jax.numpy.ndim(box.value) != len(box.names):
        return False  # nn.DenseGeneral unboxes its kernel while that is flat
    if isinstance(box, spmd.LogicallyPartitioned):
        return True
    names = [name for entry in box.names for name in (entry if type(entry) is tuple else (entry,))]
    return all(name in mesh.axis_names for name in names if isinstance(name, str))


@contextlib.contextmanager
def constraining(when: When) -> Iterator[None]:
    """Inside the block, unboxing constrains a value only at these times.

    Args:
        when: ``never``; or ``where it fits``: where flax would not raise. It does for a value of
            another rank than the annotation, for names of ``nn.Partitioned`` that are no axes of
            the mesh, and, for a value that was just made, on a mesh with Explicit axes.
    """
    global _uses
    with _lock:
        _uses += 1
        for owner in _originals:
            setattr(owner, "unbox", _replacement(owner))  # noqa: B010, mypy forbids the assignment
    previous, _active.when = _active.when, when
    try:
        yield
    finally:
        _active.when = previous
        with _lock:
            _uses -= 1
            if not _uses:
                for owner, original in _originals.items():
                    setattr(owner, "unbox", original)  # noqa: B010
