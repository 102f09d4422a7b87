"""The NNX frontend: a live or abstract NNX module, or a factory of one, becomes a graph."""

from flax import nnx

from linsey.frontends._record import Frontend, Lowered, Request
from linsey.frontends.nnx.lower import made_abstractly, parameters_of, read_module


def _accepts(source: object) -> bool:
    if isinstance(source, type):
        return issubclass(source, nnx.Pytree)
    return isinstance(source, nnx.Pytree)


def _lower(request: Request) -> Lowered:
    from linsey.frontends.nnx.lower import lower

    return lower(request)


frontend = Frontend(name="nnx", accepts=_accepts, lower=_lower)

__all__ = ["frontend", "made_abstractly", "parameters_of", "read_module"]
