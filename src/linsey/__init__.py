"""linsey compiles Flax Linen modules, Flax NNX modules and any mix of the two.

One neutral graph stands in the middle; from it linsey emits either API and runs it under jit.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linsey.ir import Graph, LinseyError, Values
    from linsey.lowering import lower, to_linen, to_nnx
    from linsey.program import Program, load
    from linsey.runtime import Executable
    from linsey.runtime.exported import Export
    from linsey.surgery import replace

__version__ = "0.1.0"

# Loaded when first used: `import linsey.ir` runs this file and must bring neither jax nor flax.
_HOME = {
    "Executable": "linsey.runtime",
    "Export": "linsey.runtime.exported",
    "Graph": "linsey.ir",
    "LinseyError": "linsey.ir",
    "Program": "linsey.program",
    "Values": "linsey.runtime",  # which makes it a pytree
    "load": "linsey.program",
    "lower": "linsey.lowering",
    "replace": "linsey.surgery",
    "to_linen": "linsey.lowering",
    "to_nnx": "linsey.lowering",
}

_NAMESPACES = {"bridge": "linsey.bridge", "checkpoint": "linsey.runtime.checkpoint"}

__all__ = [
    "Executable",
    "Export",
    "Graph",
    "LinseyError",
    "Program",
    "Values",
    "load",
    "lower",
    "replace",
    "to_linen",
    "to_nnx",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _NAMESPACES:
        return importlib.import_module(_NAMESPACES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_NAMESPACES})
