"""Which Variable class belongs to which collection, and partitioning for both APIs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx

from linsey._boxes import LINEN_BOX
from linsey.ir import BridgeError

_MISSING = object()


def register_variable_name_type_pair(
    name: str, typ: Any = _MISSING, overwrite: bool = False
) -> Any:
    """Says that a collection of Linen and a Variable class of NNX are the same thing.

    The registry is flax's own: ``nnx.variable_type_from_name`` knows the pair too. A collection
    that is not registered gets a class of its name when it is first met, and a class goes to the
    collection of its name.

    Args:
        name: the collection.
        typ: the Variable class; without it, this is a decorator for one.
        overwrite: whether the name may be another class's; that one then has no collection.

    Returns:
        `typ`.

    Raises:
        BridgeError: the name is another class's, or `typ` is not a Variable class.

    Example:
        >>> from flax import nnx
        >>> from linsey import bridge
        >>> class Momentum(nnx.Variable): ...
        >>> pair = bridge.register_variable_name_type_pair("momentum", Momentum)
        >>> nnx.variable_name_from_type(Momentum)
        'momentum'
    """
    if typ is _MISSING:
        return lambda cls: register_variable_name_type_pair(name, cls, overwrite)
    if not (isinstance(typ, type) and issubclass(typ, nnx.Variable)):
        raise BridgeError(
            f"found {typ!r} for the collection {name!r}, expected a subclass of nnx.Variable",
            path=name,
            fix="Pass the class itself.",
        )
    try:
        known = nnx.variable_type_from_name(name)
    except ValueError:
        known = typ
    if known is not typ and not overwrite:
        raise BridgeError(
            f"the collection {name!r} is that of {known.__module__}.{known.__qualname__} already",
            path=name,
            fix="Choose another name, or pass overwrite=True.",
        )
    return nnx.register_variable_name(name, typ, overwrite=True)


def with_partitioning(
    fn: Callable[..., Any],
    names: Any,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[..., Any]:
    """An NNX initialiser that also says how its value is sharded, written as in Linen.

    Where the Variable goes into Linen code, its box is ``nn.Partitioned``.

    Args:
        fn: the initialiser.
        names: one mesh or logical axis for each axis of the value; None: replicated.
        mesh: the mesh; None: that in force.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from linsey import bridge
        >>> init = bridge.with_partitioning(nnx.initializers.ones_init(), ("in", "out"))
        >>> with nnx.use_eager_sharding(False):
        ...     kernel = nnx.Param(init(jax.random.key(0), (3, 2)))
        >>> kernel.out_sharding
        ('in', 'out')
    """
    return nnx.with_partitioning(fn, names, mesh, **{LINEN_BOX: linen.Partitioned})
