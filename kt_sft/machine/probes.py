"""Short measurements of this machine: arithmetic, memory, disk, packing. Each takes about a second or less.

A busy machine gives less than an idle one: probes take the best of a few repetitions.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import native
from ..ops.packed import PackedExperts

_READ_PER_THREAD = 256 << 20  # well beyond the last-level cache of common CPUs
_READ_BYTES = 256 << 20
_PEAK_ITERATIONS = 2_000_000
_PACK_SHAPE = (2048, 768)  # hidden, intermediate: 9 MB of BF16


@dataclass(frozen=True)
class Rate:
    """A rate per second and where it comes from (``measured: ...`` or ``assumed: ...``)."""

    value: float
    source: str


def peak_flops() -> Rate:
    """Floating-point operations per second of the chosen instruction set on all kernel threads, from registers."""
    best = max(native.peak_flops(_PEAK_ITERATIONS) for _ in range(3))
    return Rate(best, f"measured: {native.isa()}, {native.num_threads()} threads, from registers")


def memory_bandwidth() -> Rate:
    """Bytes per second that all kernel threads together read from memory."""
    rate = native.ReadProbe(_READ_PER_THREAD, True).best(3)
    return Rate(rate, f"measured: reading {_READ_PER_THREAD >> 20} MiB per thread, {native.num_threads()} threads")


def pack_rate(weight_format: str) -> Rate:
    """Bytes of BF16 weights per second that are quantised and packed."""
    hidden, intermediate = _PACK_SHAPE
    gate = torch.randn(intermediate, hidden).bfloat16()
    down = torch.randn(hidden, intermediate).bfloat16()
    packed = PackedExperts.empty(1, hidden, intermediate, weight_format)
    seconds = _best(2, lambda: packed.pack_expert_(0, gate, gate, down))
    return Rate(3 * gate.nbytes / seconds, f"measured: one expert of 9 MB, {native.num_threads()} threads")


def repack_rate() -> Rate:
    """Bytes of BF16 weights per second whose codes are packed as a checkpoint stores them: INT4 in groups of 32."""
    hidden, intermediate = _PACK_SHAPE
    codes = torch.zeros(intermediate, hidden // 2, dtype=torch.uint8)
    scales = torch.zeros(intermediate, hidden // 32 * 2, dtype=torch.uint8)
    packed = PackedExperts.empty(1, hidden, intermediate, "int4_sym")
    seconds = _best(2, lambda: packed.pack_codes_(0, 0, codes, [scales]))
    return Rate(4 * codes.nbytes / seconds, f"measured: one matrix of 3 MB, {native.num_threads()} threads")


def read_rate(file: Path) -> Rate | None:
    """Bytes per second of reading the start of ``file`` past the page cache; None if it is too small to tell."""
    size = min(file.stat().st_size, _READ_BYTES) // (4 << 20) * (4 << 20)
    if size < 64 << 20:
        return None
    buffer = mmap.mmap(-1, 4 << 20)  # page-aligned, as O_DIRECT needs
    fd, how = _open_direct(file)
    try:
        start = time.perf_counter()
        for offset in range(0, size, len(buffer)):
            os.preadv(fd, [buffer], offset)
        seconds = time.perf_counter() - start
    finally:
        os.close(fd)
    return Rate(size / seconds, f"measured: {size >> 20} MiB of {file.name}, {how}, one thread")


def _open_direct(file: Path) -> tuple[int, str]:
    with suppress(OSError):
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), "direct"
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd, "page cache dropped"


def _best(repeats: int, call: Callable[[], object]) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one touches the memory
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])
