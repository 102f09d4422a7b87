"""What the commands of `linsey.cli` take: options read, targets found, errors as messages."""

from __future__ import annotations

import ast
import difflib
import importlib
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeAlias

import click

from linsey.ir import UNCONSTRAINED, Axis, LinseyError, TensorType
from linsey.ir.summary import parse_type

_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_NAMED = re.compile(r"(?:([^\W\d]\w*)=)?(.*)", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_AXIS_WORDS: dict[str, Axis] = {"none": None, "unconstrained": UNCONSTRAINED}

Input: TypeAlias = tuple[str | None, TensorType]
"""The keyword of a sample input, or None, and its type."""


def target(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Checks ``package.module:name``."""
    if value is not None and not _TARGET.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not of the form package.module:name")
    return value


def _inputs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[Input]:
    """Reads each ``[name=]dtype[shape]``."""
    read = []
    for value in values:
        match = _NAMED.fullmatch(value)
        assert match is not None
        try:
            read.append((match[1], parse_type(match[2])))
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


def mesh(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """Reads ``axis=size,axis=size``."""
    sizes: dict[str, int] = {}
    for name, size in _pairs(values, "axis=size"):
        if not (size.isascii() and size.isdigit() and int(size)):
            raise click.BadParameter(f"{name}={size}: the size of an axis is a number from 1 on")
        if name in sizes:
            raise click.BadParameter(f"the axis {name!r} is given twice")
        sizes[name] = int(size)
    return sizes


def rules(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, Axis]]:
    """Reads ``name=axis,name=axis+axis,name=none``."""
    read: list[tuple[str, Axis]] = []
    for name, on in _pairs(values, "name=axis"):
        if on.lower() in _AXIS_WORDS:
            read.append((name, _AXIS_WORDS[on.lower()]))
        else:
            axes = axis_list(ctx, param, on)
            read.append((name, axes[0] if len(axes) == 1 else axes))
    return read


def axis_list(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Reads ``axis+axis``."""
    axes = tuple(axis.strip() for axis in value.split("+")) if value is not None else ()
    if not all(axes):
        raise click.BadParameter(f"{value!r} is not of the form axis or axis+axis")
    return axes


def _pairs(values: tuple[str, ...], form: str) -> list[tuple[str, str]]:
    """Reads ``a=b,c=d``, of which there may be several."""
    pairs = []
    whole = ",".join(values)
    for value in whole.split(",") if values else ():
        name, equals, text = (part.strip() for part in value.partition("="))
        if not (name and equals and text):
            raise click.BadParameter(f"{value.strip() or whole!r} is not of the form {form}")
        pairs.append((name, text))
    return pairs


def call_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds TARGET and the options that say how it is called; see `call_of`."""
    added = (
        click.argument("target", callback=target),
        click.option(
            "inputs",
            "--input",
            callback=_inputs,
            multiple=True,
            metavar="[NAME=]DTYPE[SHAPE]",
            help="A sample input, such as 'f32[8,28,28,1]', or 'mask=bool[8,28]' for a keyword one."
            " Dtypes as jax prints them (f32, bf16, i32, u8, bool, c64 ...) or by full name."
            " Repeat it for more.",
        ),
        click.option(
            "settings",
            "--set",
            callback=_settings,
            multiple=True,
            metavar="NAME=VALUE",
            help="A keyword argument of the call that is no array, such as train=true."
            " Repeat it for more.",
        ),
        click.option("--method", help="The method to lower by, where it is not the call."),
    )
    for add in reversed(added):
        command = add(command)
    return command


def call_of(
    inputs: list[Input], settings: list[tuple[str, Any]]
) -> tuple[list[TensorType], dict[str, Any]]:
    """The positional and the keyword arguments that the options give.

    Raises:
        click.UsageError: a keyword is given twice.
    """
    keywords: dict[str, Any] = {}
    named = [(name, kind) for name, kind in inputs if name is not None]
    for name, value in (*named, *settings):
        if name in keywords:
            raise click.UsageError(f"{name!r} is given twice")
        keywords[name] = value
    return [kind for name, kind in inputs if name is None], keywords


def load(named: str) -> Any:
    """What a target names; the current directory is importable, as with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, name = named.partition(":")
    module = guarded(lambda: _imported(module_name), f"importing {module_name}")
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


def guarded(run: Callable[[], Any], doing: str) -> Any:
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
