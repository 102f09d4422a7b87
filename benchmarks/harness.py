"""What the benchmarks share: interleaved rounds, medians of ratios, a table.

A number here is a ratio: seconds of linsey's call over seconds of a rival's, both measured in the
same process, in rounds that take turns. A machine that is busy slows both; the median over many
rounds of the ratio within a round hardly moves.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax
import jax
import jaxlib


@dataclass(frozen=True, kw_only=True)
class Case:
    """Calls that do the same work."""

    ours: Callable[[], Any]
    """linsey's call."""
    rival: Callable[[], Any]
    """What it is measured against."""
    check: Callable[[], None]
    """Raises unless both give equal results; runs before any timing."""
    target: float | None
    """The highest ratio that is good enough; None: reported, not judged."""
    others: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """Further calls that do the same, by name: measured against the same rival, for comparison."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one case measured."""

    name: str
    """Name of the case."""
    ours: float
    """Median seconds of one call of linsey's."""
    rival: float
    """Median seconds of one call of the rival."""
    ratio: float
    """Median over the rounds of ours / rival within the round."""
    spread: tuple[float, float]
    """First and third quartile of those ratios."""
    target: float | None
    """As in `Case`."""
    others: Mapping[str, float]
    """Ratios of the further calls."""


def _seconds(call: Callable[[], Any], repeat: int) -> float:
    out = None
    start = time.perf_counter()
    for _ in range(repeat):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeat


def _repeat(call: Callable[[], Any], seconds: float) -> int:
    """How many calls fill about this much time."""
    once = min(_seconds(call, 1) for _ in range(3))
    return max(1, int(seconds / max(once, 1e-7)))


def compare(name: str, case: Case, *, rounds: int = 31, seconds: float = 0.02) -> Result:
    """Checks a case and times it.

    Args:
        name: its name in the table.
        case: the calls.
        rounds: how many times all calls take their turn.
        seconds: about how long one turn takes; a call that is longer runs once.
    """
    case.check()
    calls = {"ours": case.ours, "rival": case.rival, **case.others}
    repeat = {key: _repeat(call, seconds) for key, call in calls.items()}
    times: dict[str, list[float]] = {key: [] for key in calls}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            order = list(calls) if number % 2 else list(reversed(calls))
            for key in order:
                times[key].append(_seconds(calls[key], repeat[key]))
            gc.collect(0)
    finally:
        if was_enabled:
            gc.enable()
    ratios = _ratios(times["ours"], times["rival"])
    quartiles = statistics.quantiles(ratios, n=4)
    return Result(
        name=name,
        ours=statistics.median(times["ours"]),
        rival=statistics.median(times["rival"]),
        ratio=statistics.median(ratios),
        spread=(quartiles[0], quartiles[2]),
        target=case.target,
        others={key: statistics.median(_ratios(times[key], times["rival"])) for key in case.others},
    )


def _ratios(ours: list[float], rival: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, rival, strict=True)]


def environment() -> str:
    """The versions and the number of CPUs that a result belongs to."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__},"
        f" flax {flax.__version__}, {jax.default_backend()}, {cpus} CPU"
    )


def micro(seconds: float) -> str:
    """Seconds as text, in microseconds or milliseconds."""
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def report(title: str, results: list[Result]) -> str:
    """The results of a benchmark as Markdown."""
    others = list(dict.fromkeys(name for result in results for name in result.others))
    head = ("case", "rival", "linsey", "ratio", "quartiles", "target", "reached", *others)
    rows = []
    for result in results:
        reached = "" if result.target is None else "no"
        if result.target is not None and result.ratio <= result.target:
            reached = "yes"
        rows.append(
            (
                result.name,
                micro(result.rival),
                micro(result.ours),
                f"{result.ratio:.2f}",
                f"{result.spread[0]:.2f} to {result.spread[1]:.2f}",
                "" if result.target is None else f"{result.target:.1f}",
                reached,
                *(f"{result.others[n]:.2f}" if n in result.others else "" for n in others),
            )
        )
    return f"### {title}\n\n{environment()}\n\n{table(head, rows)}\n"


def run(title: str, cases: Mapping[str, Callable[[], Case]], **options: Any) -> None:
    """Measures cases one after the other and prints their table."""
    print(report(title, [compare(name, make(), **options) for name, make in cases.items()]))


def under_pytest(benchmark: Any, name: str, case: Case, **options: Any) -> None:
    """Measures a case for pytest-benchmark, which keeps the ratio among the extra information."""
    result = compare(name, case, **options)
    benchmark.extra_info.update(
        ratio=round(result.ratio, 3), target=result.target, environment=environment()
    )
    benchmark.extra_info.update({key: round(value, 3) for key, value in result.others.items()})
    benchmark.pedantic(case.ours, rounds=5, warmup_rounds=1)


def assert_equal(first: Any, second: Any) -> None:
    """Raises unless two pytrees are equal, bit for bit."""
    import numpy as np

    left, left_def = jax.tree.flatten(first)
    right, right_def = jax.tree.flatten(second)
    if left_def != right_def:
        raise AssertionError(f"two structures: {left_def} and {right_def}")
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
