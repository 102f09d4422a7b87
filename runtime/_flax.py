"""What flax has in force around a trace. Where it was not imported, none of its code can run.

A program that was exported runs where flax cannot be imported, so no other file here imports it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


def logical_axis_rules() -> Any:
    """The rules of ``nn.logical_axis_rules`` at this moment; empty where there are none."""
    if "flax" not in sys.modules:
        return ()
    from flax import linen

    return linen.get_logical_axis_rules()


@contextlib.contextmanager
def tracing(rules: tuple[tuple[str, Any], ...] | None) -> Iterator[None]:
    """What flax's code finds around it when it is traced for a mesh.

    Boxes put their constraints where they fit, and Variables that are made inside are not sharded
    one by one.

    Args:
        rules: the rules to put in force; None: those that are.
    """
    if "flax" not in sys.modules:
        yield
        return
    from flax import linen, nnx

    from linsey._unboxing import constraining

    with contextlib.ExitStack() as stack:
        stack.enter_context(nnx.use_eager_sharding(False))
        stack.enter_context(constraining("where it fits"))
        if rules is not None:
            stack.enter_context(linen.logical_axis_rules(rules))
        yield


def call_errors() -> tuple[type[Exception], ...]:
    """What a wrong call of a module raises."""
    if "flax" not in sys.modules:
        return AttributeError, TypeError
    from flax import errors

    return AttributeError, TypeError, errors.FlaxError
