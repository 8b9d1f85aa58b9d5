"""Loading speed of a synthetic BF16 checkpoint, beside what limits it, and whether killed loads resume.

    python -m benchmarks.loading [--gigabytes 8] [--kills 10] [--folder DIR]

    load         expert bytes of the checkpoint / seconds of load_experts, first start: read and quantise to int8
    read direct  the file read once from the disk, in order, by as many threads, past the page cache, as the loader does
    quantiser    packing of matrices that are in memory already, on all threads
    goal         load >= 70 % of read direct, or of the quantiser where that is lower
    read         the file read as files usually are: through the page cache, which had none of it
    file write   of the packed file, behind the run, until the process ends

Load and quantiser fill memory, and a virtual machine gives back to its host what nobody uses: then every page costs
both systems time when it is touched first. So both are measured twice: into memory that the machine has at hand, as
where no other system lies below; and into memory that nobody had for 20 seconds. The median of some rounds counts.

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
import statistics
import struct
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import loading_limits as limits
from kt_sft.config import KtConfig
from kt_sft.ops.packed import PackedExperts
from kt_sft.weights import loader, saving
from kt_sft.weights.checkpoint import ExpertTensors

D, F, E = 2048, 768, 16
MATRIX = 2 * D * F  # bytes
LAYER = 3 * E * MATRIX
FILE = "model.safetensors"
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
    with open(folder / FILE, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for i in range(len(names)):
            turn = 2 * (i * 7919 % (D * F))
            file.write(values[turn:])
            file.write(values[:turn])
        file.flush()
        os.fsync(file.fileno())
    return len(names) * MATRIX


def load(model: Path, cache: Path | None, layers: int, weight_format: str = "int8") -> dict[str, PackedExperts]:
    """Its packed experts; the file goes to ``cache``, if given."""
    config = KtConfig.from_dict({"cache_dir": str(cache or "none"), "weight_format": weight_format})
    sizes = {"num_experts": E, "hidden_size": D, "intermediate_size": F}
    return loader.load_experts(model, layers_of(layers), config=config, progress=False, **sizes)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of a load, until the experts are there and until their file is."""

    load: float
    until_written: float


def _timed_load(model: Path, cache: Path | None, layers: int, memory: int, seconds: Queue[Seconds]) -> None:
    limits.forget(model / FILE)
    limits.get_at_hand(memory)
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
        self._model, self._layers, self.cache = model, layers, cache

    def start(self, *, with_memory: bool = False, is_written: bool = True) -> tuple[ForkServerProcess, Queue[Seconds]]:
        """``with_memory``: that the machine has at hand; ``is_written``: the packed file, too."""
        seconds: Queue[Seconds] = self._context.Queue()
        memory = self._layers * LAYER if with_memory else 0  # twice what is packed
        cache = self.cache if is_written else None
        job = (self._model, cache, self._layers, memory, seconds)
        process = self._context.Process(target=_timed_load, args=job)
        process.start()
        return process, seconds

    def run(self, **settings: bool) -> Seconds:
        """Of a load that is left alone; settings as of ``start``."""
        process, seconds = self.start(**settings)
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
        process.join(timeout=rng.uniform(0, whole))
        if process.is_alive():
            process.kill()
            process.join()
            done += 1
        elif process.exitcode:
            raise RuntimeError(f"a load after {done} kills ended with exit code {process.exitcode}")
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


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes of the checkpoint per second."""

    direct: float
    quantiser: float
    load: float

    @property
    def fraction(self) -> float:
        return self.load / min(self.direct, self.quantiser)

    def __str__(self) -> str:
        return (
            f"read direct {self.direct / 1e9:.2f} GB/s, quantiser {self.quantiser / 1e9:.2f}, "
            f"load {self.load / 1e9:.2f}: {self.fraction:.0%} of the lower (goal {GOAL:.0%})"
        )


def into_memory_at_hand(file: Path, starter: Starter) -> Rates:
    direct, load = limits.direct_rate(file), starter.run(with_memory=True, is_written=False).load
    return Rates(direct=direct, quantiser=limits.quantiser_rates()[1], load=file.stat().st_size / load)


def into_new_memory(file: Path, starter: Starter) -> Rates:
    direct = limits.direct_rate(file)
    time.sleep(_SETTLED)
    quantiser = limits.quantiser_rates()[0]
    time.sleep(_SETTLED)
    load = starter.run(is_written=False).load
    return Rates(direct=direct, quantiser=quantiser, load=file.stat().st_size / load)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="of loads into either memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the temporary folder")
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    layers = max(1, round(options.gigabytes * 1e9 / LAYER))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, cache = Path(folder) / "model", Path(folder) / "cache"
        model.mkdir()
        size = write_checkpoint(model, layers)
        console.print(f"checkpoint {size / 1e9:.2f} GB, {layers} layers of {E} experts {D} x {F}")
        file = model / FILE
        starter = Starter(model, cache, layers)
        reached = {}
        for name, measure in {"memory at hand": into_memory_at_hand, "new memory": into_new_memory}.items():
            rounds = []
            for _ in range(options.rounds):
                rounds.append(measure(file, starter))
                console.print(f"{name}: {rounds[-1]}")
            reached[name] = statistics.median(rates.fraction for rates in rounds)
            console.print(f"{name}: {reached[name]:.0%} in the median")
        console.print(f"read {limits.read_rate(file) / 1e9:.2f} GB/s, through the page cache")
        first = starter.run()
        assert starter.packed is not None
        written = starter.packed.stat().st_size / (first.until_written - first.load) / 1e9
        console.print(f"file write {written:.2f} GB/s, behind the run, {first.until_written:.1f} s after the start")
        console.print(f"next start {starter.run().load:.2f} s")
        expected = digest(starter.packed)
        starter.packed.unlink()
        finished = kill_and_resume(starter, options.kills, first.until_written, expected, random.Random(options.seed))
        console.print(f"killed {options.kills} times at random moments; {finished} finished files, all the same")
    missed = [f"{name} {fraction:.0%}" for name, fraction in reached.items() if fraction < GOAL]
    if missed:
        raise SystemExit(f"the load reached, of the limit: {', '.join(missed)}; expected {GOAL:.0%}")


if __name__ == "__main__":
    main()
