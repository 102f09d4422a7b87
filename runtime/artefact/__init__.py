"""One file with a graph, its values and exported programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from linsey.ir import (
    FormatError,
    Graph,
    Values,
    ValuesError,
    dumps,
    loads,
    origin,
    slot_index,
    verify,
)
from linsey.ir.collecting import paused
from linsey.runtime.artefact._container import Container, write
from linsey.runtime.artefact._values import SLOTS, MappedValues, bytes_array, stored

__all__ = ["Artefact", "MappedValues", "load", "save"]

PathLike: TypeAlias = str | os.PathLike[str]
GRAPH = "[graph]"
"""The array that holds the graph, as `linsey.ir.dumps` writes it."""
PROGRAMS = "[programs]"
"""The array that says which programs there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Exported programs, as bytes."""

    records: bytes
    """What is known of them, as `linsey.runtime.exported.dump_records` writes it."""
    data: Sequence[Callable[[], bytes]]
    """Gives each of them."""


@paused()
def save(
    path: PathLike,
    graph: Graph,
    values: Values | None,
    programs: Programs | None = None,
    *,
    leave_out: bool = False,
) -> None:
    """Writes a graph, its values and programs as one file; see `linsey.Program.save`."""
    arrays = [bytes_array(GRAPH, dumps(graph, leave_out=leave_out))]
    if programs is not None:
        arrays.append(bytes_array(PROGRAMS, programs.records))
        arrays += [bytes_array(_program(at), data()) for at, data in enumerate(programs.data)]
    if values is not None:
        if values.index != slot_index(graph):
            raise ValuesError(
                "the values are not those of the graph",
                path="values",
                fix="Save what linsey.lower, program.init or a call gave.",
            )
        arrays += stored(values)
    try:
        write(Path(path).expanduser(), arrays)
    except OSError as error:
        raise FormatError(
            f"the artefact could not be written: {error}",
            path=os.fspath(path),
            fix="The file that was there, if any, is as it was.",
        ) from error


def _program(number: int) -> str:
    """The array that holds a program, as ``jax.export`` serialises it."""
    return f"[program {number}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """A file that was opened."""

    graph: Graph
    """The graph."""
    values: MappedValues | None
    """The values, none of which was read yet; None where there are none."""
    programs: Programs | None
    """The exported programs, none of which was read yet; None where there are none."""
    version: tuple[int, int]
    """Version of the format of the graph."""
    writer: str
    """What wrote it, such as ``linsey 0.1.0``."""
    nbytes: int
    """Bytes of the whole file."""


@paused()
def load(path: PathLike, *, trusts: Callable[[str], bool], check: bool = True) -> Artefact:
    """Opens a file; see `linsey.load`, and `linsey.ir.loads` for `trusts`."""
    try:
        container = Container(Path(path).expanduser())
    except OSError as error:
        raise FormatError(
            f"the artefact could not be read: {error}",
            path=os.fspath(path),
            fix="Give the path of one that program.save wrote.",
        ) from error
    data = container.array(GRAPH).tobytes()
    graph = verify(loads(data, trusts=trusts))
    version, writer = origin(data)
    has_values = SLOTS in container.names()
    return Artefact(
        graph=graph,
        values=MappedValues(graph, container, check=check) if has_values else None,
        programs=_programs(container),
        version=version,
        writer=writer,
        nbytes=container.nbytes,
    )


def _programs(container: Container) -> Programs | None:
    if PROGRAMS not in container.names():
        return None

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: container.array(name).tobytes()

    count = sum(name.startswith("[program ") for name in container.names())
    return Programs(
        records=container.array(PROGRAMS).tobytes(),
        data=[reader(_program(number)) for number in range(count)],
    )
