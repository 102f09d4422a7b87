"""What an executable refuses, in its own words."""

from __future__ import annotations

from typing import Any

from linsey.ir import EmitError, Graph, SlotIndex, ValuesError, decode, describe


def check_method(graph: Graph, method: Any) -> None:
    """Refuses a method that the root cannot have.

    Raises:
        EmitError: it is neither callable nor the name of a method or (in Linen) of a submodule.
    """
    root = graph.nodes[graph.root]
    if method is None or callable(method) or root.source is None:
        return
    cls = decode(root.source.cls)
    if not isinstance(method, str) or not (
        callable(getattr(cls, method, None)) or method in dict(root.children)
    ):
        raise EmitError(
            f"{describe(root.source.cls)} has no method {method!r}",
            path=describe(root.source.cls),
            fix="Pass the name of a method, or a function of the module.",
        )


def called_name(graph: Graph, method: Any) -> str:
    """What a call is named in errors."""
    source = graph.nodes[graph.root].source
    cls = "root" if source is None else describe(source.cls)
    called = method if isinstance(method, str) else getattr(method, "__name__", "__call__")
    return f"{cls}.{called}"


def not_ours(found: object, expected: SlotIndex) -> ValuesError:
    """The error for values of another program."""
    if not isinstance(found, SlotIndex):
        return ValuesError(
            f"found {type(found).__name__}, expected linsey.Values",
            path="values",
            fix="Pass what exe.init, program.values or an earlier call gave; for Linen variables:"
            " linsey.lower(..., variables=variables).values.",
        )
    missing = [key for key in expected.keys if key not in found.positions]
    extra = [key for key in found.keys if key not in expected.positions]
    first = (missing or extra or list(found.keys))[0]
    return ValuesError(
        f"the values are not those of this program: {len(missing)} slots are missing and"
        f" {len(extra)} are unknown",
        path=first,
        fix="Pass what exe.init, program.values or an earlier call gave, whole.",
    )


def no_init() -> EmitError:
    """The error for a program that cannot be initialised."""
    return EmitError(
        "this program cannot be initialised: it was lowered from a live module, or loaded",
        path="init",
        fix="Use program.values; or lower the Linen module, or a factory of the NNX one.",
    )
