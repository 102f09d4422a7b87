"""What the `ToLinen` of both faces share: making an NNX module, and storing what it holds."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from flax import core, linen, nnx
from flax.nnx import bridge

from linsey._collections import register
from linsey.backends import HostSpec, no_parent
from linsey.backends.linen import Call, Hosting, Options, detached
from linsey.bridge._mode import current_mode
from linsey.frontends import initializing, stands_for
from linsey.frontends.nnx import parameters_of, read_module
from linsey.ir import RNG_COLLECTIONS, BridgeError, format_path


class WrappedNNX(bridge.ToLinen):
    """The base of both `ToLinen`; a face says what is stored and how a call finds it."""

    linsey_call: ClassVar[Any]
    """The face's own call, by which a backend knows a subclass that changed it."""

    @property
    def linsey_made(self) -> nnx.Module | None:
        """The NNX module that this call made, for a frontend that watches it."""
        return self.__dict__.get("_linsey_made")

    @linen.nowrap
    @contextlib.contextmanager
    def linsey_around(self, made: nnx.Module) -> Iterator[None]:
        """The context of one call of the NNX module, given to what runs it.

        Keeps the module for a frontend, and sets the mode of the ToNNX around, if there is one.
        """
        object.__setattr__(self, "_linsey_made", made)
        mode = current_mode()
        if not mode or not isinstance(made, nnx.Module):
            yield
            return
        before = [
            (part, name, getattr(part, name))
            for _, part in nnx.iter_modules(made)
            for name in mode
            if hasattr(part, name)
        ]
        made.set_attributes(**mode, raise_if_not_found=False)
        yield
        for part, name, value in before:
            setattr(part, name, value)

    def __post_init__(self) -> None:
        _check(self.nnx_class, self.args, self.kwargs)
        super().__post_init__()

    @linen.nowrap
    def __getattr__(self, name: str) -> Any:
        make = self.__dict__.get("nnx_class")
        if make is not None and not name.startswith("__") and not hasattr(linen.Module, name):
            kwargs = self.__dict__.get("kwargs") or {}
            if name in kwargs:
                return kwargs[name]
            cls = _made_class(make)
            if callable(getattr(cls, name, None)):
                # A bound method, so that `apply(method=...)` can bind it to another scope.
                return types.MethodType(functools.partial(_call_method, name), self)
            if cls is None:
                raise AttributeError(
                    f"{type(self).__name__} has no attribute {name!r}, and which methods the NNX"
                    f" module has is not known before it is made. Pass nnx_method={name!r}, or say"
                    " what the factory returns: def make(rngs) -> Model"
                )
        return linen.Module.__getattr__(self, name)

    @linen.nowrap
    def _hosting(self, call: Call) -> Hosting | None:
        """What makes a top-level call without a scope, or None where that cannot be."""
        raise NotImplementedError

    @linen.nowrap
    def apply(
        self,
        variables: Any,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Calls a method; see ``linen.Module.apply``."""
        options = Options(rngs, method, mutable, capture_intermediates)
        call = detached(self, type(self).linsey_call, variables, options, kwargs)
        hosting = None if call is None else self._hosting(call)
        if call is None or hosting is None:
            return super().apply(variables, *args, **options._asdict(), **kwargs)
        return call(hosting, args, box=self._box, strict=False)

    @linen.nowrap
    def _box(self, variable: nnx.Variable[Any]) -> Any:
        return variable.get_raw_value() if self.metadata_fn is None else self.metadata_fn(variable)

    @linen.nowrap
    def _initialize(
        self, method: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, HostSpec, nnx.Module]:
        """Makes the module, calls it, and stores the state that it had before the call.

        Returns:
            What the call returned, and the module: its graph, and itself.
        """
        assert self.scope is not None
        made = _construct(self)
        where = format_path(self.path) or _name_of(self.nnx_class)
        with _explaining(where, self.scope.rngs):
            output = _initial_call(made, method, args, kwargs)
        graph, values = read_module(made)
        spec = HostSpec(graph, graph.root)
        self._store(made, spec, values)
        object.__setattr__(self, "_linsey_made", made)
        return output, spec, made

    @linen.nowrap
    def _keeps_streams(self) -> bool:
        """Whether the PRNG state of the module is stored."""
        return True

    @linen.nowrap
    def _store(self, made: nnx.Module, spec: HostSpec, values: Sequence[Any]) -> None:
        hosting = Hosting.of(spec)
        trees: dict[str, dict[Any, Any]] = {}
        for slot, place in hosting.places.items():
            if place[0] in RNG_COLLECTIONS and not self._keeps_streams():
                continue
            leaf = hosting.leaf(made, slot)
            if isinstance(leaf, nnx.Variable):
                register(type(leaf), format_path((*self.path, *place[1:])))
            holder = trees.setdefault(str(place[0]), {})
            for name in place[1:-1]:
                holder = holder.setdefault(name, {})
            holder[place[-1]] = self._box(leaf) if isinstance(leaf, nnx.Variable) else values[slot]
        for collection, tree in trees.items():
            if self.is_mutable_collection(collection):
                for name, value in tree.items():
                    self.put_variable(collection, str(name), value)


def _call_method(name: str, module: WrappedNNX, *args: Any, **kwargs: Any) -> Any:
    call = type(module).__call__
    if "nnx_method" not in inspect.signature(call).parameters:
        call = type(module).linsey_call  # a subclass changes what a plain call does, and no more
    return call(module, *args, nnx_method=name, **kwargs)


def _name_of(make: Any) -> str:
    return getattr(getattr(make, "func", make), "__name__", type(make).__name__)


def _made_class(make: Any) -> Any:
    """The class of what a class, a module or a factory makes; None where nothing tells."""
    if isinstance(make, nnx.Pytree):
        return type(make)
    make = getattr(make, "func", make)
    if isinstance(make, type):
        return make
    try:
        return typing.get_type_hints(make).get("return")
    except Exception:  # names that cannot be resolved
        return None


def _check(make: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses what cannot make an NNX module.

    Raises:
        BridgeError: with what to pass.
    """
    is_class = isinstance(make, type)
    name = make.__name__ if is_class else type(make).__name__
    if isinstance(make, linen.Module) or (is_class and issubclass(make, linen.Module)):
        raise BridgeError(
            f"found {'the class' if is_class else 'a'} {name}, which is a Linen module already",
            path="ToLinen",
            fix="Use it as it is; ToLinen takes the class of an NNX module, or such a module.",
        )
    if isinstance(make, nnx.Pytree):
        if args or kwargs:
            raise BridgeError(
                f"found a {name} that exists, and arguments to make one",
                path="ToLinen",
                fix=f"Pass the module alone, or the class: ToLinen({name}, args=(...)).",
            )
    elif not callable(make):
        raise BridgeError(
            f"found {name}, expected the class of an NNX module, a factory or a module",
            path="ToLinen",
            fix="Pass for example bridge.to_linen(nnx.Linear, 3, 2).",
        )


def _construct(module: WrappedNNX) -> Any:
    """The NNX module that a bound ToLinen stands for, with streams from its scope."""
    assert module.scope is not None
    takes = not module.skip_rng and takes_rngs(module.nnx_class)
    keys = {name: module.make_rng(name) for name in module.scope.rngs} if takes else None
    return make_module(module, keys, format_path(module.path))


def make_module(module: WrappedNNX, keys: Mapping[str, Any] | None, where: str) -> Any:
    """The NNX module that a ToLinen stands for.

    Args:
        module: the ToLinen.
        keys: the streams to pass; None passes none.
        where: its path, for errors.

    Raises:
        BridgeError: a stream is missing, or what was made is no NNX module.
    """
    make = module.nnx_class
    if isinstance(make, nnx.Pytree):
        return nnx.clone(make)
    kwargs = dict(core.unfreeze(core.FrozenDict(module.kwargs)))
    where = where or _name_of(make)
    # The Linen modules that it makes are for a ToNNX, and no children of this one.
    with _explaining(where, keys or {}), no_parent():
        made = _made(make, module.args, kwargs, keys)
    if not isinstance(made, nnx.Pytree):
        raise BridgeError(
            f"the factory made a {type(made).__name__}, expected an NNX module",
            path=where,
            fix="Return the NNX module.",
        )
    return made


def _made(make: Any, args: Any, kwargs: Mapping[str, Any], keys: Mapping[str, Any] | None) -> Any:
    def run() -> Any:
        streams = {} if keys is None or "rngs" in kwargs else {"rngs": nnx.Rngs(**keys)}
        return make(*args, **{**streams, **kwargs})

    try:
        return run()
    except ValueError as error:
        if "mesh context or metadata is required" not in str(error):
            raise
    # NNX shards annotated values as it makes them, and refuses where there is no mesh; Linen only
    # annotates them there, which is also what people want who ask for shapes and specs first.
    with nnx.use_eager_sharding(False):
        made = run()
    for _, leaf in nnx.to_flat_state(nnx.state(made)):
        if isinstance(leaf, nnx.Variable):
            leaf.set_metadata(eager_sharding=nnx.using_eager_sharding())
    return made


def takes_rngs(make: Any) -> bool:
    """Whether a class or a factory takes ``rngs``."""
    try:
        return _takes_rngs(make)
    except TypeError:  # it cannot be hashed
        return _takes_rngs.__wrapped__(make)


@functools.lru_cache(maxsize=256)
def _takes_rngs(make: Any) -> bool:
    parameters = parameters_of(make).values()
    return any(p.name == "rngs" or p.kind is p.VAR_KEYWORD for p in parameters)


@contextlib.contextmanager
def _explaining(where: str, keys: Mapping[str, Any]) -> Iterator[None]:
    """Says what to do when an ``nnx.Rngs`` has no such stream."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        told = str(error.args[0]) if error.args else ""
        if "No RngStream named" not in told:
            raise
        given = ", ".join(sorted(keys)) or "none"
        raise BridgeError(
            f"a PRNG stream is missing; given: {given}. {told}",
            path=where,
            fix="Pass a key for it to init, as in init({'params': key, 'dropout': key2}, x).",
        ) from error


def _initial_call(made: Any, method: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What the first call of a new module returns.

    The module stays as it was, but for each ToNNX in it, which gets its variables.
    """
    work = nnx.clone(made)
    wrappers = [
        (own, copy)
        for (_, own), (_, copy) in zip(nnx.iter_graph(made), nnx.iter_graph(work), strict=True)
        if isinstance(own, bridge.ToNNX)
    ]
    function = getattr(work, method or "__call__") if isinstance(method, str | None) else method
    with initializing(work):
        if function is method:
            output = function(work, *args, **kwargs)
        else:
            output = function(*args, **kwargs)
    for own, copy in wrappers:
        stands_for(copy, own)
        for name, value in vars(copy).items():
            is_kept = name in vars(own) and not name.startswith("to_nnx__")
            if not is_kept and name != "intermediates" and not name.startswith("_pytree__"):
                setattr(own, name, value)
    return output
