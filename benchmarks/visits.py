"""Rows timed in turn: every row is a process that lives through all rounds, and stands still while another is timed.

On a machine shared with others what a row takes changes from one minute to the next by more than rows differ. So rows
are compared within seconds: for every number of tokens one row after the other, and that several times over.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil

from benchmarks import machine
from kt_sft import native

ROUNDS = 5
QUICK, QUICK_TURNS = 2.0, 3  # seconds of a visit: below that a point is visited so often in every round
TIMEOUT = 600  # seconds of one answer
MEMORY_LEFT = 0.5  # of all: below that no further row is started beside the others, some of which still grow
Point = dict[str, Any]


class Gone(Exception):
    """A worker that does not answer any more, and why."""


class Worker:
    """benchmarks/worker.py in a process of its own; stopped while nobody asks it."""

    def __init__(self, job: dict[str, Any], python: str = sys.executable) -> None:
        read, write = os.pipe()
        path = os.pathsep.join(p for p in (str(machine.ROOT), os.environ.get("PYTHONPATH", "")) if p)
        names = {"OMP_NUM_THREADS": str(job["threads"]), "PYTHONPATH": path, "KT_SFT_ISA": job["isa"]}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._answers = os.fdopen(read)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", str(write)],
            **dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors, text=True),
            **dict(pass_fds=(write,), cwd=machine.ROOT, env={**os.environ, **names}),
        )
        os.close(write)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Raises Gone, after which the process has ended."""
        self._process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # the answer says that it has ended
            print(json.dumps(message), file=self._process.stdin, flush=True)
        if not select.select([self._answers], [], [], TIMEOUT)[0]:
            self.close()
            raise Gone(f"took over {TIMEOUT} s")
        if not (line := self._answers.readline()):
            status = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            self.close()
            raise Gone(f"exit status {status}: {last}")
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._answers, self._errors):
            with suppress(BrokenPipeError):
                file.close()


def better(point: Point, other: Point) -> Point:
    """Of every part the round with the lower median."""
    best = dict(point, calls=point["calls"] + other["calls"], others=max(point["others"], other["others"]))
    for part in ("fwd", "bwd", "infer"):
        if f"{part}_ms" in other and other[f"{part}_ms"] < point[f"{part}_ms"]:
            best |= {key: value for key, value in other.items() if key.startswith(f"{part}_")}
    return best


class Row:
    """A job with its worker and what it found so far: ``result`` is what reach.py and report.py read."""

    def __init__(self, job: dict[str, Any], python: str = sys.executable, unavailable: str = "") -> None:
        self.job = dict(isa=native.isa()) | job
        self.points: dict[tuple[int, str], Point] = {}
        self.wanted = list(itertools.product(job["tokens"], job["routings"]))
        self.seconds: dict[tuple[int, str], float] = {}  # of the last visit
        self.result = {key: self.job[key] for key in ("row", "shape", "threads", "isa")}
        self.worker: Worker | None = None
        if unavailable:
            self.result["unavailable"] = unavailable
        else:
            self.worker = Worker(self.job, python)
            self.result |= self._ask(self.job | dict(most_tokens=max(job["tokens"])))

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """An answer; a worker that has none is ended."""
        assert self.worker is not None
        try:
            answer = self.worker.ask(message)
        except Gone as gone:
            self.worker = None
            return dict(unavailable=str(gone))
        if "wrong" in answer or "unavailable" in answer:
            self.close()
        return answer

    def visit(self, tokens: int, routing: str) -> None:
        """One round of a point, if it is wanted; of every part the better round is kept."""
        key = tokens, routing
        if self.worker is None or key not in self.wanted:
            return
        start = time.perf_counter()
        point = self._ask(dict(tokens=tokens, routing=routing))
        self.seconds[key] = time.perf_counter() - start
        if "tokens" not in point:
            self.result |= point
        elif "skipped" in point:
            self.wanted.remove(key)
            self.points.setdefault(key, point)
        else:
            self.points[key] = better(self.points[key], point) if key in self.points else point

    def step_ms(self, key: tuple[int, str]) -> float:
        """Forward and backward of a point; infinite where it has no times."""
        point = self.points.get(key, {})
        return point.get("fwd_ms", float("inf")) + point.get("bwd_ms", float("inf"))

    def close(self) -> None:
        """End the worker; what was found stays."""
        if self.worker is not None:
            self.worker.close()
        self.worker = None


def groups(jobs: list[dict[str, Any]], start: Callable[[dict[str, Any]], list[Row]]) -> Iterator[list[Row]]:
    """Rows that fit into memory beside each other, started; they are closed when the next ones are asked for."""
    rows: list[Row] = []
    try:
        for i, job in enumerate(jobs):
            rows += start(job)
            memory = psutil.virtual_memory()
            if i + 1 == len(jobs) or memory.available < MEMORY_LEFT * memory.total:
                yield rows
                while rows:
                    rows.pop().close()
    finally:
        for row in rows:
            row.close()


def points_of(rows: list[Row]) -> list[tuple[int, str]]:
    return list(dict.fromkeys(key for row in rows for key in row.wanted))


def rounds(rows: list[Row], number: int = ROUNDS) -> Iterator[Row]:
    """All rounds: in each every point, of every point all rows; yields the row after each. After the first round the
    slower of two rivals is out. A round takes QUICK_TURNS turns, of which all but the first are of quick points."""
    points = points_of(rows)
    for turn in range(number * QUICK_TURNS):
        for key in points:
            for row in rows:
                if turn % QUICK_TURNS == 0 or row.seconds.get(key, QUICK) < QUICK:
                    row.visit(*key)
                yield row
        if turn == 0:
            drop_slower(rows)


def rivals(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows that are the same but for the number of threads."""
    same: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        same.setdefault(tuple(row.job[name] for name in ("row", "shape", "isa")), []).append(row)
    yield from same.values()


def drop_slower(rows: list[Row]) -> None:
    """Of rivals only the faster one goes on, point by point."""
    for same in rivals(rows):
        for key in points_of(same):
            fastest = min(same, key=lambda row: row.step_ms(key))
            for row in same:
                if row is not fastest and key in row.wanted:
                    row.wanted.remove(key)


def results(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """One result of all rivals: of every point the faster, with its number of threads."""
    for same in rivals(rows):
        points = []
        for key in dict.fromkeys(key for row in same for key in row.points):
            fastest = min((row for row in same if key in row.points), key=lambda row: row.step_ms(key))
            points.append(fastest.points[key] | dict(threads=fastest.job["threads"]))
        found = min(same, key=lambda row: not row.points).result
        yield found | (dict(points=points) if points else {})
