"""Lets pytest import `harness`, as `python benchmarks/bench_x.py` does by itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
