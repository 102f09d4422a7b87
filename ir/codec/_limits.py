"""How large a file's values may become, counted before they are used.

Rows may refer to one row many times, so that a small file could stand for a value that nothing can
walk through. Writing and reading count in the same order, so what is written is read.
"""

from __future__ import annotations

from collections.abc import Iterable

from linsey.ir.errors import FormatError

MAX_DEPTH = 128
"""How deep a value may be nested. `linsey.ir.encode` stops at half of it."""
MAX_SIZE = 1_000_000
"""Of how many values a value may be made, each counted as often as it occurs."""
MAX_PATH = 1_000
"""How many components a path may have."""
MEAN_PATH = 64
"""How many they may have on average, in files with more than a million."""


class Limits:
    """Counts the values and paths of one file."""

    def __init__(self) -> None:
        self._depths: list[int] = []
        self._sizes: list[int] = []
        self._paths = 0
        self._components = 0

    def value(self, held: Iterable[int]) -> None:
        """Counts the next row of all tables.

        Args:
            held: the earlier rows that it holds.

        Raises:
            FormatError: it is too deep, or made of too many values.
        """
        depth, size = 1, 1
        for number in held:
            depth = max(depth, 1 + self._depths[number])
            size += self._sizes[number]
        if depth > MAX_DEPTH or size > MAX_SIZE:
            raise too_large(f"a value of {size:,} parts, nested {depth} deep")
        self._depths.append(depth)
        self._sizes.append(size)

    def path(self, length: int) -> None:
        """Counts a path of so many components.

        Raises:
            FormatError: it is too long, or all of them together are.
        """
        self._paths += 1
        self._components += length
        if length > MAX_PATH or self._components > 1_000_000 + MEAN_PATH * self._paths:
            raise too_large(f"a path of {length:,} components")


def too_large(what: str) -> FormatError:
    """The error for what is over a limit."""
    return FormatError(
        f"found {what}, expected at most {MAX_SIZE:,} parts, {MAX_DEPTH} levels and {MAX_PATH:,}"
        " components of a path",
        fix="Keep large data in arrays and variables, not in hyper-parameters.",
    )
