"""A train step of a program with an optax optimizer: one jit over flat tuples, on one mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from linsey import _trees
from linsey.ir import EmitError, Values, ValuesError
from linsey.runtime import gradients
from linsey.runtime.call import Call, changes
from linsey.runtime.inputs import input_shardings, keys_of, read_inputs, signature_of
from linsey.runtime.optimizer_state import init_optimizer, state_shardings
from linsey.runtime.packing import Packing, packing_of
from linsey.runtime.train_state import Form, TrainState

if TYPE_CHECKING:  # which offers this as a method
    from linsey.runtime.executable import Executable


class TrainStep:
    """A train step: gradients of a loss, averaged over micro-batches, and an optax update.

    ``state, loss = step(state, *batch, rngs=...)``; where the loss function gives a pair, ``state,
    (loss, aux) = step(...)``. It is one jit. The memory of what it changes in the state is used
    again: the state that was passed in is gone. Nothing waits for the devices.

    Arrays of the batch are traced. Everything else in it (``train=True``) is static, and each new
    combination compiles once.

    Made by `linsey.runtime.Executable.train`.

    Args:
        exe: the program.
        loss: as for `linsey.runtime.Executable.value_and_grad`.
        optimizer: an optax optimizer. One that takes extra arguments gets ``value`` (the loss) and
            ``grad``.
        wrt: the slots to train: a collection, a predicate on names, or a tuple of these.
        accumulate: over how many micro-batches gradients are averaged; see
            `linsey.runtime.gradients.accumulate`. ``aux`` is then stacked, and arrays of the
            batch that have no axis are given to every micro-batch.
        stacked: whether the batch comes with its micro-batches on a leading axis of size
            ``accumulate``; otherwise micro-batch ``i`` is ``array[i::accumulate]``.
        in_shardings: how arrays of the batch lie on the mesh: one spec for all, or a tuple by
            position; None: as they come.

    Raises:
        ValuesError: ``wrt`` selects nothing, or a slot that has no gradient.
        EmitError: ``accumulate`` is not a positive number.
        PartitionError: ``in_shardings`` do not fit the mesh.
    """

    def __init__(
        self,
        exe: Executable,
        loss: Callable[..., Any],
        optimizer: Any,
        *,
        wrt: gradients.Wanted = "params",
        accumulate: int = 1,
        stacked: bool = False,
        in_shardings: Any = None,
    ) -> None:
        if type(accumulate) is not int or accumulate < 1:
            raise EmitError(
                f"found {accumulate!r}, expected a positive number",
                path="accumulate",
                fix="Pass how many micro-batches a batch is split into; 1: it is not split.",
            )
        self.exe = exe.unpacked  # the state is packed as a whole, and once
        self._packs = exe.packs
        import optax

        self.optimizer = optax.with_extra_args_support(optimizer)
        self._loss = loss
        self._wanted = gradients.chosen(exe.graph, wrt)
        self._count = accumulate
        self._stacked = stacked
        self._inputs = read_inputs(in_shardings, exe.mesh)
        self._calls: dict[Any, Call] = {}
        self._form: Form | None = None

    def init(self, rngs: Any = None, *, values: Values | None = None) -> TrainState:
        """A state to begin with, born sharded where there is a mesh.

        Args:
            rngs: as for `linsey.runtime.Executable.init`.
            values: values at hand, in place of ``rngs``. They are copied to where they belong, so
                that steps do not use up the caller's own.

        Raises:
            EmitError: the program cannot be initialised, and no values are given.
            ValuesError: the values are not those of the program.
        """
        if values is None:
            values = self.exe.init(rngs)
        else:
            values = _copied(self.exe.place(values), self.exe.shardings)
        params = values.select(*self._wanted)
        opt_state = init_optimizer(self.optimizer, params, self.exe.shardings)
        return self._fitting(TrainState(values, opt_state))

    def abstract(self, rngs: Any = None, *, values: Values | None = None) -> TrainState:
        """The state that `init` gives, as shapes, dtypes and shardings; nothing is computed.

        A checkpoint is restored into it.
        """
        state: TrainState = jax.eval_shape(lambda: self.init(rngs, values=values))
        where = self.shardings(state)
        if where is None:
            return state
        placed: TrainState = jax.tree.map(_placed_struct, state, where)
        return placed

    def shardings(self, state: TrainState) -> TrainState | None:
        """The sharding of every array of a state; None without a mesh.

        Args:
            state: a state, or its shapes and dtypes.
        """
        slots = self.exe.shardings
        if slots is None:
            return None
        params = state.values.select(*self._wanted)
        return TrainState(slots, state_shardings(state.opt_state, params, slots))

    def __call__(
        self, state: TrainState, /, *batch: Any, rngs: Any = None, **kwargs: Any
    ) -> tuple[TrainState, Any]:
        """Runs a step.

        Args:
            state: what `init` or the last step gave. It is gone afterwards.
            batch: what the loss function takes after the model.
            rngs: keys for this step, as `linsey.runtime.Executable` takes them.
            kwargs: keyword arguments of the loss function.

        Returns:
            The new state, and the loss, or the pair of it and what else the loss function gave.

        Raises:
            ValuesError: the state is not one of this program and optimizer.
            EmitError: the loss is not a real number, or the batch cannot be split.
        """
        # What is paid at every step is what stands here, and Call.__call__.
        state = self._fitting(state)
        signature, dynamic = signature_of(batch, kwargs)
        keys, stored = keys_of(rngs), state.stored
        call = self._calls.get(signature)
        if call is None:
            call = self._calls[signature] = self._compile(batch, kwargs, state, keys)
        result, after = call(stored, dynamic, keys)
        return TrainState.of_stored(state.form, after), result

    def lower(self, state: TrainState, /, *batch: Any, rngs: Any = None, **kwargs: Any) -> Any:
        """The step, lowered and not compiled: a `jax.stages.Lowered`.

        Args:
            state: a state, or what `abstract` gives.
            batch: the batch, arrays or ShapeDtypeStructs.
            rngs: keys for this step.
            kwargs: keyword arguments of the loss function.
        """
        state, keys = self._fitting(state), keys_of(rngs)
        dynamic = _trees.Arguments.split(batch, kwargs).dynamic
        return self._compile(batch, kwargs, state, keys).lower(state.stored, dynamic, keys)

    def _fitting(self, state: TrainState) -> TrainState:
        """A state in the form that this step takes.

        Raises:
            ValuesError: it is not one of this program and optimizer.
        """
        if type(state) is TrainState and state.form is self._form:
            return state
        self._check(state)
        if self._form is None:
            packing = self._packing_of(state) if self._packs else None
            self._form = Form(state.form.index, state.form.structure, packing)
        return TrainState.of_stored(self._form, state.packed(self._form.packing).stored)

    def _packing_of(self, state: TrainState) -> Packing:
        trained = set(state.values.select(*self._wanted))
        slots = [(slot.collection, slot.key in trained) for slot in self.exe.graph.slots]
        rest = len(state.arrays) - len(slots)
        where = self.shardings(state)
        return packing_of(
            list(map(_trees.value_type, state.arrays)),
            [*slots, *["the optimizer's"] * rest],
            mesh=self.exe.mesh,
            shardings=None if where is None else where.stored,
        )

    def _compile(
        self, batch: tuple[Any, ...], kwargs: Mapping[str, Any], state: TrainState, keys: Any
    ) -> Call:
        arguments = _trees.Arguments.split(batch, kwargs)
        packing, where = state.form.packing, self.shardings(state)
        plain = Form(state.form.index, state.form.structure)

        def run(arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
            before = TrainState.of_stored(plain, arrays)
            after, result = self._traced(arguments, before, dynamic, keys)
            return result, changes(arrays, after.arrays)

        if packing is not None:
            slots = packing.shardings
        else:
            slots = None if where is None else where.stored
        return Call(
            run if packing is None else functools.partial(packing.call, run),
            state.stored,
            arguments.dynamic,
            keys,
            donate=True,
            mesh=self.exe.mesh,
            slots=slots,
            inputs=input_shardings(self._inputs, arguments, self.exe.mesh),
        )

    def _check(self, state: Any) -> None:
        """Checks that a state is one of this program and optimizer."""
        if not isinstance(state, TrainState):
            raise ValuesError(
                f"found {type(state).__name__}, expected a TrainState",
                path="state",
                fix="Pass what step.init or the last step gave.",
            )
        self.exe.check_values(state.form.index)
        params = state.values.select(*self._wanted)
        own = jax.tree.structure(jax.eval_shape(self.optimizer.init, params))
        if state.form.structure != own:
            raise ValuesError(
                "the state is that of another optimizer, or of one for other slots",
                path="opt_state",
                fix="Pass what step.init or the last step gave.",
            )

    def _traced(
        self, arguments: _trees.Arguments, state: TrainState, dynamic: tuple[Any, ...], keys: Any
    ) -> tuple[TrainState, Any]:
        """What is compiled."""
        import optax

        with self.exe.around():
            (value, aux), grads, values = self._gradients(arguments, state.values, dynamic, keys)
            params = values.select(*self._wanted)
            updates, opt_state = self.optimizer.update(
                grads, state.opt_state, params, value=value, grad=grads
            )
            values = values.replace(optax.apply_updates(params, updates))
        return TrainState(values, opt_state), (value, *aux) if aux else value

    def _gradients(
        self, arguments: _trees.Arguments, values: Values, dynamic: tuple[Any, ...], keys: Any
    ) -> gradients.Result:
        def run(values: Values, dynamic: tuple[Any, ...], keys: Any) -> gradients.Result:
            args, kwargs = arguments.merge(dynamic)
            return gradients.gradients(
                self.exe, self._loss, self._wanted, values, args, kwargs, keys
            )

        if self._count == 1 and not self._stacked:
            return run(values, dynamic, keys)
        return gradients.accumulate(
            run,
            values,
            dynamic,
            keys,
            count=self._count,
            stacked=self._stacked,
            changing=self._called(arguments, values, dynamic, keys),
            params=values.select(*self._wanted),
            shardings=self.exe.shardings,
        )

    def _called(
        self, arguments: _trees.Arguments, values: Values, dynamic: tuple[Any, ...], keys: Any
    ) -> tuple[int, ...]:
        """The slots that the loss function changes on a micro-batch.

        The model is traced for it, and not again for the gradients: jax has the trace by then.
        """

        def forward(arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
            # Types tell of the mesh that they were made under: as for the gradients, all of it.
            with self.exe.around():
                stacks = gradients.split(dynamic, self._count, self._stacked)
                dynamic = gradients.micro_batch(dynamic, [s if s is None else s[0] for s in stacks])
                keys = gradients.micro_keys(keys, 0)
                args, kwargs = arguments.merge(dynamic)
                model = gradients.BoundExecutable(self.exe, Values(values.index, arrays), keys)
                gradients.scalar_loss(self._loss, model, *args, **kwargs)
                return changes(arrays, model.values.arrays)

        return tuple(jax.eval_shape(forward, values.arrays, dynamic, keys))


def _copied(values: Values, shardings: Values | None) -> Values:
    copy = jax.jit(
        lambda arrays: jax.tree.map(jax.numpy.copy, arrays),
        out_shardings=None if shardings is None else shardings.arrays,
    )
    return Values(values.index, copy(values.arrays))


def _placed_struct(array: Any, where: Any) -> Any:
    make: Any = jax.ShapeDtypeStruct  # its constructor is not annotated
    return make(array.shape, array.dtype, sharding=where)
