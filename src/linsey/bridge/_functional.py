"""An NNX module used without an object of it: ``init`` gives its state, ``apply`` takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
from flax.nnx import bridge

from linsey.backends import HostSpec
from linsey.backends.linen import GraphDef
from linsey.frontends.nnx import read_module
from linsey.ir import BridgeError


class Functional(bridge.Functional[Any]):
    """An NNX class with its arguments; made by `functional`.

    Attributes:
        module_type: the class.
        graphdef: the static half of the module; None before ``init``.
        args: positional arguments of the class.
        kwargs: keyword arguments of it.
    """

    def init(self, *, rngs: nnx.Rngs | None = None) -> Any:
        """Makes the module once, and gives its state.

        Args:
            rngs: passed to the class; None passes nothing.
        """
        given = {} if rngs is None else {"rngs": rngs}
        module = self.module_type(*self.args, **self.kwargs, **given)
        graph, _ = read_module(module)
        graphdef, state = nnx.split(module)
        self.graphdef = GraphDef(HostSpec(graph, graph.root), graphdef)
        return state

    def apply(self, *states: Any) -> Any:
        """Something to call like the module; returns ``(output, (graphdef, state))``.

        Raises:
            BridgeError: there was no ``init``.
        """
        if self.graphdef is None:
            raise BridgeError(
                "apply was called before init",
                path=self.module_type.__name__,
                fix="Call state = module.init(rngs=...) first, and pass that state.",
            )
        return self.graphdef.apply(*states)


def functional(cls: type[nnx.Module]) -> Callable[..., Functional]:
    """Makes an NNX class functional.

    Args:
        cls: the class.

    Returns:
        Something to call with the arguments of the class, but ``rngs``; see `Functional`.

    Raises:
        BridgeError: `cls` is not the class of an NNX module.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from linsey import bridge
        >>> linear = bridge.functional(nnx.Linear)(3, 2)
        >>> state = linear.init(rngs=nnx.Rngs(0))
        >>> y, (graphdef, state) = linear.apply(state)(jnp.ones((1, 3)))
        >>> y.shape
        (1, 2)
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Pytree)):
        name = cls.__name__ if isinstance(cls, type) else f"a {type(cls).__name__}"
        raise BridgeError(
            f"found {name}, expected the class of an NNX module",
            path="functional",
            fix="Pass the class, as in functional(nnx.Linear).",
        )

    def make(*args: Any, **kwargs: Any) -> Functional:
        return Functional(cls, None, args, kwargs)

    return make
