"""The probes run on every instruction set of this CPU; what they measure is not judged."""

import pytest

from benchmarks import probes
from kt_sft import native


def test_reads_are_counted_on_every_instruction_set(isa):
    for huge_pages in (True, False):
        probe = native.ReadProbe(64 << 10, huge_pages)
        assert 1e7 < probe.best(3) < 1e14 and 1e7 < probe.read(1) < 1e14


def test_arguments_that_cannot_be_measured():
    with pytest.raises(ValueError, match="bytes_per_thread: expected a positive multiple of 512, got 100"):
        native.ReadProbe(100, True)
    with pytest.raises(ValueError, match="passes: expected at least 1, got 0"):
        native.ReadProbe(512, True).read(0)


def test_a_probe_reads_with_the_threads_that_it_was_made_for():
    threads = native.num_threads()
    probe = native.ReadProbe(512, False)
    try:
        native.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match=f"made for {threads}, now they are {threads + 1}"):
            probe.read(1)
    finally:
        native.set_num_threads(threads)


@pytest.mark.parametrize("int8", [False, True])
def test_what_the_machine_gives_beside_a_measurement(isa, int8):
    if int8 and not native.computes_int8():
        pytest.skip(f"{isa} has no int8 products")
    found = probes.Beside(int8).read()
    assert 0.01 < found["dram"] < 1e4 and (isa == "amx_model" or 1e-3 < found["peak"] < 1e3)


def test_of_two_measurements_the_higher_limit_counts():
    first = probes.Limits(isa="a", threads=2, peaks=dict(a=1.0, b=3.0), int8_peaks={}, l2=5.0, dram=2.0, dram_4k=1.0)
    second = probes.Limits(isa="a", threads=2, peaks=dict(a=2.0, b=1.0), int8_peaks={}, l2=4.0, dram=3.0, dram_4k=1.0)
    assert first.better(second) == probes.Limits(
        isa="a", threads=2, peaks=dict(a=2.0, b=3.0), int8_peaks={}, l2=5.0, dram=3.0, dram_4k=1.0
    )


def test_every_limit_is_found(monkeypatch):
    monkeypatch.setattr(probes, "_PEAK_ITERATIONS", 1000)
    monkeypatch.setattr(probes, "_REPEATS", 1)
    monkeypatch.setattr(probes, "bandwidth", lambda size, huge: size / 1e9 + huge)
    before = native.isa()
    limits = probes.measure()
    assert limits.isa == native.isa() == before and limits.peak > 0
    assert set(limits.peaks) == set(native.isas()) - {"amx_model"}
    assert limits.l2 < limits.dram and limits.dram == pytest.approx(limits.dram_4k + 1)
