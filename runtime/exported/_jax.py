"""What linsey asks of jax.export: symbolic shapes, bytes and back, and what its errors mean."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export  # not there with jax alone

from linsey import _trees
from linsey.ir import EmitError, FormatError
from linsey.runtime.exported._record import StoredProgram
from linsey.runtime.exported._sizes import Dims

CONSTRAINTS = 'Compare sizes by >=, <= or ==: "time <= 512", "mod(batch, 8) == 0".'
"""What to do about a constraint that cannot be read."""
_WEAK = " (weak)"
_CALLBACKS = (b"python_cpu_callback", b"python_gpu_callback", b"python_callback")
"""In the names of XLA calls that enter Python through an address. jax.export writes none."""


def platforms(wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The platforms to export for; that of this process where nothing is said.

    Raises:
        EmitError: a name is no platform.
    """
    if wanted is None:
        return (jax.export.default_export_platform(),)
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    known = ("cpu", "cuda", "rocm", "tpu")
    for name in names:
        if name not in known:
            raise EmitError(
                f"found {name!r}, expected some of {', '.join(known)}",
                path="platforms",
                fix="For NVIDIA's GPUs say cuda, for those of AMD rocm.",
            )
    return names


def platform_of(mesh: jax.sharding.Mesh | None) -> str:
    """The platform that a program will run on, as `platforms` names it."""
    own: str = jax.export.default_export_platform()
    found = own if mesh is None else mesh.devices.flat[0].platform
    return own if found in (own, jax.default_backend()) else found


def parse(spec: str, shape: tuple[int, ...]) -> Dims:
    """What ``"b, time, _"`` says of an array of this shape.

    Raises:
        ValueError: it cannot be read, or is of another rank.
    """
    dims = jax.export.symbolic_shape(spec, like=shape)
    if len(dims) != len(shape):
        raise ValueError(f"it has {len(dims)} axes")
    return tuple(dim if isinstance(dim, int) else str(dim) for dim in dims)


def input_structs(
    inputs: Sequence[tuple[str, Dims]], constraints: Sequence[str]
) -> list[jax.ShapeDtypeStruct]:
    """Arrays of symbolic sizes, to export for.

    Raises:
        EmitError: a constraint cannot be read.
    """
    try:
        scope = jax.export.SymbolicScope(tuple(constraints))
    except Exception as error:  # jax raises several kinds
        raise EmitError(
            f"the constraints {list(constraints)} cannot be read: {error}",
            path="constraints",
            fix=CONSTRAINTS,
        ) from error
    return [
        _struct(_shape(dims, scope), _trees.dtype_of(dtype.removesuffix(_WEAK)), _WEAK in dtype)
        for dtype, dims in inputs
    ]


def struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """An array as shape and dtype, weakly typed where it is, and lying nowhere."""
    return _struct(leaf.shape, leaf.dtype, is_weak(leaf))


def _struct(shape: tuple[Any, ...], dtype: Any, weak: bool) -> jax.ShapeDtypeStruct:
    make: Any = jax.ShapeDtypeStruct  # its constructor is not annotated
    made: jax.ShapeDtypeStruct = make(shape, dtype, weak_type=weak)
    return made


def is_weak(array: Any) -> bool:
    """Whether its dtype gives way to that of others, as that of a Python number does."""
    return bool(getattr(array, "weak_type", False))


def dtype_text(dtype: str, weak: bool) -> str:
    """A dtype as a record holds it: ``float32``, or ``float32 (weak)``."""
    return dtype + _WEAK * weak


def _shape(dims: Dims, scope: Any) -> tuple[Any, ...]:
    if all(isinstance(dim, int) for dim in dims):
        return dims
    text = ", ".join(map(str, dims)) + ("," if len(dims) == 1 else "")
    return tuple(jax.export.symbolic_shape(text, scope=scope))


def _check_flatbuffers() -> None:
    """Says what to install where jax.export misses it.

    Raises:
        FormatError: it is missing.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise FormatError(
            "jax.export needs the package flatbuffers, which is not installed",
            path="export",
            fix="pip install linsey[export]",
        )


def serialize(
    function: Callable[..., Any], args: Sequence[Any], wanted: Sequence[str], order: int, name: str
) -> tuple[bytes, int]:
    """Exports a function of flat arrays.

    Args:
        function: the function.
        args: its arguments, as ShapeDtypeStructs.
        wanted: the platforms.
        order: how often it can be differentiated.
        name: what to call it in errors.

    Returns:
        The bytes, and the version of the calling convention.

    Raises:
        EmitError: it cannot be exported; the message says what jax says, and what to do.
    """
    is_symbolic = any(not isinstance(size, int) for arg in args for size in arg.shape)
    _check_flatbuffers()
    try:
        exported = jax.export.export(jax.jit(function), platforms=wanted)(*args)
        made = bytes(exported.serialize(vjp_order=order)), exported.calling_convention_version
    except EmitError as error:
        if is_symbolic:
            error.add_note(_SYMBOLIC)
        raise
    except Exception as error:  # jax raises many kinds
        raise EmitError(
            f"it cannot be exported: {type(error).__name__}: {_first_lines(error)}",
            path=name,
            fix=_remedy(error, order, is_symbolic),
        ) from error
    if exported.nr_devices != 1:
        raise EmitError(
            f"the method names a mesh of {exported.nr_devices} devices, and would run on so many"
            " only",
            path=name,
            fix="Constrain activations by nn.with_logical_constraint, or by a PartitionSpec alone,"
            " and not by a sharding on a mesh of devices.",
        )
    return made


def _first_lines(error: Exception) -> str:
    return "\n  ".join(str(error).strip().splitlines()[:4])


def _remedy(error: Exception, order: int, is_symbolic: bool) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "mesh" in text:
        return "The model names axes of a mesh: save inside jax.set_mesh(mesh), with any mesh."
    if "callback" in text:
        return "A call back to Python cannot be stored: leave out jax.debug.print, pure_callback"
    if order and ("differentiat" in text or "reverse-mode" in text or "jvp" in text):
        return "Export it without a gradient: linsey.Export(..., vjp_order=0)."
    if is_symbolic:
        return _SYMBOLIC
    return "Leave this method out of export=, or change what jax says cannot be exported."


_SYMBOLIC = (
    "Some sizes are symbolic here. Say what holds for them by constraints=, or leave those that the"
    " model has to know out of dynamic=."
)


def deserialize(program: StoredProgram) -> Any:
    """What was exported, a `jax.export.Exported`.

    Raises:
        FormatError: it is of a version that this jax does not read, or damaged.
    """
    _check_version(program)
    _check_flatbuffers()
    try:
        found = jax.export.deserialize(bytearray(program.data()))
        found.mlir_module()  # else jax tells only when it compiles the call
        parts = [found]
        while parts[-1].has_vjp():  # the backward pass is a program of its own
            parts.append(parts[-1].vjp())
    except FormatError:
        raise
    except Exception as error:  # jax raises many kinds
        raise _unreadable(program, str(error).strip() or type(error).__name__) from error
    if any(name in part.mlir_module_serialized for part in parts for name in _CALLBACKS):
        raise FormatError(
            "the program calls back to Python, which no program that linsey exported does",
            path=str(program),
            fix="Do not run it: the file was not made by program.save.",
        )
    return found


def _check_version(program: StoredProgram) -> None:
    """Checks that this jax reads what another one exported.

    Raises:
        FormatError: it does not.
    """
    if not is_readable(program):
        raise _unreadable(
            program,
            f"it follows the calling convention {program.calling_convention}, and this jax reads"
            f" {jax.export.minimum_supported_calling_convention_version} to"
            f" {jax.export.maximum_supported_calling_convention_version}",
        )


def is_readable(program: StoredProgram) -> bool:
    """Whether this jax reads the calling convention of a program."""
    oldest: int = jax.export.minimum_supported_calling_convention_version
    newest: int = jax.export.maximum_supported_calling_convention_version
    return oldest <= program.calling_convention <= newest


def _unreadable(program: StoredProgram, why: str) -> FormatError:
    return FormatError(
        f"jax {jax.__version__} cannot read what jax {program.jax} exported: {why}",
        path=str(program),
        fix="Where the source is at hand, export anew: loaded = linsey.load(path, trust=[...]);"
        " loaded.save(path, export=loaded.exports); or run the source:"
        f" compile(exported=False). Else install jax {program.jax}.",
    )
