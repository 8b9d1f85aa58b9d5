"""Where this process stands among the ranks, and which experts and threads are its host's or its own.

hosts       a rank with LOCAL_RANK 0 begins one; the launchers number the ranks host by host
experts     world: host h of H holds experts [h E / H, (h + 1) E / H); otherwise every host holds all of them
rows        the routed rows of a host's experts, sorted by expert, are cut into pieces of equal cost, one per rank
threads     the cores of the host divided among its ranks
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

# What one active expert costs besides its rows, in rows: its codes are read and decoded once. Measured on AVX512-BF16
# with int8 codes (time = experts * (c + rows)): 11. An expert that is cut in two costs this twice.
_ROWS_PER_EXPERT = 12


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank among the ranks that share their experts. ``hosts[r]`` numbers the host of rank r from 0."""

    rank: int
    hosts: tuple[int, ...]
    sharded: bool  # each host holds only its share of the experts

    @property
    def ranks(self) -> int:
        return len(self.hosts)

    def experts(self, num_experts: int, rank: int | None = None) -> range:
        """The experts that the host of ``rank`` (default: this one) holds."""
        if not self.sharded:
            return range(num_experts)
        host, count = self.hosts[self.rank if rank is None else rank], self.hosts[-1] + 1
        return range(host * num_experts // count, (host + 1) * num_experts // count)

    def share(self, counts_E: Sequence[int]) -> tuple[int, int]:
        """[begin, end) of this rank's rows among all rows sorted by expert; ``counts_E`` are the rows per expert."""
        host = self.hosts[self.rank]
        peers = [r for r in range(self.ranks) if self.hosts[r] == host]
        mine, experts = peers.index(self.rank), self.experts(len(counts_E))
        first_row = sum(counts_E[: experts.start])
        held = counts_E[experts.start : experts.stop]
        return first_row + _cut(held, mine, len(peers)), first_row + _cut(held, mine + 1, len(peers))


def _cut(counts_E: Sequence[int], piece: int, pieces: int) -> int:
    """The row where ``piece`` begins when rows and experts are cut into ``pieces`` of equal cost."""
    if piece == pieces:
        return sum(counts_E)
    target = sum(n + _ROWS_PER_EXPERT for n in counts_E if n) * piece / pieces
    row = 0
    for n in counts_E:
        if n == 0:
            continue
        if target < n + _ROWS_PER_EXPERT:
            return row + max(0, round(target) - _ROWS_PER_EXPERT)
        target -= n + _ROWS_PER_EXPERT
        row += n
    return row


def hosts_of(local_ranks: Sequence[int]) -> tuple[int, ...]:
    """The host of every rank, from the LOCAL_RANK of every rank. Raises ValueError where they make no sense."""
    if not local_ranks or local_ranks[0] != 0:
        raise ValueError(
            f"LOCAL_RANK of the ranks: expected 0 first on every host, got {list(local_ranks)}; "
            "start the ranks with torchrun, accelerate launch or deepspeed"
        )
    hosts: list[int] = []
    for before, local in zip([-1, *local_ranks], local_ranks, strict=False):
        if local not in (0, before + 1):
            raise ValueError(
                f"LOCAL_RANK of the ranks: expected 0, 1, 2 ... host by host, got {list(local_ranks)}; "
                "start the ranks with torchrun, accelerate launch or deepspeed"
            )
        hosts.append((hosts[-1] + 1 if hosts else 0) if local == 0 else hosts[-1])
    return tuple(hosts)


def threads_of_rank(cores: int) -> int:
    """Threads for this process so that the processes of its host do not compete: its share of ``cores``, at least 1."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return max(1, (rank + 1) * cores // ranks - rank * cores // ranks)
