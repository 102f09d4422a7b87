"""Lowers a Linen module: one abstract trace of its init, watched."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, errors, linen, nnx

from linsey import _trees
from linsey._collections import unboxed
from linsey._places import variable_places
from linsey.frontends import _private
from linsey.frontends._annotations import take_sown_axes
from linsey.frontends._builder import Builder, Draft
from linsey.frontends._record import Lowered, Request
from linsey.frontends.linen.build import Region, add_variables
from linsey.frontends.linen.observe import Observer, observing
from linsey.ir import (
    Graph,
    Host,
    LoweringError,
    Path,
    Source,
    TreeType,
    Values,
    ValuesError,
    Wrapper,
    as_key,
    format_path,
    is_host,
    slot_index,
)
from linsey.ir.reserved import GRAPH_COLLECTION

_MISSING = object()


def lower(request: Request) -> Lowered:
    """Lowers a Linen module.

    Raises:
        LoweringError: the module or the sample inputs are not fit for it, with the path.
        ValuesError: the given variables are not those of the module.
    """
    if is_host(request.source):
        return _lower_host(request.source, request)
    module = _checked(request.source, request)
    keys = _trees.key_dict(0 if request.rngs is None else request.rngs)
    arguments = _trees.Arguments.split(request.args, request.kwargs)
    observer = Observer()

    kept: list[Any] = []

    def init(keys: dict[str, Any], dynamic: tuple[Any, ...]) -> Any:
        args, kwargs = arguments.merge(dynamic)
        kept.append(module.init(keys, *args, method=request.method, **kwargs))
        return ()

    try:
        with observing(observer), _private.annotating("always"):
            jax.eval_shape(init, keys, arguments.dynamic)
    except Exception as error:
        raise _explained(error, module, observer, keys) from error
    graph = _graph(module, observer, kept[0], given=request.variables)
    values = None if request.variables is None else read(graph, request.variables)
    concrete = _initialiser(module, request, arguments, graph)
    return Lowered(graph=graph, values=values, init=concrete)


def _lower_host(host: Host, request: Request) -> Lowered:
    """Lowers a Linen module that linsey emitted: it is the graph that it was emitted from."""
    parts = host.linsey_parts()
    graph = parts.graph
    if request.variables is None:
        return Lowered(graph=graph)
    return Lowered(graph=graph, values=read(graph, request.variables, parts.places))


def _checked(module: Any, request: Request) -> linen.Module:
    if isinstance(module, type):
        raise LoweringError(
            f"found the class {module.__name__}, expected an instance of it",
            path=module.__name__,
            fix=f"Pass {module.__name__}(...) with its hyper-parameters.",
        )
    if module.scope is not None:
        raise LoweringError(
            "found a bound module, expected an unbound one",
            path=type(module).__name__,
            fix="Pass the module as it was constructed, or the first result of `module.unbind()`.",
        )
    method = request.method or "__call__"
    function = getattr(type(module), method, None) if isinstance(method, str) else method
    if not callable(function):
        raise LoweringError(
            f"{type(module).__name__} has no method {method!r}",
            path=type(module).__name__,
            fix="Pass method= with the name of a method, or a function of the module.",
        )
    try:
        bound = inspect.ismethod(function)
        inspect.signature(function).bind(
            *(() if bound else (module,)), *request.args, **request.kwargs
        )
    except TypeError as error:
        name = getattr(function, "__name__", str(method))
        raise LoweringError(
            f"the sample inputs do not fit {name}{inspect.signature(function)}: {error}",
            path=type(module).__name__,
            fix="Pass sample inputs (arrays or jax.ShapeDtypeStruct) as you pass them to init.",
        ) from error
    return module  # type: ignore[no-any-return]


def _explained(
    error: Exception, module: linen.Module, observer: Observer, keys: Mapping[str, Any]
) -> Exception:
    where = "/".join(observer.failed_at or ()) or type(module).__name__
    if isinstance(error, LoweringError):
        return error
    is_stream = isinstance(error, errors.InvalidRngError) or "No RngStream named" in str(error)
    if is_stream:
        given = ", ".join(sorted(keys)) or "none"
        return LoweringError(
            f"a PRNG stream is missing; given: {given}. {error}",
            path=where,
            fix="Pass rngs= with a key for every stream that the module draws from.",
        )
    return LoweringError(
        f"initialising the module raised {type(error).__name__}: {error}",
        path=where,
        fix="The same call of `module.init` raises it too; mend the module or the sample inputs.",
    )


def _graph(module: linen.Module, observer: Observer, variables: Any, given: Any) -> Graph:
    builder = Builder()
    root = builder.add(Draft())
    region = Region(builder, root, (), observer)
    whole = region.encode.module(module)
    draft = builder.nodes[root]
    is_nnx = () in observer.modules and observer.modules[()].nnx is not None
    if not is_nnx:
        draft.attrs.extend(whole.fields)
        draft.source = Source(dialect="linen", cls=whole.cls)
    region.add_modules()
    add_variables(region, builder, core.unfreeze(variables))
    if is_nnx:
        draft.wrapper = Wrapper(cls=whole.cls, attrs=region.wrapper_attributes((), whole.fields))
    if given is not None:
        _take_boxes(builder, given)
    take_sown_axes(builder, region.encode)
    return builder.finish()


def _take_boxes(builder: Builder, given: Any) -> None:
    """Gives the slots the boxes of the variables that the user has: those may be unboxed."""
    for number, slot in enumerate(builder.slots):
        value = _get(given, (slot.collection, *slot.path))
        if value is not _MISSING and slot.box is not None and value is unboxed(value):
            builder.slots[number] = dataclasses.replace(slot, box=None)


def _get(tree: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(tree, Mapping):
            return _MISSING
        if name not in tree:
            named = {as_key(key): key for key in tree}
            if name not in named:
                return _MISSING
            name = named[name]
        tree = tree[name]
    return tree


def read(graph: Graph, variables: Any, places: Mapping[int, Path] = MappingProxyType({})) -> Values:
    """Reads the values of a graph from Linen variables.

    Args:
        graph: the structure.
        variables: a dict of collections.
        places: where each slot's variable lies, where that is not the slot's own path.

    Raises:
        ValuesError: with every slot that is missing, extra, or of another shape or dtype.
    """
    if not isinstance(variables, Mapping):
        raise ValuesError(
            f"found {type(variables).__name__}, expected a dict of collections",
            path="variables",
            fix="Pass what `module.init` returned.",
        )
    places = places or variable_places(graph)
    problems, arrays = [], []
    for number, slot in enumerate(graph.slots):
        value = _get(variables, places.get(number, (slot.collection, *slot.path)))
        if value is _MISSING:
            if slot.is_derived:
                arrays.append(_trees.placeholder(slot))
            elif isinstance(slot.type, TreeType) and not slot.type.leaves:
                # No array: axis names that were sown, which users leave out of what they store.
                arrays.append(_trees.fill(slot.type.structure, []))
            else:
                problems.append(f"{slot.key}: missing, expected {slot.type}")
            continue
        try:
            found = _trees.value_type(unboxed(value))
        except TypeError as error:
            problems.append(f"{slot.key}: {error}")
            continue
        if str(found) != str(slot.type):
            problems.append(f"{slot.key}: found {found}, expected {slot.type}")
        arrays.append(unboxed(value))
    problems.extend(_extra(graph, variables, places))
    if problems:
        tops = {slot.path[0] for slot in graph.slots}
        is_one = bool(graph.slots) and set(variables) <= tops
        raise ValuesError(
            f"the variables are not those of the module, {len(problems)} differ:\n  "
            + "\n  ".join(problems),
            path="variables",
            fix="Pass the whole dict of collections: this seems to be one of them."
            if is_one
            else "Initialise by the same method and inputs as those given to lower.",
        )
    return Values(slot_index(graph), tuple(arrays))


def _extra(graph: Graph, variables: Any, places: Mapping[int, Path]) -> list[str]:
    known = {(slot.collection, *path) for slot in graph.slots for path in slot.paths}
    known.update(places.values())
    found: list[str] = []

    def walk(path: Path, tree: Any) -> None:
        if path in known:
            return
        if isinstance(tree, Mapping):
            for name, below in tree.items():
                walk((*path, as_key(name)), below)
        else:
            found.append(f"{format_path(path)}: not a variable of this module")

    for collection, tree in variables.items():
        if collection != GRAPH_COLLECTION:
            walk((collection,), tree)
    return found


def _initialiser(
    module: linen.Module,
    request: Request,
    arguments: _trees.Arguments,
    graph: Graph,
) -> Callable[[Any], Values]:
    is_mixed = any(slot.is_derived for slot in graph.slots) or any(
        node.wrapper is not None for node in graph.nodes
    )

    def concrete(leaf: Any) -> Any:
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.zeros(leaf.shape, leaf.dtype) if is_shape else leaf

    def init(rngs: Any) -> Values:
        args, kwargs = arguments.merge(tuple(map(concrete, arguments.dynamic)))
        keys = _trees.key_dict(0 if rngs is None else rngs)
        observer = Observer()
        # Watched only where flax leaves something out: see `Observer`.
        watched = observing(observer) if is_mixed else contextlib.nullcontext()
        try:
            with watched, _private.annotating("if needed"):
                variables = module.init(keys, *args, method=request.method, **kwargs)
        except errors.InvalidRngError as error:
            raise _explained(error, module, observer, keys) from error
        values = read(graph, core.unfreeze(variables))
        return values.replace(_derived_values(graph, observer)) if is_mixed else values

    return init


def _derived_values(graph: Graph, observer: Observer) -> dict[str, Any]:
    """The PRNG state that NNX modules inside a ToLinen had after a concrete init."""
    found: dict[Path, Any] = {}
    for path, seen in observer.modules.items():
        if seen.nnx is not None:
            for below, leaf in nnx.to_flat_state(nnx.state(seen.nnx, nnx.RngState)):
                if _private.is_current(leaf):  # one made inside a lifted transform is not
                    found[*path, *map(as_key, below)] = leaf.get_raw_value()
    return {
        slot.key: found[slot.path] for slot in graph.slots if slot.is_derived and slot.path in found
    }
