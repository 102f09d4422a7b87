"""linsey compiles Flax Linen modules, Flax NNX modules and any mix of the two.

One neutral graph stands in the middle; from it linsey emits either API and runs it under jit.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
