"""What XLA made of a compiled program: memory per device, and the collectives in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from linsey.runtime._text import bytes_text, table

_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# An instruction reads `%name = type op(operands), attributes`. Of an asynchronous pair the second
# half has the result as its type; the first has the operands in it too.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start|-done)?\(")
_ARRAY = re.compile(r"([a-z]+(\d*)\w*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """XLA's own count, in bytes on one device."""

    arguments: int
    """What the call is given: the values and the inputs."""
    outputs: int
    """What it gives back."""
    temporaries: int
    """What it needs meanwhile: activations and copies."""
    aliased: int
    """The part of the outputs that lies in donated arguments."""
    code: int
    """The generated code; 0 where the platform does not say."""

    @property
    def peak(self) -> int:
        """An upper bound of what the call holds at once, the code not included."""
        return self.arguments + self.outputs + self.temporaries - self.aliased


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """The collectives of one kind in a compiled program."""

    kind: str
    """``all-reduce``, ``all-gather`` …"""
    instructions: int
    """How many stand in the program."""
    executed: int
    """How many one call runs: those in a loop once per round, where XLA knows the number."""
    nbytes: int
    """Bytes of the results of those executed, on one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What `analyse` finds."""

    platform: str
    """The platform that it was compiled for; another one may choose other collectives."""
    devices: int
    """The devices that it runs on."""
    memory: Memory | None
    """Memory per device; None where the platform does not say."""
    collectives: tuple[Collective, ...]
    """By kind, in alphabetical order."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"Compiled for {self.devices} devices of the platform {self.platform}\n\n"
        memory = [("not told by this platform", "")]
        if self.memory is not None:
            named = {**asdict(self.memory), "at most at once": self.memory.peak}
            memory = [(name, bytes_text(size)) for name, size in named.items()]
        used = [
            (
                each.kind,
                f"{each.instructions:,}",
                f"{each.executed:,}",
                bytes_text(each.nbytes),
            )
            for each in self.collectives
        ]
        return (
            head
            + table(("memory", "per device"), memory)
            + "\n\n"
            + table(("collective", "in the program", "in a call", "per device"), used)
        )


def analyse(compiled: Any) -> Analysis:
    """Reads XLA's memory analysis and the collectives of a compiled program.

    Args:
        compiled: a ``jax.stages.Compiled``, such as ``jax.jit(f).lower(x).compile()``.

    Example:
        >>> import jax
        >>> analysis = analyse(jax.jit(lambda x: x + 1).lower(jax.numpy.ones(8)).compile())
        >>> analysis.memory.arguments, analysis.memory.outputs, analysis.collectives
        (32, 32, ())
    """
    stats = compiled.memory_analysis()
    text = compiled.as_text() or ""
    memory = None
    if stats is not None:
        memory = Memory(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            code=stats.generated_code_size_in_bytes,
        )
    devices = _devices(compiled)
    return Analysis(
        platform=devices[0].platform,
        devices=len(devices),
        memory=memory,
        collectives=read_collectives(text),
    )


def _devices(compiled: Any) -> list[Any]:
    import jax

    held = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return sorted(held[0].device_set, key=lambda device: device.id) if held else jax.devices()[:1]


@dataclass
class _Computation:
    """What one computation of a program holds."""

    found: list[tuple[str, int]] = field(default_factory=list)
    """Kind and bytes of each collective."""
    calls: list[tuple[str, int]] = field(default_factory=list)
    """Name of each computation that it calls, and how often."""


def read_collectives(text: str) -> tuple[Collective, ...]:
    """The collectives in a compiled program.

    Args:
        text: the program as ``compiled.as_text()`` gives it.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    totals: dict[str, list[int]] = {}
    for name, computation in computations.items():
        for kind, size in computation.found:
            total = totals.setdefault(kind, [0, 0, 0])
            total[0] += 1
            total[1] += times.get(name, 0)
            total[2] += times.get(name, 0) * size
    return tuple(
        Collective(kind=kind, instructions=total[0], executed=total[1], nbytes=total[2])
        for kind, total in sorted(totals.items())
    )


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations of a program by name, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(), ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], _Computation())
                entry = head[2] if head[1] else entry
            continue
        if any(kind in line for kind in _KINDS):
            match = _COLLECTIVE.search(line)
            if match is not None and match[3] != "-start":
                current.found.append((match[2], _nbytes(match[1])))
        if "=%" in line or "={%" in line:
            current.calls.extend(_calls(line))
    return computations, entry


def _calls(line: str) -> Iterator[tuple[str, int]]:
    trips = _TRIPS.search(line)
    for role, names in _CALLED.findall(line):
        for name in re.findall(r"[\w.\-]+", names):
            yield name, int(trips[1]) if trips and role == "body" else 1


def _times(computations: dict[str, _Computation], entry: str) -> dict[str, int]:
    """How often each computation runs in one call of the entry."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in computations or name in seen:
            return
        seen.add(name)
        for called, _ in computations[name].calls:
            visit(called)
        order.append(name)

    visit(entry)
    times = {entry: 1}
    for name in reversed(order):  # callers before what they call: programs do not recurse
        for called, count in computations[name].calls:
            times[called] = times.get(called, 0) + times.get(name, 0) * count
    return times


def _nbytes(kind: str) -> int:
    """The bytes of an HLO type: ``f32[2,3]{1,0}`` or a tuple of such."""
    total = 0
    for name, bits, sizes in _ARRAY.findall(kind):
        width = 8 if name == "pred" else int(bits or 0)
        count = math.prod(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
        total += (count * width + 7) // 8
    return total
