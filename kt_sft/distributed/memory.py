"""Memory that the processes of a host share without a name in any file system.

It is an anonymous file (memfd_create(2)) of one process, which the others open as /proc/PID/fd/N. The kernel frees it
when the last process that maps it ends, however it ends: nothing can be left behind, and the size of /dev/shm does not
limit it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import torch
from torch import Tensor

from .peers import Peers


class SharedFile:
    """An anonymous file of the first of ``peers`` that all of them have open; all are processes of one host."""

    def __init__(self, peers: Peers, name: str) -> None:
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC) if peers.index == 0 else -1
        pid, fd = peers.numbers([os.getpid(), self._fd])[0]
        error: OSError | None = None
        if peers.index > 0:
            try:
                self._fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            except OSError as failure:
                error = OSError(
                    failure.errno,
                    f"the memory shared by the ranks of this host cannot be opened: {failure.strerror}; run them in "
                    "one container as one user, or set expert_parallel: none",
                )
        peers.raise_any(error, "opening the shared memory")

    def map(self, nbytes: int, *, private: bool = False) -> Tensor:
        """``nbytes`` uint8, the file grown to them. ``private``: writes to it stay in this process."""
        if os.fstat(self._fd).st_size < nbytes:
            os.ftruncate(self._fd, nbytes)
        access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
        return torch.frombuffer(mmap.mmap(self._fd, nbytes, access=access), dtype=torch.uint8)

    def close(self) -> None:
        """Give the file up; mappings stay."""
        os.close(self._fd)


def filled_once(peers: Peers, nbytes: int, fill: Callable[[Tensor], None]) -> Tensor:
    """``nbytes`` of memory in one copy for all ``peers``, filled by the first of them. Its errors raise on all."""
    file = SharedFile(peers, "kt_sft-experts")
    error: Exception | None = None
    if peers.index == 0:
        try:
            fill(file.map(nbytes))
        except Exception as failure:
            error = failure
    peers.raise_any(error, "packing the experts")
    memory = file.map(nbytes, private=True)
    peers.numbers([0])  # the file belongs to the first process: it closes it when all have it mapped
    file.close()
    return memory


class Arena:
    """Shared scratch memory, laid out anew for every exchange; all ranks lay out the same."""

    _ALIGN = 64
    _STEP = 1 << 20

    def __init__(self, peers: Peers) -> None:
        self._file = SharedFile(peers, "kt_sft-exchange")
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def reset(self, nbytes: int) -> None:
        """Begin a layout of at most ``nbytes``, of which earlier tensors are invalid."""
        if self._memory.numel() < nbytes:
            self._memory = self._file.map(-(-nbytes * 5 // (4 * self._STEP)) * self._STEP)
        self._used = 0

    @classmethod
    def bytes_of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """What :meth:`take` uses up."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return -(-nbytes // cls._ALIGN) * cls._ALIGN

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        memory = self._memory[self._used : self._used + count]
        self._used += self.bytes_of(shape, dtype)
        return memory.view(dtype).view(shape)
