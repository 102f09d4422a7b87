"""Writing and reading large graphs as bytes, beside pickle, in rounds that take turns."""

from __future__ import annotations

import argparse
import gc
import pickle
import statistics
import time
from collections.abc import Callable
from typing import Any

import bench_graph
import harness
import pytest

from linsey.ir import Graph, dumps, loads

SIZES = (10_000, 100_000)
TARGET_SECONDS, TARGET_BYTES = 1.5, 80
"""For 100,000 nodes, each with a slot; and for a node of a kind that occurs often."""


def check(graph: Graph) -> bytes:
    """Equal graphs, equal bytes."""
    data = dumps(graph)
    back = loads(data)
    assert back == graph
    assert dumps(back) == data
    return data


def measure(graph: Graph, data: bytes, pickled: bytes) -> dict[str, float]:
    """Seconds of each."""
    calls: dict[str, Callable[[], Any]] = {
        "dumps": lambda: dumps(graph),
        "loads": lambda: loads(data),
        "pickle.dumps": lambda: pickle.dumps(graph, protocol=5),
        "pickle.loads": lambda: pickle.loads(pickled),
    }
    found = {}
    for name, call in calls.items():
        gc.collect()
        start = time.perf_counter()
        call()
        found[name] = time.perf_counter() - start
    return found


def main(rounds: int = 5, sizes: tuple[int, ...] = SIZES) -> None:
    """Prints the medians."""
    rows = []
    for size in sizes:
        graph = bench_graph.build(size)
        data, pickled = check(graph), pickle.dumps(graph, protocol=5)
        found = [measure(graph, data, pickled) for _ in range(rounds)]
        times = {name: statistics.median(each[name] for each in found) for name in found[0]}
        rows.append(
            (
                f"{size:,} nodes",
                *(f"{seconds:.2f} s" for seconds in times.values()),
                f"{len(data) / size:.0f} B",
                f"{len(pickled) / size:.0f} B",
            )
        )
    head = ("graph", *times, "a node", "a node, pickled")
    print(f"### Graphs as bytes\n\n{harness.environment()}\n\n{harness.table(head, rows)}\n")


@pytest.mark.parametrize("size", SIZES[:1])
def bench_codec(benchmark: Any, size: int) -> None:
    graph = bench_graph.build(size)
    data = check(graph)
    benchmark.extra_info.update(bytes_a_node=round(len(data) / size, 1))
    benchmark.pedantic(lambda: loads(dumps(graph)), rounds=3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args().rounds)
