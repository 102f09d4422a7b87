"""Settings of the whole suite."""

import os

# Most of the time goes into compiling tiny programs. LLVM's passes change no comparison here, since
# both sides of each are compiled alike. Set before jax is imported.
_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST}".strip()
