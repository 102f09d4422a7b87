"""The loss of a program and its gradients, for a whole batch or micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from linsey import _trees
from linsey.ir import EmitError, Graph, TensorType, Values, ValuesError, ValueType, slot_index
from linsey.runtime import sharding

if TYPE_CHECKING:  # which offers these functions as methods
    from linsey.runtime.executable import Executable

Wanted: TypeAlias = str | Callable[[str], bool] | tuple[str | Callable[[str], bool], ...]
"""Slots, as `Values.select` takes them: a collection, a predicate on names, or several of these."""

Result: TypeAlias = tuple[tuple[Any, tuple[Any, ...]], Values, Values]
"""The loss with what else the loss function gave (a tuple of none or one), the gradients, and the
values afterwards."""


class BoundExecutable:
    """A program with its values, as a loss function calls it.

    A call keeps what it changes (batch statistics, counters), so that the next call goes on from
    there.
    """

    __slots__ = ("_exe", "rngs", "values")

    def __init__(self, exe: Executable, values: Values, rngs: Any = None) -> None:
        self._exe = exe
        self.values = values
        """The values now."""
        self.rngs = rngs
        """The keys that calls get which bring none of their own."""

    def __call__(self, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        """Calls the program; gives its output alone.

        Args:
            args: positional arguments.
            rngs: keys for this call; None: those of the step. As with ``Module.apply``, two calls
                with the same keys draw the same.
            kwargs: keyword arguments.
        """
        keys = self.rngs if rngs is None else rngs
        output, self.values = self._exe(self.values, *args, rngs=keys, **kwargs)
        return output


def chosen(graph: Graph, wrt: Wanted) -> tuple[str | Callable[[str], bool], ...]:
    """What to differentiate by, checked.

    Raises:
        ValuesError: it selects no slot, or one that has no gradient.
    """
    wanted = wrt if isinstance(wrt, tuple) else (wrt,)
    types = Values(slot_index(graph), tuple(slot.type for slot in graph.slots)).select(*wanted)
    if not len(types):
        raise ValuesError(
            f"wrt={wrt!r} selects none of the {len(graph.slots)} slots",
            path="wrt",
            fix="Pass the name of a collection, or a predicate on names as print(program) shows.",
        )
    for key, kind in types.items():
        if not _is_differentiable(kind):
            raise ValuesError(
                f"found {kind}, expected floating point: it has no gradient",
                path=key,
                fix="Leave it out: wrt=lambda name: name.endswith('kernel'), say.",
            )
    return wanted


def _is_differentiable(kind: ValueType) -> bool:
    leaves = (kind,) if isinstance(kind, TensorType) else kind.leaves
    return all(
        leaf.dtype in ("float", "complex")
        or (not leaf.dtype.startswith("key<") and _is_inexact(leaf.dtype))
        for leaf in leaves
    )


def _is_inexact(dtype: str) -> bool:
    return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.inexact))


def scalar_loss(loss: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a loss function; gives the loss, and a tuple of none or one: what else it gave.

    Raises:
        EmitError: the loss is not one real number.
    """
    value = loss(model, *args, **kwargs)
    aux: tuple[Any, ...] = ()
    if isinstance(value, tuple) and len(value) == 2:
        value, aux = value[0], (value[1],)
    if not _trees.is_array(value) and not isinstance(value, float):
        raise _no_loss(type(value).__name__)
    kind = _trees.tensor_type(value)
    if kind.shape or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise _no_loss(str(kind))
    return value, aux


def _no_loss(found: str) -> EmitError:
    return EmitError(
        f"the loss function gave {found}, expected one real number, or the pair of it and anything",
        path="loss",
        fix="Reduce it: return jnp.mean(losses), or jnp.mean(losses), metrics.",
    )


def value_and_grad(exe: Executable, loss: Callable[..., Any], *, wrt: Wanted = "params") -> Any:
    """See `linsey.runtime.Executable.value_and_grad`."""
    wanted = chosen(exe.graph, wrt)

    def run(values: Values, /, *batch: Any, rngs: Any = None, **kwargs: Any) -> Any:
        keys = None if rngs is None else _trees.key_dict(rngs)
        (value, aux), grads, after = gradients(exe, loss, wanted, values, batch, kwargs, keys)
        return (value, aux[0] if aux else None), grads, after

    return run


def gradients(
    exe: Executable,
    loss: Callable[..., Any],
    wanted: tuple[Any, ...],
    values: Values,
    batch: tuple[Any, ...],
    kwargs: dict[str, Any],
    keys: Any,
) -> Result:
    """The loss, the gradients by the wanted slots, and the values afterwards."""
    exe.check_values(values)

    def objective(params: Values) -> Any:
        model = BoundExecutable(exe, values.replace(params), keys)
        value, aux = scalar_loss(loss, model, *batch, **kwargs)
        return value, (aux, model.values)

    params = values.select(*wanted)
    (value, (aux, after)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return (value, aux), kept(grads, exe.shardings), after


def split(dynamic: tuple[Any, ...], count: int, stacked: bool) -> tuple[Any, ...]:
    """Arrays of a batch as micro-batches on a leading axis; one without axes is None.

    Micro-batch ``i`` of ``count`` holds the rows ``i, i + count, i + 2 * count, ...``. So rows that
    lie on several devices stay where they are, which they would not if each took a run of rows.

    Raises:
        EmitError: the leading axis does not divide, or is not ``count`` where ``stacked`` says so.
    """
    return tuple(
        None if not jnp.ndim(array) else _split(number, array, count, stacked)
        for number, array in enumerate(dynamic)
    )


def _split(number: int, array: Any, count: int, stacked: bool) -> Any:
    size, rest = array.shape[0], array.shape[1:]
    if stacked and size != count:
        raise EmitError(
            f"found {_trees.tensor_type(array)}, expected {count} micro-batches on the first axis",
            path=f"batch, array {number}",
            fix=f"Pass arrays of shape ({count}, rows, ...), or stacked=False.",
        )
    if stacked:
        return array
    if size % count:
        raise EmitError(
            f"the first axis of {_trees.tensor_type(array)} does not divide into {count}"
            " micro-batches",
            path=f"batch, array {number}",
            fix=f"Pass a multiple of {count} rows, or another accumulate=.",
        )
    return jnp.moveaxis(array.reshape(size // count, count, *rest), 1, 0)


def accumulate(
    run: Callable[[Values, tuple[Any, ...], Any], Result],
    values: Values,
    dynamic: tuple[Any, ...],
    keys: Any,
    *,
    count: int,
    stacked: bool,
    changing: tuple[int, ...],
    params: Values,
    shardings: Values | None,
) -> Result:
    """Gradients averaged over micro-batches, one after the other in a ``lax.scan``.

    The average is that of ``optax.MultiSteps``: from zero, ``mean += (gradient - mean) / (i + 1)``
    for micro-batch ``i``, in float32 (or in the gradient's own dtype where that is wider), and in
    the gradient's dtype in the end. The values that a micro-batch changes go into the next one.
    Micro-batch ``i`` gets the keys ``jax.random.fold_in(key, i)``.

    Args:
        run: gives the result for values, one micro-batch and its keys.
        values: the values at first.
        dynamic: the arrays of the batch.
        keys: the keys of the step, or None.
        count: how many micro-batches.
        stacked: whether they lie on the leading axis already.
        changing: the slots that a micro-batch may change, by position.
        params: the parameters.
        shardings: the sharding of each slot, or None.

    Returns:
        The mean of the losses with what else the loss function gave, stacked; the averaged
        gradients; the values afterwards.
    """
    whole = split(dynamic, count, stacked)

    def body(carry: Any, micro: Any) -> Any:
        state, mean = carry
        number, arrays = micro
        batch, own = micro_batch(dynamic, arrays), micro_keys(keys, number)
        (value, aux), grads, after = run(_with(values, changing, state), batch, own)
        mean = jax.tree.map(lambda old, new: _toward(old, new, number), mean, grads)
        return (_at(after, changing), kept(mean, shardings)), (value, aux)

    zeros = kept(jax.tree.map(_zeros, params), shardings)
    (state, mean), (losses, aux) = jax.lax.scan(
        body, (_at(values, changing), zeros), (jnp.arange(count), whole)
    )
    grads = jax.tree.map(lambda array, param: array.astype(jnp.result_type(param)), mean, params)
    return (jnp.mean(losses), aux), grads, _with(values, changing, state)


def micro_batch(dynamic: tuple[Any, ...], arrays: Sequence[Any]) -> tuple[Any, ...]:
    """One micro-batch: its own arrays, and those of the batch that were not split."""
    return tuple(
        given if array is None else array for given, array in zip(dynamic, arrays, strict=True)
    )


def micro_keys(keys: Any, number: Any) -> Any:
    """The keys of one micro-batch."""
    return keys and {name: jax.random.fold_in(key, number) for name, key in keys.items()}


def _zeros(param: Any) -> Any:
    return jnp.zeros_like(param, dtype=jnp.promote_types(jnp.result_type(param), jnp.float32))


def _toward(mean: Any, grad: Any, number: Any) -> Any:
    return (mean + (grad - mean) / (number + 1)).astype(mean.dtype)


def kept(params: Values, shardings: Values | None) -> Values:
    """Held where the parameters lie.

    The compiler would be free to gather gradients on each device, and to add up their norms in an
    order of its own. Explicit axes need no constraint: types say where gradients lie.
    """
    if shardings is None or not shardings.arrays:
        return params
    if sharding.is_explicit(shardings.arrays[0].mesh):
        return params
    constrain: Any = jax.lax.with_sharding_constraint  # it is not annotated
    held = (constrain(array, shardings[key]) for key, array in params.items())
    return Values(params.index, tuple(held))


def _at(values: Values, positions: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(values.arrays[position] for position in positions)


def _with(values: Values, positions: tuple[int, ...], arrays: tuple[Any, ...]) -> Values:
    new = list(values.arrays)
    for position, array in zip(positions, arrays, strict=True):
        new[position] = array
    return Values(values.index, tuple(new))
