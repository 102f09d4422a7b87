"""Building, verifying and hashing large graphs: seconds, and whether they are linear in the size.

The one benchmark without a rival. Its ratio is seconds per node over those of the smallest size,
measured in the same rounds: 1 for what is linear.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import harness
import pytest

from linsey.ir import Const, Graph, Node, Ref, Slot, Source, TensorType, problems, verify

SIZES = (10_000, 30_000, 100_000, 300_000)
TARGET_SECONDS = 5.0
"""For building, verifying and hashing a graph of 100,000 nodes."""
_WIDTH = 10


def build(size: int) -> Graph:
    """A tree of blocks of ten nodes, with a slot for each node."""
    source = Source(dialect="linen", cls=Ref(name="flax.linen:Dense"))
    paths: list[tuple[str, ...]] = [()]
    children: list[list[tuple[str, int]]] = [[] for _ in range(size)]
    for number in range(1, size):
        parent = (number - 1) // _WIDTH
        name = f"block_{(number - 1) % _WIDTH}"
        children[parent].append((name, number))
        paths.append((*paths[parent], name))
    slots = tuple(
        Slot(
            collection="params",
            paths=((*path, "kernel"),),
            type=TensorType(shape=(8, 8 + number % 7), dtype="float32"),
        )
        for number, path in enumerate(paths)
    )
    nodes = tuple(
        Node(
            source=source,
            attrs=(("features", Const(number % 512)), ("use_bias", Const(True))),
            children=tuple(children[number]),
            slots=(("kernel", number),),
        )
        for number in range(size)
    )
    return Graph(nodes=nodes, slots=slots)


def check(size: int) -> None:
    """Equal graphs hash alike, and the verifier still finds what is wrong."""
    first, second = build(size), build(size)
    assert not problems(first)
    assert first == second
    assert hash(first) == hash(second)
    broken = Graph(nodes=(*first.nodes, Node()), slots=first.slots)
    assert problems(broken) == (f"node %{size} cannot be reached from the root",)


def measure(size: int) -> tuple[float, float, float]:
    """Seconds to build, to verify and to hash."""
    gc.collect()
    start = time.perf_counter()
    graph = build(size)
    built = time.perf_counter()
    verify(graph)
    verified = time.perf_counter()
    hash(graph)
    return built - start, verified - built, time.perf_counter() - verified


def main(rounds: int = 3, sizes: tuple[int, ...] = SIZES) -> None:
    """Measures all sizes in rounds that take turns and prints the medians."""
    for size in sizes[:1]:
        check(size)
    times: dict[int, list[tuple[float, float, float]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            times[size].append(measure(size))
    rows = []
    for size in sizes:
        parts = [statistics.median(part) for part in zip(*times[size], strict=True)]
        each = [sum(time) / size for time in times[size]]
        base = [sum(time) / sizes[0] for time in times[sizes[0]]]
        ratio = statistics.median(a / b for a, b in zip(each, base, strict=True))
        rows.append(
            (
                f"{size:,}",
                *(f"{part:.3f} s" for part in parts),
                f"{sum(parts):.3f} s",
                harness.micro(sum(parts) / size),
                f"{ratio:.2f}",
            )
        )
    head = ("nodes", "build", "verify", "hash", "total", "per node", "against the smallest")
    print("### Building, verifying and hashing a graph\n")
    print(f"{harness.environment()}; target: {TARGET_SECONDS:.0f} s for 100,000 nodes\n")
    print(harness.table(head, rows) + "\n")


@pytest.mark.parametrize("size", [10_000, 100_000])
def bench_graph(benchmark: Any, size: int) -> None:
    check(size)
    benchmark.pedantic(measure, args=(size,), rounds=3)


if __name__ == "__main__":
    main()
