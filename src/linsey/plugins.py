"""Finds frontends and backends through entry points; the built-in ones come by the same door."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from linsey.ir import PluginError

_BUILT_IN = ("linen", "nnx")


def _entries(group: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    """The entry points of a group by name, the built-in ones first; several where they clash."""
    return _scan(group, tuple(sys.path))


@functools.lru_cache(maxsize=8)
def _scan(group: str, path: tuple[str, ...]) -> Mapping[str, tuple[EntryPoint, ...]]:
    """`_entries`, once per state of ``sys.path``: a scan takes milliseconds."""
    del path
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=group):
        others = found.get(entry.name, ())
        if all(entry.value != other.value for other in others):
            found[entry.name] = (*others, entry)
    order = sorted(found, key=lambda name: (name not in _BUILT_IN, name))
    return MappingProxyType({name: found[name] for name in order})


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def names(group: str) -> tuple[str, ...]:
    """The names registered in a group, the built-in ones first."""
    return tuple(_entries(group))


def load(group: str, name: str) -> Any:
    """One plug-in by name.

    Raises:
        PluginError: nobody registered the name, two distributions did, or the plug-in cannot be
            imported.
    """
    entries = _entries(group)
    if name not in entries:
        raise PluginError(
            f"nothing is registered under the name {name!r}; there are: {', '.join(entries)}",
            path=group,
            fix=f"Install the package that provides it, or register it under {group}.",
        )
    entry, *clashing = entries[name]
    if clashing:
        both = (f"{_owner(each)} ({each.value})" for each in (entry, *clashing))
        raise PluginError(
            f"two distributions claim the name: {' and '.join(sorted(both))}",
            path=f"{group}:{name}",
            fix="Uninstall one of them.",
        )
    try:
        return entry.load()
    except Exception as error:
        raise PluginError(
            f"{_owner(entry)} failed to load: {type(error).__name__}: {error}",
            path=f"{group}:{name}",
            fix="Install what it needs; or mend or uninstall it.",
        ) from error


def find_frontend(source: object) -> Any:
    """The first frontend that accepts an object.

    Raises:
        PluginError: none does; the message names those that there are and how to add one.
    """
    group = "linsey.frontends"
    broken: list[str] = []
    known = names(group)
    for name in known:
        try:
            frontend = load(group, name)
        except PluginError as error:  # it breaks nothing unless it is the one that is needed
            broken.append(str(error))
            continue
        if frontend.accepts(source):
            return frontend
    refusal = PluginError(
        f"no frontend accepts a {type(source).__module__}.{type(source).__qualname__};"
        f" there are: {', '.join(known)}",
        path="linsey.lower",
        fix="Pass a Linen module, an NNX module or a factory of one; or register a frontend for it"
        f" under the entry-point group {group} (a linsey.frontends.Frontend).",
    )
    for line in broken:
        refusal.add_note(line)
    raise refusal
