"""The lists of docs/layers.md, from the tables: ``python -m linsey._layers.page FILE``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linsey._layers import linen, nnx
from linsey._layers.table import Place, Row
from linsey.ir.ops import OPS, REQUIRED

MARK = "<!-- What follows is made from src/linsey/_layers by `make layers`. -->\n"
"""In the file: what stands above it is written by hand."""


def page() -> str:
    """What docs/layers.md says below `MARK`; the same whichever flax is installed."""
    parts = ["\n".join((f"## {op}", "", *_layer(op))) + "\n" for op in OPS]
    lines = ["## Modules that are no layers", ""]
    for dialect, names in (("linen", linen.NO_LAYERS), ("nnx", nnx.NO_LAYERS)):
        lines += [f"* `{dialect}.{name}`: {what}." for name, what in names.items()]
    return "\n".join((*parts, "\n".join(lines) + "\n"))


def _layer(op: str) -> Iterator[str]:
    ours = [row for row in linen.ROWS if row.op == op]
    theirs = [row for row in nnx.ROWS if row.op == op]
    names = [_class("linen", row) for row in ours] + [_class("nnx", row) for row in theirs]
    yield f"{', '.join(names)}."
    yield ""
    reasons = [("Linen", row.reason) for row in ours] + [("NNX", row.reason) for row in theirs]
    if any(reason for _, reason in reasons):
        yield from (f"* From {api}: hosted; {why}." for api, why in reasons if why)
        if ours and theirs:
            yield from _places(ours[0], theirs[0])
        return
    if not ours or not theirs:
        return
    source, target = ours[0], theirs[0]
    carried = list(_carried(source, target))
    if carried:
        yield f"* Carries over: {', '.join(carried)}."
    told = [f"`{each.own}`" for each in target.fields if _is_told(each.name, source)]
    if told:
        yield f"* Told by the variables of Linen's: {', '.join(told)}."
    yield from _limits("Linen", source, target)
    yield from _limits("NNX", target, source)
    yield from _places(source, target)
    if len(source.methods) > 1:
        yield f"* Methods: {', '.join(f'`{name}`' for name in sorted(source.methods))}."


def _class(dialect: str, row: Row) -> str:
    since = f" (from flax {row.since} on)" if row.since else ""
    return f"`{dialect}.{row.cls.__name__}`{since}"


def _carried(source: Row, target: Row) -> Iterator[str]:
    """The fields that both have."""
    there = {each.name: each.own for each in target.fields}
    for each in source.fields:
        if each.name in there:
            other = there[each.name]
            yield f"`{each.own}`" + ("" if other == each.own else f" (in NNX `{other}`)")


def _is_told(name: str, source: Row) -> bool:
    is_required = source.neutral.fields[name] is REQUIRED
    return is_required and name not in {each.name for each in source.fields}


def _limits(api: str, source: Row, target: Row) -> Iterator[str]:
    """What a layer of one API needs to have for a counterpart in the other."""
    there = {each.name for each in target.fields} | target.implied
    needed = dict(source.fixed)
    for each in source.fields:
        default = source.neutral.fields[each.name]
        if each.name not in there and default is not REQUIRED:
            needed[each.own] = each.write(default)
    values = [f"`{name}` is `{_shown(value)}`" for name, value in needed.items()]
    if values:
        yield f"* From {api}: native where {', '.join(values)}."
    if source.limits:
        yield f"* From {api}: hosted where {'; or '.join(source.limits)}."


def _shown(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else repr(value)


def _places(source: Row, target: Row) -> Iterator[str]:
    """What lies elsewhere, as lines of a list."""
    moved = list(_moved(source, target)) if source.slots else []
    if moved:
        yield "* Variables, Linen's and NNX's:"
        yield from (f"  * {line}" for line in moved)


def _moved(source: Row, target: Row) -> Iterator[str]:
    """The variables that lie elsewhere."""
    for name, place in target.slots.items():
        parts = [source.slots[each] for each in place.parts or (name,)]
        here = [_path(part) for part in parts]
        if here == [_path(place)]:
            continue
        joined = " one after the other, on the last axis," if len(parts) > 1 else ""
        yield f"{', '.join(f'`{path}`' for path in here)}{joined} in `{_path(place)}`"


def _path(place: Place) -> str:
    return "/".join(map(str, place.path))


def write(path: str) -> None:
    """Writes the lists into a file, below `MARK`."""
    file = Path(path)
    above, _, _ = file.read_text(encoding="utf-8").partition(MARK)
    file.write_text(f"{above}{MARK}\n{page()}", encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
