"""The probes run on every instruction set of this CPU; what they measure is not judged."""

import pytest

from benchmarks import probes
from kt_sft import native


def test_reads_are_counted_on_every_instruction_set(isa):
    for huge_pages in (True, False):
        rate = native.read_bandwidth(64 << 10, 3, huge_pages)
        assert 1e7 < rate < 1e14


@pytest.mark.parametrize(("arguments", "message"), [
    ((100, 1, True), "bytes_per_thread: expected a positive multiple of 512, got 100"),
    ((512, 0, True), "passes: expected at least 1, got 0"),
])  # fmt: skip
def test_arguments_that_cannot_be_measured(arguments, message):
    with pytest.raises(ValueError, match=message):
        native.read_bandwidth(*arguments)


def test_every_limit_is_found(monkeypatch):
    monkeypatch.setattr(probes, "_PEAK_ITERATIONS", 1000)
    monkeypatch.setattr(probes, "_REPEATS", 1)
    monkeypatch.setattr(probes, "bandwidth", lambda size, huge: size / 1e9 + huge)
    before = native.isa()
    limits = probes.measure()
    assert limits.isa == native.isa() == before and limits.peak > 0
    assert set(limits.peaks) == set(native.isas()) - {"amx_model"}
    assert limits.l2 < limits.dram and limits.dram == pytest.approx(limits.dram_4k + 1)
