"""Calls NNX modules of equal structure through one trace; see `linsey.backends._share`."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx

from linsey._places import attribute_paths, real_keys
from linsey.backends._parts import UnshareableError
from linsey.backends._repeats import find_repeats
from linsey.backends._share import Session
from linsey.backends.nnx.build import Plan
from linsey.backends.nnx.nodes import is_hosted
from linsey.backends.nnx.objects import value_at
from linsey.ir import Graph, Node, Path

_DECLINED = object()
"""Stands for a call that is made as it always was."""


class Blocks:
    """The NNX modules of a graph that can be called through one trace.

    Args:
        graph: the graph.
        plan: how its root is built.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self._graph = graph
        self._repeats = find_repeats(graph, _is_entered)
        self._paths = _paths(graph, self._repeats.group)
        self._plans = {number: _part(plan, number) for number in self._paths}
        self._places: dict[int, dict[int, Path]] = {}

    @contextlib.contextmanager
    def calls(self, session: Session, root: Any) -> Iterator[None]:
        """Inside the block, calls of these modules go to a session.

        Args:
            session: the session.
            root: the module that the plan built.
        """
        made = {}
        for number, path in self._paths.items():
            obj = value_at(root, path)
            made[id(obj)] = (number, obj)

        def offer(obj: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            number, _ = made.get(id(obj), (None, None))
            if number is None or session.is_busy or session.is_nested:
                return _DECLINED
            try:
                return self._call(session, number, obj, args, kwargs)
            except UnshareableError:
                return _DECLINED

        with _intercepted({type(obj) for _, obj in made.values()}, offer):
            yield

    def _call(
        self,
        session: Session,
        number: int,
        obj: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        plan = self._plans[number]
        slots = self._repeats.slots[number]
        values, changes = plan.read_changes(obj, [None] * len(self._graph.slots))
        if changes or plan.has_grown(obj):
            raise UnshareableError("its structure is no longer that of the graph")
        given = [values[slot] for slot in slots]

        def body(inputs: Any) -> Any:
            held, args, kwargs = inputs
            arrays: list[Any] = [None] * len(self._graph.slots)
            for slot, value in zip(slots, held, strict=True):
                arrays[slot] = value
            module = plan.build(arrays)
            output = module(*args, **kwargs)
            after, changes = plan.read_changes(module, arrays)
            if changes or plan.has_grown(module):
                raise UnshareableError("the call changed its structure")
            return output, [after[slot] for slot in slots]

        key = self._repeats.group[number]
        output, after = session.call(key, type(obj).__name__, body, (given, args, dict(kwargs)))
        self._write(number, obj, given, after)
        return output

    def _write(self, number: int, obj: Any, before: list[Any], after: list[Any]) -> None:
        """Stores what a call changed."""
        for slot, old, new in zip(self._repeats.slots[number], before, after, strict=True):
            if new is old:
                continue
            if number not in self._places:
                self._places[number] = attribute_paths(self._graph, number)
            path = self._places[number][slot]
            held = value_at(obj, path)
            if isinstance(held, nnx.Variable):
                held.set_raw_value(new)
            else:
                setattr(value_at(obj, path[:-1]), str(path[-1]), new)


def _is_entered(node: Node) -> bool:
    """Whether a node's own code, or that of a container, calls its children as NNX objects."""
    return not is_hosted(node) and (node.source is None or node.source.dialect != "linen")


def _part(plan: Plan, number: int) -> Plan:
    """The plan of a node below a plan's root, with the very attributes that the whole has."""
    part = copy.copy(plan)
    part.root = number
    return part


def _paths(graph: Graph, numbers: Mapping[int, int]) -> dict[int, Path]:
    """The attribute paths of some nodes."""
    found: dict[int, Path] = {}
    seen: set[int] = set()
    todo: list[tuple[int, Path]] = [(graph.root, ())]
    while todo:
        number, path = todo.pop()
        if number in seen:
            continue
        seen.add(number)
        node = graph.nodes[number]
        if number in numbers:
            found[number] = path
        elif _is_entered(node):
            names = real_keys(node)
            todo.extend((child, (*path, names.get(name, name))) for name, child in node.children)
    return found


class _Active(threading.local):
    offers: tuple[Callable[..., Any], ...] = ()


_active = _Active()
_lock = threading.Lock()
_uses: dict[type, int] = {}


@contextlib.contextmanager
def _intercepted(classes: set[type], offer: Callable[..., Any]) -> Iterator[None]:
    """Offers the calls of instances of some classes, in this thread, before they are made.

    Python looks ``__call__`` up on the class, so it is the class that gets another one; in other
    threads that one does nothing else.
    """
    with _lock:
        for cls in classes:
            _uses[cls] = _uses.get(cls, 0) + 1
            if _uses[cls] == 1:
                _install(cls)
    previous = _active.offers
    _active.offers = (*previous, offer)
    try:
        yield
    finally:
        _active.offers = previous
        with _lock:
            for cls in classes:
                _uses[cls] -= 1
                if not _uses[cls]:
                    del _uses[cls]
                    _remove(cls)


_OWN = "_linsey_own_call"


def _install(cls: type) -> None:
    own = vars(cls).get("__call__", _DECLINED)
    original: Any = cls.__call__

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _active.offers and type(self) is cls:
            result = _active.offers[-1](self, args, kwargs)
            if result is not _DECLINED:
                return result
        return original.__get__(self, cls)(*args, **kwargs)

    vars(call)[_OWN] = own
    cls.__call__ = call  # type: ignore[method-assign]


def _remove(cls: type) -> None:
    own = vars(vars(cls)["__call__"])[_OWN]
    if own is _DECLINED:
        del cls.__call__
    else:
        cls.__call__ = own  # type: ignore[method-assign]
