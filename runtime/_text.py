"""Tables as plain text, for a terminal and for a log."""

from __future__ import annotations

import re
from collections.abc import Sequence

from linsey.runtime._plan_types import Plan

_NUMBER = re.compile(r"[\d,.]+( [KMGTPE]?i?B)?")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def bytes_text(size: float) -> str:
    """A number of bytes, readable.

    Example:
        >>> bytes_text(1000), bytes_text(3 * 2**30)
        ('1,000 B', '3.00 GiB')
    """
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:,.2f} {_UNITS[unit]}" if unit else f"{size:,.0f} {_UNITS[0]}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up; those whose rows are all numbers stand to the right.

    Example:
        >>> print(table(("name", "count"), [("w", "12"), ("bias", "3")]))
        name  count
        ----  -----
        w        12
        bias      3
    """
    if not rows:
        rows = [("none", *[""] * (len(head) - 1))]
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return not cell or _NUMBER.fullmatch(cell) is not None


def format_plan(plan: Plan, most: int = 12) -> str:
    """A plan as tables.

    Args:
        plan: the plan.
        most: how many rows of slots each table shows.
    """
    mesh = ", ".join(f"{name}={size}" for name, size in plan.mesh)
    parts = [f"Plan for {plan.devices:,} devices: {mesh}", _bytes(plan)]
    rows = [
        (
            each.group.name,
            str(each.group.slots),
            each.type,
            ", ".join(each.over),
            bytes_text(each.per_device),
            bytes_text(each.least),
            bytes_text(each.saved),
        )
        for each in plan.replicated
    ]
    head = ("replicated", "slots", "type", "over", "each, per device", "could be", "saves in all")
    parts.append(_listed(head, rows, most))
    uneven = [
        (
            each.group.name,
            str(each.group.slots),
            f"axis {each.axis} of size {each.size}",
            f"{each.parts} parts of {each.on!r}, by {each.reason}",
        )
        for each in plan.uneven
    ]
    parts.append(_listed(("uneven", "slots", "what", "in"), uneven, most))
    parts.append(_names(plan))
    problems = [
        f"{each.group.name} ({each.group.slots} slots): {each.message}" for each in plan.problems
    ]
    if problems:
        shown = [*problems[:most], *_more(len(problems) - most)]
        parts.append("problems, whose slots are counted as replicated\n" + "\n".join(shown))
    return "\n\n".join(parts)


def _bytes(plan: Plan) -> str:
    rows = [
        (
            share.name,
            f"{share.slots:,}",
            bytes_text(share.whole),
            bytes_text(share.per_device),
            bytes_text(share.per_device * plan.devices),
        )
        for share in plan.shares
    ]
    if len(rows) > 1:
        slots = sum(share.slots for share in plan.shares)
        total = (plan.whole, plan.per_device, plan.per_device * plan.devices)
        rows.append(("all", f"{slots:,}", *map(bytes_text, total)))  # type: ignore[arg-type]
    return table(("bytes", "slots", "unsharded", "per device", "all devices"), rows)


def _names(plan: Plan) -> str:
    rows = [
        ("name without a rule", each.name, f"{each.slots} slots, such as {each.example}")
        for each in plan.unmapped
    ]
    rows += [("rule without a slot", repr(each.rule), each.reason) for each in plan.unused_rules]
    rows += [("mesh axis without a slot", name, "") for name in plan.unused_axes]
    return table(("names", "which", ""), rows)


def _listed(head: Sequence[str], rows: Sequence[Sequence[str]], most: int) -> str:
    return "\n".join([table(head, rows[:most]), *_more(len(rows) - most)])


def _more(count: int) -> list[str]:
    return [f"and {count:,} more"] if count > 0 else []
