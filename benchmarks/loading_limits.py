"""What limits a load: the disk, the quantiser, and the memory that both fill."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kt_sft.ops.memory import populated_ahead, zeros_for_matrices
from kt_sft.ops.packed import PackedExperts
from kt_sft.weights import loader, reading

_CHUNK = 8 << 20
_SIZES = (2048, 768)  # hidden, intermediate


def forget(file: Path) -> None:
    """Drop the file from the page cache."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def get_at_hand(nbytes: int) -> None:
    """Touch so much memory and give it back: a virtual machine then has it, and gets it again at once."""
    if nbytes:
        parts = zeros_for_matrices(nbytes, 1).numpy()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda at: parts[at : at + _CHUNK].fill(1), range(0, nbytes, _CHUNK)))


def read_rate(file: Path) -> float:
    """Bytes per second of reading it once in order, a few blocks ahead, with the loader's number of threads."""
    forget(file)
    size = file.stat().st_size
    fd = os.open(file, os.O_RDONLY)
    start = time.monotonic()
    with ThreadPoolExecutor(loader.READERS) as pool:
        for _ in pool.map(lambda at: len(os.pread(fd, _CHUNK, at)), range(0, size, _CHUNK)):
            pass
    seconds = time.monotonic() - start
    os.close(fd)
    return size / seconds


def direct_rate(file: Path) -> float:
    """The same by the loader's own reads."""
    forget(file)
    size = file.stat().st_size
    start = time.monotonic()
    with ThreadPoolExecutor(loader.READERS) as pool:
        for _ in pool.map(lambda at: reading.read(file, at, min(_CHUNK, size - at)).numel(), range(0, size, _CHUNK)):
            pass
    return size / (time.monotonic() - start)


def quantiser_rates(nbytes: int = 2 << 30) -> tuple[float, float]:
    """Bytes of BF16 weights per second that packing to int8 takes in, from memory: the first time, and again.

    ``nbytes`` are packed: new memory, its pages asked for ahead as the loader does, which waits for them too.
    """
    D, F = _SIZES
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, generator=generator).bfloat16() for shape in ((F, D), (F, D), (D, F))]
    one = PackedExperts.empty(1, D, F, "int8")
    one.pack_expert_(0, *matrices)
    count = nbytes // one.nbytes
    stretch = zeros_for_matrices(count * one.nbytes, 3 * count)
    packed = PackedExperts(stretch, count, D, F, one.layout)

    def rate() -> float:
        start = time.monotonic()
        for e in range(count):
            packed.pack_expert_(e, *matrices)
        return count * sum(matrix.nbytes for matrix in matrices) / (time.monotonic() - start)

    with populated_ahead(stretch):
        first = rate()
    return first, rate()
