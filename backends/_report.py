"""What a backend makes of each node of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from linsey.ir import Path, format_path


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """What became of one node."""

    path: Path
    """Its path in the graph; empty for the root."""
    layer: str
    """Its class, with the dialect: ``linen.Dense``."""
    became: Literal["native", "hosted", "kept"]
    """``native``: the target's own layer; ``hosted``: its own code runs inside the target;
    ``kept``: it is the target's already, or stays in the bridge that the source holds it in."""
    target: str
    """The class that it is emitted as."""
    reason: str = ""
    """Why it is hosted or kept; empty for a native one."""
    is_layer: bool = False
    """Whether it is a leaf layer of flax that comes from the other API: these count for
    `Report.native_share`. What holds other layers (a container, user code) is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a backend makes of a graph: see `linsey.Program.report`."""

    rows: tuple[ReportRow, ...]
    """One per node that is a module, in the order of the graph."""

    @property
    def native_share(self) -> float:
        """The share of leaf layers that are native, from 0 to 1; 1 where there are none."""
        layers = [row for row in self.rows if row.is_layer]
        return sum(row.became == "native" for row in layers) / len(layers) if layers else 1.0

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __getitem__(self, path: str) -> ReportRow:
        """The row of a path as it is printed: ``encoder/layers_0/attn``; empty for the root.

        Raises:
            KeyError: there is no such node.
        """
        for row in self.rows:
            if format_path(row.path) == path:
                return row
        raise KeyError(path)

    def __str__(self) -> str:
        cells = [
            (format_path(row.path) or ".", row.layer, f"{row.became} {row.target}", row.reason)
            for row in self.rows
        ]
        widths = [max((len(cell[column]) for cell in cells), default=0) for column in range(3)]
        lines = [
            "  ".join(
                (*(text.ljust(width) for text, width in zip(cell, widths, strict=False)), cell[3])
            )
            for cell in cells
        ]
        layers = sum(row.is_layer for row in self.rows)
        native = sum(row.is_layer and row.became == "native" for row in self.rows)
        return "\n".join((*map(str.rstrip, lines), f"{native} of {layers} leaf layers are native"))
