"""Exports methods: what the user asks, as data, and that as programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax

from linsey import _trees
from linsey.ir import (
    AttrValue,
    Decoder,
    EmitError,
    Encoder,
    Graph,
    Hole,
    Slot,
    TensorType,
    Values,
    encode,
)
from linsey.runtime._leaves import NUMBERS
from linsey.runtime.executable import Executable
from linsey.runtime.exported import _jax
from linsey.runtime.exported._private import on_any_mesh
from linsey.runtime.exported._record import Export, Interface, StoredProgram, as_data
from linsey.runtime.exported._sizes import Dims, check, names
from linsey.runtime.inputs import entries


@dataclass(frozen=True)
class _Mark:
    index: int


def interface_of(export: Export, graph: Graph) -> Interface:
    """What is asked, as data.

    Raises:
        EmitError: there are no sample inputs, or something that is asked cannot be read.
        FormatError: a static argument cannot be data.
    """
    args, kwargs = _sample(export, graph)
    arguments = _trees.Arguments.split(args, kwargs)
    marked = arguments.merge(tuple(map(_Mark, range(len(arguments.dynamic)))))
    holes = Encoder(lambda obj: Hole(index=obj.index) if isinstance(obj, _Mark) else None)
    kinds = list(map(_trees.tensor_type, map(_canonical, arguments.dynamic)))
    weak = map(_jax.is_weak, arguments.dynamic)
    specs = entries(export.dynamic, args, kwargs, "dynamic", EmitError)
    inputs = tuple(
        (_jax.dtype_text(kind.dtype, is_weak), _dims(path, spec, kind))
        for kind, is_weak, (path, _, spec) in zip(kinds, weak, specs, strict=True)
    )
    constraints = _texts(export.constraints)
    _check_names(constraints, {dim for _, dims in inputs for dim in dims if isinstance(dim, str)})
    if export.vjp_order not in (0, 1):
        raise EmitError(
            f"found {export.vjp_order!r}, expected 0 or 1",
            path="vjp_order",
            fix="jax.export keeps first derivatives, and no others.",
        )
    return Interface(
        method=export.method,
        arguments=as_data(holes(marked)),
        inputs=inputs,
        constraints=constraints,
        keys=_keys(export, graph),
        mutable=encode(export.mutable),
        capture=_texts(export.capture),
        platforms=_jax.platforms(export.platforms),
        vjp_order=export.vjp_order,
    )


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _check_names(constraints: tuple[str, ...], dims: set[str]) -> None:
    """Checks that constraints are of sizes that there are.

    Raises:
        EmitError: one cannot be read, or names another size.
    """
    known = {name for dim in dims for name in names(dim)}
    for text in constraints:
        try:
            check(text)
            unknown = sorted(names(text) - known)
        except ValueError as error:
            raise EmitError(str(error), path="constraints", fix=_jax.CONSTRAINTS) from error
        if unknown:
            raise EmitError(
                f"{text!r} names {unknown[0]!r}; the symbolic sizes are:"
                f" {', '.join(sorted(known)) or 'none'}",
                path="constraints",
                fix="Name it by dynamic=, or leave the constraint out.",
            )


def _sample(export: Export, graph: Graph) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The sample inputs: those that are given, or those of the lowering."""
    if export.args is not None or export.kwargs is not None:
        return tuple(export.args or ()), dict(export.kwargs or {})
    for signature in graph.signatures:
        if signature.method == export.method:
            return _trees.sample_inputs(signature)
    raise EmitError(
        "the program was lowered without sample inputs of this method",
        path=export.method,
        fix=f"Give them: export=[linsey.Export({export.method!r}, args=(x,))], where x is an array"
        ' or a jax.ShapeDtypeStruct. export="..." alone takes those of linsey.lower.',
    )


def _canonical(array: Any) -> Any:
    return _trees.shape_struct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _dims(path: str, spec: Any, kind: TensorType) -> Dims:
    if spec is None:
        return kind.shape
    try:
        if not isinstance(spec, str):
            raise TypeError(f"found {spec!r}, expected a text")
        return _jax.parse(spec, kind.shape)
    except Exception as error:  # jax raises several kinds
        raise EmitError(
            f"{spec!r} does not fit {kind}: {error}",
            path=path,
            fix='Name symbolic sizes and keep others by _ and ...: "batch, time, _".',
        ) from error


def _keys(export: Export, graph: Graph) -> tuple[tuple[str, str], ...]:
    """The streams that calls bring keys for, and the dtypes of these."""
    default = str(jax.eval_shape(lambda: jax.random.key(0)).dtype)
    if export.rngs is None:
        if export.args is not None or export.kwargs is not None:
            return ()
        drawn = {s.name for s in graph.streams if s.derivation == "path" and s.use == "call"}
        return tuple((name, default) for name in sorted(drawn))
    given = (export.rngs,) if isinstance(export.rngs, str) else export.rngs
    if isinstance(given, list | tuple | set | frozenset):
        given = dict.fromkeys(given, 0)
    keys = sorted(_trees.key_dict(given).items())
    named = ((name, str(key.dtype)) for name, key in keys)
    return tuple((name, dtype if dtype.startswith("key<") else default) for name, dtype in named)


def make(
    interface: Interface,
    graph: Graph,
    values: Values | None,
    compiled: Callable[[Interface], Executable],
) -> StoredProgram:
    """Exports a method.

    It is traced without a mesh, so that it runs on any.

    Args:
        interface: what is asked.
        graph: the graph.
        values: the values that are saved beside it, or None.
        compiled: gives the executable of the model's own code.

    Raises:
        EmitError: the method cannot be exported.
    """
    exe = compiled(interface)
    shapes = _jax.input_structs(interface.inputs, interface.constraints)
    args, kwargs = Decoder(holes=tuple(shapes))(interface.arguments)
    arguments = _trees.Arguments.split(args, kwargs)
    traced = exe.function(arguments)
    slots = _slot_structs(graph, values)
    leaves, structure = jax.tree.flatten(slots)
    rngs = [_trees.shape_struct((), _trees.dtype_of(dtype)) for _, dtype in interface.keys]
    seen: list[tuple[AttrValue, tuple[str, ...]]] = []

    def flat(*flattened: Any) -> tuple[Any, ...]:
        rest = iter(flattened)
        arrays = jax.tree.unflatten(structure, [next(rest) for _ in leaves])
        dynamic = tuple(next(rest) for _ in shapes)
        given = {name: next(rest) for name, _ in interface.keys}
        output, changed = traced(arrays, dynamic, given or None)
        changed = dict(sorted((changed or {}).items()))
        for slot, value in changed.items():
            _check_structure(graph, slot, arrays[slot], value)
        found, treedef = jax.tree.flatten(output)
        keys = tuple(graph.slots[slot].key for slot in changed)
        seen[:] = [(_trees.template(treedef).structure, keys)]
        return (*found, *jax.tree.leaves(tuple(changed.values())))

    with on_any_mesh():
        data, convention = _jax.serialize(
            flat,
            [*leaves, *shapes, *rngs],
            interface.platforms,
            interface.vjp_order,
            str(interface),
        )
    output, changed = seen[-1]
    return StoredProgram(
        **{each.name: getattr(interface, each.name) for each in fields(Interface)},
        output=output,
        changed=changed,
        jax=jax.__version__,
        calling_convention=convention,
        nbytes=len(data),
        data=lambda: data,
    )


def _slot_structs(graph: Graph, values: Values | None) -> tuple[Any, ...]:
    arrays: tuple[Any, ...]
    if values is None:
        arrays = tuple(map(_abstract, graph.slots))
    else:
        arrays = getattr(values, "mapped", None) or values.arrays  # of a file: nothing is moved
    structs: tuple[Any, ...] = jax.eval_shape(lambda *given: given, *arrays)
    return jax.tree.map(_jax.struct, structs)  # type: ignore[no-any-return]


def _abstract(slot: Slot) -> Any:
    """The value of a slot as a shape; a Python number as one, since it is weakly typed."""
    is_number = isinstance(slot.type, TensorType) and slot.type.dtype in NUMBERS
    return NUMBERS[slot.type.dtype](0) if is_number else _trees.abstract_value(slot)  # type: ignore[union-attr]


def _check_structure(graph: Graph, slot: int, before: Any, after: Any) -> None:
    old: Any = jax.tree.structure(before)  # its methods are not annotated
    new: Any = jax.tree.structure(after)
    if old != new:
        raise EmitError(
            f"a call makes {new} of {old}",
            path=graph.slots[slot].key,
            fix="Such a method cannot be exported: keep the structure of what a slot holds.",
        )
