"""A program compiled by jit over the flat tuple of its slots."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh

from linsey import _trees
from linsey.backends import Runner
from linsey.ir import EmitError, Graph, Values, slot_index
from linsey.runtime import _flax, gradients, sharding
from linsey.runtime._checks import called_name, no_init, not_ours
from linsey.runtime.artefact import MappedValues
from linsey.runtime.call import Call, PlainCall, Traced, changes, updated
from linsey.runtime.inputs import input_shardings, keys_of, read_inputs, signature_of
from linsey.runtime.packing import PackedValues, Packing, packed, packing_of
from linsey.runtime.training import TrainStep


class Executable:
    """Runs one method of a program under jit.

    The jit boundary is the flat tuple of slot values: no tree is walked per call. Only the slots
    that a call changes are outputs. Arguments that are arrays are traced; everything else
    (``train=True``, a string, None, a Python number) is static, and each new combination of static
    arguments compiles once. Can be called inside ``jax.jit``, ``jax.grad`` and ``jax.vmap``.

    With a mesh, the slots lie on it as their partitions and the rules say, before and after each
    call: `init` makes them there, values that lie elsewhere are moved there, and the model runs
    with the mesh and the rules around it, so that its own constraints hold.

    Made by `linsey.Program.compile`.

    Args:
        graph: the structure.
        run: runs its root.
        init: gives concrete values from PRNG keys, or None.
        method: the method, by name or as a function of the module; None: the call.
        mutable: the collections that a call may change; None: the source's default.
        capture: collections of state that calls make and no slot holds (``intermediates``), to be
            returned beside the output.
        donate: whether a call may reuse the memory of the slots that it changes.
        mesh: the mesh that the slots lie on, or None.
        rules: pairs of a logical axis and mesh axes; None: see `linsey.Program.compile`.
        in_shardings: how the arguments of calls lie on the mesh; None: as they come.
        pack: whether small slots share buffers; see `linsey.Program.compile`.
        share_traces: whether layers of equal structure are traced once; see the same.

    Raises:
        PartitionError: a slot, the rules or ``in_shardings`` do not fit the mesh.
    """

    def __init__(
        self,
        graph: Graph,
        run: Runner,
        init: Callable[[Any], Values] | None,
        *,
        method: Any = None,
        mutable: Any = None,
        capture: tuple[str, ...] = (),
        donate: bool = False,
        mesh: Mesh | None = None,
        rules: Any = None,
        in_shardings: Any = None,
        pack: bool = False,
        share_traces: bool = False,
    ) -> None:
        self.graph = graph
        self.mesh = mesh
        """The mesh, or None."""
        self.shardings = None if mesh is None else sharding.shardings(graph, mesh, rules)
        """The sharding of each slot, by name; None without a mesh."""
        self._rules = sharding.rules_in_force(rules)
        self._inputs = read_inputs(in_shardings, mesh)
        self._packing = self._packing_of(graph) if pack else None
        self._unpacked: Executable | None = None
        self.method = method
        self._init = init
        self._index = slot_index(graph)
        self._run = run
        self._run.share_traces = share_traces
        self._mutable = _with_capture(self._run, mutable, capture)
        self._capture = capture
        self._donate = donate
        self._compiled: dict[Any, Any] = {}
        self._quick: dict[tuple[type, ...], Any] = {}
        self._jitted_init: Any = None

    def _packing_of(self, graph: Graph) -> Packing:
        return packing_of(
            [slot.type for slot in graph.slots],
            [slot.collection for slot in graph.slots],
            mesh=self.mesh,
            shardings=None if self.shardings is None else self.shardings.arrays,
        )

    @property
    def packs(self) -> bool:
        """Whether small slots share buffers."""
        return self._packing is not None

    @property
    def unpacked(self) -> Executable:
        """The same without packing."""
        if not self.packs:
            return self
        if self._unpacked is None:
            self._unpacked = copy.copy(self)
            self._unpacked._packing = None
            self._unpacked._compiled, self._unpacked._quick = {}, {}
        return self._unpacked

    def init(self, rngs: Any = None) -> Values:
        """Concrete values, initialised under jit.

        With a mesh they are born sharded: each device makes its own shards, and neither a device
        nor the host ever holds a whole slot that is split.

        Args:
            rngs: an int seed, a jax key, a dict of keys by stream, or nnx.Rngs.

        Raises:
            EmitError: the program was lowered from a live module, or loaded.
        """
        if self._init is None:
            raise no_init()
        if self._jitted_init is None:
            slots = None if self.shardings is None else self.shardings.arrays
            self._jitted_init = jax.jit(self._traced_init, out_shardings=slots)
        seed = _seed(rngs)
        if self.mesh is not None:
            seed = sharding.near(seed, self.mesh)
        arrays: tuple[Any, ...] = self._jitted_init(seed)
        return self._values(self._stored(Values(self._index, arrays)))

    def _traced_init(self, rngs: Any) -> tuple[Any, ...]:
        assert self._init is not None
        has_boxes = any(slot.box is not None for slot in self.graph.slots)
        with self.around(is_init=has_boxes):
            return self._init(rngs).arrays

    def place(self, values: Values) -> Values:
        """Values where the program wants them: on the mesh, each slot on its sharding.

        Args:
            values: values of this program, on the host or on any devices.

        Returns:
            The values; those that lie right already are the very objects. Without a mesh and
            packing, the values as they are.

        Raises:
            ValuesError: the values are not those of this program, or of another shape.
        """
        self.check_values(values)
        if self.shardings is not None:
            arrays = values.mapped if isinstance(values, MappedValues) else values.arrays
            _trees.check_shapes(self.graph, arrays)
            values = Values(self._index, sharding.put(arrays, self.shardings.arrays))
        return self._values(self._stored(values))

    def _values(self, stored: tuple[Any, ...]) -> Values:
        if self._packing is None:
            return Values(self._index, stored)
        return PackedValues(self._index, self._packing, stored)

    def _stored(self, values: Values) -> tuple[Any, ...]:
        """What the jit boundary takes: a value per slot, or the buffers."""
        if self._packing is None:
            return values.arrays
        if isinstance(values, PackedValues) and values.packing == self._packing:
            return values.stored
        arrays = values.arrays
        if self.shardings is not None:
            arrays = sharding.put(arrays, self.shardings.arrays)
        return packed(self._packing, arrays)

    @property
    def _stored_on(self) -> tuple[Any, ...] | None:
        """The shardings of what the jit boundary takes."""
        if self._packing is not None:
            return self._packing.shardings
        return None if self.shardings is None else self.shardings.arrays

    def around(self, *, is_init: bool = False) -> AbstractContextManager[None]:
        """What the model's code finds around it when it is traced."""
        if self.mesh is None:
            return nullcontext()
        # Linen's boxes cannot be initialised with explicit axes around: by hand one leaves them
        # out, and gets the bits of a computation that XLA splits as it likes.
        hides = is_init and sharding.is_explicit(self.mesh)
        return sharding.tracing_on(None if hides else self.mesh, self._rules)

    def check_values(self, values: object) -> None:
        """Checks that values are those of this program.

        Raises:
            ValuesError: they are not.
        """
        index = values.index if isinstance(values, Values) else values
        if index is not self._index and index != self._index:
            raise not_ours(index, self._index)

    def __call__(
        self, values: Values, /, *args: Any, rngs: Any = None, **kwargs: Any
    ) -> tuple[Any, Values]:
        """Calls the method.

        Args:
            values: a value for every slot.
            args: positional arguments.
            rngs: keys for this call, as `init` takes them; None: none.
            kwargs: keyword arguments.

        Returns:
            The method's result (with ``capture``: the pair of it and the captured state), and the
            values afterwards.

        Raises:
            ValuesError: the values are not those of this program.
            EmitError: a PRNG stream is missing.
        """
        # The plainest call comes first and calls as little as it can: this is paid every time.
        if rngs is None and not kwargs and type(values) is Values and values.index is self._index:
            quick = self._quick.get(tuple(map(type, args)))
            if quick is not None:
                output, changed = quick(values.arrays, args, None)
                return output, self._values(updated(values.arrays, changed)) if changed else values
        self.check_values(values)
        if self.packs and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
            return self._call_in_trace(values, args, kwargs, rngs)
        signature, dynamic = signature_of(args, kwargs)
        keys, stored = keys_of(rngs), self._stored(values)
        compiled = self._compiled.get(signature)
        if compiled is None:
            compiled = self._compile(args, kwargs, stored, keys)
            self._compiled[signature] = compiled
        if isinstance(compiled, PlainCall) and not self.packs and signature == len(args):
            self._quick[tuple(map(type, args))] = compiled.jitted
        output, after = compiled(stored, dynamic, keys)
        return output, values if after is stored else self._values(after)

    def _call_in_trace(
        self, values: Values, args: tuple[Any, ...], kwargs: dict[str, Any], rngs: Any
    ) -> tuple[Any, Values]:
        """A call of a packed program inside a trace of the user's: there is no boundary to pass."""
        plain = Values(self._index, values.arrays)
        output, after = self.unpacked(plain, *args, rngs=rngs, **kwargs)
        if after is plain or not isinstance(values, PackedValues):
            return output, values if after is plain else after
        changed = values.packing.repack(changes(plain.arrays, after.arrays), plain.arrays)
        stored = tuple(changed.get(at, old) for at, old in enumerate(values.stored))
        return output, PackedValues(self._index, values.packing, stored)

    def _compile(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], stored: tuple[Any, ...], keys: Any
    ) -> Any:
        arguments = _trees.Arguments.split(args, kwargs)
        traced = self.function(arguments)
        if self._packing is not None:
            traced = partial(self._packing.call, traced)
        if self.mesh is None and not self._donate:
            return PlainCall(traced)
        return Call(
            traced,
            stored,
            arguments.dynamic,
            keys,
            donate=self._donate,
            mesh=self.mesh,
            slots=self._stored_on,
            inputs=input_shardings(self._inputs, arguments, self.mesh),
        )

    def function(self, arguments: _trees.Arguments) -> Traced:
        """What is compiled for a call: a function of slots, arrays of the arguments, and keys."""

        def traced(arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
            args, kwargs = arguments.merge(dynamic)
            return self._traced(arrays, args, kwargs, keys)

        return traced

    def _traced(
        self, arrays: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], keys: Any
    ) -> tuple[Any, dict[int, Any] | None]:
        """What is compiled: the output, and the slots that changed, or None when none did."""
        rngs = None if keys is None else _trees.key_dict(keys)
        _trees.check_shapes(self.graph, arrays)
        try:
            with self.around():
                called = self._run(
                    arrays, args, kwargs, method=self.method, rngs=rngs, mutable=self._mutable
                )
        except _flax.call_errors() as error:
            # What a wrong call raises; the cause keeps the source's own error.
            raise EmitError(
                f"the call raised {type(error).__name__}: {error}",
                path=called_name(self.graph, self.method),
                fix="Call it with the arguments, shapes and method that the source itself takes.",
            ) from error
        changed = changes(arrays, called.arrays) or None
        if not self._capture:
            return called.output, changed
        captured = {name: called.extra.get(name, {}) for name in self._capture}
        return (called.output, captured), changed

    def value_and_grad(
        self, loss: Callable[..., Any], *, wrt: gradients.Wanted = "params"
    ) -> Callable[..., Any]:
        """The loss, its gradients and the values afterwards; for use inside a jit of one's own.

        Args:
            loss: a function ``loss(model, *batch)`` that calls ``model`` as the program is called
                (see `linsey.runtime.gradients.BoundExecutable`) and gives one real number, or the
                pair of it and anything.
            wrt: the slots to differentiate by: a collection, a predicate on names, or a tuple of
                these.

        Returns:
            A function ``f(values, *batch, rngs=None, **kwargs)`` that gives ``((loss, aux),
            gradients, values)``: ``aux`` is None where the loss function gave none, the gradients
            are `Values` of the slots ``wrt``, the values hold what the calls changed.

        Raises:
            ValuesError: ``wrt`` selects nothing, or a slot that has no gradient.

        Example:
            >>> import jax, linsey
            >>> from flax import linen as nn
            >>> x = jax.numpy.ones((1, 3))
            >>> exe = linsey.lower(nn.Dense(2), x).compile()
            >>> run = jax.jit(exe.value_and_grad(lambda model, x: model(x).sum()))
            >>> (loss, _), grads, values = run(exe.init(0), x)
            >>> grads["params/kernel"].shape
            (3, 2)
        """
        run: Callable[..., Any] = gradients.value_and_grad(self, loss, wrt=wrt)
        return run

    def train(
        self,
        loss: Callable[..., Any],
        optimizer: Any,
        *,
        wrt: gradients.Wanted = "params",
        accumulate: int = 1,
        stacked: bool = False,
        in_shardings: Any = None,
    ) -> TrainStep:
        """A train step with an optax optimizer; see `linsey.runtime.TrainStep`.

        Args:
            loss: as for `value_and_grad`.
            optimizer: an optax optimizer.
            wrt: the slots to train, as for `value_and_grad`.
            accumulate: over how many micro-batches gradients are averaged, inside the one jit.
            stacked: whether the batch has its micro-batches on a leading axis already.
            in_shardings: how arrays of the batch lie on the mesh, as for `linsey.Program.compile`.

        Raises:
            ValuesError: ``wrt`` selects nothing, or a slot that has no gradient.
            EmitError: ``accumulate`` is not a positive number.
            PartitionError: ``in_shardings`` do not fit the mesh.

        Example:
            >>> import jax, linsey, optax
            >>> from flax import linen as nn
            >>> x = jax.numpy.ones((4, 3))
            >>> exe = linsey.lower(nn.Dense(2), x).compile()
            >>> step = exe.train(lambda model, x: (model(x) ** 2).mean(), optax.adam(1e-3))
            >>> state = step.init(0)
            >>> state, loss = step(state, x)
            >>> state.values["params/kernel"].shape, loss.shape
            ((3, 2), ())
        """
        return TrainStep(
            self,
            loss,
            optimizer,
            wrt=wrt,
            accumulate=accumulate,
            stacked=stacked,
            in_shardings=in_shardings,
        )

    def lower(self, values: Values, /, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        """The call, lowered and not compiled: a `jax.stages.Lowered`.

        Args:
            values: values, or their shapes and dtypes.
            args: positional arguments, arrays or ShapeDtypeStructs.
            rngs: keys for this call.
            kwargs: keyword arguments.
        """
        keys, stored = keys_of(rngs), self._stored(values)
        dynamic = _trees.Arguments.split(args, kwargs).dynamic
        return self._compile(args, kwargs, stored, keys).lower(stored, dynamic, keys)


def _seed(rngs: Any) -> Any:
    """What the source's init takes, as a pytree of arrays: its streams are told by its form."""
    if isinstance(rngs, int) and not isinstance(rngs, bool):
        return jax.random.key(rngs)
    is_whole = rngs is None or _trees.is_rngs(rngs) or _trees.is_array(rngs)
    return rngs if is_whole else _trees.key_dict(rngs)


def _with_capture(run: Any, mutable: Any, capture: tuple[str, ...]) -> Any:
    if not capture:
        return mutable
    if mutable is None:
        mutable = run.default_mutable
    if mutable is True or mutable is None:
        return mutable
    names = [mutable] if isinstance(mutable, str) else list(mutable or ())
    return [*names, *(name for name in capture if name not in names)]
