"""Loading speed of a synthetic BF16 checkpoint, beside what limits it, and whether killed loads resume.

    python -m benchmarks.loading [--gigabytes 8] [--kills 10] [--folder DIR]

    load         expert bytes of the checkpoint / seconds of load_experts, first start: read and quantise
    file read    the same bytes read once from the disk, in order, by as many threads, as files are read usually:
                 through the page cache, which had none of it
    read direct  past the page cache, as the loader does
    quantiser    packing of matrices that are in memory already, on all threads, into memory that the process has just
                 got from the system, as a first start does; and again, now that the pages are there
    goal         load >= 70 % of the lower of file read and quantiser, the latter into new memory
    file write   of the packed file, behind the run, until the process ends

Then the process is killed (SIGKILL) at random moments of load and writing and started again, until it is done; the file
must be the same, bit for bit. Needs 1.5 times the size on disk; everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from rich.console import Console

from kt_sft.config import KtConfig
from kt_sft.ops.memory import populated_ahead, zeros_for_matrices
from kt_sft.ops.packed import PackedExperts
from kt_sft.weights import loader, reading, saving
from kt_sft.weights.checkpoint import ExpertTensors

D, F, E = 2048, 768, 16
MATRIX = 2 * D * F  # bytes
LAYER = 3 * E * MATRIX
GOAL = 0.7
_CHUNK = 8 << 20
_SETTLED = 20.0  # seconds: what a process has just given back, a virtual machine gets at once; later, from its host


def layers_of(count: int) -> dict[str, ExpertTensors]:
    """Where the experts of ``count`` layers are, in the hub's per-expert names."""

    def name(layer: int, projection: str) -> str:
        return f"model.layers.{layer}.mlp.experts.{{expert}}.{projection}_proj.weight"

    return {
        f"model.layers.{i}.mlp.experts": ExpertTensors(gate=name(i, "gate"), up=name(i, "up"), down=name(i, "down"))
        for i in range(count)
    }


def write_checkpoint(folder: Path, layers: int) -> int:
    """A checkpoint of ``layers`` layers, written matrix by matrix, all of them different. Its size in bytes."""
    names = [n for tensors in layers_of(layers).values() for e in range(E) for n in tensors.names_of(e)]
    table = {}
    for i, name in enumerate(names):
        shape = [D, F] if "down" in name else [F, D]
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [i * MATRIX, (i + 1) * MATRIX]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)  # as safetensors does
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(D * F, generator=generator).bfloat16().view(torch.uint8).numpy().data
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for i in range(len(names)):
            turn = 2 * (i * 7919 % (D * F))
            file.write(values[turn:])
            file.write(values[:turn])
        file.flush()
        os.fsync(file.fileno())
    return len(names) * MATRIX


def load(model: Path, cache: Path, layers: int, weight_format: str = "int8") -> dict[str, PackedExperts]:
    config = KtConfig.from_dict({"cache_dir": str(cache), "weight_format": weight_format})
    sizes = {"num_experts": E, "hidden_size": D, "intermediate_size": F}
    return loader.load_experts(model, layers_of(layers), config=config, progress=False, **sizes)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of a load, until the experts are there and until their file is."""

    load: float
    until_written: float


def _timed_load(model: Path, cache: Path, layers: int, seconds: Queue[Seconds]) -> None:
    start = time.monotonic()
    packed = load(model, cache, layers)
    loaded = time.monotonic() - start
    saving.finish()
    seconds.put(Seconds(load=loaded, until_written=time.monotonic() - start))
    del packed


class Starter:
    """Starts loads in processes of their own, which have imported everything before."""

    def __init__(self, model: Path, cache: Path, layers: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._job = (model, cache, layers)
        self.cache = cache

    def start(self) -> tuple[ForkServerProcess, Queue[Seconds]]:
        seconds: Queue[Seconds] = self._context.Queue()
        process = self._context.Process(target=_timed_load, args=(*self._job, seconds))
        process.start()
        return process, seconds

    def run(self) -> Seconds:
        """Of a load that is left alone."""
        process, seconds = self.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the load ended with exit code {process.exitcode}; its message is above")
        return seconds.get(timeout=60)

    @property
    def packed(self) -> Path | None:
        """The finished file, if there is one."""
        return next(iter(self.cache.glob(f"*{loader.SUFFIX}")), None)


def digest(file: Path) -> str:
    """Of all bytes of the file."""
    total = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as f:
        while data := f.read(_CHUNK):
            total.update(data)
    return total.hexdigest()


def kill_and_resume(starter: Starter, kills: int, whole: float, expected: str, rng: random.Random) -> int:
    """Kill ``kills`` loads at random moments of ``whole`` seconds, let the last one finish. How many ended.

    Raises RuntimeError if a load fails, or if a finished file differs from ``expected``.
    """
    done = finished = 0
    while done < kills:
        process, _ = starter.start()
        start = time.monotonic()
        process.join(timeout=rng.uniform(0, whole))
        if process.is_alive():
            process.kill()
            process.join()
            done += 1
        elif process.exitcode:
            raise RuntimeError(f"a load after {done} kills ended with exit code {process.exitcode}")
        else:
            whole = min(whole, time.monotonic() - start)  # the rest of a load, if it was killed before
        if starter.packed is not None:
            finished += 1
            _check(starter.packed, expected)
            starter.packed.unlink()
    starter.run()
    assert starter.packed is not None
    _check(starter.packed, expected)
    return finished + 1


def _check(file: Path, expected: str) -> None:
    if digest(file) != expected:
        raise RuntimeError(f"{file}: differs from the file of a load that was left alone")


def forget(file: Path) -> None:
    """Drop the file from the page cache."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


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
        return count * 3 * MATRIX / (time.monotonic() - start)

    with populated_ahead(stretch):
        first = rate()
    return first, rate()


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes of the checkpoint per second."""

    read: float
    quantiser: float
    load: float

    @property
    def fraction(self) -> float:
        return self.load / min(self.read, self.quantiser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the temporary folder")
    options = parser.parse_args()
    console = Console(width=120)
    layers = max(1, round(options.gigabytes * 1e9 / LAYER))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, cache = Path(folder) / "model", Path(folder) / "cache"
        model.mkdir()
        size = write_checkpoint(model, layers)
        console.print(f"checkpoint {size / 1e9:.2f} GB, {layers} layers of {E} experts {D} x {F}")
        file = model / "model.safetensors"
        read, direct = read_rate(file), direct_rate(file)
        time.sleep(_SETTLED)
        quantiser, again = quantiser_rates()
        starter = Starter(model, cache, layers)
        forget(file)
        time.sleep(_SETTLED)
        first = starter.run()
        rates = Rates(read=read, quantiser=quantiser, load=size / first.load)
        console.print(f"file read  {rates.read / 1e9:6.2f} GB/s, {loader.READERS} threads, from the disk")
        console.print(f"read direct {direct / 1e9:5.2f} GB/s")
        console.print(
            f"quantiser  {rates.quantiser / 1e9:6.2f} GB/s, int8; {again / 1e9:.2f} where the pages are there"
        )
        console.print(
            f"load       {rates.load / 1e9:6.2f} GB/s, {first.load:.1f} s: {rates.fraction:.0%} (goal {GOAL:.0%})"
        )
        assert starter.packed is not None
        written = starter.packed.stat().st_size / (first.until_written - first.load) / 1e9
        console.print(f"file write {written:6.2f} GB/s, behind the run, {first.until_written:.1f} s after the start")
        console.print(f"next start {starter.run().load:6.2f} s")
        expected = digest(starter.packed)
        starter.packed.unlink()
        finished = kill_and_resume(starter, options.kills, first.until_written, expected, random.Random(options.seed))
        console.print(f"killed {options.kills} times at random moments; {finished} finished files, all the same")
    if rates.fraction < GOAL:
        raise SystemExit(f"the load reached {rates.fraction:.0%} of the limit, expected {GOAL:.0%}")


if __name__ == "__main__":
    main()
