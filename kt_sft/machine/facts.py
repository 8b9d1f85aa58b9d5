"""Memory, CPUs, limits, huge pages, NUMA nodes, disks and GPUs, as Linux and torch report them. Sizes in bytes.

Functions that read /proc and /sys take the root of the file system, so that tests can hand them another machine.
Control groups: the tightest limit from the process's own group up to the root counts, version 2
(https://docs.kernel.org/admin-guide/cgroup-v2.html) and version 1.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 writes a huge number for "no limit"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """``total`` and ``available`` respect the control group's ``limit`` (None: no limit below the machine's memory)."""

    total: int
    available: int
    limit: int | None
    swap_total: int
    swap_used: int


@dataclass(frozen=True, kw_only=True)
class Cpus:
    """Cores of the machine, logical CPUs that this process may use, and its control group's quota in CPUs."""

    physical: int
    logical: int
    allowed: int
    quota: float | None


@dataclass(frozen=True, kw_only=True)
class NumaNode:
    number: int
    total: int
    free: int


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    total: int
    free: int


def memory(root: Path = ROOT) -> Memory:
    machine, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit, used = _memory_limit(root)
    total, available = machine.total, machine.available
    if limit is None or limit >= total:
        limit = None
    else:
        total, available = limit, min(available, max(limit - used, 0))
    return Memory(total=total, available=available, limit=limit, swap_total=swap.total, swap_used=swap.used)


def cpus(root: Path = ROOT) -> Cpus:
    logical = os.cpu_count() or 1
    return Cpus(
        physical=psutil.cpu_count(logical=False) or logical,
        logical=logical,
        allowed=len(os.sched_getaffinity(0)),
        quota=_cpu_quota(root),
    )


def cpu_model(root: Path = ROOT) -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else "unknown CPU"


def cpu_flags(root: Path = ROOT) -> set[str]:
    match = re.search(r"^flags\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return set(match[1].split()) if match else set()


def numa_nodes(root: Path = ROOT) -> list[NumaNode]:
    """Nodes that have memory; empty where the kernel lists none."""
    nodes = []
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        sizes = dict(re.findall(r"(MemTotal|MemFree):\s+(\d+) kB", _text(folder / "meminfo")))
        if int(sizes.get("MemTotal", 0)):
            number = int(folder.name.removeprefix("node"))
            total, free = int(sizes["MemTotal"]) << 10, int(sizes.get("MemFree", 0)) << 10
            nodes.append(NumaNode(number=number, total=total, free=free))
    return nodes


def automatic_numa_balancing(root: Path = ROOT) -> bool:
    return _text(root / "proc/sys/kernel/numa_balancing").strip() not in ("", "0")


def transparent_huge_pages(root: Path = ROOT) -> str:
    """``always``, ``madvise``, ``never``, or ``""`` where the kernel has none."""
    match = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return match[1] if match else ""


def disk_free(folder: Path) -> int:
    """Free bytes where ``folder`` is or would be created."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def writable(folder: Path) -> bool:
    """Whether this user could create files in ``folder``, or create it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def gpus() -> list[Gpu]:
    """The CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(name=torch.cuda.get_device_name(index), total=total, free=free))
    return found


def nvidia_driver(root: Path = ROOT) -> bool:
    return (root / "proc/driver/nvidia/version").exists()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and its parents: version 2, then version 1 of ``controller``."""
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        own = base / path.lstrip("/")
        folders += [own, *(p for p in own.parents if p == base or base in p.parents)]
    return folders


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _memory_limit(root: Path) -> tuple[int | None, int]:
    """The tightest limit and what its group uses (the page cache that can be dropped left out)."""
    limits = []
    for folder in _groups(root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _number(_text(folder / limit_file))
            if limit is not None:
                cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                used = (_number(_text(folder / usage_file)) or 0) - (int(cached[1]) if cached else 0)
                limits.append((limit, max(used, 0)))
    return min(limits, default=(None, 0))


def _cpu_quota(root: Path) -> float | None:
    quotas = []
    for folder in _groups(root, "cpu"):
        words = _text(folder / "cpu.max").split()
        if len(words) != 2:
            words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(word.isdigit() and int(word) for word in words):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)
