"""Code that is not all Linen's as a Linen module."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

from flax import linen

from linsey.backends._spec import HostSpec
from linsey.backends.linen.detached import Options, detached
from linsey.backends.linen.hosting import Hosting
from linsey.backends.linen.region import Region
from linsey.ir import EmitError, HostParts, decode


class _Host(linen.Module):
    """A Linen module that stands for a node of a graph; its variables come with it."""

    spec: HostSpec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the node's ``__call__``."""
        return self._run("__call__", args, kwargs)

    @linen.nowrap
    def __getattr__(self, name: str) -> Any:
        spec = self.__dict__.get("spec")
        if spec is not None and not name.startswith("__"):
            cls = _class(spec)
            method = getattr(cls, name, None)
            if callable(method) and not hasattr(linen.Module, name):
                # A bound method, so that `apply(method=...)` can bind it to another scope.
                return types.MethodType(functools.partial(_method, name), self)
        return super().__getattr__(name)

    @linen.nowrap
    def _run(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.is_initializing():
            raise EmitError(
                "init was called on a module whose variables came with it",
                path=_class(self.spec).__name__,
                fix="Use the variables that linsey.to_linen or program.emit('linen') returned.",
            )
        return self._call(name, args, kwargs)

    @linen.nowrap
    def _call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Calls a method of the node."""
        raise NotImplementedError


class LinenWithNNX(_Host):
    """Linen code that calls NNX modules in the place of some of its own.

    ``program.emit("linen")`` makes it of a model in which modules were replaced. All its methods
    can be called, as ``apply(..., method="encode")``.
    """

    @linen.nowrap
    def linsey_parts(self) -> HostParts:
        """What a frontend sees of it."""
        region = Region.of(self.spec)
        places = {slot: (collection, *path) for slot, collection, path in region.slots}
        return HostParts(graph=self.spec.graph, node=self.spec.node, places=places)

    @linen.nowrap
    def _call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return Region.of(self.spec).call_in(self.scope, name, args, kwargs)


class NNXHost(_Host):
    """An NNX module whose variables are Linen's.

    Made by `linsey.to_linen` and ``program.emit("linen")``. The module is built from the graph at
    each call and its constructor never runs. All its methods can be called, as ``apply(...,
    method="encode")``. ``apply(..., mutable=...)`` decides which changes come back; ``rngs`` given
    to ``apply`` are used in place of the stored streams.
    """

    @linen.nowrap
    def linsey_parts(self) -> HostParts:
        """What a frontend sees of it."""
        return HostParts(
            graph=self.spec.graph, node=self.spec.node, places=Hosting.of(self.spec).places
        )

    @linen.nowrap
    def _call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return Hosting.of(self.spec).run(self, name, args, kwargs)

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
        """Calls a method; see ``linen.Module.apply``.

        A call at the top does not go through Linen's scopes: see `detached`.
        """
        options = Options(rngs, method, mutable, capture_intermediates)
        call = detached(self, _Host.__call__, variables, options, kwargs)
        if call is None:
            return super().apply(variables, *args, **options._asdict(), **kwargs)
        return call(Hosting.of(self.spec), args)


def _method(name: str, host: _Host, *args: Any, **kwargs: Any) -> Any:
    return host._run(name, args, kwargs)


def _class(spec: HostSpec) -> Any:
    source = spec.entry.source
    assert source is not None
    return spec.cached("class", lambda _: decode(source.cls))
