"""NNX objects by the paths of their attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from linsey.backends import _private
from linsey.ir import Path


def value_at(obj: Any, path: Path) -> Any:
    """What stands at an attribute path of NNX objects.

    Raises:
        AttributeError, KeyError, IndexError: nothing does.
    """
    for name in path:
        is_item = isinstance(obj, list | tuple | Mapping | nnx.List | nnx.Dict)
        obj = obj[name] if is_item else getattr(obj, str(name))
    return obj


def rebuild(module: Any, values: Mapping[Path, Any]) -> Any:
    """A copy of NNX objects with other values in some of their Variables.

    Args:
        module: the objects.
        values: raw values by path; a Variable whose path is not here is shared with `module`.
    """
    made: dict[int, Any] = {}

    def copy(obj: Any, path: Path) -> Any:
        if id(obj) in made:
            return made[id(obj)]
        if isinstance(obj, nnx.Variable):
            if path not in values:
                return obj
            made[id(obj)] = type(obj).from_metadata(values[path], obj.get_metadata())
            return made[id(obj)]
        if type(obj) is _private.PytreeState:
            return _private.PytreeState(obj.initializing, obj.is_setup)
        impl = _private.get_node_impl(obj)
        if impl is None:
            return obj
        if not isinstance(impl, _private.GraphNodeImpl):
            items: Any
            items, metadata = impl.flatten(obj)
            parts = [(name, copy(value, (*path, name))) for name, value in items]
            return impl.unflatten(parts, metadata)
        new: Any = object.__new__(type(obj))
        made[id(obj)] = new
        for name, value in vars(obj).items():
            has_ints = bool(obj._pytree__has_int_keys) and name.isdigit()
            vars(new)[name] = copy(value, (*path, int(name) if has_ints else name))
        return new

    return copy(module, ())
