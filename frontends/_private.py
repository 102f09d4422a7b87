"""Every private name of flax and jax that the frontends touch, each with its reason.

Seen in flax 0.12.8 and 0.12.12.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, Literal

import jax
from flax.core import lift, meta, scope, spmd
from flax.linen import module as linen_module
from flax.linen import transforms
from flax.nnx import graphlib
from flax.nnx.bridge import wrappers

from linsey._unboxing import constraining
from linsey.ir import AttrValue, Call, Const, Encoder, Map, Ref, reference


class Watcher:
    """What `watching` calls back; a frontend overrides what it wants to know."""

    def put(self, collection: str, path: tuple[str, ...], name: str) -> None:
        """A variable was written."""

    def draw(self, path: tuple[str, ...], stream: str, *, initialising: bool) -> None:
        """A key was drawn; `initialising`: by ``self.param`` for its initialiser."""

    def add_axis(self, tree: Any, params: dict[Any, Any]) -> tuple[Any, dict[Any, Any]]:
        """A lifted transform is about to stack variables along a new axis."""
        return tree, params

    def call(self, module: Any, method: Any, run: Any, args: Any, kwargs: Any) -> Any:
        """A method of a Linen module is called; `run` takes its arguments."""
        return run(*args, **kwargs)

    def lift(self, module: Any) -> None:
        """A lifted transform runs a method of `module`, the outermost instance."""

    def close(self, path: tuple[str, ...]) -> None:
        """A scope ends; when a lifted transform does, that of the module which runs it."""

    def mark_axis(self, params: dict[Any, Any]) -> dict[Any, Any]:
        """A lifted transform is about to slice variables along a stacked axis."""
        return params

    def stands_for(self, copy: Any, wrapper: Any) -> None:
        """A ``bridge.ToNNX`` that was called is a copy of another, which is the one to know."""

    def call_to_nnx(self, wrapper: Any, run: functools.partial[Any]) -> Any:
        """A ``bridge.ToNNX`` is called."""
        return run()


class _Active(threading.local):
    watcher: Watcher | None = None
    in_param: int = 0
    annotating: Literal["always", "if needed"] | None = None


_active = _Active()
_lock = threading.Lock()
_uses = 0

# Scope is the one place through which every variable and every key of Linen passes, and flax offers
# no public hook on it: method interception sees calls of modules only.
_originals: dict[tuple[Any, str], Any] = {
    (scope.Scope, "put_variable"): scope.Scope.put_variable,
    (scope.Scope, "make_rng"): scope.Scope.make_rng,
    (scope.Scope, "param"): scope.Scope.param,
    # lift calls `meta.add_axis(variables, axis, params)` for each group that a transform stacks.
    # Only what lift sees is replaced: elsewhere the same function names axes that no array has.
    (lift, "meta"): meta,
    # Every call of a method. The public `nn.intercept_methods` sees the same calls, and makes the
    # trace of an `nn.remat` inside an `nn.scan` 40 % slower.
    (linen_module.Module, "_call_wrapped_method"): linen_module.Module._call_wrapped_method,
    # Class transforms leave the outer call unintercepted: flax takes it for wrapped already.
    (transforms, "get_module_scopes"): transforms.get_module_scopes,
    # ``nn.jit`` runs the jitted function inside this block: traced before, its Python code, and so
    # all that is in it, would not be seen.
    (transforms, "fork_rngs"): transforms.fork_rngs,
    (scope.Scope, "invalidate"): scope.Scope.invalidate,
    # The moment at which NNX code enters Linen code; NNX calls cannot be intercepted.
    (wrappers.ToNNX, "__call__"): wrappers.ToNNX.__call__,
    # A Variable with an annotation shards its value when it is made, and raises where there is no
    # mesh. ``nnx.use_eager_sharding(False)`` would stop it, and be kept in the metadata.
    (spmd, "shard_value"): spmd.shard_value,
    # Reading a boxed variable constrains its value to the mesh in force. On a mesh with Explicit
    # axes that is an assertion, which no value that an initialiser just made can pass.
}


def _put_variable(self: Any, col: str, name: str, value: Any) -> None:
    if _active.watcher is not None:
        _active.watcher.put(col, self.path, name)
    _originals[scope.Scope, "put_variable"](self, col, name, value)


def _make_rng(self: Any, name: str = "params") -> Any:
    if _active.watcher is not None:
        _active.watcher.draw(self.path, name, initialising=_active.in_param > 0)
    return _originals[scope.Scope, "make_rng"](self, name)


def _param(self: Any, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
    original = _originals[scope.Scope, "param"]
    if _active.watcher is None:
        return original(self, name, init_fn, *args, **kwargs)
    _active.in_param += 1
    try:
        return original(self, name, init_fn, *args, **kwargs)
    finally:
        _active.in_param -= 1


def _call_wrapped_method(self: Any, fun: Any, args: Any, kwargs: Any) -> Any:
    original = _originals[linen_module.Module, "_call_wrapped_method"]
    if _active.watcher is None:
        return original(self, fun, args, kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return original(self, fun, args, kwargs)

    return _active.watcher.call(self, fun, run, args, kwargs)


def _get_module_scopes(module: Any, args: Any = None, kwargs: Any = None) -> Any:
    if _active.watcher is not None:
        _active.watcher.lift(module)
    return _originals[transforms, "get_module_scopes"](module, args, kwargs)


# A distinct value of this context makes jax.jit trace again, where it would use what it kept.
_make_context: Any = jax.make_user_context  # not annotated
_fresh = _make_context(default_value=None)


@contextlib.contextmanager
def _fork_rngs(module: Any) -> Iterator[None]:
    again = contextlib.nullcontext() if _active.watcher is None else _fresh(object())
    with again, _originals[transforms, "fork_rngs"](module):
        yield


def _invalidate(self: Any) -> None:
    if _active.watcher is not None:
        _active.watcher.close(self.path)
    _originals[scope.Scope, "invalidate"](self)


class _Meta:
    """``flax.core.meta`` as lift sees it while a watcher is at work."""

    def __getattr__(self, name: str) -> Any:
        return getattr(meta, name)

    def add_axis(self, tree: Any, index: int, params: dict[Any, Any]) -> Any:
        if _active.watcher is not None:
            tree, params = _active.watcher.add_axis(tree, params)
        return meta.add_axis(tree, index, params)

    def remove_axis(self, tree: Any, index: int, params: dict[Any, Any]) -> Any:
        if _active.watcher is not None:
            params = _active.watcher.mark_axis(params)
        return meta.remove_axis(tree, index, params)


def _call_to_nnx(self: Any, *args: Any, **kwargs: Any) -> Any:
    run = functools.partial(_originals[wrappers.ToNNX, "__call__"], self, *args, **kwargs)
    return watched_call(run)


def stands_for(copy: Any, wrapper: Any) -> None:
    """Tells the watcher at work that a ToNNX which was called is a copy of another."""
    if _active.watcher is not None:
        _active.watcher.stands_for(copy, wrapper)


def watched_call(run: functools.partial[Any]) -> Any:
    """Runs the call of a ToNNX (the first argument of `run`) as the watcher at work wants it."""
    return run() if _active.watcher is None else _active.watcher.call_to_nnx(run.args[0], run)


def _shard_value(value: Any, out_sharding: Any, sharding_rules: Any, mesh: Any) -> Any:
    meshes = (mesh, meta.get_global_mesh(), _mesh_of(out_sharding))
    has_mesh = any(each is not None for each in meshes)
    if _active.annotating == "always" or (_active.annotating and not has_mesh):
        return value
    original = _originals[spmd, "shard_value"]
    return original(value, out_sharding, sharding_rules, mesh)


def _mesh_of(annotation: Any) -> Any:
    """The mesh of a sharding, or of the sharding in a format."""
    return getattr(getattr(annotation, "sharding", annotation), "mesh", None)


_replacements = {
    (scope.Scope, "put_variable"): _put_variable,
    (scope.Scope, "make_rng"): _make_rng,
    (scope.Scope, "param"): _param,
    (lift, "meta"): _Meta(),
    (linen_module.Module, "_call_wrapped_method"): _call_wrapped_method,
    (transforms, "get_module_scopes"): _get_module_scopes,
    (transforms, "fork_rngs"): _fork_rngs,
    (scope.Scope, "invalidate"): _invalidate,
    (wrappers.ToNNX, "__call__"): _call_to_nnx,
    (spmd, "shard_value"): _shard_value,
}


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    """Puts the replacements in their places; each asks what this thread wants."""
    global _uses
    with _lock:
        _uses += 1
        for (owner, name), replacement in _replacements.items():
            setattr(owner, name, replacement)
    try:
        yield
    finally:
        with _lock:
            _uses -= 1
            if not _uses:
                for (owner, name), original in _originals.items():
                    setattr(owner, name, original)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tells `watcher` what flax does in this thread; other threads are not disturbed."""
    previous = _active.watcher
    with _replaced():
        _active.watcher = watcher
        try:
            yield
        finally:
            _active.watcher = previous


@contextlib.contextmanager
def annotating(when: Literal["always", "if needed"]) -> Iterator[None]:
    """Inside the block, annotations are kept, and values are not sharded by them.

    Args:
        when: ``always`` for abstract values; ``if needed`` for concrete ones: only where flax would
            raise, since there is no mesh, or (see `constraining`) the annotation does not fit.
    """
    previous = _active.annotating
    with _replaced(), constraining("never" if when == "always" else "where it fits"):
        _active.annotating = when
        try:
            yield
        finally:
            _active.annotating = previous


def _closure(function: Any) -> dict[str, Any]:
    """The captured variables of a function."""
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    cells = function.__closure__ or ()
    found = {}
    for name, cell in zip(code.co_freevars, cells, strict=True):
        with contextlib.suppress(ValueError):  # a cell that is still empty
            found[name] = cell.cell_contents
    return found


def _innermost(function: Any, maker: str) -> Any:
    """The function that `maker` made, below the wrappers that flax puts around methods."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and code.co_qualname.startswith(maker):
            return function
        function = getattr(function, "__wrapped__", None)
    return None


def transformed_class(cls: type, encode: Encoder) -> AttrValue | None:
    """A class that ``nn.vmap``, ``nn.scan`` … made, as the call that made it; None for others.

    The call is of ``flax.linen.transforms.lift_transform``, which all of them end in.
    """
    methods: dict[str, Any] = {}
    for name, method in vars(cls).items():
        function = _innermost(method, "module_class_lift_transform") if callable(method) else None
        if function is not None:
            methods[name] = _closure(function)
    if not methods or len(cls.__bases__) != 1:
        return None
    captured = next(iter(methods.values()))
    transform = captured.get("transform")
    function = reference(transform) or encode(transform)
    per_method = tuple(
        (
            Const(name),
            encode((tuple(each.get("trafo_args", ())), dict(each.get("trafo_kwargs", {})))),
        )
        for name, each in methods.items()
    )
    target = Ref(name="flax.linen.transforms:lift_transform")
    args = (function, encode(cls.__bases__[0]))
    return Call(
        function=target,
        args=args,
        kwargs=(("methods", Map(cls=Ref(name="builtins:dict", live=dict), items=per_method)),),
        live=cls,
    )


# nnx.graphlib is where NNX itself says what is a node and how it flattens; the public nnx names
# cover iteration, but neither static attributes nor plain pytrees.
get_node_impl = graphlib.get_node_impl
GraphNodeImpl = graphlib.GraphNodeImpl
DataElem = graphlib.DataElem
StaticElem = graphlib.StaticElem
IndexesPytreeDef = graphlib.IndexesPytreeDef


def is_current(variable: Any) -> bool:
    """Whether an NNX Variable was made in the current trace: its value may be used."""
    return bool(variable._can_update)


# `bridge.lazy_init` sets this flag around one call; it has no public setter, and a ToNNX inside a
# ToLinen needs it around a call that flax makes.
set_initializing = wrappers._set_initializing
