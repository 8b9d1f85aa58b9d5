"""The token meter: only time inside steps counts."""

from __future__ import annotations

import pytest

from kt_sft.integrations import throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_rate_counts_tokens_and_step_time(clock):
    meter = throughput.TokenMeter()
    meter.begin(1000)  # a resumed run starts with what it has seen
    for _ in range(2):
        meter.step_began()
        clock[0] += 2.0
        meter.step_ended()
        clock[0] += 100.0  # evaluation
    assert meter.read(1400) == 100.0
    assert meter.read(1400) is None
    meter.step_began()
    clock[0] += 1.0
    meter.step_ended()
    assert meter.read(1450) == 50.0


def test_step_end_without_begin_adds_nothing(clock):
    meter = throughput.TokenMeter()
    meter.step_ended()
    assert meter.read(10) is None
