"""Reads through the page cache and past it give the file's bytes, wherever they begin and end."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kt_sft.weights import reading

MIB = 1 << 20
SIZE = 4 * MIB + 1234


@pytest.fixture(params=["disk", "memory"])
def file(request: pytest.FixtureRequest, tmp_path: Path, shared_memory: Path) -> Path:
    path = (tmp_path if request.param == "disk" else shared_memory) / "data"
    path.write_bytes(torch.randint(256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy())
    return path


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"kt_sft_test_reading_{os.getpid()}"
    folder.mkdir(exist_ok=True)
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def forget(file: Path, start: int = 0, nbytes: int = 0) -> None:
    """Drop it from the page cache."""
    with open(file, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), start, nbytes, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("start", [0, 8, 4096, 4104, MIB - 8, 13])
@pytest.mark.parametrize("nbytes", [0, 5, 4096, MIB, MIB + 8, 2 * MIB + 4093])
@pytest.mark.parametrize("cached", ["all", "none", "half"])
def test_the_bytes_are_those_of_the_file(file: Path, start: int, nbytes: int, cached: str) -> None:
    expected = file.read_bytes()[start : start + nbytes]
    if cached != "all":
        forget(file, *((0, 0) if cached == "none" else (MIB, SIZE)))
    got = reading.read(file, start, nbytes)
    assert got.numpy().tobytes() == expected
    if nbytes % 8 == 0:
        assert got.view(torch.int64).numel() == nbytes // 8


def test_up_to_the_last_byte(file: Path) -> None:
    expected = file.read_bytes()
    forget(file)
    assert reading.read(file, 0, SIZE).numpy().tobytes() == expected
    forget(file)
    assert reading.read(file, 1000, SIZE - 1000).numpy().tobytes() == expected[1000:]


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_ends_early_is_named(file: Path, cached: bool) -> None:
    if not cached:
        forget(file)
    with pytest.raises(EOFError, match=rf"{file}: expected {3 * MIB} bytes at {2 * MIB}, got {SIZE - 2 * MIB}"):
        reading.read(file, 2 * MIB, 3 * MIB)


def test_large_reads_leave_the_page_cache_alone(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(4 * MIB))
    forget(file)
    if reading._direct(file, memoryview(mmap.mmap(-1, 4096)), 0) == 0:
        pytest.skip("this file system has no O_DIRECT")
    reading.read(file, 0, 4 * MIB)
    assert not is_cached(file)
    for start in range(0, 4 * MIB, 4096):
        reading.read(file, start, 4096)
    assert is_cached(file)


def is_cached(file: Path) -> bool:
    with open(file, "rb") as f:
        return reading._is_cached(f.fileno(), 0, 4 * MIB)
