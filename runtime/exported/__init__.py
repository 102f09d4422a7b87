"""Methods as programs of ``jax.export``: they run where the model's source code is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from linsey.ir import EmitError, Graph, Values, encode
from linsey.runtime.executable import Executable
from linsey.runtime.exported._fields import Fields
from linsey.runtime.exported._jax import is_readable
from linsey.runtime.exported._make import interface_of, make
from linsey.runtime.exported._record import (
    Export,
    Interface,
    StoredProgram,
    dump_records,
    load_records,
)
from linsey.runtime.exported._run import StoredRunner

__all__ = [
    "Export",
    "Fields",
    "Interface",
    "StoredProgram",
    "StoredRunner",
    "dump_records",
    "export_all",
    "find",
    "is_readable",
    "load_records",
]


def export_all(
    wanted: Sequence[Export | StoredProgram],
    graph: Graph,
    values: Values | None,
    compiled: Callable[[Interface], Executable],
) -> tuple[StoredProgram, ...]:
    """Exports methods.

    Args:
        wanted: which; a `StoredProgram` is exported anew.
        graph: the graph.
        values: the values that are saved beside them, or None.
        compiled: gives the executable of the model's own code.

    Raises:
        EmitError: one cannot be exported, or two are called alike.
    """
    interfaces = [
        each if isinstance(each, Interface) else interface_of(each, graph) for each in wanted
    ]
    called = [(each.method, each.arguments, each.inputs, *_asked(each)) for each in interfaces]
    for number, call in enumerate(called):
        if call in called[:number]:
            raise EmitError(
                "it is asked for twice",
                path=str(interfaces[number]),
                fix="Leave one of them out of export=.",
            )
    return tuple(make(each, graph, values, compiled) for each in interfaces)


def _asked(program: Interface) -> tuple[Any, ...]:
    return program.mutable, program.capture


def find(
    programs: Sequence[StoredProgram],
    method: Any,
    *,
    mutable: Any,
    capture: tuple[str, ...],
    exported: bool | None,
) -> tuple[StoredProgram, ...]:
    """The stored programs of a method, which differ in their arguments only.

    Args:
        programs: those that there are.
        method: as for `linsey.Program.compile`.
        mutable: as there.
        capture: as there.
        exported: as there.

    Returns:
        None of them where the model's own code is to run.

    Raises:
        EmitError: there are none, or none for these collections.
    """
    name = "__call__" if method is None else method
    named = [each for each in programs if isinstance(name, str) and each.method == name]
    if exported is False or (exported is None and not named):
        return ()
    wanted = (encode(mutable), capture)
    found = tuple(each for each in named if _asked(each) == wanted)
    if not found:
        there = "\n  ".join(map(str, programs)) or "none"
        raise EmitError(
            f"no program of this method, for mutable={mutable!r} and capture={capture!r}, is"
            f" stored; there are:\n  {there}",
            path=name if isinstance(name, str) else getattr(name, "__name__", "method"),
            fix="Export it: program.save(path, export=[linsey.Export(...)]); or, with the source at"
            " hand, compile(exported=False).",
        )
    return found
