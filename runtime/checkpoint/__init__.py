"""Checkpoints of values by Orbax, with the graph beside them.

A checkpoint is a folder. The arrays of the persistent slots lie in it by name (``values``), the
leaves of a pytree such as an optimizer's state (``state``), and a JSON document (``graph``) that
holds the graph and says which slots there are, with all their names, shapes and dtypes. Every
function here is called by all processes of a `jax.distributed` program alike.
"""

from __future__ import annotations

from typing import Any

from linsey.ir import CheckpointError, Values
from linsey.runtime.checkpoint import _arrays, _values
from linsey.runtime.checkpoint._manager import Checkpoints
from linsey.runtime.checkpoint._report import DTypes, Report
from linsey.runtime.checkpoint._values import PathLike

__all__ = ["Checkpoints", "Report", "compare", "restore", "save"]


def save(
    path: PathLike,
    program: Any,
    values: Values,
    *,
    collections: tuple[str, ...] | None = None,
) -> None:
    """Writes one checkpoint, and returns when it is complete.

    Ephemeral slots (a decoding cache, intermediates) are left out.

    Args:
        path: its folder, which must not exist yet.
        program: the program, or its graph.
        values: a value for every slot that is saved.
        collections: save these collections only.

    Raises:
        CheckpointError: the folder exists, or a value is missing or of a kind that cannot be saved.

    Example:
        >>> import jax, linsey, tempfile
        >>> from flax import linen as nn
        >>> from linsey.runtime import checkpoint
        >>> program = linsey.lower(nn.Dense(2), jax.numpy.ones((1, 3))).init(0)
        >>> path = tempfile.mkdtemp() + "/first"
        >>> checkpoint.save(path, program, program.values)
        >>> print(checkpoint.compare(path, program).is_clean)
        True
        >>> values = checkpoint.restore(path, program, dtype="bfloat16")
        >>> values["params/kernel"].dtype
        dtype(bfloat16)
    """
    folder = _arrays.folder(path)
    args = _values.save_args(_values.graph_of(program), values, collections=collections)
    if folder.exists():
        raise CheckpointError(
            "found something there already, expected a new folder",
            path=str(folder),
            fix="Choose another path, or remove it; `Checkpoints` keeps several in one folder.",
        )
    _arrays.write(folder, args)


def compare(
    path: PathLike,
    program: Any,
    *,
    collections: tuple[str, ...] | None = None,
    dtype: DTypes = None,
    state: Any = None,
) -> Report:
    """Compares a checkpoint with a program; loads no array.

    Args:
        path: the checkpoint's folder.
        program: the program, or its graph.
        collections: compare these collections only.
        dtype: as `restore` takes it.
        state: what the pytree beside the values should be; None: it is not compared.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    stored = _arrays.describe(path)
    comparison = _values.compare(
        stored, _values.graph_of(program), state, dtype=dtype, collections=collections
    )
    return comparison.report()


def restore(
    path: PathLike,
    program: Any,
    *,
    shardings: Any = None,
    dtype: DTypes = None,
    collections: tuple[str, ...] | None = None,
    values: Values | None = None,
    ignore_extra: bool = False,
) -> Values:
    """Reads a checkpoint, each array straight into its sharding.

    Before anything is read the checkpoint is compared with the program, as by `compare`. A tied
    slot is found by any of its paths.

    Args:
        path: the checkpoint's folder.
        program: the program, or its graph.
        shardings: where the values go: a `jax.sharding.Sharding` for each slot, as
            ``Executable.shardings`` gives them, as a mapping from names of slots or as a sequence
            in the order of the slots; or one for all. None, here or for a slot: the first device.
        dtype: a floating dtype that the floating slots are cast to; or a mapping from collection
            to dtype; or a function of a slot's name that gives one or None. Without it a slot that
            was saved in another dtype is an error.
        collections: restore these collections only.
        values: what is not restored is taken from here: ephemeral slots, which no checkpoint
            holds, and other collections.
        ignore_extra: whether the checkpoint may hold slots that the program has not.

    Returns:
        A value for every slot; with ``collections`` and without ``values``, for those restored.

    Raises:
        CheckpointError: there is no checkpoint; it is damaged; or it does not fit the program, with
            the report of `compare`.
    """
    return _values.restore(
        path,
        _values.graph_of(program),
        None,
        shardings=shardings,
        dtype=dtype,
        collections=collections,
        values=values,
        ignore_extra=ignore_extra,
    )[0]
