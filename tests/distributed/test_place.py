"""Who computes what: every row exactly once, in shares of equal cost."""

from __future__ import annotations

import itertools

import pytest
import torch

from kt_sft.distributed.place import Place, hosts_of, threads_of_rank


def shares(counts: list[int], hosts: tuple[int, ...], sharded: bool) -> list[tuple[int, int]]:
    return [Place(rank=r, hosts=hosts, sharded=sharded).share(counts) for r in range(len(hosts))]


@pytest.mark.parametrize(("hosts", "sharded"), [((0, 0), False), ((0, 0, 0), False), ((0, 1), True), ((0, 0, 1), True)])
def test_every_row_is_computed_once(hosts, sharded):
    generator = torch.Generator().manual_seed(0)
    for most in (1, 2, 100):
        for _ in range(200):
            counts = torch.randint(0, most + 1, (7,), generator=generator).tolist()
            pieces = shares(counts, hosts, sharded)
            assert pieces[0][0] == 0 and pieces[-1][1] == sum(counts)
            assert all(a[1] == b[0] and a[0] <= a[1] for a, b in itertools.pairwise(pieces))


def test_a_rank_computes_only_experts_of_its_host():
    counts = [5, 0, 3, 8, 2, 1, 9]
    for rank, (begin, end) in enumerate(shares(counts, (0, 0, 1), True)):
        place = Place(rank=rank, hosts=(0, 0, 1), sharded=True)
        rows = [e for e, n in enumerate(counts) for _ in range(n)][begin:end]
        assert set(rows) <= set(place.experts(7))
    assert Place(rank=0, hosts=(0, 0, 1), sharded=True).experts(7) == range(3)
    assert Place(rank=2, hosts=(0, 0, 1), sharded=True).experts(7) == range(3, 7)
    assert Place(rank=1, hosts=(0, 0), sharded=False).experts(7) == range(7)


def test_shares_cost_the_same():
    assert shares([64] * 8, (0, 0), False) == [(0, 256), (256, 512)]
    assert shares([0, 1000, 0], (0, 0), False) == [(0, 494), (494, 1000)]  # a hot expert is cut
    assert shares([1] * 100 + [0] * 100, (0, 0), False) == [(0, 50), (50, 100)]  # experts cost more than rows


def test_hosts_are_read_from_the_local_ranks():
    assert hosts_of([0, 1, 0, 1]) == (0, 0, 1, 1)
    assert hosts_of([0, 0, 1, 2]) == (0, 1, 1, 1)
    for wrong in ([1, 0], [0, 2], [0, 1, 1], []):
        with pytest.raises(ValueError, match="LOCAL_RANK"):
            hosts_of(wrong)


@pytest.mark.parametrize(("cores", "ranks"), [(8, 3), (2, 2), (96, 8), (10, 4)])
def test_threads_of_all_ranks_are_the_cores(monkeypatch, cores, ranks):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    threads = []
    for rank in range(ranks):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        threads.append(threads_of_rank(cores))
    assert sum(threads) == cores and max(threads) - min(threads) <= 1


def test_more_ranks_than_cores_get_a_thread_each(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert threads_of_rank(2) == 1
