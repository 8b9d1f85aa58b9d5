"""Checks of the machine: instruction sets, cores, memory, NUMA, huge pages, disk, GPUs. ``root`` is for tests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kt_sft import topology
from kt_sft.config import KtConfig
from kt_sft.machine import facts

from .findings import Finding, ok, problem, warning
from .sizes import gb

_AMX_FLAGS = ("amx_tile", "amx_bf16", "amx_int8")
_LOW_BANDWIDTH = 15e9  # bytes/s; a single DDR5 channel gives more


def machine_findings(root: Path = facts.ROOT) -> list[Finding]:
    return [
        *kernels(),
        amx(facts.cpu_flags(root), _runnable()),
        cores(facts.cpus(root), _threads()),
        openmp(os.environ),
        ram(facts.memory(root)),
        swap(facts.memory(root)),
        numa(facts.numa_nodes(root), facts.automatic_numa_balancing(root), _split()),
        huge_pages(facts.transparent_huge_pages(root)),
        bandwidth(),
        cache_folder(KtConfig().cache_folder),
        gpus(facts.gpus(), facts.nvidia_driver(root)),
    ]


def _runnable() -> list[str]:
    try:
        from kt_sft import native
    except (ImportError, ValueError):  # reported by ``kernels``
        return []
    return native.isas()


def _threads() -> int | None:
    try:
        from kt_sft import native
    except (ImportError, ValueError):
        return None
    return native.num_threads()


def _split() -> str:
    try:
        from kt_sft import native
    except (ImportError, ValueError):
        return "1"
    return topology.describe(native.nodes())


def kernels() -> list[Finding]:
    """Whether the extension loads, and the instruction set that it chose."""
    try:
        from kt_sft import native
    except ImportError as error:
        return [problem("kernels", str(error), "reinstall the package: pip install .")]
    except ValueError as error:
        remedy = "unset KT_SFT_ISA, KT_KERNEL_CPU_VARIANT and KT_SFT_NUMA, or correct them"
        return [problem("kernels", str(error), remedy)]
    isa, hardware = native.isa(), [name for name in native.isas() if name != "amx_model"]
    text = f"{isa} chosen; this CPU ({facts.cpu_model()}) runs {', '.join(hardware)}"
    forced = next((n for n in ("KT_SFT_ISA", "KT_KERNEL_CPU_VARIANT") if os.environ.get(n)), None)
    if isa != hardware[0]:
        return [warning("kernels", f"{text}; {forced} forces it", f"unset {forced}: {hardware[0]} is faster")]
    if isa == "avx2":
        return [warning("kernels", text, "a CPU with AVX512-BF16 or AMX is several times faster")]
    return [ok("kernels", text)]


def amx(flags: set[str], runnable: list[str]) -> Finding:
    """AMX needs the CPU, the hypervisor, and the kernel's permission (arch_prctl, Linux 5.16)."""
    present = [flag for flag in _AMX_FLAGS if flag in flags]
    if "amx" in runnable:
        return ok("AMX", "present and permitted")
    if len(present) == len(_AMX_FLAGS):
        return warning(
            "AMX",
            "the CPU has it, but this process may not use it",
            "Linux 5.16 or newer, and a container that allows arch_prctl(ARCH_REQ_XCOMP_PERM), are needed",
        )
    if present:
        return warning(
            "AMX", f"only {', '.join(present)}", "let the hypervisor pass amx_tile, amx_bf16 and amx_int8 through"
        )
    return ok("AMX", "this CPU has none; the AVX kernels run")


def cores(cpus: facts.Cpus, threads: int | None) -> Finding:
    text = f"{cpus.physical} cores, {cpus.logical} logical CPUs, {cpus.allowed} allowed to this process"
    text += f", quota {cpus.quota:g} CPUs" if cpus.quota else ""
    text += f"; {threads} kernel threads" if threads else ""
    if cpus.quota and threads and threads > cpus.quota + 0.5:
        remedy = f"set kt_num_threads: {max(int(cpus.quota), 1)}, or raise the container's quota (--cpus)"
        return warning("cores", text, remedy)
    if cpus.allowed < cpus.logical:
        remedy = "if that was not intended, start without taskset or numactl, or widen the container's cpuset"
        return warning("cores", text, remedy)
    return ok("cores", text)


def openmp(environ: Mapping[str, str]) -> Finding:
    names = (
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
        "KMP_BLOCKTIME",
        "OMP_PROC_BIND",
        "GOMP_CPU_AFFINITY",
    )
    found = {name: environ[name] for name in names if environ.get(name)}
    text = (
        ", ".join(f"{name}={value}" for name, value in found.items()) or "no OMP_* set; kt_sft keeps idle threads quiet"
    )
    if found.get("OMP_WAIT_POLICY", "").lower() == "active":
        return warning("OpenMP", text, "unset OMP_WAIT_POLICY: torch's waiting threads take the kernels' cores")
    if found.get("GOMP_SPINCOUNT", "").lower() in ("infinity", "infinite"):
        return warning("OpenMP", text, "unset GOMP_SPINCOUNT: torch's waiting threads take the kernels' cores")
    if {"OMP_PROC_BIND", "GOMP_CPU_AFFINITY"} & found.keys() and found.get("OMP_PROC_BIND", "").lower() != "false":
        return warning(
            "OpenMP", text, "unset OMP_PROC_BIND and GOMP_CPU_AFFINITY: bound threads crowd the kernels' cores"
        )
    return ok("OpenMP", text)


def ram(memory: facts.Memory) -> Finding:
    text = f"{gb(memory.available)} of {gb(memory.total)} available"
    if memory.limit is not None:
        text += " (the control group's limit)"
        if memory.available < 4e9:
            return warning("RAM", text, "raise the container's memory limit; kt-sft plan MODEL says what a model needs")
    if memory.available < 4e9:
        return warning("RAM", text, "end other programs; kt-sft plan MODEL says what a model needs")
    return ok("RAM", text)


def swap(memory: facts.Memory) -> Finding:
    if memory.swap_total == 0:
        return ok("swap", "none")
    text = f"{gb(memory.swap_used)} of {gb(memory.swap_total)} used"
    if memory.swap_used > 1e9:
        remedy = "experts that are swapped out stall every step: free memory, then sudo swapoff -a && sudo swapon -a"
        return warning("swap", text, remedy)
    return ok("swap", text)


def numa(nodes: list[facts.NumaNode], balancing: bool, split: str = "1") -> Finding:
    """``split``: over how many nodes the experts are, as topology.describe says it."""
    used = "" if split == "1" else f"; experts are split over {split}"
    if len(nodes) < 2:
        return ok("NUMA", f"one node{used}")
    text = ", ".join(f"node {n.number}: {gb(n.total)}, {gb(n.free)} free" for n in nodes) + used
    totals = [n.total for n in nodes]
    if max(totals) > 1.1 * min(totals):
        return warning(
            "NUMA", text, "equip all sockets with the same memory modules: the smallest node limits bandwidth"
        )
    if max(n.free for n in nodes) > 2 * min(n.free for n in nodes) + (4 << 30):
        remedy = (
            "free page cache on the full node (sync; echo 1 | sudo tee /proc/sys/vm/drop_caches) or use numactl -i all"
        )
        return warning("NUMA", text, remedy)
    if balancing:
        remedy = "echo 0 | sudo tee /proc/sys/kernel/numa_balancing: page migration only disturbs packed experts"
        return warning("NUMA", f"{text}; automatic balancing is on", remedy)
    return ok("NUMA", text)


def huge_pages(setting: str) -> Finding:
    if setting in ("always", "madvise"):
        return ok("huge pages", f"transparent huge pages: {setting}")
    remedy = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled (memory reads gain 4 to 18 %)"
    return warning("huge pages", f"transparent huge pages: {setting or 'not in this kernel'}", remedy)


def bandwidth() -> Finding:
    try:
        from kt_sft.machine import probes
    except (ImportError, ValueError):
        return warning("bandwidth", "not measured: the kernels do not load", "see kernels")
    rate = probes.memory_bandwidth()
    text = f"{gb(rate.value)}/s ({rate.source})"
    if rate.value < _LOW_BANDWIDTH:
        remedy = "if the machine was idle: fill all memory channels; in a virtual machine, ask for whole sockets"
        return warning("bandwidth", text, remedy)
    return ok("bandwidth", text)


def cache_folder(folder: Path | None) -> Finding:
    if folder is None:
        return ok("cache", "none (KT_SFT_CACHE=none): experts are packed at every start")
    free = facts.disk_free(folder)
    text = f"{folder}: {gb(free)} free"
    if not facts.writable(folder):
        return problem(
            "cache", f"{folder} cannot be written", "set KT_SFT_CACHE (or kt_cache_dir) to a folder that can"
        )
    if free < 20e9:
        return warning("cache", text, "free some space, or set KT_SFT_CACHE to a larger disk: packed experts go there")
    return ok("cache", text)


def gpus(found: list[facts.Gpu], driver: bool) -> Finding:
    if found:
        return ok("GPUs", ", ".join(f"{gpu.name} ({gb(gpu.free)} of {gb(gpu.total)} free)" for gpu in found))
    if driver:
        remedy = "install torch for CUDA (pip install torch), and check CUDA_VISIBLE_DEVICES and nvidia-smi"
        return warning("GPUs", "an NVIDIA driver is there, but torch sees no GPU", remedy)
    return ok("GPUs", "none: everything runs on the CPU (use_cpu: true in the YAML)")
