"""The checkpoints of a run, over Orbax's CheckpointManager."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from linsey.ir import CheckpointError, Values
from linsey.runtime.checkpoint import _arrays, _values
from linsey.runtime.checkpoint._report import DTypes
from linsey.runtime.checkpoint._values import PathLike


class Checkpoints:
    """The checkpoints of a run: one folder, a checkpoint per step, written in the background.

    A checkpoint is listed when it is complete, on all processes. One whose writing was cut off is
    not, and the next save of the same step removes what is left of it. An error in the background
    is raised by the next call, or by `close`. To be used in a ``with`` statement.

    Args:
        folder: where the steps go; it is made by the first save.
        program: the program, or its graph.
        max_to_keep: how many to keep, the last ones; None: all.
        save_interval_steps: `save` does nothing at other steps than multiples of it.

    Example:
        >>> import jax, linsey, tempfile
        >>> from flax import linen as nn
        >>> from linsey.runtime import checkpoint
        >>> program = linsey.lower(nn.Dense(2), jax.numpy.ones((1, 3))).init(0)
        >>> folder = tempfile.mkdtemp()
        >>> with checkpoint.Checkpoints(folder, program, max_to_keep=2) as checkpoints:
        ...     for step in range(3):
        ...         saved = checkpoints.save(step, program.values, state={"step": step})
        ...     values, state = checkpoints.restore(state={"step": 0})
        ...     checkpoints.steps(), state
        ((1, 2), {'step': 2})
    """

    def __init__(
        self,
        folder: PathLike,
        program: Any,
        *,
        max_to_keep: int | None = None,
        save_interval_steps: int = 1,
    ) -> None:
        self.folder = _arrays.folder(folder)
        self._graph = _values.graph_of(program)
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(
                "found a file, expected a folder",
                path=str(self.folder),
                fix="Give the folder that holds, or shall hold, the steps.",
            )
        with _arrays.translated(str(self.folder), "the options are wrong"):
            options = ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep, save_interval_steps=save_interval_steps, create=False
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._is_open = True

    def save(self, step: int, values: Values, *, state: Any = None, force: bool = False) -> bool:
        """Starts to write a checkpoint, and returns as soon as the arrays may change.

        Args:
            step: its number, greater than those before.
            values: a value for every persistent slot.
            state: a pytree of arrays and numbers to save beside them: an optimizer's state, a
                TrainState, a counter.
            force: whether to save outside the interval too.

        Returns:
            Whether it is saved: False outside the interval.

        Raises:
            CheckpointError: the step is not a new one; a value is missing or of a kind that cannot
                be saved; or an earlier save failed.
        """
        if not self._opened().is_saving_in_progress():
            self.wait()
        last = self._manager.latest_step()
        if last is not None and step <= last:
            raise CheckpointError(
                f"found step {step}, expected one after the last, {last}",
                path=str(self.folder),
                fix="Number the steps on from the restored one; to go back behind the last, save"
                " into another folder.",
            )
        if not force and not self._manager.should_save(step):
            return False
        args = _values.save_args(self._graph, values, state)
        with _arrays.translated(str(self.folder / str(step)), "the save failed"):
            self._manager.save(step, args=args, force=True)
        return True

    def steps(self) -> tuple[int, ...]:
        """The steps that are complete, those that another program wrote included."""
        self.wait()
        self._manager.reload()
        return tuple(self._manager.all_steps())

    def restore(
        self,
        step: int | None = None,
        *,
        state: Any = None,
        shardings: Any = None,
        dtype: DTypes = None,
        collections: tuple[str, ...] | None = None,
        values: Values | None = None,
        ignore_extra: bool = False,
    ) -> tuple[Values, Any]:
        """Reads a checkpoint; see `restore`.

        Args:
            step: its number; None: the last one.
            state: what the saved state is: a pytree of the same structure, of arrays or
                `jax.ShapeDtypeStruct`, such as ``jax.eval_shape(optimizer.init, params)``. Each
                leaf is read into the sharding that stands here, if there is one.
            shardings: as for `restore`.
            dtype: as for `restore`; it does not cast the state.
            collections: as for `restore`.
            values: as for `restore`.
            ignore_extra: as for `restore`.

        Returns:
            The values; and the state, or None where it was not asked for.

        Raises:
            CheckpointError: as for `restore`; or the state is another one.
        """
        return _values.restore(
            self.folder / str(self._complete(step)),
            self._graph,
            state,
            shardings=shardings,
            dtype=dtype,
            collections=collections,
            values=values,
            ignore_extra=ignore_extra,
        )

    def _complete(self, step: int | None) -> int:
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            what = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
            raise CheckpointError(
                f"found no {what}; there are: {', '.join(map(str, steps)) or 'none'}",
                path=str(self.folder),
                fix="Give the folder that Checkpoints saved into, and one of its steps.",
            )
        return steps[-1] if step is None else step

    def wait(self) -> None:
        """Waits until all saves are complete.

        Raises:
            CheckpointError: one of them failed.
        """
        with _arrays.translated(str(self.folder), "a save in the background failed"):
            self._opened().wait_until_finished()

    def _opened(self) -> Any:
        if not self._is_open:
            raise CheckpointError(
                "it is closed",
                path=str(self.folder),
                fix="Save and restore inside the with statement.",
            )
        return self._manager

    def close(self) -> None:
        """Waits until all saves are complete, and ends the threads.

        Raises:
            CheckpointError: a save failed.
        """
        if not self._is_open:
            return
        try:
            self.wait()
        finally:
            self._is_open = False
            with _arrays.translated(str(self.folder), "a save in the background failed"):
                self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
