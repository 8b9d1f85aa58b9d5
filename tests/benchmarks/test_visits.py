"""Rows that are timed in turn: their processes, what is kept of every round, rivals, and what becomes of failures."""

import os
import signal

from benchmarks import __main__ as bench
from benchmarks import visits
from benchmarks.visits import Row, Worker
from kt_sft import native

JOB = dict(row="int8", shape="tiny", tokens=[1, 16], routings=["balanced"], threads=1, seconds=0.0)


def state(worker: Worker) -> str:
    """Of the process: R, S, T (stopped), Z."""
    with open(f"/proc/{worker._process.pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_row_lives_through_all_rounds_and_stands_still_between():
    row = Row(JOB)
    try:
        os.waitpid(row.worker._process.pid, os.WUNTRACED)
        assert state(row.worker) == "T" and row.result["weights_mib"] > 0 and row.result["isa"] == native.isa()
        assert [r is row for r in visits.rounds([row], 2)] == [True] * 4 * visits.QUICK_TURNS
        assert 0 < row.seconds[1, "balanced"] < visits.QUICK
        (result,) = visits.results([row])
        assert [(p["tokens"], p["threads"]) for p in result["points"]] == [(1, 1), (16, 1)]
        assert all(p["calls"] >= 6 * visits.QUICK_TURNS and p["fwd_ms"] > 0 for p in result["points"])
    finally:
        row.close()
    row.visit(1, "balanced")  # nobody is there any more
    assert row.points[1, "balanced"]["calls"] == result["points"][0]["calls"]


def test_a_worker_that_cannot_start_is_a_reason():
    row = Row(JOB | dict(row="no such row"))
    assert "row: expected a name like int8" in row.result["unavailable"] and row.worker is None
    assert list(visits.results([row])) == [row.result]


def test_a_worker_that_dies_keeps_its_times_and_says_why():
    row = Row(JOB)
    row.visit(1, "balanced")
    row.worker._process.send_signal(signal.SIGKILL)
    row.visit(16, "balanced")
    (result,) = visits.results([row])
    assert [p["tokens"] for p in result["points"]] == [1] and result["unavailable"] == "exit status -9: no message"


def test_a_worker_that_does_not_answer_is_ended(monkeypatch):
    row = Row(JOB)
    monkeypatch.setattr(visits, "TIMEOUT", 0)
    row.visit(1, "balanced")
    assert row.result["unavailable"] == "took over 0 s" and row.worker is None


def test_kt_kernel_without_its_environment_is_a_reason(monkeypatch):
    monkeypatch.delenv(bench.PEER_PYTHON, raising=False)
    (row,) = bench.start(JOB | dict(row="kt int8"))
    assert row.result["unavailable"] == "KT_SFT_PEER_PYTHON is not set"


def test_kt_kernel_runs_with_one_thread_fewer_too(monkeypatch):
    monkeypatch.setenv(bench.PEER_PYTHON, "python-of-the-peer")
    started = []
    monkeypatch.setattr(bench, "Row", lambda job, python: started.append((job["threads"], python)))
    bench.start(JOB | dict(row="kt int8", threads=2))
    bench.start(JOB | dict(row="kt int8", threads=1))
    assert started == [(2, "python-of-the-peer"), (1, "python-of-the-peer"), (1, "python-of-the-peer")]


class Made(Row):
    """A row whose worker is a table of times."""

    def __init__(self, threads, **ms):
        super().__init__(JOB | dict(threads=threads), unavailable="-")
        del self.result["unavailable"]
        self.ms, self.asked = ms, []

    def visit(self, tokens, routing):
        if (tokens, routing) in self.wanted:
            self.asked.append(tokens)
            self.seconds[tokens, routing] = self.ms.get("seconds", visits.QUICK)
            ms = self.ms[f"t{tokens}"]
            self.points[tokens, routing] = dict(tokens=tokens, routing=routing, fwd_ms=ms, bwd_ms=ms)


def test_of_rivals_the_faster_goes_on_point_by_point():
    one, two = Made(1, t1=1.0, t16=5.0), Made(2, t1=2.0, t16=4.0)
    assert len(list(visits.rounds([one, two], 3))) == 12 * visits.QUICK_TURNS
    assert one.asked == [1, 16, 1, 1] and two.asked == [1, 16, 16, 16]
    (result,) = visits.results([one, two])
    assert [(p["tokens"], p["threads"], p["fwd_ms"]) for p in result["points"]] == [(1, 1, 1.0), (16, 2, 4.0)]


def test_quick_points_are_visited_more_often():
    quick, slow = Made(1, t1=1.0, t16=5.0, seconds=0.1), Made(1, t1=1.0, t16=5.0)
    list(visits.rounds([quick], 2)), list(visits.rounds([slow], 2))
    assert quick.asked == [1, 16] * 2 * visits.QUICK_TURNS and slow.asked == [1, 16] * 2


def test_groups_end_where_memory_does_and_close_their_rows(monkeypatch):
    free = iter([0.5, 0.3, 0.5, 0.5])
    monkeypatch.setattr(
        visits.psutil, "virtual_memory", lambda: type("Memory", (), dict(available=next(free), total=1.0))
    )
    closed = []

    class Started:
        def __init__(self, job):
            self.job = job

        def close(self):
            closed.append(self.job)

    found = []
    for rows in visits.groups(["a", "b", "c", "d"], lambda job: [Started(job)]):
        found.append([row.job for row in rows])
        assert not set(found[-1]) & set(closed)
    assert found == [["a", "b"], ["c", "d"]] and sorted(closed) == ["a", "b", "c", "d"]


def test_the_better_round_of_every_part_counts():
    def point(fwd, bwd, **others):
        names = ("ms", "p20", "p80", "dram")
        times = {f"{part}_{v}": t for part, ts in (("fwd", fwd), ("bwd", bwd)) for v, t in zip(names, ts, strict=True)}
        return times | others

    first = point((5, 4, 6, 40), (7, 6, 8, 40), calls=3, others=0.1, tokens=8)
    second = point((4, 3, 9, 50), (8, 1, 8, 50), calls=4, others=0.3, tokens=8)
    best = point((4, 3, 9, 50), (7, 6, 8, 40), calls=7, others=0.3, tokens=8)
    assert visits.better(first, second) == best
