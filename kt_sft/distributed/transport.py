"""How the rows of all ranks meet, and how partial results come back: shared memory on a host, gloo between hosts.

One exchange is ``gather`` (every rank gets the rows of all), ``partials`` (memory for what this rank computes of all
rows), then ``reduce`` (every rank gets its own rows, summed over the ranks in their order).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .memory import Arena
from .peers import Peers


class Transport(Protocol):
    def gather(self, rows: list[Tensor], counts: list[int], widths: list[int]) -> list[Tensor]:
        """Each of ``rows`` (own count, ...) -> (sum of counts, ...); ``widths`` are those of the partials to come."""

    def partials(self) -> list[Tensor]:
        """One fp32 (sum of counts, width) per width, not initialised."""

    def reduce(self, partials: list[Tensor]) -> list[Tensor]:
        """fp32 (own count, width) each; called when every rank has written its partials."""


class SharedMemoryTransport:
    """Every rank writes its rows into one mapping and reads the others' in place; the same for the partials."""

    def __init__(self, peers: Peers) -> None:
        self._peers, self._arena = peers, Arena(peers)
        self._counts: list[int] = []
        self._parts: list[Tensor] = []  # per width: (ranks, sum of counts, width)

    def gather(self, rows: list[Tensor], counts: list[int], widths: list[int]) -> list[Tensor]:
        total, ranks = sum(counts), self._peers.size
        shapes = [((total, *t.shape[1:]), t.dtype) for t in rows] + [((ranks, total, w), torch.float32) for w in widths]
        self._arena.reset(sum(Arena.bytes_of(*shape) for shape in shapes))
        tensors = [self._arena.take(*shape) for shape in shapes]
        everyones, self._parts, self._counts = tensors[: len(rows)], tensors[len(rows) :], counts
        for own, everyone in zip(rows, everyones, strict=True):
            everyone[self._own()].copy_(own)
        self._peers.numbers([0])
        return everyones

    def partials(self) -> list[Tensor]:
        return [part[self._peers.index] for part in self._parts]

    def reduce(self, partials: list[Tensor]) -> list[Tensor]:
        own = self._own()
        return [part[:, own].sum(dim=0) for part in self._parts]

    def _own(self) -> slice:
        begin = sum(self._counts[: self._peers.index])
        return slice(begin, begin + self._counts[self._peers.index])


class NetworkTransport:
    """The same over gloo: rows are gathered on every rank, partials go to the rank of their rows."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._counts: list[int] = []
        self._widths: list[int] = []

    def gather(self, rows: list[Tensor], counts: list[int], widths: list[int]) -> list[Tensor]:
        self._counts, self._widths = counts, widths
        return [self._peers.gather(own, counts) for own in rows]

    def partials(self) -> list[Tensor]:
        return [torch.empty(sum(self._counts), width) for width in self._widths]

    def reduce(self, partials: list[Tensor]) -> list[Tensor]:
        return [self._peers.exchange(part, self._counts).sum(dim=0) for part in partials]
