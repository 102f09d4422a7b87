"""A top-level ``apply`` of an NNX module in Linen, made without Linen's scopes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen
from flax.core.scope import in_filter

from linsey.backends import _private


class Detached:
    """Linen variables outside of any scope: what ``Hosting.run`` needs of a bound module.

    A top-level ``apply`` through Linen clones the module and makes a scope, which costs more than a
    small module itself.

    Args:
        variables: the variables.
        rngs: keys by stream.
        mutable: the filter of mutable collections.
    """

    path: tuple[str, ...] = ()

    def __init__(self, variables: Mapping[str, Any], rngs: Mapping[str, Any], mutable: Any) -> None:
        self.given = variables
        self.rngs = rngs
        self.mutable = mutable
        self._drawn: dict[str, int] = {}
        self._changed: dict[str, dict[str, Any]] = {}

    @property
    def scope(self) -> Detached:
        """Itself: it stands for the scope too."""
        return self

    def is_mutable_collection(self, collection: str) -> bool:
        """As ``linen.Module.is_mutable_collection``."""
        return self.mutable is not False and bool(in_filter(self.mutable, collection))

    def get_variable(self, collection: str, name: str, default: Any = None) -> Any:
        """As ``linen.Module.get_variable``."""
        tree = self._changed.get(collection)
        tree = self.given.get(collection, {}) if tree is None else tree
        return tree.get(name, default)

    def put_variable(self, collection: str, name: str, value: Any) -> None:
        """As ``linen.Module.put_variable``."""
        if collection not in self._changed:
            self._changed[collection] = dict(self.given.get(collection, {}))
        self._changed[collection][name] = value

    def make_rng(self, name: str) -> Any:
        """As ``linen.Module.make_rng`` at the root."""
        self._drawn[name] = self._drawn.get(name, 0) + 1
        return _private.folded(self.rngs[name], self._drawn[name])

    def updates(self) -> dict[str, Any]:
        """The mutable collections after the call."""
        known = {**self.given, **self._changed}
        return {name: tree for name, tree in known.items() if self.is_mutable_collection(name)}


class Options(NamedTuple):
    """The options of ``linen.Module.apply``."""

    rngs: Any
    method: Any
    mutable: Any
    capture_intermediates: Any


class Call:
    """A top-level ``apply`` that needs no scope; see `detached`."""

    def __init__(self, variables: Detached, method: Any, kwargs: dict[str, Any]) -> None:
        self.variables = variables
        self._method = method
        self._kwargs = kwargs

    def __call__(self, hosting: Any, args: tuple[Any, ...], **options: Any) -> Any:
        """Makes the call by a `Hosting`; `options` are those of `Hosting.run`."""
        output = hosting.run(self.variables, self._method, args, self._kwargs, **options)
        return output if self.variables.mutable is False else (output, self.variables.updates())


def detached(
    module: linen.Module,
    own_call: Any,
    variables: Any,
    options: Options,
    kwargs: Mapping[str, Any],
) -> Call | None:
    """An ``apply`` that can do without Linen's scopes; None for one that cannot.

    It cannot when somebody watches, when it captures intermediates, and when the method is no name.

    Args:
        module: the module.
        own_call: the ``__call__`` that linsey wrote for it; a lifted class must run its transform.
        variables: the variables.
        options: the options of ``apply``.
        kwargs: keyword arguments of the method.
    """
    method, rngs = options.method, options.rngs
    if (
        type(module).__call__ is not own_call
        or options.capture_intermediates is not False
        or not (method is None or isinstance(method, str))
        or not (rngs is None or isinstance(rngs, Mapping))
        or not isinstance(variables, Mapping)
        or _private.is_watched()
    ):
        return None
    rest = dict(kwargs)
    given = Detached(variables, rngs or {}, options.mutable)
    return Call(given, rest.pop("nnx_method", method), rest)
