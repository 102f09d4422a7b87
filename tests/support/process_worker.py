"""One process of a training run; `tests/runtime/test_processes.py` starts it.

Run as ``python process_worker.py JSON``, with the fields of `Task`.
"""

import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import linsey
from linsey.runtime import checkpoint

RULES = [("batch", "data"), ("embed", "data"), ("mlp", "model")]
OPTIMIZER = optax.adam(1e-2)


@dataclasses.dataclass
class Task:
    """What the process does: it goes on from the last checkpoint, or starts, and trains."""

    folder: str
    process: int = 0
    processes: int = 1
    port: int = 0
    mesh: tuple[int, int] = (4, 2)
    steps: int = 0
    """How many steps to train; each is saved."""
    hangs: bool = False
    """Whether this process stops for ever in the middle of the last save."""


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.Dense(16, kernel_init=init)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(8, kernel_init=init)(x)


def _state(params: Any) -> dict[str, Any]:
    """What is saved beside the values: any pytree."""
    return {
        "optimizer": OPTIMIZER.init(params),
        "key": jax.random.key(1),
        "step": jnp.uint32(0),
    }


class Run:
    def __init__(self, task: Task) -> None:
        self.task = task
        self.folder = Path(task.folder)
        self.mesh = jax.make_mesh(
            task.mesh, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)
        )
        self.program = linsey.lower(Model(), jnp.ones((1, 8)), train=True)
        self.exe = self.program.compile(mesh=self.mesh, rules=RULES)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.train_step = jax.jit(self._train_step, donate_argnums=(0, 1))
        self.values = self.exe.init(0)
        params = self.values.select("params")
        self.state = jax.jit(
            _state, out_shardings=self._state_shardings(jax.eval_shape(_state, params))
        )(params)

    def _state_shardings(self, state: Any) -> Any:
        """The optimizer's moments lie as their parameters do; the rest is replicated."""
        shardings = jax.tree.map(lambda _: self.replicated, state)
        shardings["optimizer"] = optax.tree_map_params(
            OPTIMIZER,
            lambda _, sharding: sharding,
            state["optimizer"],
            self.exe.shardings.select("params"),
            transform_non_params=lambda _: self.replicated,
        )
        return shardings

    def _train_step(self, values: Any, state: Any, x: Any) -> Any:
        params = values.select("params")

        def loss(params: Any) -> Any:
            y, after = self.exe(values.replace(params), x, train=True)
            return jnp.mean((y - x) ** 2), after

        grads, after = jax.grad(loss, has_aux=True)(params)
        updates, optimizer = OPTIMIZER.update(grads, state["optimizer"], params)
        state = {
            "optimizer": optimizer,
            "key": jax.random.fold_in(state["key"], state["step"]),
            "step": state["step"] + 1,
        }
        return after.replace(optax.apply_updates(params, updates)), state

    def step(self, number: int) -> None:
        data = np.random.default_rng(number).standard_normal((8, 8)).astype(np.float32)
        x = jax.make_array_from_callback(
            data.shape, NamedSharding(self.mesh, PartitionSpec("data")), lambda at: data[at]
        )
        self.values, self.state = self.train_step(self.values, self.state, x)

    def arrays(self) -> dict[str, np.ndarray]:
        """All values and the state, each whole, by place."""

        def plain(leaf: Any) -> Any:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.key_data(leaf) if is_key else leaf

        whole = jax.jit(lambda tree: jax.tree.map(plain, tree), out_shardings=self.replicated)(
            (self.values, self.state)
        )
        return {
            jax.tree_util.keystr(at): np.asarray(leaf.addressable_data(0))
            for at, leaf in jax.tree.leaves_with_path(whole)
        }

    def save(self, checkpoints: checkpoint.Checkpoints, number: int) -> None:
        arrays = self.arrays()
        if self.task.process == 0:
            np.savez(self.folder / f"expected_{number}.npz", **arrays)
        checkpoints.save(number, self.values, state=self.state)

    def refused(self, checkpoints: checkpoint.Checkpoints) -> str:
        """The error for an array that each process made for itself."""
        try:
            checkpoints.save(99, self.values, state={"local": jnp.zeros(2)})
        except linsey.LinseyError as error:
            return str(error)
        return ""

    def resume(self, checkpoints: checkpoint.Checkpoints) -> int:
        """Restores the last checkpoint, and checks it bit for bit; gives its step."""
        last = checkpoints.steps()[-1]
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            self.state,
        )
        self.values, self.state = checkpoints.restore(shardings=self.exe.shardings, state=target)
        for key, value in self.values.items():
            assert value.sharding == self.exe.shardings[key], (key, value.sharding)
        expected = np.load(self.folder / f"expected_{last}.npz")
        found = self.arrays()
        assert set(found) == set(expected.files)
        for name, array in found.items():
            assert array.dtype == expected[name].dtype, name
            assert array.tobytes() == expected[name].tobytes(), name
        return last


class Forever(ocp.Future):
    """Stands for the arrays that are never written; the others are on the disk by then."""

    def __init__(self, written: list[Any], sign: Path) -> None:
        self.written, self.sign = written, sign

    def result(self, timeout: float | None = None) -> None:
        for future in self.written:
            future.result(timeout)
        self.sign.touch()
        time.sleep(600)


def hang_in_next_save(sign: Path) -> None:
    """Lets Orbax write half of the arrays of this process, make a file, and wait for ever."""
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    whole = handler.serialize

    async def half(values: Any, infos: Any, args: Any) -> Any:
        some = slice(0, len(values) // 2)
        return [Forever(list(await whole(values[some], infos[some], args[some])), sign)]

    handler.serialize = half


def main(task: Task) -> None:
    signal.alarm(150)  # whatever becomes of the one that started it
    if task.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{task.port}", task.processes, task.process, initialization_timeout=60
        )
    assert jax.device_count() == 8
    run = Run(task)
    with checkpoint.Checkpoints(run.folder / "steps", run.program) as checkpoints:
        steps = checkpoints.steps()
        first = run.resume(checkpoints) if steps else 0
        for number in range(first + 1, first + 1 + task.steps):
            run.step(number)
            if task.hangs and number == first + task.steps:
                checkpoints.wait()
                hang_in_next_save(run.folder / "hangs")
            run.save(checkpoints, number)
        result = {"found": steps, "steps": checkpoints.steps()}
        if task.processes > 1:
            result["refused"] = run.refused(checkpoints)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
