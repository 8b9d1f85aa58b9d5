"""Large host buffers: on transparent huge pages where the system has them, and used again where they come every step.

A fresh page costs a fault and is cleared by the kernel first, which for the factor gradients of a layer takes longer
than computing them, and for what its forward saves a tenth of its time; and what exceeds 32 MiB the C library returns
to the system at every free. ``recycled`` therefore takes the memory of an earlier such tensor of the same size, or up
to a quarter more, once that tensor and all its views and storages are gone.

What is kept for later is bounded twice. Kept and used buffers together are never more than were in use at once, so a
process never holds more than it once needed, or that quarter beyond. And a kept buffer is marked MADV_FREE: the system
takes its pages back as soon as it needs memory, and until then using it again costs nothing.
https://man7.org/linux/man-pages/man2/madvise.2.html
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from threading import Event, Lock, Thread

import torch
from torch import Tensor

from kt_sft import native

_LARGE = 4 << 20  # bytes: a buffer with whole huge pages in it
_LARGE_PART = 8 << 20  # bytes of a matrix on a node: at most an eighth then shares a huge page with the neighbour
_RECYCLED = 1 << 20  # bytes: below, the C library's own free lists do
_HUGE_PAGE = 2 << 20
_POPULATED, _POPULATORS = 4 << 20, 8  # bytes that a thread asks for at once; threads
_MADV_FREE, _MADV_POPULATE_WRITE = 8, 23  # Linux; the mmap module has names that Python's headers had


def empty_matrices(nbytes: int, count: int) -> Tensor:
    """uint8 for ``count`` packed matrices; on small pages where a NUMA node's part of one is small."""
    tensor = torch.empty(nbytes, dtype=torch.uint8)
    if nbytes >= _LARGE:
        native.wish_huge_pages(tensor, _huge_pages_fit(nbytes // count))
    return tensor


def zeros_for_matrices(nbytes: int, count: int) -> Tensor:
    """The same as zeros that begin with a page; they are cleared by whoever touches them first."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(mapping, mmap.MADV_HUGEPAGE if _huge_pages_fit(nbytes // count) else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


@contextlib.contextmanager
def populated_ahead(memory: Tensor) -> Iterator[None]:
    """Meanwhile threads ask the system for the pages of ``memory``, from its beginning on, contents unchanged.

    Who fills it in order would wait for every page by himself. Only where there is one NUMA node: on several, pages
    come from the node of the thread that writes them first.
    """
    if len(native.nodes()) > 1 or memory.nbytes < 2 * _POPULATED:
        yield
        return
    starts = iter(range(-(-memory.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE, _end(memory) - _POPULATED + 1, _POPULATED))
    lock, stop = Lock(), Event()

    def populate() -> None:
        madvise = ctypes.CDLL(None).madvise
        while not stop.is_set():
            with lock:
                start = next(starts, None)
            if start is None or madvise(ctypes.c_void_p(start), ctypes.c_size_t(_POPULATED), _MADV_POPULATE_WRITE):
                return  # before Linux 5.14, or no memory: whoever writes there gets the pages, or the signal

    count = min(_POPULATORS, native.num_threads())
    threads = [Thread(target=populate, name="kt_sft-populate", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _end(memory: Tensor) -> int:
    return memory.data_ptr() + memory.nbytes


def _huge_pages_fit(matrix: int) -> bool:
    nodes = len(native.nodes())
    return nodes == 1 or matrix // nodes >= _LARGE_PART


def release_freed() -> None:
    """Give back to the system what is kept of freed memory: by ``recycled``, and by the C library (malloc_trim(3))."""
    _recycler.release()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def recycled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, of memory that earlier tensors of this function gave back. It cannot be resized."""
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes < _RECYCLED:
        return torch.empty(*shape, dtype=dtype)  # half the time of one argument
    return torch.frombuffer(_recycler.take(nbytes), dtype=dtype, count=count).view(shape)


class Recycler:
    """Private anonymous mappings, lent out as memoryviews and taken back when the last reference to a view is gone.

    A view dies in any thread, also in the garbage collector while ``take`` runs: giving back is one append, and all
    else happens in ``take`` under a lock. A forked child has copies of the mappings and keeps its own account of them.
    """

    def __init__(self) -> None:
        self._returned: deque[mmap.mmap] = deque()
        self._kept: list[mmap.mmap] = []  # oldest first
        self._kept_bytes = self._used_bytes = self._most_bytes = 0
        self._lock = Lock()

    def take(self, nbytes: int) -> memoryview:
        """A writable view of at least ``nbytes`` with any contents."""
        size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
        with self._lock:
            self._collect()
            mapping = self._pop(size) or _new_mapping(size)
            self._used_bytes += len(mapping)
            self._most_bytes = max(self._most_bytes, self._used_bytes)
            while self._used_bytes + self._kept_bytes > self._most_bytes:
                self._kept_bytes -= len(self._kept[0])
                self._kept.pop(0).close()
        view = memoryview(mapping)
        weakref.finalize(view, self._give_back, mapping).atexit = False
        return view

    def release(self) -> None:
        """Keep nothing for later."""
        with self._lock:
            self._collect()
            while self._kept:
                self._kept.pop().close()
            self._kept_bytes = 0

    def held_bytes(self) -> tuple[int, int]:
        """In use, and kept for later."""
        with self._lock:
            self._collect()
            return self._used_bytes, self._kept_bytes

    def _give_back(self, mapping: mmap.mmap) -> None:
        _advise(mapping, _MADV_FREE)
        self._returned.append(mapping)

    def _collect(self) -> None:
        while self._returned:
            mapping = self._returned.popleft()
            self._used_bytes -= len(mapping)
            self._kept_bytes += len(mapping)
            self._kept.append(mapping)

    def _pop(self, size: int) -> mmap.mmap | None:
        """Of the kept buffers that fit, the smallest, and of several the one that was used last."""
        fitting = [(-len(m), i) for i, m in enumerate(self._kept) if size <= len(m) <= size + size // 4]
        if not fitting:
            return None
        mapping = self._kept.pop(max(fitting)[1])
        self._kept_bytes -= len(mapping)
        return mapping

    def replace_lock(self) -> None:
        """In a forked child: a thread that exists no more may have held the lock."""
        self._lock = Lock()


def _new_mapping(size: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(mapping, mmap.MADV_HUGEPAGE)
    return mapping


def _advise(mapping: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(OSError):  # only a wish: a kernel may know no huge pages, or not free locked memory
        mapping.madvise(advice)


_recycler = Recycler()
os.register_at_fork(after_in_child=_recycler.replace_lock)
