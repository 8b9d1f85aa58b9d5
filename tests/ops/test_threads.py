"""Torch's OpenMP threads must not spin on the cores that the kernels need, nor begin before they are wanted."""

import os
import subprocess
import sys

import pytest

SPIN = """
import time, torch
from kt_sft.ops.threads import keep_openmp_from_spinning
def spinning():
    samples = []
    for _ in range(9):
        torch.zeros(1 << 20).add_(1)
        start = time.process_time()
        time.sleep(0.02)
        samples.append(time.process_time() - start)
    return sorted(samples)[4]
before = spinning()
keep_openmp_from_spinning()
keep_openmp_from_spinning()
print(before, spinning())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: OpenMP has no other threads")
def test_openmp_threads_go_to_sleep():
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", SPIN], capture_output=True, text=True, env=env, timeout=120, check=True
    )
    before, after = map(float, done.stdout.split())
    if before < 0.002:
        pytest.skip(f"this OpenMP does not spin ({before * 1e3:.2f} ms)")
    assert after < before / 4, f"{before * 1e3:.2f} ms before, {after * 1e3:.2f} ms after"


IMPORTS = """
import importlib, os, pkgutil, torch
before = os.listdir("/proc/self/task")
import kt_sft
for package in ("ops", "weights", "distributed"):  # the others import PEFT, which has a thread
    for module in pkgutil.iter_modules(importlib.import_module(f"kt_sft.{package}").__path__, f"kt_sft.{package}."):
        importlib.import_module(module.name)
print(*set(os.listdir("/proc/self/task")) - set(before))
"""


def test_importing_starts_no_thread():
    """A process that forks after OpenMP has threads hangs at the child's next parallel loop."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
