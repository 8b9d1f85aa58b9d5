"""The parts of a training step: every one is measured, and together they are the step."""

import sys

import pytest
import torch

from benchmarks import bench_train_step as bench
from benchmarks.shapes import TINY


@pytest.fixture
def arguments(monkeypatch):
    monkeypatch.setattr(bench, "SHAPE", TINY)
    monkeypatch.setattr(sys, "argv", ["", "--layers", "2", "--tokens", "32", "--sequence", "16", "--device", "cpu"])
    return bench.parse_args()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_make_up_the_step(arguments, checkpointing):
    arguments.checkpointing = checkpointing
    model = bench.make_stack(bench.checked_experts("int8", 4), arguments)
    rows = bench.measure(bench.make_step(model, arguments), 2)
    assert len(rows) == 2
    for row in rows:
        assert list(row) == [*bench.PHASES, "the rest", "step"] and min(row.values()) > 0
        assert sum(ms for name, ms in row.items() if name != "step") == pytest.approx(row["step"])


def test_every_layer_trains(arguments):
    model = bench.make_stack(bench.checked_experts("int8", 4), arguments)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bench.make_step(model, arguments)()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name} and len(moved) == 2 * 7 * 2


def test_wrong_results_get_no_time(arguments, monkeypatch):
    monkeypatch.setattr(bench.check, "error", lambda got, want: 1.0)
    with pytest.raises(SystemExit, match="refusing to report"):
        bench.checked_experts("int8", 4)
