"""Lowers an NNX module: a walk over it, and an abstract call where sample inputs are given."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import bridge

from linsey import _trees
from linsey._places import attribute_paths
from linsey.frontends import _private
from linsey.frontends._annotations import take_sown_axes
from linsey.frontends._builder import Builder
from linsey.frontends._record import Lowered, Request
from linsey.frontends._session import initializing
from linsey.frontends.linen.build import signature
from linsey.frontends.linen.observe import Call, Observer, observing
from linsey.frontends.nnx.build import Walker, wrapped_variables
from linsey.frontends.nnx.optimizers import follow_parameters
from linsey.ir import Graph, LoweringError, Values, as_key, slot_index

_NO_VALUE = object()


def lower(request: Request) -> Lowered:
    """Lowers a live or abstract NNX module, or a class whose constructor takes no more than rngs.

    Raises:
        LoweringError: the module or the sample inputs are not fit for it, with the path.
    """
    if request.variables is not None:
        raise LoweringError(
            "found variables=, but an NNX module holds its own",
            path="variables",
            fix="Put the values into the model with nnx.update, and lower that.",
        )
    if isinstance(request.source, type):
        return lower_factory(request, lambda made: lower(dataclasses.replace(request, source=made)))
    if request.rngs is not None:
        raise LoweringError(
            "found rngs=, but a live NNX module holds its own",
            path="rngs",
            fix="Lower a factory, `lambda rngs: Model(..., rngs=rngs)`, to choose the seed.",
        )
    return _lower_live(request)


def _lower_live(request: Request) -> Lowered:
    model = request.source
    lazy = _unready(model)
    if lazy and not (request.args or request.kwargs):
        raise LoweringError(
            f"{len(lazy)} ToNNX inside have no variables yet, and there are no sample inputs",
            path=lazy[0],
            fix="Pass sample inputs to lower, or call bridge.lazy_init(model, ...) first.",
        )
    calls: dict[str, Call] = {}
    if request.args or request.kwargs or request.method:
        model_after, nested, calls = _trace(model, request, lazy=bool(lazy))
        lazy = lazy if _unready(model_after) != lazy else []
        if lazy:
            model, pairs = model_after, nested
        else:
            pairs = _matched(model, model_after, nested)
    else:
        pairs = {}
    graph, arrays = _walk(model, pairs, calls)
    if not lazy:
        return Lowered(graph=graph, values=_concrete(graph, arrays))

    def init(rngs: Any) -> Values:
        if rngs is not None:
            raise LoweringError(
                "found rngs, but a live NNX module holds its own",
                path="rngs",
                fix="Call init() without them.",
            )
        ready = nnx.clone(request.source)
        _lazy_init(ready, request)
        return _same(graph, ready)

    return Lowered(graph=graph, init=init)


def lower_factory(request: Request, other: Callable[[Any], Lowered]) -> Lowered:
    """Lowers what a factory makes, without making it.

    Args:
        request: its source is a callable that takes nothing or ``rngs``.
        other: lowers what the factory makes when that is not of NNX.

    Raises:
        LoweringError: the factory needs other arguments, or raises.
    """
    make = request.source
    takes_rngs = _takes_rngs(make)
    try:
        made = made_abstractly(lambda: make(rngs=_like(request.rngs)) if takes_rngs else make())
    except Exception as error:
        raise LoweringError(
            f"the factory raised {type(error).__name__}: {error}",
            path=_name(make),
            fix="Calling it under jax.eval_shape raises it too; mend the factory.",
        ) from error
    if not isinstance(made, nnx.Pytree):
        return other(made)
    if request.rngs is not None and not takes_rngs:
        raise LoweringError(
            "found rngs=, but the factory takes none",
            path="rngs",
            fix="Let the factory take an argument called rngs.",
        )
    lowered = _lower_live(
        Request(
            source=made,
            args=request.args,
            kwargs=request.kwargs,
            method=request.method,
        )
    )

    def init(rngs: Any) -> Values:
        if rngs is not None and not takes_rngs:
            raise LoweringError(
                "found rngs, but the factory takes none",
                path="rngs",
                fix="Call init() without them.",
            )
        chosen = request.rngs if rngs is None else rngs
        with _private.annotating("if needed"):
            ready = make(rngs=_rngs(chosen)) if takes_rngs else make()
        if _unready(ready) and (request.args or request.kwargs):
            _lazy_init(ready, request)
        return _same(lowered.graph, ready)

    return Lowered(graph=lowered.graph, init=init)


def made_abstractly(make: Callable[[], Any]) -> Any:
    """What a factory makes; an NNX module has shapes in place of arrays, and nothing is computed.

    Raises:
        Exception: whatever the factory raises under ``jax.eval_shape``.
    """
    kept: list[Any] = []

    def run() -> Any:
        made = make()
        if not isinstance(made, nnx.Pytree):
            kept.append(made)
            return ()
        _mark_arrays(made)
        graphdef, state = nnx.split(made)
        kept.append(graphdef)
        return state

    with _private.annotating("always"):
        state = jax.eval_shape(run)
    return nnx.merge(kept[0], state) if isinstance(kept[0], nnx.GraphDef) else kept[0]


def _name(make: Any) -> str:
    return getattr(make, "__name__", type(make).__name__)


def _like(rngs: Any) -> nnx.Rngs:
    """Streams with the names of `rngs`, made in the current trace; their numbers do not matter."""
    if not isinstance(rngs, nnx.Rngs):
        return _rngs(rngs)
    return nnx.Rngs(**dict.fromkeys(rngs, 0))


def _mark_arrays(model: Any) -> None:
    """Marks array attributes as data: flax does for arrays, but takes traced ones for static."""
    for _, obj in nnx.iter_graph(model):
        if isinstance(obj, nnx.Pytree):
            nodes = obj._pytree__nodes
            traced = [
                name
                for name, value in vars(obj).items()
                if isinstance(value, jax.Array) and not nodes.get(name, False)
            ]
            if traced:
                marked = nodes.update(dict.fromkeys(traced, True))
                object.__setattr__(obj, "_pytree__nodes", marked)


def read_module(model: Any) -> tuple[Graph, Sequence[Any]]:
    """The graph of an NNX module, and the value of each slot.

    Raises:
        LoweringError: something in it cannot be lowered, with its path.
    """
    return _walk(model, {}, {})


def parameters_of(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a class, a function or a partial of either still takes."""
    # The metaclass of NNX hides the constructor's own signature.
    function = getattr(make, "func", make)
    is_class = isinstance(function, type)
    if is_class and function.__init__ is object.__init__:
        return {}
    parameters = dict(inspect.signature(function.__init__ if is_class else make).parameters)
    if is_class:
        parameters.pop(next(iter(parameters)))
        given = getattr(make, "args", ())
        for name in [*list(parameters)[: len(given)], *getattr(make, "keywords", {})]:
            parameters.pop(name, None)
    return parameters


def _takes_rngs(make: Callable[..., Any]) -> bool:
    parameters = parameters_of(make)
    is_class = isinstance(getattr(make, "func", make), type)
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if set(needed) - {"rngs"}:
        name = _name(make)
        raise LoweringError(
            f"found the {'class' if is_class else 'function'} {name}, which needs"
            f" {', '.join(needed)}; expected a module, or a factory that needs no more than rngs",
            path=name,
            fix=f"Pass an instance, or `lambda rngs: {name}(..., rngs=rngs)`.",
        )
    return "rngs" in parameters


def _rngs(rngs: Any) -> nnx.Rngs:
    if isinstance(rngs, nnx.Rngs):
        return rngs
    return nnx.Rngs(0 if rngs is None else rngs)


def _unready(model: Any) -> list[str]:
    """The paths of the ToNNX wrappers that were never initialised."""
    found = []
    for path, obj in nnx.iter_graph(model):
        if isinstance(obj, bridge.ToNNX) and not wrapped_variables(obj):
            # A module without variables looks the same, and may be called as it is.
            found.append("/".join(map(str, path)))
    return found


def _lazy_init(model: Any, request: Request) -> None:
    """Initialises the ToNNX wrappers of a model, those inside a ToLinen too: it is watched."""

    def concrete(leaf: Any) -> Any:
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.zeros(leaf.shape, leaf.dtype) if is_shape else leaf

    args, kwargs = jax.tree.map(concrete, (request.args, request.kwargs))
    with observing(Observer()), initializing(model), _private.annotating("if needed"):
        _method(model, request.method)(*args, **kwargs)


def _method(model: Any, method: Any) -> Callable[..., Any]:
    if method is None:
        return model  # type: ignore[no-any-return]
    if isinstance(method, str):
        return getattr(model, method)  # type: ignore[no-any-return]
    return lambda *args, **kwargs: method(model, *args, **kwargs)


def _trace(
    model: Any, request: Request, *, lazy: bool
) -> tuple[Any, dict[int, tuple[Any, Observer]], dict[str, Call]]:
    """Calls the model abstractly, and keeps what ran inside its ToNNX wrappers."""
    name = request.method or "__call__"
    if isinstance(name, str) and not callable(getattr(model, name, None)):
        raise LoweringError(
            f"{type(model).__name__} has no method {name!r}",
            path=type(model).__name__,
            fix="Pass method= with the name of a method of the model.",
        )
    graphdef, state = nnx.split(model)
    arguments = _trees.Arguments.split(request.args, request.kwargs)
    observer = Observer()
    kept: list[Any] = []

    def run(state: Any, dynamic: tuple[Any, ...]) -> Any:
        args, kwargs = arguments.merge(dynamic)
        copy = nnx.merge(graphdef, state)
        with initializing(copy) if lazy else contextlib.nullcontext():
            output = _method(copy, request.method)(*args, **kwargs)
        call = Call(name if isinstance(name, str) else name.__name__, args, kwargs, output)
        kept.extend((copy, call))
        return ()

    try:
        with observing(observer), _private.annotating("always"):
            jax.eval_shape(run, state, arguments.dynamic)
    except LoweringError:
        raise
    except Exception as error:
        raise LoweringError(
            f"calling the model raised {type(error).__name__}: {error}",
            path=type(model).__name__,
            fix="The same call of the model raises it too; mend the model or the sample inputs.",
        ) from error
    nested = {id(wrapper): (wrapper, seen) for wrapper, seen in reversed(observer.nested)}
    return kept[0], nested, {kept[1].method: kept[1]}


def _matched(
    model: Any, copy: Any, nested: dict[int, tuple[Any, Observer]]
) -> dict[int, tuple[Any, Observer]]:
    """What was observed in the wrappers of a copy, by the wrappers of the original."""
    if not nested:
        return {}
    there = {path: obj for path, obj in nnx.iter_graph(copy) if isinstance(obj, bridge.ToNNX)}
    here = {path: obj for path, obj in nnx.iter_graph(model) if isinstance(obj, bridge.ToNNX)}
    return {
        id(obj): (obj, nested[id(there[path])][1])
        for path, obj in here.items()
        if path in there and id(there[path]) in nested
    }


def _walk(
    model: Any, nested: dict[int, tuple[Any, Observer]], calls: dict[str, Call]
) -> tuple[Graph, list[Any]]:
    builder = Builder()
    walker = Walker(builder, nested=nested)
    root = walker.add(model, ())
    builder.nodes[root].signatures.extend(signature(call, walker.encode) for call in calls.values())
    values = {builder.slots[number].key: value for number, value in walker.values.items()}
    take_sown_axes(builder, walker.encode)
    follow_parameters(builder, walker.objects, walker.slots)
    graph = builder.finish()
    return graph, [values.get(slot.key, _NO_VALUE) for slot in graph.slots]


def _concrete(graph: Graph, arrays: list[Any]) -> Values | None:
    """The values, or None when the model is abstract."""
    arrays = [
        _trees.placeholder(slot) if value is _NO_VALUE else value
        for slot, value in zip(graph.slots, arrays, strict=True)
    ]
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arrays)):
        return None
    return Values(slot_index(graph), tuple(arrays))


def _same(graph: Graph, model: Any) -> Values:
    """The values of a model that must have the structure of a graph."""
    other, arrays = _walk(model, {}, {})
    found = dict(zip((slot.key for slot in other.slots), arrays, strict=True))
    found |= {slot.key: _trees.placeholder(slot) for slot in graph.slots if slot.is_derived}
    # Inside Linen code that nobody watched, the objects tell no more than where a variable lies.
    leaves = {tuple(map(as_key, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    for number, path in attribute_paths(graph, graph.root).items():
        leaf, slot = leaves.get(tuple(map(as_key, path))), graph.slots[number]
        if leaf is not None and slot.key not in found:
            found[slot.key] = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    missing = [slot.key for slot in graph.slots if slot.key not in found]
    if missing:
        raise LoweringError(
            f"the factory made another structure than when it was lowered; {len(missing)} slots are"
            f" missing, {missing[0]} first",
            path=missing[0],
            fix="Pass rngs with the same streams as to lower.",
        )
    return Values(slot_index(graph), tuple(found[slot.key] for slot in graph.slots))
