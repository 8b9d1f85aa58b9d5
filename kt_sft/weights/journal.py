"""What of an unfinished file of packed experts is written: one line per expert, in a text file beside it.

    CRC-32 of the rest of the line, JSON: first {"spec": ...}, then [layer, expert, CRC-32 of the expert's bytes] each

A line follows its bytes but is not synced with them: whoever resumes checks the bytes themselves, so a journal that is
ahead of the data after a power failure costs time, never correctness. Reading ends at the first torn line.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

Written = dict[tuple[int, int], int]  # (layer, expert) -> CRC-32


class Journal:
    """The journal at ``path`` of a file that holds ``spec``."""

    def __init__(self, path: Path, spec: dict[str, Any]) -> None:
        self._path = path
        self._head = _line({"spec": spec})
        self._fd = -1

    def open(self) -> Written:
        """Open it to be continued. What it says is written: nothing if it is new or of another file."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        text = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        if not text.startswith(self._head):
            os.ftruncate(self._fd, 0)
            self._append(self._head)
            return {}
        written: Written = {}
        end = len(self._head)
        for line in text[end:].splitlines(keepends=True):
            row = _row(line)
            if row is None:
                break
            written[row[0], row[1]] = row[2]
            end += len(line)
        os.ftruncate(self._fd, end)
        return written

    def add(self, layer: int, expert: int, crc: int) -> None:
        self._append(_line([layer, expert, crc]))

    def _append(self, line: bytes) -> None:
        if os.write(self._fd, line) != len(line):
            raise OSError(f"{self._path}: a line was cut off; check the disk")

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        self.close()
        self._path.unlink(missing_ok=True)


def _line(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _row(line: bytes) -> tuple[int, int, int] | None:
    """Layer, expert and CRC-32 of a whole line; None for a torn one."""
    text = line[9:-1]
    if line != b"%08x %s\n" % (zlib.crc32(text), text):
        return None
    layer, expert, crc = json.loads(text)
    return layer, expert, crc
