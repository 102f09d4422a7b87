"""Linen models of the zoo with values: made once for all tests of a process."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from zoo_models import ZOO, ZooModel

import linsey

LINEN = tuple(entry for entry in ZOO if entry.api == "linen")
"""The models of the zoo that are Linen code."""


def keys(names: tuple[str, ...], seed: int) -> dict[str, Any]:
    """One key for each stream."""
    return {name: jax.random.key(seed + number) for number, name in enumerate(names)}


@dataclass(frozen=True, kw_only=True)
class LinenRun:
    """A Linen model of the zoo, with initial values of its own and from linsey."""

    entry: ZooModel
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """Arrays by keyword, without the entry's ``static``."""
    variables: Any
    """What the model's own ``init`` gives, under jit."""
    program: linsey.Program
    """The model lowered, with values from the same keys, under jit."""

    @property
    def rngs(self) -> dict[str, Any] | None:
        """The keys of a call."""
        return keys(self.entry.call_rngs, 7) or None

    @property
    def mutable(self) -> list[str] | bool:
        """The collections that a call changes, as ``apply`` takes them."""
        return list(self.entry.mutable) or False

    def apply(self, variables: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Output and updates of the model's own call."""
        made = self.module.apply(
            variables,
            *args,
            rngs=self.rngs,
            mutable=self.mutable,
            method=self.entry.method,
            **kwargs,
            **self.entry.static,
        )
        return made if self.mutable else (made, {})

    def call(self, model: Any, args: Any, kwargs: Any) -> Any:
        """Output of the same call of an NNX module that was emitted."""
        method = model if self.entry.method is None else getattr(model, self.entry.method)
        return method(*args, rngs=self.rngs, mutable=self.mutable, **kwargs, **self.entry.static)


@functools.cache
def linen_run(name: str) -> LinenRun:
    """The model of a name."""
    entry = next(entry for entry in LINEN if entry.name == name)
    module = entry.build()
    args, kwargs = entry.inputs()
    every = {**kwargs, **entry.static}
    init_keys = keys(entry.init_rngs, 0)
    program = linsey.lower(module, *args, rngs=init_keys, method=entry.method, **every)
    values = program.compile(entry.method, mutable=list(entry.mutable) or False).init(init_keys)

    def init(init_keys: Any) -> Any:
        return module.init(init_keys, *args, method=entry.method, **every)

    return LinenRun(
        entry=entry,
        module=module,
        args=args,
        kwargs=kwargs,
        variables=jax.jit(init)(init_keys),
        program=linsey.Program(graph=program.graph, values=values),
    )
