"""A Linen module as an NNX module; where it keeps its variables is for the two faces to say."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import core, errors, linen, nnx
from flax.nnx import bridge

from linsey import _boxes, _trees
from linsey._collections import unboxed
from linsey.bridge import _private
from linsey.bridge._held import HeldModule
from linsey.bridge._mode import setting, with_mode
from linsey.frontends import note_initialized, was_initialized, watched_call
from linsey.ir import BridgeError, Path
from linsey.ir.reserved import GRAPH_COLLECTION

HELD = "to_nnx__held"
"""The attribute that holds the Linen module."""
_MODE = "to_nnx__mode"
_SOWN = "to_nnx__sown"
GRAPHDEFS = "to_nnx__graphdefs"
"""The attribute that holds the graphdefs of each ToLinen inside, by path."""
_MODES = ("deterministic", "use_running_average")
_NOT_BY_DEFAULT = frozenset({"params", "perturbations"})

Place = tuple[str, Path]
"""A Linen variable: its collection, and its path there."""


class WrappedLinen(bridge.ToNNX):
    """What the `ToNNX` of both faces share: holding a Linen module and calling it.

    A face keeps the streams, and lays out the variables: it says where each one is kept.
    """

    _mode_goes_first = True
    """Whether ``train()`` and ``eval()`` go before what a Linen module was made with."""

    _keeps_variables = True
    """Whether initialisation keeps the variables that are there already."""

    def _own_keys(self) -> dict[str, Any]:
        """A key from each of the module's own streams, by Linen's name for it."""
        raise NotImplementedError

    def _variables(self) -> dict[str, Any]:
        """The Variables as Linen lays them out: collections of nested dicts."""
        raise NotImplementedError

    def _keep(self, collection: str, tree: Mapping[Any, Any]) -> None:
        """Stores Linen variables, in the Variables that are there and in new ones."""
        raise NotImplementedError

    def _hold(self, module: Any) -> None:
        if isinstance(module, linen.Module):
            if module.scope is not None and not module.variables:
                # Made inside a Linen method, which makes it a child there; it is not meant as one.
                module = _private.unbound(module)
            if module.scope is not None:
                raise BridgeError(
                    "found a bound Linen module, expected an unbound one",
                    path=type(module).__name__,
                    fix="Pass the module as it was constructed, or the first of module.unbind().",
                )
            setattr(self, *self.linsey_hold(module))
            setattr(self, _MODE, ())
            setattr(self, _SOWN, ())
            setattr(self, GRAPHDEFS, ())
            return
        is_class = isinstance(module, type)
        name = module.__name__ if is_class else type(module).__name__
        is_nnx = isinstance(module, nnx.Pytree) or (is_class and issubclass(module, nnx.Pytree))
        fix = f"Pass an instance, {name}(...)." if is_class else "Pass a flax.linen module."
        raise BridgeError(
            f"found {'the class' if is_class else 'a'} {name}, expected an instance of a Linen"
            " module",
            path="ToNNX",
            fix="It is an NNX module already: use it as it is." if is_nnx else fix,
        )

    @staticmethod
    def linsey_hold(module: linen.Module) -> tuple[str, Any]:
        """The attribute that holds a Linen module, and what it is set to."""
        return HELD, HeldModule(module)

    @property
    def to_nnx__module(self) -> linen.Module:  # type: ignore[override]
        """The Linen module."""
        return vars(self)[HELD].module  # type: ignore[no-any-return]

    @property
    def deterministic(self) -> bool | None:
        """What ``train``, ``eval`` or ``set_attributes`` said last; None before."""
        return dict(vars(self).get(_MODE, ())).get("deterministic")

    @property
    def use_running_average(self) -> bool | None:
        """What ``train``, ``eval`` or ``set_attributes`` said last; None before."""
        return dict(vars(self).get(_MODE, ())).get("use_running_average")

    def set_view(
        self, deterministic: bool | None = None, use_running_average: bool | None = None
    ) -> None:
        """Sets the mode of the Linen modules inside; ``nnx.view`` calls it.

        Args:
            deterministic: whether dropout is off.
            use_running_average: whether batch norms use the stored statistics.
        """
        for name, value in zip(_MODES, (deterministic, use_running_average), strict=True):
            if value is not None:
                setattr(self, name, value)

    def _setattr(self, name: str, value: Any) -> None:
        if name in _MODES:
            mode = {**dict(vars(self)[_MODE]), name: value}
            name, value = _MODE, tuple(mode.items())
        super()._setattr(name, value)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        held = vars(self).get(HELD)
        if held is not None and not name.startswith("__"):
            method = getattr(type(held.module), name, None)
            if callable(method):
                call = functools.wraps(method)(functools.partial(self.__call__, method=name))
                call.__self__ = self  # type: ignore[attr-defined]  # for `lazy_init(model.decode)`
                return call
        raise self._unknown(name)

    def _unknown(self, name: str) -> AttributeError:
        if HELD not in vars(self):
            return AttributeError(f"ToNNX has no attribute {name!r}")
        shown = sorted(
            key
            for key, value in vars(self).items()
            if value is not None and not key.startswith(("_", "to_nnx__"))
        )
        has = f"it has {', '.join(shown) or 'nothing'}"
        if not any(self._variables().values()):
            has = "it has no variables yet: call bridge.lazy_init(model, ...) first"
        return AttributeError(
            f"ToNNX({self._name()}) has no collection, attribute or method {name!r}; {has}"
        )

    def _name(self) -> str:
        return type(self.to_nnx__module).__name__

    def __call__(
        self,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the Linen module.

        Args:
            args: positional arguments of the method.
            rngs: keys for this call, as ``Module.apply`` takes them, or an ``nnx.Rngs``; without,
                one is drawn from each of the model's own streams.
            method: name of the method, or a function of the Linen module; None: the call.
            mutable: the collections that the call may change, as for ``Module.apply``; what changed
                is stored in the model. None: those of the Linen call around this one, where there
                is one; else all that the model has but ``params`` and ``perturbations``, and
                ``intermediates``.
            kwargs: keyword arguments of the method. ``capture_intermediates`` is Linen's.

        Returns:
            What the method returns.

        Raises:
            BridgeError: there are no variables yet, they are not those of the module, or a PRNG
                stream is missing.
        """
        return watched_call(
            functools.partial(
                WrappedLinen._call,
                self,
                *args,
                rngs=rngs,
                method=method,
                mutable=mutable,
                **kwargs,
            )
        )

    def _call(self, *args: Any, rngs: Any, method: Any, mutable: Any, **kwargs: Any) -> Any:
        keys = self._keys() if rngs is None else _trees.key_dict(rngs)
        mode = dict(vars(self)[_MODE])
        if mode and self._mode_goes_first:
            kwargs = with_mode(self.to_nnx__module, method, mode, args, kwargs)
        try:
            with setting(mode, first=self._mode_goes_first) if mode else contextlib.nullcontext():
                if _private.is_initializing(self):
                    return self._init(keys, method, args, kwargs)
                return self._apply(keys, method, mutable, args, kwargs)
        except _MISSING as error:
            raise self._explained(error, keys) from error

    def _keys(self) -> dict[str, Any]:
        try:
            return self._own_keys()
        except errors.TraceContextError as error:
            raise BridgeError(
                "its streams cannot advance: it was made outside of the trace that calls it",
                path=self._name(),
                fix="Give the model to the function as an argument (nnx.jit, nnx.grad), or pass"
                " rngs= to the call: keys, or {} where it draws none.",
            ) from error

    def _init(self, keys: Any, method: Any, args: Any, kwargs: Any) -> Any:
        is_kept = self._keeps_variables or was_initialized(self)
        before = self._linen_variables() if is_kept else {}
        mutable = True if self._keeps_sown() else core.DenyList("intermediates")
        module = self.to_nnx__module
        with _private.watching_sow() as sown:
            output, variables = _private.init_onto(
                module, before, keys, mutable, method, args, kwargs
            )
        self._store(variables, sown)
        note_initialized(self)
        return output

    def _apply(self, keys: Any, method: Any, mutable: Any, args: Any, kwargs: Any) -> Any:
        module, variables = self.to_nnx__module, self._linen_variables()
        if mutable is None:
            mutable = self._default_mutable(variables)
        if mutable is False and not kwargs.get("capture_intermediates"):
            return module.apply(variables, *args, rngs=keys, method=method, **kwargs)
        with _private.watching_sow() as sown:
            output, updates = module.apply(
                variables, *args, rngs=keys, method=method, mutable=mutable, **kwargs
            )
        self._store(updates, sown)
        return output

    def _default_mutable(self, variables: Mapping[str, Any]) -> Any:
        # As flax does: the Linen code around decides, bridge.Module first.
        around = bridge.current_module()
        scope = around.scope if around is not None else _private.current_scope()
        if scope is not None:
            return scope.mutable
        if not _private.can_change(self):
            return False
        held = dict.fromkeys([*variables, *(collection for collection, _ in vars(self)[_SOWN])])
        kept = ["intermediates"] if self._keeps_sown() else []
        return [*(name for name in held if name not in _NOT_BY_DEFAULT), *kept]

    def _keeps_sown(self) -> bool:
        """Whether a call that does not say what it may change keeps what it sows."""
        return True

    def _linen_variables(self) -> dict[str, Any]:
        """The variables for a call: all but what calls sow, which each call makes anew."""
        variables = self._variables()
        variables.pop("intermediates", None)
        for collection, path in vars(self)[_SOWN]:
            if collection in variables:
                variables[collection] = _without(variables[collection], path)
        for path, graphdef in vars(self)[GRAPHDEFS]:
            holder = variables.setdefault(GRAPH_COLLECTION, {})
            for name in path[:-1]:
                holder = holder.setdefault(name, {})
            holder[path[-1]] = graphdef
        return variables

    def _store(self, updates: Mapping[str, Any], sown: Iterable[Place]) -> None:
        for collection, tree in updates.items():
            if collection == GRAPH_COLLECTION:  # of each ToLinen inside: static, and no state
                found = {**dict(vars(self)[GRAPHDEFS]), **dict(flat(tree))}
                setattr(self, GRAPHDEFS, tuple(sorted(found.items(), key=lambda item: item[0])))
            else:
                self._keep(collection, tree)
        # Kept apart only where the collection does not say it.
        known = {*vars(self)[_SOWN], *(place for place in sown if place[0] != "intermediates")}
        if len(known) > len(vars(self)[_SOWN]):
            setattr(self, _SOWN, tuple(sorted(known)))

    def _explained(self, error: Exception, keys: Mapping[str, Any]) -> BridgeError:
        if isinstance(error, errors.InvalidRngError):
            given = ", ".join(sorted(keys)) or "none"
            return BridgeError(
                f"a PRNG stream is missing; there are: {given}. {error}",
                path=self._name(),
                fix="Give ToNNX an nnx.Rngs with that stream, or pass rngs= to the call.",
            )
        if not any(self._variables().values()):
            return BridgeError(
                "called before lazy_init: there are no variables yet",
                path=self._name(),
                fix="Call bridge.lazy_init(model, ...) with sample inputs first.",
            )
        return BridgeError(
            f"the variables are not those of the module. {error}",
            path=self._name(),
            fix="Call bridge.lazy_init with the inputs or the method of this call, or put back the"
            " variables that it made.",
        )


_MISSING = (
    errors.InvalidRngError,
    errors.ScopeCollectionNotFound,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeVariableNotFoundError,
)


_fold_in = jax.jit(jax.random.fold_in)


def streams_of(rngs: nnx.Rngs) -> list[tuple[str, nnx.RngStream]]:
    """The streams by name. ``rngs.items()`` is a generator, which ``nnx.tabulate`` cannot run."""
    held = vars(rngs).items()
    return [(name, stream) for name, stream in held if isinstance(stream, nnx.RngStream)]


def drawn(rngs: nnx.Rngs) -> dict[str, Any]:
    """A key from each stream, by Linen's name for it: what ``stream()`` gives, compiled."""
    keys = {}
    for name, stream in streams_of(rngs):
        if type(stream) is nnx.RngStream:
            count = stream.count.get_value()
            keys[name] = _fold_in(stream.key.get_value(), count)
            stream.count.set_value(count + 1)
        else:
            keys[name] = stream()
    return _trees.key_dict(keys)


def renewed(kind: type[nnx.Variable[Any]], old: Any, value: Any) -> nnx.Variable[Any]:
    """A Variable with the value of a Linen variable: the old one where there is one.

    Args:
        kind: the class of a new one.
        old: what is there now.
        value: the Linen variable, boxed or not.
    """
    if not isinstance(old, nnx.Variable):
        return _boxes.variable(kind, value)
    raw = unboxed(value)
    if raw is not old.get_raw_value():
        old.set_raw_value(raw)
    return old


def flat(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested dicts with their paths."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for name, value in tree.items():
        yield from flat(value, (*path, name))


def _without(tree: Any, path: Path) -> Any:
    """A nested dict without one entry; it may not be there."""
    if not isinstance(tree, Mapping) or path[0] not in tree:
        return tree
    rest = {name: value for name, value in tree.items() if name != path[0]}
    return rest if len(path) == 1 else {**rest, path[0]: _without(tree[path[0]], path[1:])}
