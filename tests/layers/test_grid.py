"""Each Linen layer, with each of its fields, gives Linen's numbers as NNX's own or hosted."""

import pytest
from flax import linen as nn
from layer_checks import (
    check_eager,
    check_emitted,
    check_jitted,
    check_operations,
    check_report,
    lowered,
)
from layer_grid import (
    ALIASES,
    IS_FULL,
    ROWS,
    Point,
    call_of,
    draw,
    points,
    unknown_fields,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")

LAYERS = [cls for cls in ROWS if IS_FULL or cls not in ALIASES]
POINTS = [
    point
    for cls in ROWS
    for point in points(cls, is_full=IS_FULL)
    if cls in LAYERS or point.label == "default"
]


def is_run(point: Point) -> bool:
    """Whether a point is compiled and run, or its operations are only counted."""
    if point.label == "default" or not IS_FULL:
        return point.label == "default" and point.cls not in ALIASES
    return ROWS[point.cls].op != "multi_head_attention" or point.seed % 3 == 0


def name_of(point: Point) -> str:
    return f"{point.cls.__name__}-{point.label}"


@pytest.mark.parametrize("cls", ROWS, ids=lambda cls: cls.__name__)
def test_the_grid_knows_every_field(cls: type[nn.Module]) -> None:
    assert unknown_fields(cls) == []


def check(point: Point, *, with_numbers: bool) -> None:
    call = call_of(point, is_scanned=True)
    program = lowered(call)
    check_report(program)
    check_operations(call, program)
    if with_numbers:
        check_emitted(call, program)
        check_jitted(call, program)
        call = call_of(point, is_scanned=False)
        check_eager(call, lowered(call))


@pytest.mark.parametrize("point", POINTS, ids=name_of)
def test_one_value(point: Point) -> None:
    check(point, with_numbers=is_run(point))


@pytest.mark.parametrize("seed", range(8 if IS_FULL else 1))
@pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)
def test_several_values(cls: type[nn.Module], seed: int) -> None:
    point = draw(cls, seed)
    try:
        check(point, with_numbers=is_run(point))
    except Exception as error:
        error.add_note(name_of(point))
        raise
