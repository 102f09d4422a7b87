"""Saving and loading values: beside a plain write, flax's msgpack and Orbax.

Each measurement is a process of its own, so that its peak memory is its own; they take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {"large": (300, 1 << 30), "small": (20_000, 20_000 * 32)}
"""Slots, and bytes of all of them."""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(which: str, what: str, shape: str, folder: str) -> dict[str, float]:
    """One save or load, in this process."""
    import flax.serialization
    import jax
    import jax.numpy as jnp
    import numpy as np

    import linsey
    import linsey.program  # which is loaded when it is first used
    from linsey.ir import Graph, Node, Slot, TensorType, slot_index

    count, total = SHAPES[shape]
    size = total // count // 4
    names = [f"w{number:05}" for number in range(count)]
    path = Path(folder) / which
    kind = TensorType(shape=(size,), dtype="float32")
    slots = tuple(Slot(collection="params", paths=((name,),), type=kind) for name in names)
    held = tuple((name, number) for number, name in enumerate(names))
    graph = Graph(nodes=(Node(slots=held),), slots=slots)
    arrays: Any = ()
    if what == "save":
        fill = jax.jit(lambda n: jnp.full((size,), n, jnp.float32))
        arrays = jax.block_until_ready([fill(float(number)) for number in range(count)])

    def plain_save() -> None:
        with path.open("wb") as file:
            for array in arrays:
                file.write(memoryview(np.asarray(array)).cast("B"))
            file.flush()
            os.fsync(file.fileno())

    def linsey_save() -> None:
        values = linsey.Values(slot_index(graph), tuple(arrays))
        linsey.Program(graph=graph, values=values).save(path)

    def flax_save() -> None:
        tree = dict(zip(names, arrays, strict=True))
        path.write_bytes(flax.serialization.to_bytes(tree))

    def orbax_save() -> None:
        ocp.PyTreeCheckpointer().save(path, dict(zip(names, arrays, strict=True)), force=True)

    def linsey_load() -> Any:
        values = linsey.load(path).values
        assert values is not None
        return values.host(f"params/{names[-1]}")

    def flax_load() -> Any:
        return flax.serialization.msgpack_restore(path.read_bytes())[names[-1]]

    def orbax_load() -> Any:
        return ocp.PyTreeCheckpointer().restore(path)[names[-1]]

    calls: dict[str, Callable[[], Any]] = {
        "plain save": plain_save,
        "linsey save": linsey_save,
        "flax save": flax_save,
        "orbax save": orbax_save,
        "linsey load": linsey_load,
        "flax load": flax_load,
        "orbax load": orbax_load,
    }
    import orbax.checkpoint as ocp

    before, start = _peak(), time.perf_counter()
    found = calls[f"{which} {what}"]()
    seconds = time.perf_counter() - start
    if found is not None:
        assert float(found[0]) == float(count - 1)
    return {"seconds": seconds, "bytes": _peak() - before}


def main(shape: str, rounds: int) -> None:
    """Prints the medians."""
    order = [("plain", "save")]
    order += [(who, what) for what in ("save", "load") for who in ("linsey", "flax", "orbax")]
    times: dict[str, list[dict[str, float]]] = {" ".join(each): [] for each in order}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for which, what in order:
                command = [sys.executable, __file__, "--one", which, what, "--shape", shape]
                out = subprocess.run(
                    [*command, "--folder", folder], check=True, capture_output=True, text=True
                )
                times[f"{which} {what}"].append(json.loads(out.stdout.splitlines()[-1]))
    count, total = SHAPES[shape]
    print(f"{count:,} slots, {total / 2**20:,.0f} MiB, {rounds} rounds")
    for name, found in times.items():
        seconds = statistics.median(each["seconds"] for each in found)
        memory = statistics.median(each["bytes"] for each in found) / 2**20
        print(f"  {name}: {seconds:.3f} s, memory {memory:,.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="large")
    parser.add_argument("--folder", default="")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_measure(*options.one, options.shape, options.folder)))
    else:
        main(options.shape, options.rounds)
