"""Small messages and tensors between ranks, over a gloo group of our own.

The group is made from torch.distributed's store and is not registered there: no other code can interleave collectives
with ours, ``destroy_process_group`` does not take it from us, and it exists beside NCCL. A rank whose process ends
closes its connections, which raises on the others at once. Every method is a collective of all ranks of the group.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = timedelta(days=7)  # a rank may wait for one that loads or saves; one that dies is noticed at once
_TEXT_BYTES = 1024
_numbers = itertools.count()


class PeerLost(RuntimeError):
    """A rank is gone. The message says which one, where that can be known."""


class Peers:
    """The ranks ``members`` (of the default process group), in this order. All of them construct it together."""

    def __init__(self, members: list[int], purpose: str) -> None:
        rank = dist.get_rank()
        store = dist.distributed_c10d._get_default_store()
        name = f"kt_sft/{purpose}/{members[0]}-{members[-1]}/{next(_numbers)}"
        self.members, self.index, self.size = members, members.index(rank), len(members)
        group: Any = dist.ProcessGroupGloo
        self._group: Any = group(dist.PrefixStore(name, store), self.index, self.size, _TIMEOUT)
        host = socket.gethostname()
        self._places: list[tuple[str, int]] = [("", 0)] * self.size
        here = self.texts(f"{host} {os.getpid()}")
        self._places = [(place.split()[0], int(place.split()[1])) for place in here]

    def numbers(self, values: list[int]) -> list[list[int]]:
        """The ``values`` of every rank; all have the same length."""
        own = torch.tensor(values, dtype=torch.int64)
        everyones = torch.zeros(self.size, len(values), dtype=torch.int64)
        self._wait(lambda: self._group.allgather([list(everyones.unbind())], [own]))
        return everyones.tolist()

    def texts(self, text: str) -> list[str]:
        """The ``text`` of every rank, cut to 1 KiB."""
        data = text.encode()[:_TEXT_BYTES].decode(errors="ignore").encode()
        own = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        everyones = torch.zeros(self.size, _TEXT_BYTES, dtype=torch.uint8)
        self._wait(lambda: self._group.allgather([list(everyones.unbind())], [own]))
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in everyones]

    def raise_any(self, error: BaseException | None, doing: str) -> None:
        """Meet the other ranks; if one of them comes with an error, raise it on all of them, with its rank."""
        failed = [bool(flag) for (flag,) in self.numbers([error is not None])]
        if not any(failed):
            return
        texts = self.texts("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        first = failed.index(True)
        raise RuntimeError(f"rank {self.members[first]} failed {doing}: {texts[first]}")

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks one below the other; rank i has ``counts[i]`` of them."""
        most = max(counts)
        own = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype)
        own[: rows.shape[0]] = rows
        everyones = [torch.zeros_like(own) for _ in range(self.size)]
        raw = [t.view(torch.uint8).flatten() for t in (own, *everyones)] if most else []
        if most:
            self._wait(lambda: self._group.allgather([raw[1:]], [raw[0]]))
        return torch.cat([t[:n] for t, n in zip(everyones, counts, strict=True)])

    def exchange(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Send ``counts[i]`` consecutive fp32 rows to rank i; returns (ranks, own count, width), what each sent."""
        own, width = counts[self.index], rows.shape[1]
        received = torch.zeros(self.size * own * width)
        sent = [n * width for n in counts]
        flat = rows.contiguous().flatten()
        self._wait(lambda: self._group.alltoall_base(received, flat, [own * width] * self.size, sent))
        return received.view(self.size, own, width)

    def broadcast(self, tensor: Tensor, index: int) -> None:
        """Fill ``tensor`` on every rank with that of rank ``index`` of the group."""
        self._wait(lambda: self._group.broadcast(tensor.view(torch.uint8), index))

    def sum(self, tensor: Tensor) -> None:
        """Replace ``tensor`` on every rank by the sum over the ranks."""
        self._wait(lambda: self._group.allreduce([tensor]))

    def close(self) -> None:
        """Close the connections; the other ranks notice at once."""
        self._group = None

    def _wait(self, start: Any) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise PeerLost(self._who_is_gone()) from error

    def _who_is_gone(self) -> str:
        """Name the processes of this host that have ended; they may take a moment to."""
        here = socket.gethostname()
        local = [(rank, pid) for rank, (host, pid) in zip(self.members, self._places, strict=True) if host == here]
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            gone = [f"rank {rank} (process {pid})" for rank, pid in local if pid and not _is_running(pid)]
            if gone:
                return f"{', '.join(gone)} ended without an error of its own: killed from outside, or out of memory"
            time.sleep(0.05)
        return "a rank closed its connection: it ended on another host, or its network failed"


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
