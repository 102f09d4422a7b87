"""Lowering and planning a decoder of 405 billion parameters for 512 devices, with none of them.

Each measurement is a fresh process, imports included: its wall time, and the most memory that it
held.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import pytest

TARGET_SECONDS = 30.0
TARGET_BYTES = 2 * 2**30
PARAMETERS = 405_853_388_800
EXAMPLES = Path(__file__).parents[1] / "examples"
CASES = ("unrolled", "scanned")

# The parts of the process, timed from within: ru_maxrss is in KiB on Linux.
_CHILD = """
import json, resource, sys, time
start = time.perf_counter()
import jax
import decoder, linsey
from linsey.runtime.plan import plan
imported = time.perf_counter()
tokens = jax.ShapeDtypeStruct((512, 8192), "int32")
graph = linsey.lower(getattr(decoder, sys.argv[1])(), tokens).graph
lowered = time.perf_counter()
made = plan(graph, {"data": 16, "fsdp": 16, "tensor": 2}, decoder.RULES)
text = str(made)
end = time.perf_counter()
print(json.dumps({
    "import": imported - start, "lower": lowered - imported, "plan": end - lowered,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "slots": len(graph.slots), "whole": made.whole, "per_device": made.per_device,
}))
"""


def measure(name: str) -> dict[str, Any]:
    """One process; its figures, and its wall time as ``wall``."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, name],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["whole"] == 2 * PARAMETERS
    return {"wall": wall, **found}


def main(rounds: int = 3) -> None:
    """Measures both cases in turns and prints the medians."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name in CASES:
            runs[name].append(measure(name))
    rows = []
    for name, found in runs.items():
        middle = {key: statistics.median(run[key] for run in found) for key in found[0]}
        reached = middle["wall"] <= TARGET_SECONDS and middle["peak"] <= TARGET_BYTES
        seconds = (f"{middle[key]:.2f} s" for key in ("import", "lower", "plan", "wall"))
        peak = f"{middle['peak'] / 2**20:.0f} MiB"
        share = f"{middle['per_device'] / 2**30:.2f} GiB"
        rows.append(
            (name, f"{found[0]['slots']:,}", share, *seconds, peak, "yes" if reached else "no")
        )
    head = (
        *("case", "slots", "bytes per device", "import", "lower", "plan and print"),
        *("whole process", "peak memory", "reached"),
    )
    target = f"targets: {TARGET_SECONDS:.0f} s and {TARGET_BYTES / 2**30:.0f} GiB"
    print("### Lowering and planning a decoder of 405 billion parameters for 16 x 16 x 2\n")
    print(f"{harness.environment()}; {target}\n")
    print(harness.table(head, rows) + "\n")


@pytest.mark.parametrize("name", CASES)
def bench_plan(benchmark: Any, name: str) -> None:
    found = benchmark.pedantic(measure, args=(name,), rounds=1)
    benchmark.extra_info.update(peak=found["peak"], environment=harness.environment())


if __name__ == "__main__":
    main()
