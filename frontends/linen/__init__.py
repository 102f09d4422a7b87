"""The Linen frontend: a Linen module, traced once and abstractly, becomes a graph."""

from flax import linen

from linsey.frontends._record import Frontend, Lowered, Request


def _accepts(source: object) -> bool:
    return isinstance(source, linen.Module) or (
        isinstance(source, type) and issubclass(source, linen.Module)
    )


def _lower(request: Request) -> Lowered:
    from linsey.frontends.linen.lower import lower

    return lower(request)


frontend = Frontend(name="linen", accepts=_accepts, lower=_lower)

__all__ = ["frontend"]
