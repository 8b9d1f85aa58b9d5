"""How fast a packed file of one layer is mapped, checksums included, beside a plain read of it with as many threads.

Both start with the file's pages dropped from the page cache. A file system in memory has no disk to measure.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.machine import ROOT
from benchmarks.shapes import SHAPES, Shape
from kt_sft.ops.layout import uniform
from kt_sft.weights.cache import CacheSpec, PackedWriter, open_packed

_CHUNK = 4 << 20


def _drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _read(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size

        def part(start: int) -> None:
            os.preadv(file.fileno(), [bytearray(_CHUNK)], start)

        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            list(pool.map(part, range(0, size, _CHUNK)))


def _gb_per_s(path: Path, use: Callable[[], object]) -> float:
    _drop(path)
    start = time.perf_counter()
    use()
    return path.stat().st_size / (time.perf_counter() - start) / 1e9


def measure(shape: Shape = SHAPES["A"], repeats: int = 3) -> dict[str, float]:
    """``mapped_gb_per_s`` and ``read_gb_per_s``, the best of a few alternating runs."""
    spec = CacheSpec(
        **dict(wanted="int8", num_experts=shape.E, hidden_size=shape.D, intermediate_size=shape.F),
        **dict(layers=("layer",), packing="benchmark", content="benchmark", source="", layouts=(uniform("int8"),)),
    )
    (ROOT / ".cache").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as folder:
        path = Path(folder) / "layer.ktpack"
        with PackedWriter(path, spec) as writer:
            for e in range(shape.E):
                values = torch.randint(256, (spec.slot(0),), dtype=torch.uint8)
                writer.put("layer", e, values)
            writer.commit()
        pairs = [(_gb_per_s(path, lambda: open_packed(path, spec)), _gb_per_s(path, lambda: _read(path)))
                 for _ in range(repeats)]  # fmt: skip
    mapped, read = (max(column) for column in zip(*pairs, strict=True))
    return dict(mapped_gb_per_s=mapped, read_gb_per_s=read)
