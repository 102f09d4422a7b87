"""Linen modules inside NNX modules and NNX modules inside Linen modules, as the guide shows it.

Stands in the place of ``flax.nnx.bridge``. A code base that was written for the bridge of flax 0.12
finds that one's names, layout and behaviour in `linsey.bridge.flax12`.
"""

from flax.nnx.bridge import (
    AttrPriority,
    Module,
    Scope,
    compact,
    current_context,
    current_module,
    initializers,
    linen_in_bridge_mdl,
    nnx_in_bridge_mdl,
)

from linsey._boxes import NNXMeta
from linsey.bridge._functional import Functional, functional
from linsey.bridge._lazy import lazy_init
from linsey.bridge._registry import register_variable_name_type_pair, with_partitioning
from linsey.bridge._to_linen import ToLinen, to_linen
from linsey.bridge._to_nnx import ToNNX

__all__ = [
    "AttrPriority",
    "Functional",
    "Module",
    "NNXMeta",
    "Scope",
    "ToLinen",
    "ToNNX",
    "compact",
    "current_context",
    "current_module",
    "functional",
    "initializers",
    "lazy_init",
    "linen_in_bridge_mdl",
    "nnx_in_bridge_mdl",
    "register_variable_name_type_pair",
    "to_linen",
    "with_partitioning",
]
