"""The checkpoints of a run: steps, state, saving in the background, and its errors."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state

import linsey
from linsey.ir import CheckpointError
from linsey.runtime import Values, checkpoint
from linsey.runtime.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def program() -> linsey.Program:
    return linsey.lower(nn.Dense(64), jnp.ones((1, 64))).init(0)


def scaled(values: Values, by: int) -> Values:
    return jax.tree.map(lambda x: x * by, values)


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(one) is type(other)
        if isinstance(one, jax.Array) and jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = map(jax.random.key_data, (one, other))
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes())


# Steps.


def test_the_last_step_is_restored_or_any_other(program: linsey.Program, tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "run", program) as checkpoints:
        assert checkpoints.steps() == ()
        for step in (1, 2, 5):
            assert checkpoints.save(step, scaled(program.values, step))
        assert checkpoints.steps() == (1, 2, 5)
        assert_same(checkpoints.restore()[0], scaled(program.values, 5))
        assert_same(checkpoints.restore(2)[0], scaled(program.values, 2))
    assert checkpoint.compare(tmp_path / "run" / "5", program).is_clean
    assert_same(checkpoint.restore(tmp_path / "run" / "1", program), program.values)


def test_old_steps_go_and_steps_outside_the_interval_are_not_saved(
    program: linsey.Program, tmp_path: Path
) -> None:
    with Checkpoints(tmp_path, program, max_to_keep=2, save_interval_steps=3) as checkpoints:
        saved = [step for step in range(11) if checkpoints.save(step, program.values)]
        assert saved == [0, 3, 6, 9]
        assert checkpoints.steps() == (6, 9)
        assert checkpoints.save(10, program.values, force=True)
        assert checkpoints.steps() == (9, 10)


def test_a_run_goes_on_in_the_same_folder(program: linsey.Program, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, program) as checkpoints:
        checkpoints.save(1, program.values)
    with Checkpoints(tmp_path, program) as checkpoints:
        assert checkpoints.steps() == (1,)
        checkpoints.save(2, program.values)
    with Checkpoints(tmp_path, program) as checkpoints:
        assert checkpoints.steps() == (1, 2)


def test_another_one_sees_the_steps_of_a_run(program: linsey.Program, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, program) as writer, Checkpoints(tmp_path, program) as reader:
        assert reader.steps() == ()
        writer.save(1, program.values)
        writer.wait()
        assert reader.steps() == (1,)
        assert_same(reader.restore()[0], program.values)


def test_a_step_that_is_not_new_is_an_error(program: linsey.Program, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, program) as checkpoints:
        checkpoints.save(5, program.values)
        for step in (4, 5):
            with pytest.raises(CheckpointError, match=f"found step {step}, expected one after the"):
                checkpoints.save(step, program.values)


def test_a_step_that_is_not_there_is_an_error(program: linsey.Program, tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "run", program) as checkpoints:
        with pytest.raises(CheckpointError, match="found no complete checkpoint; there are: none"):
            checkpoints.restore()
        assert not (tmp_path / "run").exists()
        checkpoints.save(5, program.values)
        with pytest.raises(CheckpointError, match="checkpoint of step 4; there are: 5"):
            checkpoints.restore(4)


def test_a_file_is_no_folder(program: linsey.Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="found a file, expected a folder"):
        Checkpoints(tmp_path / "file", program)


def test_wrong_options_are_an_error(program: linsey.Program, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the options are wrong: ValueError: .*max_to_keep"):
        Checkpoints(tmp_path, program, max_to_keep=-1)


def test_after_close_nothing_is_done(program: linsey.Program, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, program)
    checkpoints.close()
    checkpoints.close()
    with pytest.raises(CheckpointError, match="it is closed"):
        checkpoints.save(1, program.values)
    with pytest.raises(CheckpointError, match="it is closed"):
        checkpoints.restore()


# The state beside the values.


class Pair(NamedTuple):
    a: Any
    b: Any


def test_any_pytree_is_saved_beside_the_values(program: linsey.Program, tmp_path: Path) -> None:
    state = {
        "numbered": {1: (jnp.ones(2), [jnp.zeros(3, jnp.bfloat16)]), 10: jnp.ones(1)},
        "a.b": Pair(jax.random.key(0), None),
        "a": {"b": Pair(jnp.ones(1), jnp.ones(2))},
        "empty": {},
        "none": jnp.zeros((0, 2)),
        "step": 7,
        "done": False,
        "numpy": np.arange(3, dtype=np.int64),
    }
    with Checkpoints(tmp_path, program) as checkpoints:
        checkpoints.save(1, program.values, state=state)
        _, found = checkpoints.restore(state=state)
        assert_same(found, state)
        assert checkpoints.restore()[1] is None
    assert checkpoint.compare(tmp_path / "1", program, state=state).is_clean


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.chain(optax.clip(1.0), optax.adamw(1e-3)),
        optax.adafactor(1e-3, min_dim_size_to_factor=8),
        optax.MultiSteps(optax.sgd(1e-3, momentum=0.9), 2),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    ],
    ids=["adam", "chain", "adafactor", "multi_steps", "injected"],
)
def test_an_optimizer_goes_on(
    program: linsey.Program, tmp_path: Path, optimizer: optax.GradientTransformation
) -> None:
    params = program.values.select("params")
    _, state = optimizer.update(scaled(params, 2), optimizer.init(params), params)
    with Checkpoints(tmp_path, program) as checkpoints:
        checkpoints.save(1, program.values, state=state)
        _, found = checkpoints.restore(state=jax.eval_shape(optimizer.init, params))
    assert_same(found, state)


def test_a_train_state_goes_on(program: linsey.Program, tmp_path: Path) -> None:
    state = train_state.TrainState.create(
        apply_fn=None, params=dict(program.values.items()), tx=optax.adam(1e-3)
    )
    with Checkpoints(tmp_path, program) as checkpoints:
        checkpoints.save(1, program.values, state=state)
        assert_same(checkpoints.restore(state=jax.eval_shape(lambda: state))[1], state)


def test_a_state_of_another_optimizer_is_not_loaded(
    program: linsey.Program, tmp_path: Path
) -> None:
    params = program.values.select("params")
    adam = optax.adam(1e-3)

    def restore(target: Any) -> Any:
        return checkpoints.restore(state=jax.eval_shape(lambda: target))

    with Checkpoints(tmp_path, program) as checkpoints:
        checkpoints.save(1, program.values, state=adam.init(params))
        # Flat against a chain: the same leaves, one level deeper.
        with pytest.raises(CheckpointError, match=r"(?s)5 missing, 5 extra.*: state\[0\]\[0\]\.mu"):
            restore(optax.chain(adam).init(params))
        with pytest.raises(CheckpointError, match=r"4 dtype\n  dtype: state\[0\]\.mu\['params/bia"):
            restore(adam.init(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)))
        with pytest.raises(CheckpointError, match=r"4 shape\n  shape: state\[0\]\.mu\['params/bia"):
            restore(adam.init(jax.tree.map(lambda x: x[:3], params)))
        checkpoints.save(2, program.values)
        with pytest.raises(CheckpointError, match=r"5 missing\n  missing: state\[0\]\.count"):
            restore(adam.init(params))


def test_a_state_that_cannot_be_saved_is_refused(program: linsey.Program, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, program) as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"at state\['name'\]: expected an array or a num"
        ):
            checkpoints.save(1, program.values, state={"name": "adam"})
        assert checkpoints.steps() == ()


# In the background.


def test_arrays_may_change_as_soon_as_save_returns(program: linsey.Program, tmp_path: Path) -> None:
    double = jax.jit(lambda values: scaled(values, 2), donate_argnums=0)
    values = scaled(program.values, 1)
    numpy = np.arange(1000)
    with Checkpoints(tmp_path, program) as checkpoints:
        for step in range(4):
            checkpoints.save(step, values, state={"numpy": numpy})
            values = double(values)
            numpy += 1
        for step in range(4):
            saved, state = checkpoints.restore(step, state={"numpy": numpy})
            assert_same(saved, scaled(program.values, 2**step))
            assert_same(state["numpy"], np.arange(1000) + step)


@contextlib.contextmanager
def full_disk() -> Iterator[dict[str, Any]]:
    """No file can grow beyond a megabyte; gives a state that is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"large": jax.random.normal(jax.random.key(0), (512, 1024))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        yield state
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FAILED = "ValueError: .*File too large"


def test_an_error_in_the_background_is_raised_by_wait(
    program: linsey.Program, tmp_path: Path
) -> None:
    with Checkpoints(tmp_path, program) as checkpoints:
        checkpoints.save(1, program.values)
        with full_disk() as state:
            assert checkpoints.save(2, program.values, state=state)
            with pytest.raises(CheckpointError, match=f"a save in the background failed: {FAILED}"):
                checkpoints.wait()
        # The run goes on: what was complete is there, and the same step can be saved again.
        assert checkpoints.steps() == (1,)
        assert_same(checkpoints.restore()[0], program.values)
        checkpoints.save(2, program.values, state=state)
        assert checkpoints.steps() == (1, 2)
        assert_same(checkpoints.restore(state=state)[1], state)


def test_an_error_in_the_background_is_raised_by_the_next_save(
    program: linsey.Program, tmp_path: Path
) -> None:
    with Checkpoints(tmp_path, program) as checkpoints, full_disk() as state:
        checkpoints.save(1, program.values, state=state)
        with pytest.raises(CheckpointError, match=FAILED):
            checkpoints.save(2, program.values)
        assert checkpoints.save(2, program.values)
        assert checkpoints.steps() == (2,)


def test_an_error_in_the_background_is_raised_by_close(
    program: linsey.Program, tmp_path: Path
) -> None:
    def run() -> None:
        with Checkpoints(tmp_path, program) as checkpoints:
            checkpoints.save(1, program.values, state=state)

    with full_disk() as state, pytest.raises(CheckpointError, match=FAILED):
        run()


def test_one_checkpoint_that_cannot_be_written(program: linsey.Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = "the checkpoint could not be written: NotADirectoryError"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "file" / "x", program, program.values)
