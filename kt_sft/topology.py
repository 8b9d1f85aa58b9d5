"""The NUMA nodes that the expert kernels are split over, from sysfs or given explicitly. Standard library only.

A topology is one list of CPUs for each node. Lists are empty where there is nothing to bind threads to: a machine with
one node, and nodes that are made up to try the split anywhere.
https://www.kernel.org/doc/html/latest/admin-guide/cputopology.html describes lists of CPUs such as "0-3,8".
"""

from __future__ import annotations

import os
from collections.abc import Set
from itertools import pairwise
from pathlib import Path

Topology = list[list[int]]

MOST_NODES = 16
_VARIABLE = "KT_SFT_NUMA"


def detect(root: Path = Path("/"), allowed: Set[int] | None = None) -> Topology:
    """The nodes with CPUs that this process may use (``allowed``; None: its affinity)."""
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    nodes = []
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    for folder in sorted(folders, key=lambda folder: int(folder.name.removeprefix("node"))):
        try:
            cpus = parse_cpus((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if usable := sorted(allowed & set(cpus)):
            nodes.append(usable)
    return at_most(nodes, MOST_NODES) if len(nodes) > 1 else [[]]


def parse(text: str) -> Topology:
    """``KT_SFT_NUMA``: CPUs of each node ("0-3;4-7"), or how many nodes to make up ("2"). Raises ValueError."""
    try:
        if text.strip().isdigit():
            count = int(text)
            nodes: Topology = [[] for _ in range(count)]
        else:
            nodes = [parse_cpus(part) for part in text.split(";")]
            count = len(nodes) if all(nodes) else 0
        if not 1 <= count <= MOST_NODES:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{_VARIABLE}: expected the CPUs of 1 to {MOST_NODES} nodes, such as '0-3,8;4-7,9', or a number of nodes "
            f"to make up, got {text!r}; unset it to take the machine's"
        ) from None
    return nodes


def parse_cpus(text: str) -> list[int]:
    """A list of CPUs as the kernel writes it; empty for an empty text. Raises ValueError."""
    cpus: list[int] = []
    for part in text.strip().split(",") if text.strip() else ():
        first, dash, last = part.partition("-")
        begin, end = int(first), int(last) if dash else int(first)
        if not 0 <= begin <= end:
            raise ValueError(f"list of CPUs: expected ranges such as 0-3, got {part!r}")
        cpus += range(begin, end + 1)
    return cpus


def at_most(nodes: Topology, count: int) -> Topology:
    """Neighbouring nodes put together until ``count`` are left."""
    count = min(count, len(nodes))
    cuts = [i * len(nodes) // count for i in range(count + 1)]
    return [[cpu for node in nodes[a:b] for cpu in node] for a, b in pairwise(cuts)]


def describe(nodes: Topology) -> str:
    """The number of nodes and, where threads are bound, their CPUs: ``2 (CPUs 0-3; 4-7)``."""
    if len(nodes) == 1:
        return "1"
    return f"{len(nodes)} (" + ("CPUs " + "; ".join(map(_ranges, nodes)) if nodes[0] else "made up") + ")"


def _ranges(cpus: list[int]) -> str:
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
