"""What made those objects of optax that its closures alone do not tell.

The one file of this layer that touches private names of optax, seen in 0.2.8. Nothing here is
certain: what these arguments make has to be compared with what there is. `KeyError`,
`AttributeError` and the like say that this version of optax holds something else.
"""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

INJECTED = "inject_hyperparams.<locals>.wrapped_transform.<locals>.init_fn"
"""The qualified name of the ``init`` of what ``optax.inject_hyperparams(...)(...)`` gives."""


def is_multi_steps(obj: Any) -> bool:
    """Whether it is an ``optax.MultiSteps``; imports nothing."""
    optax = sys.modules.get("optax")
    return optax is not None and type(obj) is getattr(optax, "MultiSteps", None)


def multi_steps(obj: Any) -> dict[str, Any]:
    """The arguments of an ``optax.MultiSteps``."""
    held = vars(obj)
    every, skip = held["_every_k_schedule"], held["_should_skip_update_fn"]
    if _is_own(every):  # of an int, it makes a function
        every = every.__closure__[0].cell_contents
    return {
        "opt": held["_opt"],
        "every_k_schedule": every,
        "use_grad_mean": held["_use_grad_mean"],
        "should_skip_update_fn": None if _is_own(skip) else skip,
        "accumulator_dtype": held["_accumulator_dtype"],
    }


def _is_own(fn: Any) -> bool:
    return str(getattr(fn, "__qualname__", "")).startswith("MultiSteps.__init__.<locals>.")


def injected(init: types.FunctionType) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of ``optax.inject_hyperparams``, and those of the function that it gives.

    Args:
        init: that of the transformation.
    """
    cells = zip(init.__code__.co_freevars, init.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in cells}
    factory, other = held["inner_factory"], held["other_hps"]
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= other.get(name, {})
        elif name in held["sched_hps"]:
            schedule = held["sched_hps"][name]
            is_wrapped = type(schedule).__name__ == "WrappedSchedule"
            arguments[name] = schedule.schedule_fn if is_wrapped else schedule
        else:
            arguments[name] = {**held["numeric_hps"], **other}[name]
    outer = {
        "inner_factory": factory,
        "static_args": tuple(name for name, value in other.items() if _is_dynamic(value)),
        "hyperparam_dtype": held["hyperparam_dtype"],
    }
    return outer, arguments


def _is_dynamic(value: Any) -> bool:
    """Whether optax would take a hyper-parameter for one that changes, unless it is told."""
    is_number = isinstance(value, int | float) or hasattr(value, "__array__")
    return type(value) is not bool and (is_number or callable(value))
