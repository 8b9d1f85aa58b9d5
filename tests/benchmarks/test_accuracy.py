"""The accuracy table's limits, on a smaller layer: relative errors hardly depend on the sizes."""

import pytest

from benchmarks import accuracy
from benchmarks.shapes import Shape

SMALL = Shape("small", 8, 4, 512, 256)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Not needed here, and slow."""


@pytest.mark.parametrize("name", accuracy.ROWS)
def test_limits_hold(name):
    row = accuracy.measure_row(name, SMALL, tokens=32)
    if row.unavailable:
        pytest.skip(row.unavailable)
    assert set(row.errors) == {"forward", "dX", "adjoint"} | ({"d LoRA"} if "lora" in name else set())
    assert all(value > 0 for value, _ in row.errors.values())
    assert row.holds, row.errors


def test_a_limit_that_does_not_hold_is_seen():
    row = accuracy.Accuracy("int8", {"forward": (0.02, 0.015)})
    assert not row.holds and accuracy.cell(0.02, 0.015) == "2.00% (> 1.5)"
    assert not accuracy.Accuracy("int8", {"dX": (float("nan"), 0.015)}).holds
