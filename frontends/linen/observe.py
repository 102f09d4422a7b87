"""Watches Linen code run, and keeps what it saw: modules, calls, variables, keys, stacked axes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import core, linen, nnx, struct
from flax.core import meta
from flax.nnx import bridge

from linsey._collections import collection_of
from linsey.frontends import _private

LinenPath = tuple[str, ...]


@dataclass
class Call:
    """One observed call of one module."""

    method: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@dataclass
class Module:
    """What was seen of the module at one scope path."""

    instance: linen.Module
    calls: dict[str, Call] = field(default_factory=dict)
    draws: dict[str, bool] = field(default_factory=dict)
    """Stream -> whether something other than a parameter's initialiser drew from it."""
    nnx: Any = None
    """The NNX module that a `bridge.ToLinen` at this path made."""


class StackBox(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A metadata box that flax itself tells of every axis that a lifted transform adds."""

    value: Any
    stack: tuple[tuple[int, str | None, LinenPath], ...] = struct.field(pytree_node=False)
    """Axis, partition name and owner path of each lifted axis, outermost first."""

    def unbox(self) -> Any:
        """The value; it may be a box of the source."""
        return self.value

    def replace_boxed(self, val: Any) -> StackBox:
        """The box around another value."""
        return self.replace(value=val)

    def _inner(self, change: Callable[[Any], Any]) -> Any:
        return change(self.value) if isinstance(self.value, meta.AxisMetadata) else self.value

    def add_axis(self, index: int, params: dict[Any, Any]) -> StackBox:
        """Notes an axis, and tells the box inside."""
        # `nn.add_metadata_axis` names an axis that no array gets: then there is no owner.
        added = (index, params.get(meta.PARTITION_NAME), params.get(StackBox))
        return self.replace(
            value=self._inner(lambda box: box.add_axis(index, params)),
            stack=self.stack if added[2] is None else (added, *self.stack),
        )

    def remove_axis(self, index: int, params: dict[Any, Any]) -> StackBox:
        """Forgets the outermost axis, and tells the box inside."""
        return self.replace(
            value=self._inner(lambda box: box.remove_axis(index, params)),
            stack=self.stack[1:] if StackBox in params else self.stack,
        )


class Observer(_private.Watcher):
    """Observes one run of Linen code; use `observing` around the run."""

    def __init__(self) -> None:
        self.modules: dict[LinenPath, Module] = {}
        self.variables: dict[tuple[str, LinenPath, str], None] = {}
        self.nested: list[tuple[Any, Observer]] = []
        """The ``bridge.ToNNX`` objects that were called, each with what ran inside it."""
        self.entry: Call | None = None
        """Inside a ToNNX: the call of it."""
        self._closed: LinenPath = ()
        self._inside: list[Observer] = []
        self.failed_at: LinenPath | None = None

    def put(self, collection: str, path: LinenPath, name: str) -> None:
        """Notes a variable."""
        if self._inside:
            self._inside[-1].put(collection, path, name)
        else:
            self.variables.setdefault((collection, path, name))

    def draw(self, path: LinenPath, stream: str, *, initialising: bool) -> None:
        """Notes a draw from a stream."""
        if self._inside:
            self._inside[-1].draw(path, stream, initialising=initialising)
        elif path in self.modules:
            draws = self.modules[path].draws
            draws[stream] = draws.get(stream, False) or not initialising

    def add_axis(self, tree: Any, params: dict[Any, Any]) -> tuple[Any, dict[Any, Any]]:
        """Puts a `StackBox` around each variable that is about to be stacked."""
        if self._inside:  # flax makes Variables of what comes out: no place for a box of ours
            return tree, params
        boxed = jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, StackBox) else StackBox(value=leaf, stack=()),
            tree,
            is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata),
        )
        return boxed, self.mark_axis(params)

    def lift(self, module: linen.Module) -> None:
        """Keeps the outermost instance of a lifted class: its methods are not intercepted."""
        inside = self._inside[-1] if self._inside else self
        if module.scope is not None:
            inside.modules.setdefault(module.scope.path, Module(module))

    def close(self, path: LinenPath) -> None:
        """Keeps the path of the scope that ended last: that of a lift which is about to stack."""
        (self._inside[-1] if self._inside else self)._closed = path

    def mark_axis(self, params: dict[Any, Any]) -> dict[Any, Any]:
        """Adds the owner of a lift to its metadata parameters."""
        inside = self._inside[-1] if self._inside else self
        return {**params, StackBox: inside._closed}

    def call_to_nnx(self, wrapper: Any, run: functools.partial[Any]) -> Any:
        """Observes what runs inside a ToNNX apart from what runs around it."""
        inner = Observer()
        args, kwargs = run.args[1:], dict(run.keywords)
        method = kwargs.pop("method", None)
        own = {"rngs", "mutable"}
        kept = {name: value for name, value in kwargs.items() if name not in own}
        inner.entry = Call(method, args, kept)
        owner = self._inside[-1] if self._inside else self
        owner.nested.append((wrapper, inner))
        self._inside.append(inner)
        try:
            return run()
        finally:
            self._inside.pop()

    def stands_for(self, copy: Any, wrapper: Any) -> None:
        """Keeps what was seen in a copy of a ToNNX under the original."""
        nested = (self._inside[-1] if self._inside else self).nested
        nested[:] = [(wrapper if seen is copy else seen, inner) for seen, inner in nested]

    def call(self, module: Any, method: Any, run: Any, args: Any, kwargs: Any) -> Any:
        """Notes a call of a Linen method, and runs it."""
        if self._inside:
            return self._inside[-1].call(module, method, run, args, kwargs)
        name = getattr(method, "__name__", "unnamed_function")
        if module.scope is None:
            return run(*args, **kwargs)
        path: LinenPath = module.scope.path
        seen = self.modules.get(path)
        if seen is None:
            seen = self.modules[path] = Module(module)
        if hasattr(type(module), "linsey_made"):
            run = functools.partial(self._call_own_to_linen, seen, module, run)
        elif isinstance(module, bridge.ToLinen) and _is_to_linen_call(method):
            run = functools.partial(self._call_to_linen, seen, module, run)
        try:
            # flax checks `setup` by calling a lambda of its own on the module.
            is_own = name in ("setup", "<lambda>")
            # Inside a lifted class the values are slices: that call is not the node's.
            is_slice = type(module) is not type(seen.instance)
            if is_own or is_slice or name in seen.calls:
                return run(*args, **kwargs)
            call = seen.calls[name] = Call(name, args, kwargs)
            call.output = run(*args, **kwargs)
            return call.output
        except BaseException:
            if self.failed_at is None:
                self.failed_at = path
            raise

    def _call_own_to_linen(
        self, seen: Module, module: Any, run: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a ToLinen of linsey, which tells what it made."""
        output = run(*args, **kwargs)
        seen.nnx = seen.nnx if module.linsey_made is None else module.linsey_made
        return output

    def _call_to_linen(
        self, seen: Module, module: bridge.ToLinen, run: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a `bridge.ToLinen`, and keeps the NNX module that it makes.

        flax leaves a `bridge.ToNNX` inside that module without variables; here they are made, and
        stored where flax would look for them.
        """
        make = module.nnx_class

        def keeping(*make_args: Any, **make_kwargs: Any) -> Any:
            seen.nnx = make(*make_args, **make_kwargs)
            if module.is_initializing() and holds_to_nnx(seen.nnx):
                _private.set_initializing(seen.nnx, True)
            return seen.nnx

        object.__setattr__(module, "nnx_class", keeping)
        try:
            output = run(*args, **kwargs)
        finally:
            object.__setattr__(module, "nnx_class", make)
        if module.is_initializing() and holds_to_nnx(seen.nnx):
            _private.set_initializing(seen.nnx, False)
            _store_nested(module, seen.nnx)
        return output


def holds_to_nnx(module: nnx.Module) -> bool:
    """Whether there is a `bridge.ToNNX` anywhere in an NNX module."""
    return any(isinstance(child, bridge.ToNNX) for _, child in nnx.iter_graph(module))


def _store_nested(module: bridge.ToLinen, made: nnx.Module) -> None:
    """Puts the variables that are new in `made` into the scope of the ToLinen around it."""
    for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.Not(nnx.RngState))):
        if not isinstance(leaf, nnx.Variable):
            continue
        collection = collection_of(type(leaf))
        name = str(path[0])
        top: Any = module.get_variable(collection, name, {})
        flat = nnx.traversals.flatten_mapping({path[0]: core.unfreeze(top)})
        if path not in flat and module.is_mutable_collection(collection):
            box = leaf.get_value() if module.metadata_fn is None else module.metadata_fn(leaf)
            nested = nnx.traversals.unflatten_mapping({**flat, path: box})
            module.put_variable(collection, name, nested[path[0]])


def _is_to_linen_call(method: Any) -> bool:
    """Whether this is flax's own ``ToLinen.__call__``, and not a subclass's around it."""
    return method is getattr(bridge.ToLinen.__call__, "__wrapped__", None)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[Observer]:
    """Observes the Linen code that this thread runs inside the block."""
    with _private.watching(observer):
        yield observer
