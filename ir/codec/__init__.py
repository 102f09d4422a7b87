"""Graphs as bytes: versioned, bounded, the same on every machine; reading runs no code."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import replace

from linsey.ir.codec._columns import damaged, seal, unseal, unsupported
from linsey.ir.codec._left_out import left_out
from linsey.ir.codec._read import Reader
from linsey.ir.codec._schema import SCHEMA, VERSION
from linsey.ir.codec._write import FoundLiveError, Writer
from linsey.ir.collecting import paused
from linsey.ir.errors import FormatError, FormatWarning
from linsey.ir.graph import Graph, Unknown
from linsey.ir.verify import verify

__all__ = ["SCHEMA", "VERSION", "dumps", "left_out", "loads", "origin"]


@paused()
def dumps(graph: Graph, *, leave_out: bool = False) -> bytes:
    """A graph as bytes; docs/format.md says what is in them.

    Equal graphs give equal bytes, in every process and on every machine.

    Args:
        graph: the graph.
        leave_out: whether what cannot be data (a lambda, a local class) is written by its name
            alone: such a graph can be read and printed, and neither emitted nor run.

    Raises:
        FormatError: the graph holds something that cannot be data, with all of it by path; or a
            value is too large or too deep.
        VerifyError: an index points to nothing.

    Example:
        >>> from linsey.ir import Graph, Node, loads
        >>> graph = Graph(nodes=(Node(),))
        >>> loads(dumps(graph)) == graph
        True
    """
    if graph.unknown is not None:
        own = replace(graph, unknown=None)
        if replace(_read(graph.unknown.data), unknown=None) == own:
            return graph.unknown.data
        warnings.warn(
            f"the graph has changed since it was read: {', '.join(graph.unknown.fields)} of a newer"
            " version are left out",
            FormatWarning,
            stacklevel=3,
        )
        graph = own
    try:
        return seal(_writer(), Writer(leave_out=leave_out).tables(graph))
    except FoundLiveError:
        found = left_out(graph)
        raise FormatError(
            f"{len(found)} values cannot be data:\n  " + "\n  ".join(map(str, found)),
            fix="Change these as each line says; or save with an exported program, which stands in"
            " for them.",
        ) from None
    except IndexError:
        verify(graph)
        raise
    except RecursionError as error:
        raise FormatError(
            "a value is nested too deep", fix="Keep large data in arrays and variables."
        ) from error


@paused()
def loads(data: bytes, *, trusts: Callable[[str], bool] | None = None) -> Graph:
    """The graph that `dumps` wrote. Imports nothing and runs nothing that the bytes name.

    Args:
        data: the bytes.
        trusts: whether what a `Ref` names (``package.module:Name``) may ever be imported; decoding
            any other is an error, wherever it happens. None: all may be.

    Raises:
        FormatError: they are not a graph, are damaged, of a version that is not supported, or stand
            for values that are too large or too deep.

    Warns:
        FormatWarning: they are of a newer minor version and have fields that this one does not
            know. They are kept: `dumps` of the unchanged graph writes them again.

    Example:
        >>> loads(b"something else")
        Traceback (most recent call last):
        ...
        linsey.ir.errors.FormatError: found no graph of linsey: the first bytes are others
        Pass what linsey.ir.dumps gave, opened in binary mode.
    """
    data = bytes(data) if isinstance(data, bytearray | memoryview) else data
    graph = _read(data, trusts)
    if graph.unknown is not None:
        warnings.warn(
            f"the graph has fields of a newer version, kept and not used:"
            f" {', '.join(graph.unknown.fields)}",
            FormatWarning,
            stacklevel=3,
        )
    return graph


def origin(data: bytes) -> tuple[tuple[int, int], str]:
    """The version of the format of some bytes, and what wrote them.

    Raises:
        FormatError: they are not a graph, are damaged, or of a version that is not supported.

    Example:
        >>> from linsey.ir import Graph, Node
        >>> origin(dumps(Graph(nodes=(Node(),))))[0]
        (1, 0)
    """
    version, writer, _ = unseal(data)
    return version, writer


def _read(data: bytes, trusts: Callable[[str], bool] | None = None) -> Graph:
    version, writer, tables = unseal(data)
    try:
        reader = Reader(tables, trusts)
        graph, unknown = reader.graph(), tuple(reader.unknown())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if version > VERSION:
            raise unsupported(version, writer, str(error)) from error
        raise damaged(str(error)) from error
    return replace(graph, unknown=Unknown(fields=unknown, data=data)) if unknown else graph


@functools.lru_cache
def _writer() -> str:
    return f"linsey {importlib.metadata.version('linsey')}"
