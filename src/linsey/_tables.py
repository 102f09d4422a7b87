"""What ``linsey lower`` prints below the graph."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from linsey.ir import Graph, format_path
from linsey.ir.summary import Summary


def print_summary(summary: Summary, graph: Graph) -> None:
    """Prints a summary to the terminal."""
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
