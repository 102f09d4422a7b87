"""Born-sharded init of a model of 1 GB on eight faked devices, against the same written by hand.

Each measurement is a process of its own, so that its peak memory is its own: the growth of the
process from before the init to its peak. The two take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

TARGET = 1.1
FLAGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
WIDTH, LAYERS = 2048, 16  # 16 blocks of 2 x 2048 x 4096 float32: 1 GiB


def _peak() -> int:
    """The most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(which: str, api: str) -> dict[str, float]:
    """Time and peak memory of one init, in this process."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from flax import nnx
    from jax.sharding import AxisType

    import linsey

    init = nn.initializers.lecun_normal()
    names = (("embed", "mlp"), ("mlp", "embed"))
    rules = (("embed", "data"), ("mlp", "model"))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for _ in range(LAYERS):
                up, down = (nn.with_logical_partitioning(init, each) for each in names)
                x = nn.Dense(2 * WIDTH, use_bias=False, kernel_init=up)(x)
                x = nn.Dense(WIDTH, use_bias=False, kernel_init=down)(x)
            return x

    class NNX(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            sizes = ((WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH))
            self.layers = nnx.List(
                nnx.Linear(
                    *size,
                    use_bias=False,
                    kernel_init=init,
                    kernel_metadata={"out_sharding": each, "sharding_rules": rules},
                    rngs=rngs,
                )
                for _ in range(LAYERS)
                for size, each in zip(sizes, names, strict=True)
            )

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((1, WIDTH), "float32")
    jax.jit(lambda key: jax.random.normal(key, (8,)))(jax.random.key(0))  # jax is up

    def by_hand_linen() -> Any:
        model = Linen()
        ones = jnp.ones(x.shape, x.dtype)
        abstract = jax.eval_shape(model.init, jax.random.key(0), ones)
        where = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)
        return jax.jit(model.init, out_shardings=where)(jax.random.key(0), ones)

    def by_hand_nnx() -> Any:
        def make() -> Any:
            return nnx.state(NNX(nnx.Rngs(0)))

        with jax.set_mesh(mesh):
            where = nnx.get_named_sharding(jax.eval_shape(make), mesh)
            return jax.jit(make, out_shardings=where)()

    def ours() -> Any:
        if api == "linen":
            program = linsey.lower(Linen(), x)
        else:
            program = linsey.lower(lambda rngs: NNX(rngs), rngs=0)
        return program.compile(mesh=mesh, rules=rules).init(0)

    run = ours if which == "linsey" else {"linen": by_hand_linen, "nnx": by_hand_nnx}[api]
    before, start = _peak(), time.perf_counter()
    values = jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(values))
    shards = {len(leaf.addressable_shards) for leaf in jax.tree.leaves(values) if leaf.ndim}
    assert shards == {8}, shards
    sizes = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(values)]
    assert sum(sizes) * 8 <= total * 1.01, "something is not split"
    return {"seconds": seconds, "bytes": _peak() - before, "model": total}


def main(rounds: int) -> None:
    """Prints the medians of both, and of their ratios within a round."""
    for api in ("linen", "nnx"):
        found: dict[str, list[dict[str, float]]] = {"by hand": [], "linsey": []}
        for number in range(rounds):
            for which in sorted(found, reverse=bool(number % 2)):
                command = [sys.executable, __file__, "--one", which, "--api", api]
                out = subprocess.run(
                    command, env={**os.environ, **FLAGS}, check=True, capture_output=True, text=True
                )
                found[which].append(json.loads(out.stdout.splitlines()[-1]))
        print(f"{api}: {found['linsey'][0]['model'] / 2**30:.2f} GiB, {rounds} rounds")
        for what, unit in (("seconds", 1.0), ("bytes", 2**30)):
            hand, ours = ([each[what] for each in found[which]] for which in ("by hand", "linsey"))
            ratio = statistics.median(a / b for a, b in zip(ours, hand, strict=True))
            print(
                f"  {what}: by hand {statistics.median(hand) / unit:.2f},"
                f" linsey {statistics.median(ours) / unit:.2f}, ratio {ratio:.2f}"
                f" (target {TARGET})"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=["by hand", "linsey"])
    parser.add_argument("--api", choices=["linen", "nnx"], default="linen")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_measure(options.one, options.api)))
    else:
        main(options.rounds)
