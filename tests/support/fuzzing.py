"""Damaged files, each of which must give a typed error at once; and saves that are killed.

``python tests/support/fuzzing.py`` does it in full.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flax import linen as nn

import linsey
from linsey.ir import (
    Const,
    FormatError,
    FormatWarning,
    Graph,
    Node,
    Ref,
    Slot,
    Source,
    TensorType,
    dumps,
    encode,
    loads,
)
from linsey.ir.codec._columns import MAGIC

HEAD = len(MAGIC) + 32
DENSE = Source(dialect="linen", cls=Ref(name="flax.linen:Dense"))


@dataclass
class Found:
    """What became of many files."""

    files: int = 0
    graphs: int = 0
    slowest: float = 0.0


def small() -> Graph:
    """One of each, as the golden files hold it."""
    kernel = Slot(
        collection="params",
        paths=(("layers", 0, "kernel"), ("head", "kernel")),
        type=TensorType(shape=(3, 4), dtype="bfloat16"),
        metadata=(("tag", encode({"a": [1, 2.5, None, True, "ü", b"\0", ..., 1j]})),),
    )
    return Graph(
        nodes=(
            Node(source=DENSE, children=(("layers", 1),), attrs=(("big", Const(-(2**90))),)),
            Node(op="container", children=((0, 2),)),
            Node(source=DENSE, slots=(("kernel", 0),), attrs=(("features", Const(4)),)),
        ),
        slots=(kernel,),
        empty=(("cache",),),
    )


def mutated(rng: random.Random, body: bytearray) -> bytes:
    """A body with a few bytes changed, cut out or put in."""
    for _ in range(rng.randint(1, 4)):
        if not body:
            break
        place = rng.randrange(len(body))
        match rng.randrange(4):
            case 0:
                body[place] = rng.randrange(256)
            case 1:
                del body[place : place + rng.randint(1, 8)]
            case 2:
                body[place:place] = rng.randbytes(rng.randint(1, 8))
            case 3:
                body[place] ^= 1 << rng.randrange(8)
    return bytes(body)


def mutations(count: int, seed: int) -> Found:
    """Reads files whose content was changed, with the checksum that belongs to it.

    Without that, the checksum alone would refuse all of them.
    """
    body, rng, found = dumps(small())[HEAD:], random.Random(seed), Found()
    for _ in range(count):
        new = mutated(rng, bytearray(body))
        data = MAGIC + hashlib.sha256(new).digest() + new
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FormatWarning)
                graph = loads(data)
        except FormatError:
            graph = None
        found.files += 1
        found.slowest = max(found.slowest, time.perf_counter() - start)
        if graph is not None:
            found.graphs += 1
            graph = replace(graph, unknown=None)
            again = loads(dumps(graph, leave_out=True))
            assert dumps(again, leave_out=True) == dumps(graph, leave_out=True)
    return found


def truncations() -> int:
    """Reads every truncation of a file; how many were refused."""
    data, refused = dumps(small()), 0
    for end in range(len(data)):
        try:
            loads(data[:end])
        except FormatError:
            refused += 1
    return refused


def exported(path: Path) -> None:
    """Writes an artefact with values and an exported program."""
    x = np.ones((2, 3), np.float32)
    program = linsey.lower(nn.Dense(4), x).init(0)
    program.save(path, export="__call__", dynamic="batch, _", constraints=["batch >= 2"])
    linsey.load(path)


def artefacts(path: Path, count: int, seed: int) -> Found:
    """Opens artefacts whose header, or one of whose arrays, was changed, with its checksums.

    Args:
        path: one that is whole; it is written over.
        count: how many.
        seed: of the changes.
    """
    data, rng, found = path.read_bytes(), random.Random(seed), Found()
    for _ in range(count):
        path.write_bytes(_resealed(data, rng))
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FormatWarning)
                program = linsey.load(path)
                assert all(map(str, program.exports))
                if program.values is not None:
                    assert len(program.values.arrays) == len(program.graph.slots)
        except linsey.LinseyError:
            program = None
        found.files += 1
        found.graphs += program is not None
        found.slowest = max(found.slowest, time.perf_counter() - start)
    return found


def _resealed(data: bytes, rng: random.Random) -> bytes:
    """An artefact with a change that its checksums do not tell of."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = bytearray(data[8 : 8 + size]), bytearray(data[8 + size :])
    arrays = {
        name: entry["data_offsets"]
        for name, entry in json.loads(header).items()
        if name not in ("__metadata__", "[checks]")
    }
    what = rng.choice(["header", *(name for name in arrays if name.startswith("["))])
    if what == "header":
        header = bytearray(mutated(rng, header))
    else:
        start, end = arrays[what]
        new = mutated(rng, body[start:end])[: end - start].ljust(end - start, b"\0")
        if what == "[graph]" or (what == "[programs]" and rng.random() < 0.8):
            new = new[: len(MAGIC)] + hashlib.sha256(new[HEAD:]).digest() + new[HEAD:]
        body[start:end] = new
        place = max(end for _, end in arrays.values())
        number = list(arrays).index(what)
        body[place + 4 * number : place + 4 * number + 4] = struct.pack("<I", zlib.crc32(new))
    head = struct.pack("<Q", len(header)) + bytes(header)
    sums = bytes(body[-32 - 4 * len(arrays) : -32])
    return head + bytes(body[:-32]) + hashlib.sha256(head + sums).digest()


SAVING = """
    import sys, itertools, numpy as np, linsey
    from flax import nnx

    def program(fill):
        return linsey.lower(nnx.Dict(a=nnx.Param(np.full((1 << 18,), fill, np.float32))))

    both = [program(1.0), program(2.0)]
    both[0].save(sys.argv[1])
    print("ready", flush=True)
    for each in itertools.cycle(both):
        each.save(sys.argv[1])
"""


def killed_saves(path: Path, count: int, seed: int) -> None:
    """Kills a process that saves again and again, so many times; the file must be whole."""
    rng = random.Random(seed)
    for _ in range(count):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVING), os.fspath(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        values = linsey.load(path).values
        assert values is not None
        assert set(np.unique(values["params/a"])) in ({1.0}, {2.0})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = mutations(options.count, options.seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{found.files:,} mutated files: {found.graphs:,} were graphs, the others typed errors;"
        f" slowest {1000 * found.slowest:.0f} ms; peak memory {peak:.0f} MiB"
    )
    print(f"{truncations():,} truncations: all typed errors")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        exported(whole)
        found = artefacts(whole, options.count // 20, options.seed)
        print(
            f"{found.files:,} artefacts with changes under a right checksum: {found.graphs:,} were"
            f" read, the others typed errors; slowest {1000 * found.slowest:.0f} ms"
        )
        killed_saves(Path(folder) / "a", options.kills, options.seed)
    print(f"{options.kills:,} killed saves: a whole file each time")
