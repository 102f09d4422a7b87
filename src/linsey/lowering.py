"""`lower`, and the one-line conversions on top of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import jax
from flax import linen, nnx

from linsey import _trees, plugins
from linsey.backends import folded
from linsey.backends.nnx import derive, module_of
from linsey.frontends import Frontend, Lowered, Request
from linsey.frontends.nnx.lower import lower_factory
from linsey.ir import EmitError
from linsey.program import Program

Derivation = Literal["source", "target"]


def lower(
    source: Any,
    *args: Any,
    rngs: Any = None,
    variables: Any = None,
    method: Any = None,
    **kwargs: Any,
) -> Program:
    """Lowers a module to a program: one abstract trace, nothing allocated, nothing computed.

    Args:
        source: an unbound Linen module; an NNX module, live or abstract; a factory (a function that
            takes nothing or ``rngs`` and returns either); or what another frontend accepts.
        args: sample inputs, as the source is called or initialised with: arrays or
            ``jax.ShapeDtypeStruct``. A Linen module needs them; an NNX module needs them only where
            a ``bridge.ToNNX`` inside is not initialised yet.
        rngs: for Linen and for factories: an int seed, a jax key, a dict of keys by stream, or
            ``nnx.Rngs``. Their names matter, their numbers do not until `Program.init`.
        variables: for Linen: the variables at hand, boxed or not; they become the program's values.
        method: the method to lower by, a name or a function of the module; None: the call.
        kwargs: keyword inputs. Those that are not arrays are static.

    Raises:
        LoweringError: the module or the inputs are not fit for it.
        ValuesError: the variables are not those of the module.
        PluginError: no frontend accepts the source.

    Example:
        >>> import jax, linsey
        >>> from flax import linen as nn
        >>> x = jax.ShapeDtypeStruct((1, 3), "float32")
        >>> program = linsey.lower(nn.Dense(2), x)
        >>> [str(slot.type) for slot in program.graph.slots]
        ['float32[2]', 'float32[3,2]']
    """
    request = Request(
        source=source, args=args, kwargs=kwargs, rngs=rngs, variables=variables, method=method
    )
    if _is_factory(source):
        lowered = lower_factory(request, lambda made: _lower(replace(request, source=made)))
    else:
        lowered = _lower(request)
    return Program(graph=lowered.graph, values=lowered.values, initialize=lowered.init)


def lower_again(program: Program) -> Program:
    """Lowers the Linen module that a program stands for, by the inputs that it was lowered by.

    Raises:
        EmitError: the module's code has changed since.
        LinseyError: it cannot be emitted.
    """
    module, _ = replace(program, values=None).emit("linen")
    signature = program.graph.signatures[0]
    args, kwargs = _trees.sample_inputs(signature)
    again = lower(module, *args, method=signature.method, **kwargs)
    if again.graph.slots != program.graph.slots:
        raise EmitError(
            "the module of today has other slots than the graph of the file",
            path="init",
            fix="Lower the module anew, or use the code that the file was saved with.",
        )
    return again


def _lower(request: Request) -> Lowered:
    frontend: Frontend = plugins.find_frontend(request.source)
    return frontend.lower(request)


def _is_factory(source: Any) -> bool:
    """Whether it is a function that makes a module; classes are for the frontends to judge."""
    is_module = isinstance(source, linen.Module | nnx.Pytree | nnx.Variable)
    return callable(source) and not isinstance(source, type) and not is_module


def to_nnx(
    source: Any,
    *args: Any,
    rngs: Any = None,
    variables: Any = None,
    method: Any = None,
    native: bool = True,
    derivation: Derivation = "source",
    **kwargs: Any,
) -> Any:
    """Converts a module to an NNX module with its values.

    Args:
        source: as for `lower`.
        args: sample inputs, as for `lower`.
        rngs: as for `lower`. Linen values are initialised from them unless ``variables`` are given;
            the streams but ``params`` stay in the model, as ``model.rngs``, for the calls that
            bring no keys. ``params`` stays too where a call draws from a stream that was not given,
            since Linen then falls back to it.
        variables: for Linen: the values at hand.
        method: as for `lower`.
        native: whether Linen's layers become NNX's own: ``model.Dense_0`` is an ``nnx.Linear``.
            They do where that computes the same, bit for bit; `Program.report` tells which. With
            False the code of every layer is hosted.
        derivation: for Linen, whose rule makes keys of ``rngs``. ``"source"``: Linen's, so that
            initial values and masks are those of ``init`` and ``apply``. ``"target"``: NNX's, as if
            its layers had been constructed with these streams.
        kwargs: keyword inputs.

    Returns:
        An ``nnx.Module`` with the source's methods; see `linsey.backends.nnx.LinenHost` for one
        that comes from Linen.

    Raises:
        LoweringError, ValuesError, PluginError: as `lower`.

    Example:
        >>> import jax, linsey
        >>> from flax import linen as nn
        >>> x = jax.numpy.ones((1, 3))
        >>> model = linsey.to_nnx(nn.Dense(2), x, rngs=0)
        >>> model.kernel.shape, model(x).shape
        ((3, 2), (1, 2))
    """
    _check_derivation(derivation)
    is_linen = isinstance(source, linen.Module)
    if is_linen and derivation == "target":
        return _to_nnx_by_its_keys(source, args, kwargs, rngs, variables, method, native)
    given = _trees.key_dict(rngs) if is_linen and rngs is not None else rngs
    streams = rngs.fork() if is_linen and isinstance(rngs, nnx.Rngs) else rngs
    program = lower(source, *args, rngs=given, variables=variables, method=method, **kwargs)
    if program.values is None:
        program = program.init(given)
    model = module_of(program.graph, program.values, native=native)
    if is_linen and hasattr(model, "linsey_streams"):  # the NNX module of a ToLinen has its own
        _give_streams(model, program, streams)
    return model


def _to_nnx_by_its_keys(
    source: linen.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rngs: Any,
    variables: Any,
    method: Any,
    native: bool,
) -> Any:
    """`to_nnx` of a Linen module, by NNX's derivation."""
    if rngs is None or isinstance(rngs, int):
        streams = nnx.Rngs(rngs or 0)
    else:
        streams = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(**_trees.key_dict(rngs))
    names = {"params", *(name for name, _ in streams.items())} - {"default"}
    program = lower(
        source,
        *args,
        rngs={name: jax.random.key(0) for name in sorted(names)},
        variables=variables,
        method=method,
        **kwargs,
    )
    if program.values is None:
        assert program.initialize is not None
        values = derive.initial_values(program.graph, streams, program.initialize)
        program = replace(program, values=values)
    model = module_of(program.graph, program.values, native=native)
    if hasattr(model, "linsey_streams"):
        if native:
            derive.give_streams(program.graph, model, streams)
        _give_streams(model, program, streams)
    return model


def _check_derivation(derivation: str) -> None:
    if derivation not in ("source", "target"):
        raise EmitError(
            f"found {derivation!r}, expected 'source' or 'target'",
            path="derivation",
            fix="'source' keeps the numbers of the source; 'target' takes the other API's rule.",
        )


def _give_streams(model: Any, program: Program, rngs: Any) -> None:
    if rngs is None:
        return
    drawn = {s.name for s in program.graph.streams if s.derivation == "path" and s.use == "call"}
    if isinstance(rngs, nnx.Rngs):
        keys = {name: stream.key.get_value() for name, stream in rngs.items()}
        if "params" not in keys and "default" in keys:
            keys["params"] = keys.pop("default")
    else:
        keys = _trees.key_dict(rngs)
    kept = {name: key for name, key in keys.items() if name != "params" or drawn - set(keys)}
    if kept:
        model.linsey_streams(nnx.Rngs(**kept))


def to_linen(
    source: Any,
    *args: Any,
    rngs: Any = None,
    native: bool = True,
    derivation: Derivation = "source",
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Converts a module to a Linen module and its variables.

    Args:
        source: an NNX module or a factory of one, or what `lower` takes else.
        args: sample inputs, as for `lower`.
        rngs: for factories and Linen modules, as for `lower`.
        native: whether a layer, or a sequence of layers, becomes Linen's own where that computes
            the same, bit for bit; `Program.report` tells. User code, and all that it calls, is
            hosted.
        derivation: for a factory of NNX, whose rule makes keys of ``rngs``. ``"source"``: NNX's, so
            that initial values are those of the constructor. ``"target"``: the constructor gets the
            keys that Linen's ``make_rng`` gives at the root, as in ``nnx.bridge.ToLinen``.
        kwargs: keyword inputs.

    Returns:
        ``(module, variables)``: ``module.apply(variables, ...)`` calls it. RNG state is in the
        collections ``RngKey`` and ``RngCount``: pass ``mutable=["RngCount"]`` and store what comes
        back, or pass ``rngs=`` to each call.

    Raises:
        LoweringError, ValuesError, PluginError: as `lower`.

    Example:
        >>> import jax, linsey
        >>> from flax import nnx
        >>> module, variables = linsey.to_linen(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> module.apply(variables, jax.numpy.ones((1, 3))).shape
        (1, 2)
    """
    _check_derivation(derivation)
    if derivation == "target" and _is_factory(source):
        keys = _trees.key_dict(0 if rngs is None else rngs)
        rngs = nnx.Rngs(**{name: folded(key, 1) for name, key in keys.items()})
    program = lower(source, *args, rngs=rngs, **kwargs)
    if program.values is None:
        program = program.init(rngs)
    module, variables = program.emit("linen", native=native)
    return module, variables
