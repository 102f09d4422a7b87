"""A program compiled by jit over the flat tuple of its slots."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors

from linsey import _trees
from linsey.backends import Backend
from linsey.ir import EmitError, Graph, SlotIndex, Values, ValuesError, decode, describe, slot_index

_EMPTY: dict[str, Any] = {}
_ARRAY_TYPES: set[type] = set()
"""The types of concrete arrays met so far: a set look-up is faster than ``isinstance``."""


class Executable:
    """Runs one method of a program under jit.

    The jit boundary is the flat tuple of slot values: no tree is walked per call. Only the slots
    that a call changes are outputs. Arguments that are arrays are traced; everything else
    (``train=True``, a string, None, a Python number) is static, and each new combination of static
    arguments compiles once. Can be called inside ``jax.jit``, ``jax.grad`` and ``jax.vmap``.

    Made by `linsey.Program.compile`.

    Args:
        graph: the structure.
        backend: the backend of the root's dialect.
        init: gives concrete values from PRNG keys, or None.
        method: the method, by name or as a function of the module; None: the call.
        mutable: the collections that a call may change; None: the source's default.
        capture: collections of state that calls make and no slot holds (``intermediates``), to be
            returned beside the output.
        donate: whether a call may reuse the memory of the slots that it changes.
    """

    def __init__(
        self,
        graph: Graph,
        backend: Backend,
        init: Callable[[Any], Values] | None,
        *,
        method: Any = None,
        mutable: Any = None,
        capture: tuple[str, ...] = (),
        donate: bool = False,
    ) -> None:
        _check_method(graph, method)
        self.graph = graph
        self.method = method
        self._init = init
        self._index = slot_index(graph)
        self._run = backend.runner(graph)
        self._mutable = _with_capture(self._run, mutable, capture)
        self._capture = capture
        self._donate = donate
        self._fast = jax.jit(lambda arrays, *args: self._traced(arrays, args, _EMPTY, None))
        self._fast_keyed = jax.jit(
            lambda arrays, keys, *args: self._traced(arrays, args, _EMPTY, keys)
        )
        self._compiled: dict[Any, Any] = {}
        self._jitted_init: Any = None

    def init(self, rngs: Any = None) -> Values:
        """Concrete values, initialised under jit.

        Args:
            rngs: an int seed, a jax key, a dict of keys by stream, or nnx.Rngs.

        Raises:
            EmitError: the program was lowered from a live module or without its source.
        """
        if self._init is None:
            raise EmitError(
                "this program cannot be initialised: it was lowered from a live module",
                path="init",
                fix="Use program.values, or lower a factory.",
            )
        if self._jitted_init is None:
            init = self._init
            self._jitted_init = jax.jit(lambda keys: init(keys).arrays)
        keys = None if rngs is None else _trees.key_dict(rngs)
        return Values(self._index, self._jitted_init(keys))

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
        index = values.index if isinstance(values, Values) else values
        if index is not self._index and index != self._index:
            raise _not_ours(index, self._index)
        # What follows is paid at every call: a microsecond in all.
        for arg in args:
            if type(arg) not in _ARRAY_TYPES and not _is_array(arg):
                return self._static_call(values, args, kwargs, rngs)
        if kwargs or self._donate:
            return self._static_call(values, args, kwargs, rngs)
        if rngs is None:
            output, changed = self._fast(values.arrays, *args)
        else:
            is_plain = type(rngs) is dict and all(
                type(key) in _ARRAY_TYPES for key in rngs.values()
            )
            keys = rngs if is_plain else _trees.key_dict(rngs)
            output, changed = self._fast_keyed(values.arrays, keys, *args)
        return output, values if changed is None else self._updated(values, changed)

    def _updated(self, values: Values, changed: Mapping[int, Any]) -> Values:
        arrays = list(values.arrays)
        for slot, value in changed.items():
            arrays[slot] = value
        return Values(self._index, tuple(arrays))

    def _static_call(
        self, values: Values, args: tuple[Any, ...], kwargs: dict[str, Any], rngs: Any
    ) -> tuple[Any, Values]:
        """A call with static arguments, or with donation."""
        keys = None if rngs is None else _trees.key_dict(rngs)
        arguments = _trees.Arguments.split(args, kwargs)
        signature = (arguments.treedef, arguments.static)
        try:
            compiled = self._compiled.get(_strict(signature))
        except TypeError as error:
            raise EmitError(
                f"a static argument cannot be hashed: {error}",
                path="arguments",
                fix="Pass arrays, or hashable objects (a tuple in place of a list).",
            ) from error
        if compiled is None:
            compiled = self._compile(arguments, values, keys)
            self._compiled[_strict(signature)] = compiled
        output, changed = compiled(values.arrays, arguments.dynamic, keys)
        return output, values if changed is None else self._updated(values, changed)

    def _compile(self, arguments: _trees.Arguments, values: Values, keys: Any) -> Any:
        def traced(arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
            args, kwargs = arguments.merge(dynamic)
            return self._traced(arrays, args, kwargs, keys)

        if not self._donate:
            return jax.jit(traced)
        changed = jax.eval_shape(traced, values.arrays, arguments.dynamic, keys)[1]
        return _Donating(traced, tuple(changed or ()), len(values.arrays))

    def _traced(
        self, arrays: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], keys: Any
    ) -> tuple[Any, dict[int, Any] | None]:
        """What is compiled: the output, and the slots that changed, or None when none did."""
        rngs = None if keys is None else _trees.key_dict(keys)
        _trees.check_shapes(self.graph, arrays)
        try:
            called = self._run(
                arrays, args, kwargs, method=self.method, rngs=rngs, mutable=self._mutable
            )
        except (errors.FlaxError, AttributeError, TypeError) as error:
            # What a wrong call raises; the cause keeps the source's own error.
            raise EmitError(
                f"the call raised {type(error).__name__}: {error}",
                path=_name(self.graph, self.method),
                fix="Call it with the arguments, shapes and method that the source itself takes.",
            ) from error
        changed = {
            slot: new
            for slot, (old, new) in enumerate(zip(arrays, called.arrays, strict=True))
            if new is not old
        } or None
        if not self._capture:
            return called.output, changed
        captured = {name: called.extra.get(name, {}) for name in self._capture}
        return (called.output, captured), changed

    def lower(self, values: Values, /, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        """The call, lowered and not compiled: a `jax.stages.Lowered`.

        Args:
            values: values, or their shapes and dtypes.
            args: positional arguments, arrays or ShapeDtypeStructs.
            rngs: keys for this call.
            kwargs: keyword arguments.
        """
        arguments = _trees.Arguments.split(args, kwargs)
        keys = None if rngs is None else _trees.key_dict(rngs)

        def traced(arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
            merged, named = arguments.merge(dynamic)
            return self._traced(arrays, merged, named, keys)

        return jax.jit(traced).lower(values.arrays, arguments.dynamic, keys)


class _Donating:
    """A jitted call that donates the slots which it changes, and no other."""

    def __init__(self, traced: Callable[..., Any], changed: tuple[int, ...], count: int) -> None:
        kept = tuple(slot for slot in range(count) if slot not in set(changed))
        order = {slot: position for position, slot in enumerate((*changed, *kept))}
        places = tuple(order[slot] for slot in range(count))

        def call(given: tuple[Any, ...], rest: tuple[Any, ...], dynamic: Any, keys: Any) -> Any:
            together = (*given, *rest)
            return traced(tuple(together[place] for place in places), dynamic, keys)

        self._take, self._leave = _getter(changed), _getter(kept)
        self._jitted = jax.jit(call, donate_argnums=0)

    def __call__(self, arrays: tuple[Any, ...], dynamic: tuple[Any, ...], keys: Any) -> Any:
        return self._jitted(self._take(arrays), self._leave(arrays), dynamic, keys)


def _check_method(graph: Graph, method: Any) -> None:
    """Refuses a method that the root cannot have.

    Raises:
        EmitError: it is neither callable nor the name of a method or (in Linen) of a submodule.
    """
    root = graph.nodes[graph.root]
    if method is None or callable(method) or root.source is None:
        return
    cls = decode(root.source.cls)
    if not isinstance(method, str) or not (
        callable(getattr(cls, method, None)) or method in dict(root.children)
    ):
        raise EmitError(
            f"{describe(root.source.cls)} has no method {method!r}",
            path=describe(root.source.cls),
            fix="Pass the name of a method, or a function of the module.",
        )


def _name(graph: Graph, method: Any) -> str:
    source = graph.nodes[graph.root].source
    cls = "root" if source is None else describe(source.cls)
    called = method if isinstance(method, str) else getattr(method, "__name__", "__call__")
    return f"{cls}.{called}"


def _is_array(arg: Any) -> bool:
    if not isinstance(arg, jax.Array):
        return False
    if not isinstance(arg, jax.core.Tracer):
        _ARRAY_TYPES.add(type(arg))
    return True


def _getter(slots: tuple[int, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    if len(slots) > 1:
        return operator.itemgetter(*slots)
    return lambda arrays: tuple(arrays[slot] for slot in slots)


def _strict(signature: tuple[Any, tuple[tuple[int, Any], ...]]) -> Any:
    """The signature with types, so that 1, 1.0 and True are three signatures."""
    treedef, static = signature
    return treedef, tuple((position, type(value), value) for position, value in static)


def _with_capture(run: Any, mutable: Any, capture: tuple[str, ...]) -> Any:
    if not capture:
        return mutable
    if mutable is None:
        mutable = run.default_mutable
    if mutable is True or mutable is None:
        return mutable
    names = [mutable] if isinstance(mutable, str) else list(mutable or ())
    return [*names, *(name for name in capture if name not in names)]


def _not_ours(found: object, expected: SlotIndex) -> ValuesError:
    if not isinstance(found, SlotIndex):
        return ValuesError(
            f"found {type(found).__name__}, expected linsey.Values",
            path="values",
            fix="Pass what exe.init, program.values or an earlier call gave; for Linen variables:"
            " linsey.lower(..., variables=variables).values.",
        )
    missing = [key for key in expected.keys if key not in found.positions]
    extra = [key for key in found.keys if key not in expected.positions]
    first = (missing or extra or list(found.keys))[0]
    return ValuesError(
        f"the values are not those of this program: {len(missing)} slots are missing and"
        f" {len(extra)} are unknown",
        path=first,
        fix="Pass what exe.init, program.values or an earlier call gave, whole.",
    )
