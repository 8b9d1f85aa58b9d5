"""The packed-experts file: written once per model and format, mapped by every process afterwards.

    4 KiB head: magic, version, place and CRC-32 of the index, CRC-32 of the head
    per layer, page-aligned: ``PackedExperts.storage``
    index: JSON {"spec": what is packed from which source, "layers": {name: {"offset", "crc32": one per expert}}}

* It is written under a temporary name and renamed: other processes see the old file or the whole new one. The space is
  reserved before the first byte, so that a full disk is found at once. A file that is made to be kept (``weight_path``)
  is synced first. The automatic cache is not: what a power failure tears is found by the checksums and packed again.
* A process that is interrupted or killed leaves the temporary file and a journal (journal.py). The next one checks what
  is there and packs the rest; the result is the same, bit for bit.
* Every expert's CRC-32 is checked on every load, by reading the file once with several threads. CRC-32 runs at 6 GB/s a
  thread (BLAKE2b: 1.3), faster than disks deliver, and the read brings the pages into the page cache, where the first
  training step needs them: a load without the check would pay nearly the same a little later.
* The mapping is private: a stray write changes this process's copy of a page, never the file. The processes of a host
  share one copy in the page cache.
* Nothing in it depends on instruction set, threads or NUMA nodes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import Layout, MatrixFormat
from ..ops.packed import PackedExperts
from .journal import Journal, Written

logger = logging.getLogger(__name__)

MAGIC = b"KTSFTPKD"
VERSION = 5
_HEAD = struct.Struct("<8sIIQQ")  # magic, version, CRC-32 of the index, its offset, its length
_PAGE = 4096
_CHUNK = 4 << 20  # bytes per read while checking: stays in L2/L3 between the read and the CRC
_SYNC_EVERY = 256 << 20  # bytes between syncs: the disk writes all the time, and the last sync is short
NEAREST = "nearest"  # the rounding of the kernels' own quantiser


class CacheMiss(Exception):
    """Why a file cannot be used."""


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What a file must hold to be usable. ``source`` and ``content`` identify the checkpoint (loader.py)."""

    wanted: str  # the setting that the layouts came from
    num_experts: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[str, ...]
    packing: str  # fingerprint of quantiser and layout
    content: str  # the expert tensors: names, shapes, dtypes, samples
    source: str  # content, and the files' sizes and times; empty where copies of a file must stay usable
    layouts: tuple[Layout, ...] | None = None  # of every layer; None: whatever the file has
    rounding: str | None = NEAREST  # how the codes were chosen; None: however it was

    def sizes(self, layer: int) -> tuple[int, int, int, Layout]:
        """The arguments of ``PackedExperts`` for one layer."""
        assert self.layouts is not None
        return self.num_experts, self.hidden_size, self.intermediate_size, self.layouts[layer]

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        return tuple(PackedExperts.nbytes_for(*self.sizes(i)) for i in range(len(self.layers)))

    def slot(self, layer: int) -> int:
        """Bytes of one expert."""
        return self.layer_bytes[layer] // self.num_experts

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Of every layer in the file, and the end of the last."""
        return tuple(accumulate((-(-size // _PAGE) * _PAGE for size in self.layer_bytes), initial=_PAGE))


def open_packed(path: Path, spec: CacheSpec, *, check: bool = True) -> dict[str, PackedExperts]:
    """Check the file against ``spec`` and its checksums, and map it. Raises CacheMiss if it cannot be used.

    ``check=False`` leaves the checksums out, for a file that another process of this host has just checked.
    """
    try:
        with open(path, "rb") as f:
            index = _read_index(f.fileno())
            found = _spec(index["spec"])
            _compare(found, spec)
            if check:
                _check(f.fileno(), index["layers"], found)
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise CacheMiss("there is none yet") from None
    except OSError as error:
        raise CacheMiss(f"it cannot be read ({error.strerror or error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CacheMiss(f"its index is malformed ({error!r})") from error
    return {name: PackedExperts(_storage(mapped, found, i), *found.sizes(i)) for i, name in _layers(found)}


def verify_packed(path: Path) -> CacheSpec:
    """What the file holds, after a check of its checksums. Raises CacheMiss if it is damaged or of another version."""
    try:
        with open(path, "rb") as f:
            index = _read_index(f.fileno())
            spec = _spec(index["spec"])
            _check(f.fileno(), index["layers"], spec)
    except OSError as error:
        raise CacheMiss(f"it cannot be read ({error.strerror or error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CacheMiss(f"its index is malformed ({error!r})") from error
    return spec


def _storage(mapped: mmap.mmap, spec: CacheSpec, layer: int) -> Tensor:
    return torch.frombuffer(mapped, dtype=torch.uint8, count=spec.layer_bytes[layer], offset=spec.offsets[layer])


def _spec(row: dict[str, Any]) -> CacheSpec:
    """From the index of a file."""
    layouts = tuple(tuple(MatrixFormat(*matrix) for matrix in layout) for layout in row["layouts"])
    if len(layouts) != len(row["layers"]) or any(len(layout) != 3 for layout in layouts):
        raise ValueError("layouts")
    return CacheSpec(**{**row, "layers": tuple(row["layers"]), "layouts": layouts})


def _layers(spec: CacheSpec) -> Iterator[tuple[int, str]]:
    return iter(enumerate(spec.layers))


def _read_index(fd: int) -> dict[str, Any]:
    size = os.fstat(fd).st_size
    head = os.pread(fd, _HEAD.size + 4, 0)
    if len(head) < _HEAD.size + 4 or head[:8] != MAGIC:
        raise CacheMiss("it is not a file of packed experts, or it is torn")
    magic_to_length = head[: _HEAD.size]
    _, version, crc, offset, length = _HEAD.unpack(magic_to_length)
    if version != VERSION:
        raise CacheMiss(f"it has version {version}, this is version {VERSION}")
    if zlib.crc32(magic_to_length) != struct.unpack("<I", head[_HEAD.size :])[0] or offset + length != size:
        raise CacheMiss("it is torn (head or length)")
    text = os.pread(fd, length, offset)
    if zlib.crc32(text) != crc:
        raise CacheMiss("it is torn (checksum of the index)")
    return json.loads(text)


def _compare(found: CacheSpec, spec: CacheSpec) -> None:
    for name in (field.name for field in fields(CacheSpec)):
        got, expected = getattr(found, name), getattr(spec, name)
        if expected is not None and got != expected:
            what = {"source": "the checkpoint's files have changed", "content": "it holds another model's experts"}
            raise CacheMiss(what.get(name, f"{name} is {got!r}, wanted {expected!r}"))


def _check(fd: int, layers: dict[str, Any], spec: CacheSpec) -> None:
    jobs = []
    for i, name in _layers(spec):
        row, start, nbytes = layers[name], spec.offsets[i], spec.slot(i)
        if row["offset"] != start or len(row["crc32"]) != spec.num_experts:
            raise CacheMiss("its index is malformed")
        jobs += [(start + e * nbytes, nbytes, crc, name, e) for e, crc in enumerate(row["crc32"])]

    def check(job: tuple[int, int, int, str, int]) -> None:
        start, nbytes, expected, name, expert = job
        if _crc_of_file(fd, start, nbytes) != expected:
            raise CacheMiss(f"it is torn (checksum of {name}, expert {expert})")

    with ThreadPoolExecutor(max_workers=_checkers()) as pool:
        for _ in pool.map(check, jobs):
            pass


def _checkers() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _crc_of_file(fd: int, start: int, nbytes: int) -> int:
    buffer = memoryview(bytearray(min(nbytes, _CHUNK)))
    crc = done = 0
    while done < nbytes:
        got = os.preadv(fd, [buffer[: nbytes - done]], start + done)
        if got == 0:
            raise CacheMiss("it is torn (too short)")
        crc = zlib.crc32(buffer[:got], crc)
        done += got
    return crc


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    """Make the file ``nbytes`` long, with its blocks allocated where the file system can do that."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, nbytes)


class PackedWriter:
    """Writes one file: ``put`` every expert that ``holds`` denies, then ``commit``.

    Left by an exception, an unfinished file is removed. Left by an interruption (KeyboardInterrupt), or by the end of
    the process, it stays, and the next writer of the same spec continues it.

    Raises:
        OSError: the disk is full or refuses; the file that was there before is untouched.
    """

    def __init__(self, path: Path, spec: CacheSpec, *, durable: bool = True) -> None:
        """``durable``: wait until the disk has it, before it gets its name."""
        self.path, self._spec, self._durable = path, spec, durable
        self._temporary = path.with_name(path.name + ".tmp")
        self._journal = Journal(path.with_name(path.name + ".journal"), asdict(spec))
        self._end = spec.offsets[-1]
        self._crc: dict[str, list[int | None]] = {name: [None] * spec.num_experts for name in spec.layers}
        self._index_of = {name: i for i, name in _layers(spec)}
        self._unsynced = 0
        self._fd = -1

    def __enter__(self) -> PackedWriter:
        with self._explained():
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                written = self._journal.open()
                os.ftruncate(self._fd, min(os.fstat(self._fd).st_size, self._end) if written else 0)
                _reserve(self._fd, self._end)
            except OSError:
                self._discard()
                raise
        self._resume(written)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        if exc_type is None or issubclass(exc_type, Exception):
            self._discard()
        else:
            self._close()

    def holds(self, layer: str, expert: int) -> bool:
        """Whether the expert was put, now or before an interruption."""
        return self._crc[layer][expert] is not None

    def _resume(self, written: Written) -> None:
        """Take over what the journal names, as far as the bytes are there."""

        def whole(item: tuple[tuple[int, int], int]) -> bool:
            (layer, expert), crc = item
            return _crc_of_file(self._fd, self._place(layer, expert), self._spec.slot(layer)) == crc

        with ThreadPoolExecutor(max_workers=_checkers()) as pool:
            for ((layer, expert), crc), is_whole in zip(written.items(), pool.map(whole, written.items()), strict=True):
                if is_whole:
                    self._crc[self._spec.layers[layer]][expert] = crc

    def _place(self, layer: int, expert: int) -> int:
        return self._spec.offsets[layer] + expert * self._spec.slot(layer)

    def fileno(self) -> int:
        return self._fd

    def place(self, layer: str) -> int:
        """Where in the file the layer begins."""
        return self._spec.offsets[self._index_of[layer]]

    def put(self, layer: str, expert: int, storage: Tensor) -> None:
        """Write one expert's slice of the layer's storage."""
        data = storage.numpy().data
        index, crc = self._index_of[layer], zlib.crc32(data)
        slot = self._spec.slot(index)
        if data.nbytes != slot:
            raise ValueError(f"{layer}, expert {expert}: expected {slot} packed bytes, got {data.nbytes}")
        with self._explained():
            self._write(data, self._place(index, expert))
            self._journal.add(index, expert, crc)
            self._unsynced += slot
            if self._durable and self._unsynced >= _SYNC_EVERY:
                os.fdatasync(self._fd)
                self._journal.sync()
                self._unsynced = 0
        self._crc[layer][expert] = crc

    def get(self, layer: str, expert: int) -> Tensor:
        """The bytes of one expert that was put."""
        index = self._index_of[layer]
        storage = torch.empty(self._spec.slot(index), dtype=torch.uint8)
        os.preadv(self._fd, [storage.numpy().data], self._place(index, expert))
        return storage

    def commit(self) -> None:
        """Write the index and give the file its name."""
        for layer, crcs in self._crc.items():
            if None in crcs:
                raise ValueError(f"{layer}: expert {crcs.index(None)} was never written")
        spec = self._spec
        rows = {name: {"offset": spec.offsets[i], "crc32": self._crc[name]} for i, name in _layers(spec)}
        text = json.dumps({"spec": asdict(spec), "layers": rows}).encode()
        head = _HEAD.pack(MAGIC, VERSION, zlib.crc32(text), self._end, len(text))
        with self._explained():
            self._write(memoryview(text), self._end)
            self._write(memoryview(head + struct.pack("<I", zlib.crc32(head))), 0)
            if self._durable:
                os.fsync(self._fd)
            os.replace(self._temporary, self.path)
            self._journal.remove()
            if self._durable:
                _sync_folder(self.path.parent)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < data.nbytes:
            done += os.pwrite(self._fd, data[done:], offset + done)

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1
        self._journal.close()

    def _discard(self) -> None:
        if self._fd >= 0:
            self._close()
            self._temporary.unlink(missing_ok=True)
            self._journal.remove()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"packed experts {self.path}: writing {self._end / 2**30:.2f} GiB failed: {error.strerror or error}; "
                "free some space, or choose another folder (cache_dir, KT_SFT_CACHE) or cache_dir: none",
            ) from error


@contextlib.contextmanager
def build_lock(path: Path) -> Iterator[None]:
    """Held by the one process that builds ``path``; the others wait. The kernel drops it when its process ends."""
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OSError(
            error.errno,
            f"packed experts {path}: the folder cannot be written: {error.strerror or error}; "
            "choose another folder (cache_dir, KT_SFT_CACHE) or cache_dir: none",
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Waiting for another process that packs the experts into %s.", path)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may have it open too
        os.close(fd)
