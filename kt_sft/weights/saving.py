"""Packed experts in memory, written to their file by a thread while the run goes on.

A disk that is written at 0.3 GB/s needs half an hour for the experts of a giant model, and training needs none of it.
So the first start packs into memory and begins; the file is for the next one. The thread has the lowest priority, and
a process ends when its file is written: Ctrl-C then, or a kill at any time, leaves the rest to the next start, which
continues (journal.py). A disk that fails costs the file, never the run.

Once the file is whole it takes the place of the memory, a few pages at a time: from then on the processes of a host
share one copy in the page cache, as at every later start. Memory on several NUMA nodes, or that ranks share, stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from contextlib import ExitStack

from kt_sft import native

from ..ops.packed import PackedExperts
from .cache import PackedWriter

logger = logging.getLogger(__name__)

_LOWEST_PRIORITY = 19


def finish() -> None:
    """Wait until this process has written all of its files."""
    for thread in threading.enumerate():
        if isinstance(thread, Saver):
            thread.join()


class Saver(threading.Thread):
    """Writes what ``writer`` does not hold yet of ``layers``, and gives the file its name.

    owned: what is to be closed at the end, the writer among it: an error removes what was written.
    exchange: map the file in place of the layers' memory, which then lies in it as in the file.
    """

    def __init__(
        self, layers: dict[str, PackedExperts], writer: PackedWriter, owned: ExitStack, *, exchange: bool
    ) -> None:
        super().__init__(name="kt_sft-save")
        self._layers, self._writer, self._owned, self._exchange = layers, writer, owned, exchange

    def run(self) -> None:
        with contextlib.suppress(OSError):  # only a wish
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        start = time.monotonic()
        try:
            with self._owned:
                self._write()
                self._writer.commit()
                if self._exchange:
                    self._map_file()
        except Exception as error:
            logger.warning("%s; the run goes on, and the next start packs the experts again.", error)
        else:
            logger.info("%s is written (%.1f s beside the run).", self._writer.path, time.monotonic() - start)

    def _write(self) -> None:
        waiting = False
        for name, packed in self._layers.items():
            for expert in range(packed.num_experts):
                if not self._writer.holds(name, expert):
                    self._writer.put(name, expert, packed.one(expert).storage)
                if not waiting and not threading.main_thread().is_alive():
                    waiting = True
                    logger.warning(
                        "The process ends when %s is written; Ctrl-C leaves the rest to the next start.",
                        self._writer.path,
                    )

    def _map_file(self) -> None:
        try:
            for name, packed in self._layers.items():
                native.map_file_over(packed.storage, self._writer.fileno(), self._writer.place(name))
        except RuntimeError as error:
            logger.warning("%s: %s; this process keeps its own copy in memory.", self._writer.path, error)
