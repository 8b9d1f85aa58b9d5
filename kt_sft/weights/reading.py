"""Bytes of a file into memory: from the page cache what is there, the rest straight from the disk.

A checkpoint is read once. Through the page cache the processor would find room for every page and copy it, which takes
longer than packing it, and what else the machine keeps there would be driven out. With O_DIRECT the disk writes to
where the packer reads. Small reads, and file systems that have no O_DIRECT, go through the page cache.
https://man7.org/linux/man-pages/man2/open.2.html, https://man7.org/linux/man-pages/man2/mincore.2.html
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
_LARGE = 1 << 20  # bytes: shorter reads gain from the readahead of the page cache


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
    """Whether most pages are in the page cache already. For a file of another owner the system always says so."""
    skipped = start % mmap.ALLOCATIONGRANULARITY
    pages = (ctypes.c_ubyte * (-(-(skipped + nbytes) // mmap.PAGESIZE)))()
    try:
        mapping = mmap.mmap(fd, skipped + nbytes, access=mmap.ACCESS_COPY, offset=start - skipped)
    except (OSError, ValueError):  # the file system maps no files, or the file is shorter
        return True
    with mapping:
        first = ctypes.c_char.from_buffer(mapping)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(skipped + nbytes), pages)
        del first  # the mapping cannot be closed before
    return bool(failed) or sum(page & 1 for page in pages) > len(pages) // 2


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
