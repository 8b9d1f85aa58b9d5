"""Limits of this machine, by our own loops: multiply-adds on registers per instruction set, reads from L2 and DRAM.

All threads together. A limit is the best of several runs: what the hardware gives when nothing else is in the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.machine import cache_bytes
from kt_sft import native

_PEAK_ITERATIONS = 2_000_000  # a few milliseconds: the best of many short runs is undisturbed
_REPEATS = 20
_MODELS = {"amx_model"}  # a software model: its speed means nothing


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``peaks``: TFLOP/s by instruction set, with the products that it computes layers with; ``int8_peaks``: TOP/s;
    ``l2``, ``dram``, ``dram_4k``: read GB/s, the latter two on huge and on 4 KiB pages."""

    isa: str
    threads: int
    peaks: dict[str, float]
    int8_peaks: dict[str, float]
    l2: float
    dram: float
    dram_4k: float

    @property
    def peak(self) -> float:
        """Of the chosen instruction set."""
        return self.peaks[self.isa]

    @property
    def int8_peak(self) -> float | None:
        return self.int8_peaks.get(self.isa)

    def better(self, other: Limits) -> Limits:
        """The higher of every limit, of two measurements on one machine."""
        peaks, int8_peaks = (
            {isa: max(rate, getattr(other, name)[isa]) for isa, rate in getattr(self, name).items()}
            for name in ("peaks", "int8_peaks")
        )
        rates = {name: max(getattr(self, name), getattr(other, name)) for name in ("l2", "dram", "dram_4k")}
        return replace(self, peaks=peaks, int8_peaks=int8_peaks, **rates)


def _best_peak(name: str) -> float | None:
    """Tera-operations per second of native.peak_flops or native.peak_int8, or None where there is none."""
    probe = getattr(native, name, None)
    if probe is None:
        return None
    try:
        return max(probe(_PEAK_ITERATIONS) for _ in range(_REPEATS)) / 1e12 or None
    except ValueError:  # this instruction set has no such products
        return None


def bandwidth(bytes_per_thread: int, huge_pages: bool, tries: int = _REPEATS // 4) -> float:
    """Read GB/s of all threads, each from memory of its own."""
    passes = max(1, (1 << 29) // bytes_per_thread)
    aligned = -(-bytes_per_thread // 4096) * 4096
    return max(native.ReadProbe(aligned, huge_pages).best(passes) for _ in range(tries)) / 1e9


class Beside:
    """What the machine gives beside a measurement, again and again: on one shared with others that changes within a
    second, by clocks and by what the neighbours take.

    ``peak``: tera-operations per second from registers, of the products that a row computes with; ``dram``: read GB/s
    of memory by all threads, four times L3 on huge pages.
    """

    def __init__(self, int8: bool) -> None:
        self._peak = native.peak_int8 if int8 else native.peak_flops
        self._dram = native.ReadProbe(4 * (cache_bytes(3) or 32 << 20) // native.num_threads() // 4096 * 4096, True)
        self._dram.best(4)

    def read(self) -> dict[str, float]:
        """One reading of each, of some milliseconds together."""
        peak = {} if native.isa() in _MODELS else {"peak": self._peak(_PEAK_ITERATIONS // 8) / 1e12}
        return peak | {"dram": self._dram.read(1) / 1e9}


def measure() -> Limits:
    """Measure every limit; about three seconds."""
    chosen, threads = native.isa(), native.num_threads()
    peaks, int8_peaks = {}, {}
    for isa in native.isas():
        if isa in _MODELS:
            continue
        native.select_isa(isa)
        peaks[isa] = _best_peak("peak_flops") or 0.0
        if (int8 := _best_peak("peak_int8")) is not None:
            int8_peaks[isa] = int8
    native.select_isa(chosen)
    l2, l3 = cache_bytes(2) or 1 << 20, cache_bytes(3) or 32 << 20
    dram = max(1 << 30, 4 * l3) // threads
    return Limits(
        **dict(isa=chosen, threads=threads, peaks=peaks, int8_peaks=int8_peaks),
        **dict(l2=bandwidth(l2 // 2, True), dram=bandwidth(dram, True), dram_4k=bandwidth(dram, False)),
    )
