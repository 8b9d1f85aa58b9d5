"""Start the ranks of a test as processes of their own, without a launcher that would end them for us."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Ended:
    code: int
    text: str
    seconds: float  # after the first rank had ended


def environment(rank: int, ranks: int, port: int, hosts: int = 1) -> dict[str, str]:
    """That of torchrun, for ``ranks`` spread evenly over ``hosts``."""
    per_host = ranks // hosts
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KT_", "ACCELERATE_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % per_host),
        "LOCAL_WORLD_SIZE": str(per_host),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(case: str, folder: Path, *, ranks: int = 2, hosts: int = 1, timeout: float = 120) -> list[Any]:
    """Run ``case`` of worker.py on every rank; what each wrote down. A rank that fails fails the test."""
    ended = start_ranks(case, folder, ranks=ranks, hosts=hosts, timeout=timeout)
    assert [e.code for e in ended] == [0] * ranks, "\n".join(e.text[-3000:] for e in ended)
    return [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(ranks)]


def start_ranks(case: str, folder: Path, *, ranks: int = 2, hosts: int = 1, timeout: float = 120) -> list[Ended]:
    """Run ``case`` on every rank, whatever comes of it. None is left when this returns."""
    port = free_port()
    logs = [open(folder / f"{case}.{rank}.log", "w+") for rank in range(ranks)]  # noqa: SIM115
    command = [sys.executable, "-m", "tests.distributed.worker", case, str(folder)]
    processes = [
        subprocess.Popen(
            command, env=environment(rank, ranks, port, hosts), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        for rank, log in enumerate(logs)
    ]
    ends: dict[int, float] = {}
    until = time.monotonic() + timeout
    try:
        while len(ends) < ranks and time.monotonic() < until:
            for rank, process in enumerate(processes):
                if rank not in ends and process.poll() is not None:
                    ends[rank] = time.monotonic()
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = []
    for log in logs:
        log.seek(0)
        texts.append(log.read())
        log.close()
    assert len(ends) == ranks, f"{case}: still running after {timeout} s\n" + "\n".join(t[-3000:] for t in texts)
    first = min(ends.values())
    return [
        Ended(p.returncode, text, ends[rank] - first)
        for rank, (p, text) in enumerate(zip(processes, texts, strict=True))
    ]
