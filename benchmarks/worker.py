"""One row in one process, which lives as long as its row is timed: ``python -m benchmarks.worker FD``.

A message is a line of JSON on standard input, an answer one on the file descriptor FD (libraries print to standard
output). The first message is the job: row, shape, threads, seconds and the most tokens; its answer describes the layer
that was built and checked, or says why it is ``unavailable`` or ``wrong``. Every further message asks for one round of
a point (tokens, routing): times in ms, median, 20th and 80th percentile, or ``skipped`` with the reason.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import check, machine
from benchmarks.shapes import SHAPES, TINY, Shape, bank, make_inputs

DECODE_TOKENS = 8  # up to here a call without gradients is timed too
MEMORY_ROWS = 64  # per expert: of more, memory limits nothing
MIN_CALLS, MAX_CALL_SECONDS = 3, 12.0
WARM_CALLS, WARM_SECONDS = 2, 0.5  # to warm up: so many calls, fewer of slow ones
READ_EVERY, READ_AGAIN = 5e-3, 20e-3  # seconds of calls between two looks at what the machine gives; in longer calls


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of seconds, in ms."""
    ms = [s * 1e3 for s in samples]
    if len(ms) == 1:
        return ms[0], ms[0], ms[0]
    cuts = statistics.quantiles(ms, n=10, method="inclusive")
    return statistics.median(ms), cuts[1], cuts[7]


def repeat(
    call: Callable[[int], tuple[float, ...]], seconds: float, look: Callable[[], dict[str, float]] | None = None
) -> tuple[list[list[float]], dict[str, float]]:
    """Times of each part of ``call(i)``: some to warm up, then at least MIN_CALLS and about ``seconds``.

    And the medians of what ``look`` found between them: after every READ_EVERY seconds of calls, and after the last, as
    often as the time since then asks for.
    """
    samples: list[tuple[float, ...]] = []
    found: list[dict[str, float]] = []
    begin, stop, since = time.perf_counter(), None, 0.0
    for i in range(1_000_000):
        times = call(i)
        if stop is None:
            warm = i + 1 >= WARM_CALLS or time.perf_counter() >= begin + WARM_SECONDS
            stop = time.perf_counter() + seconds if warm else None
            continue
        samples.append(times)
        since += sum(times)
        last = len(samples) >= MIN_CALLS and time.perf_counter() >= stop
        if look and (last or since >= READ_EVERY):
            found += [look() for _ in range(1 + int(since / READ_AGAIN))]
            since = 0.0
        if last:
            break
    medians = {name: statistics.median(reading[name] for reading in found) for name in (found[0] if found else ())}
    return [list(part) for part in zip(*samples, strict=True)], medians


def measure(row: Any, shape: Shape, tokens: int, routing: str, seconds: float, beside: Any = None) -> dict[str, Any]:
    """Times of one number of tokens. Few tokens rotate over inputs, so that no weights stay in the cache.

    ``*_peak``, ``*_dram``: up to MEMORY_ROWS, the medians of what ``beside`` (a probes.Beside) finds between the calls.
    A median of times is only comparable with a median of what was there meanwhile; many rows are judged by the best.
    """
    look = beside.read if beside and tokens * shape.K <= MEMORY_ROWS * shape.E else None
    batches = [make_inputs(shape, tokens, seed, routing) for seed in range(max(1, min(16, 64 // tokens)))]
    active = statistics.mean(len(ids.unique()) for _, ids, _, _ in batches)

    def step(i: int) -> tuple[float, float]:
        x, ids, weights, grad_out = batches[i % len(batches)]
        start = time.perf_counter()
        row.forward(x, ids, weights, True)
        middle = time.perf_counter()
        row.backward(grad_out)
        return middle - start, time.perf_counter() - middle

    def infer(i: int) -> tuple[float]:
        x, ids, weights, _ = batches[i % len(batches)]
        start = time.perf_counter()
        row.forward(x, ids, weights, False)
        return (time.perf_counter() - start,)

    with machine.OtherLoad() as others:
        times, given = repeat(step, seconds, look)
        parts = {"fwd": (times[0], given), "bwd": (times[1], given)}
        if tokens <= DECODE_TOKENS:
            with torch.no_grad():
                times, given = repeat(infer, seconds / 2, look)
            parts["infer"] = times[0], given
    point: dict[str, Any] = dict(tokens=tokens, routing=routing, active=active, rows=tokens * shape.K / active)
    for name, (samples, given) in parts.items():
        point |= dict(zip((f"{name}_ms", f"{name}_p20", f"{name}_p80"), quantiles(samples), strict=True))
        point |= {f"{name}_{limit}": value for limit, value in given.items()}
    return point | dict(calls=len(parts["fwd"][0]), others=others.cores)


def make_row(job: dict[str, Any], shape: Shape) -> Any:
    """The layer that ``job["row"]`` names."""
    name, threads = job["row"], job["threads"]
    if name.startswith("kt "):
        from benchmarks.kt_kernel_peer import KtKernel

        return KtKernel(shape, name, threads)
    from benchmarks.peers import TORCH_PEERS

    if name in TORCH_PEERS:
        return TORCH_PEERS[name](shape)
    from benchmarks.ours import Ours
    from kt_sft import native

    native.set_num_threads(threads)
    return Ours(shape, name)


def memory_before(job: dict[str, Any]) -> float:
    """Anonymous MiB with what is there for any layer: modules, threads and what torch keeps after its first calls."""
    if not job["row"].startswith("kt "):
        x, ids, weights, grad_out = make_inputs(TINY, 1, 0)
        tiny = make_row(job, TINY)
        tiny.forward(x, ids, weights, True)
        tiny.backward(grad_out)
    return machine.anonymous_mib()


def memory(row: Any, shape: Shape, tokens: int, before: float) -> dict[str, float]:
    """MiB that a layer holds with a recorded forward (``saved``) and after backward (``held``), beside its parts."""
    from kt_sft import native

    x, ids, weights, grad_out = make_inputs(shape, tokens, 0)
    inputs = (x.nbytes + ids.nbytes + weights.nbytes + grad_out.nbytes) / 2**20
    row.forward(x, ids, weights, True)
    saved = machine.anonymous_mib() - before - inputs
    row.backward(grad_out)
    held = machine.anonymous_mib() - before - inputs
    values = tokens * shape.K * (2 * shape.F + shape.D)
    return dict(
        tokens=tokens,
        packed_mib=row.weight_bytes / 2**20,
        workspace_mib=native.workspace_bytes() / 2**20,
        activations_mib=2 * values / 2**20,
        saved_mib=saved,
        held_mib=held,
    )


class Layer:
    """The row of a job, built and found right for three tokens, and what it answers."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.shape, self.seconds = SHAPES[job["shape"]], job["seconds"]
        torch.set_num_threads(job["threads"])
        before = memory_before(job)
        self.row = make_row(job, self.shape)
        bank.cache_clear()
        self.answer: dict[str, Any] = dict(weights_mib=self.row.weight_bytes / 2**20)
        if hasattr(self.row, "pack_seconds"):
            source = 2 * self.shape.expert_values * self.shape.E / 1e9 / job["threads"]
            rate = source / self.row.pack_seconds
            self.answer["packing"] = dict(seconds=self.row.pack_seconds, gb_per_s_per_thread=rate)
            self.answer["memory"] = memory(self.row, self.shape, job["most_tokens"], before)
        self.beside = self.row.beside() if hasattr(self.row, "beside") else None  # holds memory: after the row's
        self.expected = check.evaluate(self.row, self.shape)
        check.check(self.row, self.shape, self.expected, 3, "balanced")
        self.errors: dict[tuple[int, str], float] = {}  # of every point that was checked
        self.call_seconds = 0.0

    def point(self, tokens: int, routing: str) -> dict[str, Any]:
        """One round; what is asked for the first time is compared with float32 before it is timed."""
        key = tokens, routing
        if key not in self.errors and self.call_seconds <= MAX_CALL_SECONDS:
            start = time.perf_counter()
            error = check.check(self.row, self.shape, self.expected, tokens, routing)
            self.call_seconds = time.perf_counter() - start
            if self.call_seconds <= MAX_CALL_SECONDS:
                self.errors[key] = error
        if key not in self.errors:
            skipped = f"forward and backward took {self.call_seconds:.0f} s"
            return dict(tokens=tokens, routing=routing, skipped=skipped)
        point = measure(self.row, self.shape, tokens, routing, self.seconds, self.beside)
        return point | dict(error=self.errors[key])


def main() -> None:
    layer = None
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            message = json.loads(line)
            try:
                if layer is None:
                    layer = Layer(message)
                    answer = layer.answer
                else:
                    answer = layer.point(message["tokens"], message["routing"])
            except check.WrongResult as wrong:
                answer = dict(wrong=str(wrong))
            except (check.Unavailable, ImportError) as error:
                answer = dict(unavailable=str(error))
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
