"""The command line: ``linsey lower pkg.module:factory --input 'f32[8,28,28,1]'``."""

from __future__ import annotations

import ast
import difflib
import importlib
import json
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import click

import linsey
from linsey.ir import LinseyError, TensorType, format_path
from linsey.ir import summary as _summary

JSON_VERSION = 1
"""Version of what ``--json`` prints. Entries may be added within a version; one that goes, or that
changes its meaning, makes a new version."""

_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_NAMED = re.compile(r"(?:([^\W\d]\w*)=)?(.*)", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None, "null": None}

_JSON_HELP = """\b
--json prints one object:
  version     1; entries may be added, none goes or changes its meaning
  target      TARGET
  root        id of the root node
  nodes       id, op, source (dialect, class), attrs (as text), children,
              slots and streams (by name and id), signatures, wrapper
  slots       id, key, collection, paths, kind, type (dtype and shape, or
              tree and leaves), bytes, partition, stack (axis, length,
              name, owner), lifetime, raw, mirrors, metadata, box
  streams     id, name, derivation, use, key and count (ids of slots)
  signatures  the calls of the root: method, inputs, output
  empty       paths of collections and subtrees that hold nothing
  summary     nodes, slots, bytes, layers (number by class), collections
              (slots and bytes by name), streams, shared, tied, stacked
"""


def _target(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Checks ``package.module:name``."""
    if not _TARGET.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not of the form package.module:name")
    return value


def _inputs(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str | None, TensorType]]:
    """Reads each ``[name=]dtype[shape]``."""
    read = []
    for value in values:
        match = _NAMED.fullmatch(value)
        assert match is not None
        try:
            read.append((match[1], _summary.parse_type(match[2])))
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    return read


def _settings(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, Any]]:
    """Reads each ``name=value``; the value is a Python literal, or else a string."""
    read: list[tuple[str, Any]] = []
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{value!r} is not of the form name=value")
        if text.lower() in _WORDS:
            read.append((name, _WORDS[text.lower()]))
            continue
        try:
            read.append((name, ast.literal_eval(text)))
        except (SyntaxError, ValueError):
            read.append((name, text))
    return read


@click.group()
@click.version_option(linsey.__version__, prog_name="linsey")
def main() -> None:
    """A graph-IR interop compiler for Flax: Linen modules, NNX modules and any mix of the two."""


@main.command(epilog=_JSON_HELP)
@click.argument("target", callback=_target)
@click.option(
    "inputs",
    "--input",
    callback=_inputs,
    multiple=True,
    metavar="[NAME=]DTYPE[SHAPE]",
    help="A sample input, such as 'f32[8,28,28,1]', or 'mask=bool[8,28]' for a keyword one."
    " Dtypes as jax prints them (f32, bf16, i32, u8, bool, c64 ...) or by full name."
    " Repeat it for more.",
)
@click.option(
    "settings",
    "--set",
    callback=_settings,
    multiple=True,
    metavar="NAME=VALUE",
    help="A keyword argument of the call that is no array, such as train=true. Repeat it for more.",
)
@click.option("--method", help="The method to lower by, where it is not the call.")
@click.option("as_json", "--json", is_flag=True, help="Print JSON, for programs.")
def lower(
    target: str,
    inputs: list[tuple[str | None, TensorType]],
    settings: list[tuple[str, Any]],
    method: str | None,
    as_json: bool,
) -> None:
    """Lowers a module to a graph, and prints the graph and a summary.

    TARGET is a Linen or NNX module, a function that makes one (it takes nothing, or rngs), or a
    class that needs nothing. The current directory can be imported from. Nothing is allocated: a
    model of any size can be lowered.
    """
    args = [kind for name, kind in inputs if name is None]
    named = [(name, kind) for name, kind in inputs if name is not None]
    keywords: dict[str, Any] = {}
    for name, value in (*named, *settings):
        if name in keywords:
            raise click.UsageError(f"{name!r} is given twice")
        keywords[name] = value
    source = _load(target)
    graph = _guarded(lambda: _lowered(source, args, keywords, method), f"lowering {target}")
    if as_json:
        data = {"version": JSON_VERSION, "target": target, **_summary.to_json(graph)}
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(str(graph))
    click.echo()
    _print_summary(_summary.summarize(graph), graph)


def _load(target: str) -> Any:
    """What a target names; the current directory is importable, as with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, name = target.partition(":")
    module = _guarded(lambda: _imported(module_name), f"importing {module_name}")
    try:
        return operator.attrgetter(name)(module)
    except AttributeError as error:
        near = difflib.get_close_matches(name, dir(module), n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise click.ClickException(f"module {module_name} has no {name!r}{hint}") from error


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise click.ClickException(
            f"there is no module {error.name!r} in {os.getcwd()} or among the installed ones"
        ) from error


def _guarded(run: Callable[[], Any], doing: str) -> Any:
    """Runs code of the user; what it raises becomes a message."""
    try:
        return run()
    except click.ClickException:
        raise
    except LinseyError as error:
        notes = getattr(error, "__notes__", [])
        where = "" if error.__cause__ is None else _where(error.__cause__)
        raise click.ClickException("\n".join([str(error) + where, *notes])) from error
    except Exception as error:
        message = f"{doing} raised {type(error).__name__}: {error}"
        raise click.ClickException(message + _where(error)) from error


def _where(error: BaseException) -> str:
    """The last line of the user's own code that an error passed through."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(os.getcwd()) and "site-packages" not in frame.filename
    ]
    return f"\n({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _lowered(
    source: Any, args: list[TensorType], keywords: dict[str, Any], method: str | None
) -> Any:
    import jax
    from flax import linen

    def abstract(kind: TensorType) -> Any:
        dtype = jax.numpy.dtype(kind.dtype)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise click.ClickException(
                f"{kind} needs jax in its 64-bit mode\nSet JAX_ENABLE_X64=1 in the environment."
            )
        return jax.ShapeDtypeStruct(kind.shape, dtype)  # type: ignore[no-untyped-call]

    if isinstance(source, type) and issubclass(source, linen.Module):
        source = source()
    kwargs = {
        name: abstract(value) if isinstance(value, TensorType) else value
        for name, value in keywords.items()
    }
    return linsey.lower(source, *map(abstract, args), method=method, **kwargs).graph


def _print_summary(summary: _summary.Summary, graph: linsey.Graph) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Summary", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("what", overflow="fold")
    table.add_column("number", justify="right")
    table.add_column("bytes", justify="right")

    def section(part: str, rows: Sequence[tuple[str, int | None, int | None]]) -> None:
        for what, number, size in rows or [("none", None, None)]:
            cells = ["" if cell is None else f"{cell:,}" for cell in (number, size)]
            table.add_row(Text(part), Text(what), *cells)
            part = ""
        table.add_section()

    section("layers", [(name, count, None) for name, count in summary.layers])
    total = [size for _, _, size in summary.collections if size is not None]
    whole: list[tuple[str, int | None, int | None]] = []
    if len(total) == len(summary.collections) > 1:
        whole.append(("all", len(graph.slots), sum(total)))
    section("slots", [*summary.collections, *whole])
    section("streams", [(f"{name} ({by}, {use})", None, None) for name, by, use in summary.streams])
    shared = [
        (_and_also([format_path(path) for path in paths]), max(1, len(paths)), None)
        for _, paths in summary.shared
    ]
    section("shared nodes", shared)
    tied = [graph.slots[number] for number in summary.tied]
    section(
        "tied slots",
        [
            (_and_also([slot.key, *map(format_path, slot.paths[1:])]), len(slot.paths), None)
            for slot in tied
        ],
    )
    stacked = [
        (f"{part.name or 'axis'}={part.length} by {format_path(part.owner) or 'the root'}", part)
        for part in summary.stacked
    ]
    section("stacked slots", [(what, part.slots, None) for what, part in stacked])
    Console(file=sys.stdout).print(table)


def _and_also(places: list[str]) -> str:
    first, *rest = places or ["an attribute"]
    return f"{first}, also {', '.join(rest)}" if rest else first


if __name__ == "__main__":
    main(prog_name="linsey")
