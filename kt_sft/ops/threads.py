"""Let torch's OpenMP threads sleep while the kernels compute.

After a parallel region, GNU OpenMP's threads spin for 300,000 rounds (10 ms measured) before they sleep, on the cores
that the expert kernels want next. The limit is 1,000 rounds once the process has more OpenMP threads than cores
(GOMP_SPINCOUNT in https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html), so a few sleeping OpenMP teams are
kept, whose only purpose is to be counted. OMP_WAIT_POLICY or GOMP_SPINCOUNT, where set, are left to decide.
"""

from __future__ import annotations

import os
import threading

import torch

_lock = threading.Lock()
_done = False


def keep_openmp_from_spinning() -> None:
    """Once per process: start the idle teams. Cheap to call again."""
    global _done
    if _done:
        return
    with _lock:
        threads = torch.get_num_threads()
        if not _done and threads > 1 and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
            for _ in range(len(os.sched_getaffinity(0)) // threads):
                started = threading.Event()
                threading.Thread(target=_hold_team, args=(started,), daemon=True, name="kt_sft-openmp-team").start()
                started.wait()
        _done = True


def _hold_team(started: threading.Event) -> None:
    torch.zeros(1 << 18).add_(1)  # large enough for a parallel region: this thread now owns a team
    started.set()
    threading.Event().wait()


def _forget_after_fork() -> None:
    global _done, _lock
    _done, _lock = False, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
