"""Checkpoints of several processes on this machine: `jax.distributed` with gloo."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import process_worker
import pytest

import linsey
from linsey.runtime import checkpoint

WORKER = Path(__file__).parents[1] / "support" / "process_worker.py"
SECONDS = 120
"""The longest that any of this may take; it takes a tenth."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def started(folder: Path, processes: int, **task: Any) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts the processes of a run, eight devices in all; none is left at the end.

    A field of the task that is a list has an entry for each process.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={8 // processes}")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    task |= {"folder": str(folder), "processes": processes, "port": free_port()}
    running: list[subprocess.Popen[str]] = []
    try:
        for process in range(processes):
            own = {
                key: each[process] if isinstance(each, list) else each for key, each in task.items()
            }
            with (folder / f"log_{process}").open("w") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, str(WORKER), json.dumps(own | {"process": process})],
                        env=environment,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )
        yield running
    finally:
        for each in running:
            each.kill()
            each.communicate()


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log_*")))


def finished(folder: Path, processes: int, **task: Any) -> list[dict[str, Any]]:
    """Runs to the end; gives what each process found and left."""
    with started(folder, processes, **task) as running:
        outputs = [each.communicate(timeout=SECONDS)[0] for each in running]
        assert [each.returncode for each in running] == [0] * processes, logs(folder)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def steps(results: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    return [(each["found"], each["steps"]) for each in results]


def wait_for(condition: Callable[[], bool], running: list[subprocess.Popen[str]], of: Path) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert all(each.poll() is None for each in running), logs(of)
        assert time.monotonic() < end, logs(of)
        time.sleep(0.05)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("killed", [0, 1])
def test_a_save_cut_off_by_a_kill_leaves_the_last_checkpoint_intact(
    tmp_path: Path, killed: int
) -> None:
    hangs = [process == killed for process in range(2)]
    with started(tmp_path, 2, steps=2, hangs=hangs) as running:
        wait_for((tmp_path / "hangs").exists, running, tmp_path)
        before = contents(tmp_path / "steps" / "1")
        running[killed].send_signal(signal.SIGKILL)
        running[killed].wait()
        time.sleep(0.5)
        running[1 - killed].terminate()
    left = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert left == ["1", "2.orbax-checkpoint-tmp"]
    assert list((tmp_path / "steps" / "2.orbax-checkpoint-tmp").rglob("ocdbt.process_*"))
    assert contents(tmp_path / "steps" / "1") == before

    if killed:
        # One process of eight devices, another mesh: the worker compares bit for bit, and saves
        # step 2 anew over what is left of it.
        assert steps(finished(tmp_path, 1, mesh=(2, 4), steps=1)) == [([1], [1, 2])]
        assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["1", "2"]
    else:
        check_values_here(tmp_path)


def check_values_here(folder: Path) -> None:
    """Compares the checkpoint with what was saved, in this process and without a mesh."""
    program = linsey.lower(process_worker.Model(), jnp.ones((1, 8)), train=True)
    with checkpoint.Checkpoints(folder / "steps", program) as checkpoints:
        assert checkpoints.steps() == (1,)
        values, _ = checkpoints.restore()
    expected = np.load(folder / "expected_1.npz")
    for key, value in values.items():
        assert np.asarray(value).tobytes() == expected[f"[0]['{key}']"].tobytes()


def test_one_process_saves_and_two_restore(tmp_path: Path) -> None:
    assert steps(finished(tmp_path, 1, mesh=(8, 1), steps=1)) == [([], [1])]
    found = finished(tmp_path, 2, mesh=(4, 2), steps=1)
    assert steps(found) == [([1], [1, 2])] * 2
    for each in found:
        assert "state['local']: found an array that lies in one process, exp" in each["refused"]
