"""`ToLinen` as the guide shows it: the graphdef is stored, and every variable is boxed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import core, linen, nnx
from flax.nnx import bridge

from linsey import _boxes
from linsey.backends import HostSpec
from linsey.backends.linen import Call, GraphDef, Hosting
from linsey.bridge._wrapped_nnx import WrappedNNX
from linsey.frontends.nnx import read_module
from linsey.ir import BridgeError, as_key, format_path
from linsey.ir.reserved import GRAPH_COLLECTION

GRAPHDEF = "graphdef"


class ToLinen(WrappedNNX):
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
        graphdef: Any = self.get_variable(GRAPH_COLLECTION, GRAPHDEF)
        if self.is_initializing() and not _is_made(self, graphdef):
            output, spec, made = self._initialize(nnx_method, args, kwargs)
            self._store_graphdef(GraphDef(spec, nnx.graphdef(made)))
            return output
        hosting = _hosting(graphdef, self.variables, self.scope.path)
        return hosting.run(
            self,
            nnx_method,
            args,
            kwargs,
            box=self._box,
            around=self.linsey_around,
            restructured=functools.partial(self._restructured, hosting),
            strict=False,
        )

    @linen.nowrap
    def _hosting(self, call: Call) -> Hosting | None:
        if call.variables.is_mutable_collection(GRAPH_COLLECTION):
            return None  # the structure may change: what stores that wants a scope
        graphdef = call.variables.get_variable(GRAPH_COLLECTION, GRAPHDEF)
        return _hosting(graphdef, call.variables.given, ())

    @linen.nowrap
    def _store_graphdef(self, graphdef: GraphDef) -> None:
        if self.is_mutable_collection(GRAPH_COLLECTION):
            self.put_variable(GRAPH_COLLECTION, GRAPHDEF, graphdef)

    @linen.nowrap
    def _restructured(self, hosting: Hosting, made: Any) -> None:
        """Stores the graphdef of a module whose structure a call changed, where the call may."""
        if self.is_mutable_collection(GRAPH_COLLECTION):
            _drop_sown(made, hosting)
            graph, _ = read_module(made)
            graphdef = GraphDef(HostSpec(graph, graph.root), nnx.graphdef(made))
            if graphdef != self.get_variable(GRAPH_COLLECTION, GRAPHDEF):
                self._store_graphdef(graphdef)


def _drop_sown(made: nnx.Module, hosting: Hosting) -> None:
    """Takes away what the call sowed: the next one makes it anew."""
    for keys, part in list(nnx.iter_graph(made)):
        path = tuple(map(as_key, keys))
        held = dict(vars(part)) if isinstance(part, nnx.Pytree) else {}
        for name, value in held.items():
            is_wrapped = isinstance(part, bridge.ToNNX) and name == "intermediates"
            is_new = isinstance(value, nnx.Intermediate) and not hosting.has((*path, name))
            if is_wrapped or is_new:
                delattr(part, name)


def _is_made(module: ToLinen, graphdef: Any) -> bool:
    """Whether an init has come to this module before.

    The graphdef alone does not tell: ``nn.scan`` traces its body once for what it broadcasts, and
    again for the rest.
    """
    return isinstance(graphdef, GraphDef) and Hosting.of(graphdef.spec).is_stored(module)


def _hosting(graphdef: Any, variables: Mapping[str, Any], where: tuple[str, ...]) -> Hosting:
    """What runs the module of a graphdef on some variables.

    Raises:
        BridgeError: there is no graphdef, or a variable that it does not know.
    """
    if not isinstance(graphdef, GraphDef):
        found = "nothing" if graphdef is None else type(graphdef).__name__
        raise BridgeError(
            f"found {found}, expected the graphdef that init stored",
            path=format_path((GRAPH_COLLECTION, *where, GRAPHDEF)),
            fix="Pass all the variables that init returned. A lifted transform must pass them on"
            " too: variable_axes={'params': 0, 'nnx': None}, or variable_broadcast='nnx' for"
            " nn.scan. A checkpoint holds arrays only: take this from"
            " jax.eval_shape(model.init, key, x)['nnx'].",
        )
    hosting = Hosting.of(graphdef.spec)
    unknown = hosting.unknown(variables)
    if unknown is not None:
        raise BridgeError(
            "the module has no such variable",
            path=format_path((unknown[0], *where, *unknown[1:])),
            fix="Leave it out. If a call made it, let that call change the structure too:"
            " mutable=['nnx', ...].",
        )
    return hosting


ToLinen.linsey_call = ToLinen.__call__


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
