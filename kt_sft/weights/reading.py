"""Bytes of a file into memory: from the page cache what is there, the rest straight from the disk.

A checkpoint is read once. Through the page cache the processor would find room for every page and copy it, which takes
longer than packing it, and what else the machine keeps there would be driven out. With O_DIRECT the disk writes to
where the packer reads. Small reads, and file systems that have no O_DIRECT, go through the page cache.
https://man7.org/linux/man-pages/man2/open.2.html, https://docs.kernel.org/admin-guide/mm/index.html (cachestat)
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..ops import memory

_BLOCK = 4096  # bytes: what O_DIRECT asks of offsets, lengths and addresses, at most, on the usual file systems
_CACHESTAT = 451  # the number of the system call, which the C library does not have yet
_LARGE = 1 << 20  # bytes: shorter reads gain from the readahead of the page cache
_libc = ctypes.CDLL(None)


def read(file: Path, start: int, nbytes: int) -> Tensor:
    """``nbytes`` from ``start`` on as uint8, in memory that earlier reads gave back; any dtype may be viewed in it.

    Raises OSError where the disk fails, EOFError where the file ends before.
    """
    ahead = start % _BLOCK if nbytes >= _LARGE else 0  # bytes of the first block that nobody asked for
    end = ahead + nbytes
    buffer = memory.recycled((-(-end // _BLOCK) * _BLOCK,), torch.uint8)
    view = buffer.numpy().data
    with _opened(file) as fd:
        done = ahead
        if nbytes >= _LARGE and not _is_cached(fd, start, nbytes):
            done = min(end, max(done, _direct(file, view, start - ahead)))
        while done < end:
            got = os.preadv(fd, [view[done:end]], start - ahead + done)
            if got == 0:
                raise EOFError(f"{file}: expected {nbytes} bytes at {start}, got {done - ahead}")
            done += got
    part = buffer[ahead:end]
    return part if ahead % 8 == 0 else part.clone()


def _is_cached(fd: int, start: int, nbytes: int) -> bool:
    """Whether most of it is in the page cache already; False if the system cannot tell (before Linux 6.5)."""
    wanted = (ctypes.c_uint64 * 2)(start, nbytes)
    pages = (ctypes.c_uint64 * 5)()  # in the cache, and four other counts
    failed = _libc.syscall(_CACHESTAT, fd, wanted, pages, 0)
    return not failed and pages[0] * mmap.PAGESIZE * 2 > nbytes


def _direct(file: Path, view: memoryview, start: int) -> int:
    """How many bytes came past the page cache; what is missing, or an error, is for the ordinary read to find."""
    done = 0
    with contextlib.suppress(OSError), _opened(file, os.O_DIRECT) as fd:
        while done < len(view) and done % _BLOCK == 0:
            got = os.preadv(fd, [view[done:]], start + done)
            if got == 0:
                break
            done += got
    return done


@contextlib.contextmanager
def _opened(file: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)
