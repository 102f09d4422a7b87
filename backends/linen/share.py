"""Calls Linen modules of equal structure through one trace; see `linsey.backends._share`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import core, linen
from flax.core.scope import in_filter

from linsey.backends import _private
from linsey.backends._parts import UnshareableError, is_same, static_key
from linsey.backends._repeats import find_repeats
from linsey.backends._share import WORDS, Session
from linsey.ir import Graph, Node


class Blocks:
    """The Linen modules of a graph that can be called through one trace.

    Which modules these are follows from the graph. What a trace depends on is asked of the module
    that is called: its hyper-parameters may differ from call to call, its values may be slices that
    a transform made.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._paths = _scope_paths(graph, find_repeats(graph, _is_linen).group)

    @contextlib.contextmanager
    def calls(self, session: Session) -> Iterator[None]:
        """Inside the block, calls of these modules go to a session."""
        if not self._paths or _private.is_watched():
            yield
            return
        watchers: list[int] = []
        running: list[tuple[str, ...]] = []

        def route(
            run: Any, args: Any, kwargs: Any, context: linen.module.InterceptorContext
        ) -> Any:
            if not watchers:  # the outermost call: linsey's own interceptors are in place
                watchers.append(_private.count_interceptors())
            module, path = context.module, context.module.path
            if session.is_busy or path not in self._paths or path in running:
                return run(*args, **kwargs)
            running.append(path)
            try:
                if watchers[0] != _private.count_interceptors():
                    raise UnshareableError("somebody watches its methods")
                return _call(session, module, context, args, kwargs)
            except UnshareableError:
                return run(*args, **kwargs)
            finally:
                running.pop()

        with linen.intercept_methods(route):
            yield


def _call(
    session: Session,
    module: linen.Module,
    context: linen.module.InterceptorContext,
    args: Any,
    kwargs: Any,
) -> Any:
    name = context.method_name
    scope = module.scope
    assert scope is not None
    if not _private.is_own_method(module, name, context.orig_method):
        raise UnshareableError("not a method of its class")
    counters = _frozen_counters(scope.rng_counters)
    key = (
        _module_key(module),
        name,
        _filter_key(scope.mutable),
        scope.flags,
        counters,
    )
    before = module.variables
    rngs = dict(scope.rngs)
    bases = {stream: rng.rng for stream, rng in rngs.items()}

    def body(inputs: Any, words: Any = None) -> Any:
        variables, bases, args, kwargs = inputs
        draws = _private.Draws(words)
        inner = core.Scope(
            {
                name: core.unfreeze(tree) if in_filter(scope.mutable, name) else tree
                for name, tree in variables.items()
            },
            rngs={stream: draws.rng(stream, key) for stream, key in bases.items()},
            name=scope.name,
            mutable=scope.mutable,
            path=scope.path,
            flags=scope.flags,
        )
        inner.rng_counters = _thawed_counters(counters)
        with _private.apart(module) as read:
            copy = module.copy(parent=inner, name=module.name)
            output = getattr(copy, name)(*args, **kwargs)
        if read:
            raise UnshareableError("it asks for its name or its path")
        if len(draws.made) > WORDS:
            raise UnshareableError("it draws many keys")
        after = inner.mutable_variables() if scope.mutable is not False else {}
        drawn = _Drawn(draws.made, _frozen_counters(inner.rng_counters))
        return output, after, drawn

    def words(result: Any) -> Any:
        numbers = np.zeros(WORDS, np.uint32)
        for place, (stream, suffix) in enumerate(result[2].made):
            numbers[place] = _private.fold_number((*rngs[stream].suffix, *suffix))
        return numbers

    given = (before, bases, args, kwargs)
    output, after, drawn = session.call(
        key, type(module).__name__, body, given, words if bases else None
    )
    _restore(scope.rng_counters, drawn.counters)
    for collection, tree in after.items():
        old = before.get(collection, {})
        for variable, value in tree.items():
            if variable not in old or not is_same(old[variable], value):
                scope.put_variable(collection, variable, value)
    return output


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The keys that a module drew."""

    made: tuple[tuple[str, tuple[Any, ...]], ...]
    """Stream, and what is folded into its key below the module."""
    counters: Hashable
    """The counters of the module's scope, and of those below, afterwards."""


def _is_linen(node: Node) -> bool:
    return node.source is None or node.source.dialect == "linen"


def _scope_paths(graph: Graph, numbers: Mapping[int, int]) -> frozenset[tuple[str, ...]]:
    """The scope paths of some nodes; those that hold NNX modules are left out."""
    found: set[tuple[str, ...]] = set()

    def is_pure(number: int) -> bool:
        node = graph.nodes[number]
        return _is_linen(node) and all(is_pure(child) for _, child in node.children)

    def walk(number: int, path: tuple[str, ...]) -> None:
        if number in numbers:
            if is_pure(number):
                found.add(path)
            return
        if _is_linen(graph.nodes[number]):
            for name, child in graph.nodes[number].children:
                walk(child, (*path, str(name)))

    walk(graph.root, ())
    return frozenset(found)


def _module_key(module: linen.Module) -> Hashable:
    """The class and hyper-parameters of a module, and of those inside them.

    Raises:
        UnshareableError: a module inside belongs to another one, or a hyper-parameter may change.
    """
    fields = []
    for field in dataclasses.fields(module):
        if field.init and field.name not in ("parent", "name"):
            value = _without_modules(getattr(module, field.name), module)
            fields.append((field.name, static_key(value)))
    return type(module), tuple(fields)


def _without_modules(value: Any, owner: linen.Module) -> Any:
    if isinstance(value, linen.Module):
        if value.parent is not owner:
            raise UnshareableError("a module inside it belongs to another")
        return ("module", *_module_key(value))  # type: ignore[misc]
    if isinstance(value, tuple | list):
        return type(value), [_without_modules(item, owner) for item in value]
    if isinstance(value, Mapping):
        return type(value), [(name, _without_modules(item, owner)) for name, item in value.items()]
    return value


def _filter_key(mutable: Any) -> Hashable:
    if isinstance(mutable, bool | str):
        return mutable
    if isinstance(mutable, core.DenyList):
        return "deny", _filter_key(mutable.deny)
    return frozenset(mutable)


def _frozen_counters(counters: Mapping[Any, Any]) -> Hashable:
    """Counters of a scope and those below, as they can be compared."""
    return frozenset(
        (name, _frozen_counters(value) if isinstance(value, Mapping) else value)
        for name, value in counters.items()
    )


def _thawed_counters(counters: Any) -> dict[Any, Any]:
    return {
        name: _thawed_counters(value) if isinstance(value, frozenset) else value
        for name, value in counters
    }


def _restore(counters: Any, after: Any) -> None:
    """Sets counters that several scopes share, in place."""
    for name, value in after:
        if isinstance(value, frozenset):
            _restore(counters.setdefault(name, {}), value)
        else:
            counters[name] = value
