"""The arguments of a call: which are traced, what tells calls apart, how they lie on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from linsey import _trees
from linsey.ir import EmitError, LinseyError, PartitionError

_ARRAY_TYPES: set[type] = set()
"""The types of concrete arrays met so far: a set look-up is faster than ``isinstance``."""


def signature_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """What tells a call from others that compile apart, and its arrays.

    Where all arguments are arrays by position, which this is quick for, it is their number.

    Raises:
        EmitError: a static argument cannot be hashed.
    """
    if not kwargs and (_ARRAY_TYPES.issuperset(map(type, args)) or all(map(_is_array, args))):
        return len(args), args
    arguments = _trees.Arguments.split(args, kwargs)
    # With their types: 1, 1.0 and True are three signatures.
    static = tuple((place, type(value), value) for place, value in arguments.static)
    signature = (arguments.treedef, static)
    try:
        hash(signature)
    except TypeError as error:
        raise EmitError(
            f"a static argument cannot be hashed: {error}",
            path="arguments",
            fix="Pass arrays, or hashable objects (a tuple in place of a list).",
        ) from error
    return signature, arguments.dynamic


def _is_array(arg: Any) -> bool:
    if not isinstance(arg, jax.Array | np.ndarray):
        return False
    if not isinstance(arg, jax.core.Tracer):
        _ARRAY_TYPES.add(type(arg))
    return True


def keys_of(rngs: Any) -> dict[str, Any] | None:
    """The keys of a call by stream, from any form of them; None: none.

    Raises:
        LinseyError: they are no keys.
    """
    if rngs is None:
        return None
    if type(rngs) is dict and all(type(key) in _ARRAY_TYPES for key in rngs.values()):
        return rngs
    return _trees.key_dict(rngs)


def read_inputs(in_shardings: Any, mesh: Mesh | None) -> Any:
    """``in_shardings`` as given, checked.

    Args:
        in_shardings: one spec or sharding for all arrays of the arguments; or a tuple with an entry
            for each positional argument; or a dict by the names of keyword arguments and the
            positions of others. An entry is a spec, a sharding, None (as it comes), or a pytree
            prefix of the argument with these as leaves.
        mesh: the mesh.

    Raises:
        PartitionError: there is no mesh, an entry is neither spec nor sharding, or a spec names an
            axis that the mesh does not have.
    """
    if in_shardings is None:
        return None
    if mesh is None:
        raise PartitionError(
            "in_shardings are given and no mesh",
            path="in_shardings",
            fix="Pass mesh= too.",
        )
    entries: Any = in_shardings.values() if isinstance(in_shardings, Mapping) else (in_shardings,)
    for leaf in jax.tree.leaves(tuple(entries), is_leaf=_is_spec):
        if isinstance(leaf, Sharding):
            continue
        if not isinstance(leaf, PartitionSpec):
            raise PartitionError(
                f"found {leaf!r}, expected a PartitionSpec, a Sharding or None",
                path="in_shardings",
                fix='Write P("data") for an array whose first axis lies on the axis data.',
            )
        for entry in leaf:
            for name in entry if isinstance(entry, tuple) else (entry,):
                if isinstance(name, str) and name not in mesh.shape:
                    raise PartitionError(
                        f"{leaf} names {name!r}; the mesh has {', '.join(mesh.axis_names)}",
                        path="in_shardings",
                        fix="Name axes of the mesh.",
                    )
    return in_shardings


def _is_spec(entry: Any) -> bool:
    return isinstance(entry, PartitionSpec)


def input_shardings(
    in_shardings: Any, arguments: _trees.Arguments, mesh: Mesh | None
) -> tuple[Any, ...] | None:
    """The sharding of each array among the arguments of a call; None: as it comes.

    Raises:
        PartitionError: ``in_shardings`` has not the structure of the arguments, or an array does
            not divide by it.
    """
    if in_shardings is None or mesh is None:
        return None
    args, kwargs = arguments.merge(arguments.dynamic)
    found: list[Any] = []
    for place, array, spec in entries(in_shardings, args, kwargs, "in_shardings", PartitionError):
        sharding = NamedSharding(mesh, spec) if isinstance(spec, PartitionSpec) else spec
        if sharding is not None:
            check_fit(array, sharding, place)
        found.append(sharding)
    return tuple(found)


def entries(
    given: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: str,
    error: type[LinseyError],
) -> list[tuple[str, Any, Any]]:
    """What is said of each array among the arguments of a call.

    Args:
        given: one entry for all; a tuple by position; or a dict by position and keyword. An entry
            is for the whole argument, or a pytree prefix of it. None says nothing.
        args: the positional arguments.
        kwargs: the keyword arguments.
        path: what `given` is called in errors.
        error: the class of these.

    Returns:
        The place, the array and the entry.

    Raises:
        LinseyError: there is no such argument, or it has another structure.
    """
    if isinstance(given, tuple | list) and not _is_spec(given):
        by_name: Mapping[Any, Any] = dict(enumerate(given))
    elif isinstance(given, Mapping):
        by_name = given
    else:
        by_name = dict.fromkeys([*range(len(args)), *kwargs], given)
    unknown = [name for name in by_name if name not in kwargs and name not in range(len(args))]
    if unknown and any(by_name[name] is not None for name in unknown):
        raise error(
            f"there is an entry for {unknown[0]!r}; the call has {len(args)} positional arguments"
            f" and the keywords {sorted(kwargs)}",
            path=path,
            fix="Give an entry for each positional argument, or a dict by position and keyword.",
        )
    found: list[tuple[str, Any, Any]] = []
    for name, argument in (*enumerate(args), *sorted(kwargs.items())):
        entry, place = by_name.get(name), f"{path}[{name!r}]"
        leaves, treedef = jax.tree.flatten(argument)
        whole: Any = treedef  # its methods are not annotated
        try:
            spread = jax.tree.broadcast(
                entry, argument, is_leaf=lambda leaf: leaf is None or _is_spec(leaf)
            )
            pairs = list(zip(leaves, whole.flatten_up_to(spread), strict=True))
        except ValueError as wrong:
            raise error(
                f"{entry!r} is no prefix of the argument's structure: {wrong}",
                path=place,
                fix="Give one entry for the whole argument, or one for each of its parts.",
            ) from wrong
        found += [(place, leaf, each) for leaf, each in pairs if _trees.is_array(leaf)]
    return found


def check_fit(array: Any, sharding: Any, path: str = "in_shardings") -> None:
    """Checks that a sharding divides an array.

    Raises:
        PartitionError: it does not.
    """
    try:
        sharding.shard_shape(tuple(array.shape))
    except ValueError as error:
        raise PartitionError(
            f"an array of shape {tuple(array.shape)} cannot be split so: {error}",
            path=path,
            fix="Pass a batch that the mesh axes divide, or another spec.",
        ) from error
