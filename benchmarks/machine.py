"""Facts about the machine and this process, read from Linux. Standard library only: peers run it elsewhere."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model name of the processor, with family and model: hypervisors give all of a maker's generations one name."""
    first = cpuinfo.read_text().partition("\n\n")[0].splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    name = facts.get("model name", "unknown")
    numbers = [f"{key.split()[-1]} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return f"{name} ({' '.join(numbers)})" if numbers else name


def slug(text: str) -> str:
    """Lower case, with dashes: for file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cache_bytes(level: int, root: Path = _CACHES) -> int | None:
    """Size of the data or unified cache of a level, or None where the system does not say."""
    for index in sorted(root.glob("index*")):
        kind, found = ((index / name).read_text().strip() for name in ("type", "level"))
        if kind != "Instruction" and int(found) == level:
            size = (index / "size").read_text().strip()
            return int(size.rstrip("KMG")) * _UNITS.get(size[-1], 1)
    return None


def commit() -> str:
    """Short hash of the checkout, with a + if files differ from it, or unknown."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "kt_sft", "csrc", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def anonymous_mib() -> float:
    """Anonymous and shared memory of this process, after returning what the allocators keep."""
    gc.collect()
    if (ours := sys.modules.get("kt_sft.ops.memory")) is not None:
        ours.release_freed()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1024


class OtherLoad:
    """Mean number of cores that other processes (and the hypervisor) took inside the ``with`` block."""

    cores = 0.0

    def __enter__(self) -> OtherLoad:
        self._start = self._read()
        return self

    def __exit__(self, *exc: object) -> None:
        busy, own, now = (after - before for after, before in zip(self._read(), self._start, strict=True))
        self.cores = max(0.0, (busy - own) / now) if now > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter()
