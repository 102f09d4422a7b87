"""Runs stored programs in the place of a model's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from linsey import _trees
from linsey.backends import Called, SharedCalls
from linsey.ir import Decoder, EmitError, FormatError, Graph, LinseyError, ValuesError, slot_index
from linsey.runtime.exported import _jax
from linsey.runtime.exported._fields import standing_in
from linsey.runtime.exported._record import StoredProgram
from linsey.runtime.exported._sizes import evaluate, names, shape_text, solve


class StoredRunner:
    """A `linsey.backends.Runner` of stored programs that differ in their arguments only.

    What a program was exported for is checked first: arguments, dtypes, sizes, constraints, keys,
    slots and the platform.

    Args:
        graph: the graph.
        programs: the programs.
        mesh: the mesh that they will run on, or None.
    """

    default_mutable: Any = None

    def __init__(self, graph: Graph, programs: Sequence[StoredProgram], mesh: Mesh | None) -> None:
        self.share_traces = False
        self.shared = SharedCalls()
        self._graph = graph
        self._programs = tuple(map(_Program, programs))
        self._platform = _jax.platform_of(mesh)

    def __call__(
        self,
        arrays: Sequence[Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        method: Any,
        rngs: Mapping[str, Any] | None,
        mutable: Any,
    ) -> Called:
        """See `linsey.backends.Runner`; method and mutable are those of the programs."""
        arguments = _trees.Arguments.split(args, kwargs)
        reasons = []
        for program in self._programs:
            reason = program.mismatch(arguments)
            if reason is None:
                return program.call(self._graph, arrays, arguments.dynamic, rngs, self._platform)
            reasons.append(f"{program.stored}: {reason}")
        raise EmitError(
            f"the call fits none of {len(reasons)} stored programs:\n  " + "\n  ".join(reasons),
            path=self._programs[0].stored.method,
            fix="Call it as one of them was exported; or, with the source at hand,"
            " compile(exported=False).",
        )


class _Program:
    """A stored program, read when it is first called."""

    def __init__(self, stored: StoredProgram) -> None:
        self.stored = stored
        self._arguments = standing_in(stored.arguments)
        self._output = standing_in(stored.output)
        self._exported: Any = None

    def mismatch(self, arguments: _trees.Arguments) -> str | None:
        """Why it cannot take these arguments; None: it can."""
        shapes = [_trees.shape_struct((), np.dtype(bool)) for _ in self.stored.inputs]
        try:
            args, kwargs = Decoder(holes=tuple(shapes))(self._arguments)
        except LinseyError as error:
            return f"its arguments cannot be made: {error}"
        own = _trees.Arguments.split(args, kwargs)
        if own.treedef != arguments.treedef:
            return f"the call has other arguments{self._hint()}"
        for (at, expected), (place, found) in zip(own.static, arguments.static, strict=False):
            if (at, type(expected), expected) != (place, type(found), found):
                return f"found the static argument {found!r}, expected {expected!r}"
        if len(own.static) != len(arguments.static):
            return "another number of arguments are arrays"
        for array, (dtype, dims) in zip(arguments.dynamic, self.stored.inputs, strict=True):
            found = _jax.dtype_text(_trees.tensor_type(array).dtype, _jax.is_weak(array))
            if found != dtype or len(array.shape) != len(dims):
                return f"found {shape_text(found, array.shape)}, expected {shape_text(dtype, dims)}"
        return self._wrong_size([array.shape for array in arguments.dynamic])

    def _hint(self) -> str:
        if self._arguments == self.stored.arguments:
            return ""
        return ", or objects of a package that is not trusted: linsey.load(path, trust=[...])"

    def _wrong_size(self, shapes: Sequence[tuple[Any, ...]]) -> str | None:
        pairs = []
        for shape, (dtype, dims) in zip(shapes, self.stored.inputs, strict=True):
            for size, dim in zip(shape, dims, strict=True):
                if isinstance(dim, str):
                    pairs.append((dim, size))
                elif size != dim:
                    found = shape_text(dtype, shape)
                    return f"found {found}, expected {shape_text(dtype, dims)}"
        if not all(isinstance(size, int) for _, size in pairs):
            return None  # inside an export of the user's own: jax compares symbolic sizes
        try:
            return _contradiction(pairs, self.stored.constraints)
        except (ValueError, KeyError, ZeroDivisionError) as error:
            return f"its sizes cannot be computed: {error}"

    def call(
        self,
        graph: Graph,
        arrays: Sequence[Any],
        dynamic: tuple[Any, ...],
        rngs: Mapping[str, Any] | None,
        platform: str,
    ) -> Called:
        """Makes the call.

        Raises:
            EmitError: a key is missing, or the program is for other platforms.
            ValuesError: a slot has another dtype.
            FormatError: this jax cannot read the program.
        """
        if platform not in self.stored.platforms:
            raise EmitError(
                f"it was exported for {', '.join(self.stored.platforms)}, and runs on {platform}",
                path=str(self.stored),
                fix="Export it with platforms=[...]; or, with the source at hand,"
                " compile(exported=False).",
            )
        if self._exported is None:
            self._exported = _jax.deserialize(self.stored)
        leaves = jax.tree.leaves(tuple(arrays))
        keys = self._keys(rngs)
        self._check_slots(graph, arrays, leaves)
        flat = self._exported.call(*leaves, *dynamic, *keys)
        positions = self._changed(graph)
        count = sum(len(jax.tree.leaves(arrays[position])) for position in positions)
        after, new = list(arrays), iter(flat[len(flat) - count :])
        for position in positions:
            after[position] = jax.tree.map(lambda _: next(new), arrays[position])
        output = Decoder(holes=tuple(flat[: len(flat) - count]))(self._output)
        if not self.stored.capture:
            return Called(output=output, arrays=after)
        result, captured = output
        return Called(output=result, arrays=after, extra=captured)

    def _changed(self, graph: Graph) -> list[int]:
        index = slot_index(graph).positions
        if not set(self.stored.changed) <= set(index):
            raise _other_slots(self.stored)
        return [index[key] for key in self.stored.changed]

    def _check_slots(self, graph: Graph, arrays: Sequence[Any], leaves: list[Any]) -> None:
        slots = [
            slot.key
            for slot, value in zip(graph.slots, arrays, strict=True)
            for _ in jax.tree.leaves(value)
        ]
        avals = self._exported.in_avals
        if len(avals) != len(slots) + len(self.stored.inputs) + len(self.stored.keys):
            raise _other_slots(self.stored)
        for key, leaf, aval in zip(slots, leaves, avals, strict=False):
            found, expected = _trees.tensor_type(jax.typeof(leaf)), _trees.tensor_type(aval)
            if found != expected:
                raise ValuesError(
                    f"found {found}, and the program was exported for {expected}",
                    path=key,
                    fix="Pass values of the dtypes that were saved; or, with the source at hand,"
                    " compile(exported=False).",
                )

    def _keys(self, rngs: Mapping[str, Any] | None) -> list[Any]:
        keys = []
        for name, dtype in self.stored.keys:
            if name not in (rngs or {}):
                raise EmitError(
                    f"the stream {name!r} is missing",
                    path=str(self.stored),
                    fix=f"Pass rngs={{{name!r}: jax.random.key(0)}} to the call, as when it was"
                    " exported.",
                )
            key = (rngs or {})[name]
            if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
                key = jax.random.wrap_key_data(key, impl=_trees.KEY_IMPLS.get(dtype, dtype[4:-1]))
            if str(key.dtype) != dtype or key.shape:
                raise EmitError(
                    f"found {_trees.tensor_type(key)} for the stream {name!r}, expected {dtype}[]",
                    path=str(self.stored),
                    fix="Make the key as the one that it was exported with.",
                )
            keys.append(key)
        return keys


def _contradiction(pairs: list[tuple[str, int]], constraints: Sequence[str]) -> str | None:
    """What does not hold for these sizes of expressions, in words."""
    sizes = solve(pairs)
    if isinstance(sizes, str):
        return sizes
    for constraint in constraints:
        if not evaluate(constraint, sizes):
            given = ", ".join(f"{name} = {sizes[name]}" for name in sorted(names(constraint)))
            return f"{constraint} does not hold for {given}"
    return None


def _other_slots(program: StoredProgram) -> FormatError:
    return FormatError(
        "the program was exported for other slots than those of the graph",
        path=str(program),
        fix="Load another copy, or save it again.",
    )
