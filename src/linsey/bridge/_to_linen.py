"""An NNX module as a Linen module; what is stored, and where, is for the two faces to say."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import core, linen, nnx
from flax.nnx import bridge

from linsey import _boxes
from linsey._collections import register
from linsey.backends import HostSpec, no_parent
from linsey.backends.linen import GRAPH_COLLECTION, GraphDef, Hosting, plain_call
from linsey.bridge import _lazy
from linsey.frontends.nnx import parameters_of, read_module
from linsey.ir import BridgeError, format_path

GRAPHDEF = "graphdef"


class ToLinen(bridge.ToLinen):
    """An NNX module as a Linen module: stands alone, or as a part of another.

    ``init`` makes the NNX module and stores its state: each variable in the collection of its type,
    boxed as `NNXMeta`; PRNG state in ``RngKey`` and ``RngCount``; and the static rest as
    ``variables["nnx"]["graphdef"]``, an ``nnx.GraphDef``. ``apply`` puts the module together again
    from these. The constructor never runs there.

    A call that draws keys advances the stored streams, so it needs ``mutable=["RngCount"]``; or it
    brings its own, ``rngs={"dropout": key}``. Without either it is an error, since each call would
    draw the same. All methods of the NNX module can be called: ``apply(..., method="encode")``.

    Attributes:
        nnx_class: the class of the NNX module; or a factory; or a module that exists, which is
            copied, so that ``init`` gives its values.
        args: positional arguments of the class or factory.
        kwargs: keyword arguments of it.
        skip_rng: whether not to pass ``rngs``. They are not passed either where nothing takes them.
        metadata_fn: makes the Linen box of a Variable.

    Raises:
        BridgeError: `nnx_class` cannot make an NNX module, or two of its Variable classes have one
            name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from linsey import bridge
        >>> model = bridge.ToLinen(nnx.Linear, args=(3, 2))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> sorted(variables), variables["params"]["kernel"].value.shape
        (['nnx', 'params'], (3, 2))
        >>> model.apply(variables, jnp.ones((1, 3))).shape
        (1, 2)
    """

    nnx_class: Any
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = core.FrozenDict({})
    skip_rng: bool = False
    metadata_fn: Callable[[nnx.Variable[Any]], Any] | None = _boxes.boxed_meta

    def __post_init__(self) -> None:
        _check(self.nnx_class, self.args, self.kwargs)
        super().__post_init__()

    @linen.compact
    def __call__(self, *args: Any, nnx_method: Any = None, **kwargs: Any) -> Any:
        """Calls the NNX module.

        Args:
            args: positional arguments of the method.
            nnx_method: name of the method, or a function of the NNX module; None: the call.
            kwargs: keyword arguments of the method.

        Raises:
            BridgeError: a PRNG stream is missing at ``init``.
            EmitError: a variable is missing or of another shape; a stream that the call draws from
                is nowhere, or cannot advance.
        """
        assert self.scope is not None
        graphdef = self.get_variable(GRAPH_COLLECTION, GRAPHDEF)
        if graphdef is None and self.is_initializing():
            made = construct(self)
            output = initial_call(made, nnx_method, args, kwargs, self.path)
            self._store(made)
            object.__setattr__(self, "linsey_made", made)  # for a frontend that watches
            return output
        return Hosting.of(_spec(graphdef, self.scope.path)).run(
            self,
            nnx_method,
            args,
            kwargs,
            box=self._box,
            restructured=self._restructured,
            strict=False,
        )

    @linen.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a method; see ``linen.Module.apply``."""
        call = plain_call(self, ToLinen, kwargs)
        stored = variables.get(GRAPH_COLLECTION) if isinstance(variables, Mapping) else None
        if call is None or stored is None or GRAPHDEF not in stored:
            return super().apply(variables, *args, **kwargs)
        method = call.pop("nnx_method", kwargs.get("method"))
        hosting = Hosting.of(_spec(stored[GRAPHDEF], ()))
        return hosting.plain(variables, method, args, call)

    @linen.nowrap
    def __getattr__(self, name: str) -> Any:
        make = self.__dict__.get("nnx_class")
        if make is not None and not name.startswith("__") and not hasattr(linen.Module, name):
            kwargs = self.__dict__.get("kwargs") or {}
            if name in kwargs:
                return kwargs[name]
            if callable(getattr(_class_of(make), name, None)):
                # A bound method, so that `apply(method=...)` can bind it to another scope.
                return types.MethodType(functools.partial(_call_method, name), self)
        return linen.Module.__getattr__(self, name)

    @linen.nowrap
    def _box(self, variable: nnx.Variable[Any]) -> Any:
        return variable.get_raw_value() if self.metadata_fn is None else self.metadata_fn(variable)

    @linen.nowrap
    def _store(self, made: Any) -> None:
        """Stores the state of a new module, and its graphdef."""
        graph, values = read_module(made)
        spec = HostSpec(graph, graph.root)
        hosting = Hosting.of(spec)
        trees: dict[str, dict[Any, Any]] = {}
        for slot, place in hosting.places.items():
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
        if self.is_mutable_collection(GRAPH_COLLECTION):
            self.put_variable(GRAPH_COLLECTION, GRAPHDEF, GraphDef(spec, nnx.graphdef(made)))

    @linen.nowrap
    def _restructured(self, made: Any) -> None:
        """Stores the graphdef of a module whose structure a call changed, where the call may."""
        if self.is_mutable_collection(GRAPH_COLLECTION):
            nnx.pop(made, nnx.Intermediate)  # made anew by each call
            graph, _ = read_module(made)
            graphdef = GraphDef(HostSpec(graph, graph.root), nnx.graphdef(made))
            if graphdef != self.get_variable(GRAPH_COLLECTION, GRAPHDEF):
                self.put_variable(GRAPH_COLLECTION, GRAPHDEF, graphdef)


def _call_method(name: str, module: ToLinen, *args: Any, **kwargs: Any) -> Any:
    return module(*args, nnx_method=name, **kwargs)


def _class_of(make: Any) -> Any:
    return make if isinstance(make, type) else type(make)


def _spec(graphdef: Any, where: tuple[str, ...]) -> HostSpec:
    if isinstance(graphdef, GraphDef):
        return graphdef.spec
    found = "nothing" if graphdef is None else type(graphdef).__name__
    raise BridgeError(
        f"found {found}, expected the graphdef that init stored",
        path=format_path((GRAPH_COLLECTION, *where, GRAPHDEF)),
        fix="Pass all the variables that init returned. A lifted transform must pass them on too:"
        " variable_axes={'params': 0, 'nnx': None}.",
    )


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


def construct(module: Any) -> Any:
    """The NNX module that a bound ToLinen stands for, with streams from its scope.

    Raises:
        BridgeError: a stream is missing, or what was made is no NNX module.
    """
    make = module.nnx_class
    if isinstance(make, nnx.Pytree):
        return nnx.clone(make)
    kwargs = dict(core.unfreeze(module.kwargs))
    keys = {}
    if not module.skip_rng and "rngs" not in kwargs and takes_rngs(make):
        keys = {name: module.make_rng(name) for name in module.scope.rngs}
        kwargs["rngs"] = nnx.Rngs(**keys)
    where = format_path(module.path) or _class_of(make).__name__
    # The Linen modules that it makes are for a ToNNX, and no children of this one.
    with _explaining(where, keys), no_parent():
        made = make(*module.args, **kwargs)
    if not isinstance(made, nnx.Pytree):
        raise BridgeError(
            f"the factory made a {type(made).__name__}, expected an NNX module",
            path=where,
            fix="Return the NNX module.",
        )
    return made


def takes_rngs(make: Any) -> bool:
    """Whether a class or a factory takes ``rngs``."""
    parameters = parameters_of(make).values()
    return any(p.name == "rngs" or p.kind is p.VAR_KEYWORD for p in parameters)


@contextlib.contextmanager
def _explaining(where: str, keys: Mapping[str, Any]) -> Iterator[None]:
    """Says what to do when an ``nnx.Rngs`` has no such stream."""
    try:
        yield
    except AttributeError as error:
        if "No RngStream named" not in str(error):
            raise
        given = ", ".join(sorted(keys)) or "none"
        raise BridgeError(
            f"a PRNG stream is missing; given: {given}. {error}",
            path=where,
            fix="Pass a key for it to init, as in init({'params': key, 'dropout': key2}, x).",
        ) from error


def initial_call(made: Any, method: Any, args: Any, kwargs: Mapping[str, Any], where: Any) -> Any:
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
    with _lazy.initializing(work), _explaining(format_path(where), {}):
        if function is method:
            output = function(work, *args, **kwargs)
        else:
            output = function(*args, **kwargs)
    for own, copy in wrappers:
        for name, value in vars(copy).items():
            if name not in ("intermediates", "_pytree__state", "_pytree__nodes"):
                if name not in vars(own) or name.startswith("to_nnx__"):
                    setattr(own, name, value)
    return output


def to_linen(
    nnx_class: Any,
    *args: Any,
    metadata_fn: Callable[[nnx.Variable[Any]], Any] | None = _boxes.boxed_meta,
    name: str | None = None,
    skip_rng: bool = False,
    **kwargs: Any,
) -> ToLinen:
    """A `ToLinen` whose arguments are written as those of the NNX class.

    Args:
        nnx_class: the class, a factory, or a module that exists.
        args: positional arguments of the class.
        metadata_fn: makes the Linen box of a Variable.
        name: name of the Linen module.
        skip_rng: whether not to pass ``rngs``.
        kwargs: keyword arguments of the class.

    Example:
        >>> from flax import nnx
        >>> from linsey import bridge
        >>> long = bridge.ToLinen(nnx.Linear, args=(3,), kwargs={"out_features": 2})
        >>> bridge.to_linen(nnx.Linear, 3, out_features=2) == long
        True
    """
    return ToLinen(
        nnx_class,
        args=args,
        kwargs=core.FrozenDict(kwargs),
        metadata_fn=metadata_fn,
        skip_rng=skip_rng,
        name=name,
    )
