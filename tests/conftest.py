"""Settings of the whole suite."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Most of the time goes into compiling tiny programs. LLVM's passes change no comparison here, since
# both sides of each are compiled alike. Set before jax is imported.
_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST}".strip()

_GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the texts that tests compare with into tests/golden/, and compare nothing",
    )


@pytest.fixture
def assert_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Asserts that a text is the one in ``tests/golden/<name>.txt``."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = _GOLDEN / f"{name}.txt"
        if update:
            path.write_text(f"{text}\n", encoding="utf-8")
        assert path.exists(), f"there is no {path.name}; run pytest --update-golden, and read it"
        assert f"{text}\n" == path.read_text(encoding="utf-8"), (
            "pytest --update-golden, and read it"
        )

    return check
