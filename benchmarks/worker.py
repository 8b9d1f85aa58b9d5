"""One row in one process: build the layer, check it, time it. ``python -m benchmarks.worker JOB.json RESULT.json``.
A job with ``points`` of an earlier visit times them once more: one round a visit.

The result holds ``points`` (one per number of tokens; times in ms, median, 20th and 80th percentile of the best round),
``memory`` and ``packing`` of our rows, or ``unavailable`` / ``wrong`` with the reason.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, machine
from benchmarks.shapes import SHAPES, TINY, Shape, bank, make_inputs

DECODE_TOKENS = 8  # up to here a call without gradients is timed too
MEMORY_ROWS = 64  # per expert: of more, memory limits nothing
MIN_CALLS, MAX_CALL_SECONDS = 5, 4.0
READ_EVERY = 5e-3  # seconds of calls between two looks at what DRAM gives


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of seconds, in ms."""
    ms = [s * 1e3 for s in samples]
    if len(ms) == 1:
        return ms[0], ms[0], ms[0]
    cuts = statistics.quantiles(ms, n=10, method="inclusive")
    return statistics.median(ms), cuts[1], cuts[7]


def repeat(
    call: Callable[[int], tuple[float, ...]], seconds: float, look: Callable[[], float] | None = None
) -> tuple[list[list[float]], list[float]]:
    """Times of each part of ``call(i)``: two calls to warm up, then at least MIN_CALLS and about ``seconds``.

    And what ``look`` found between them: after every READ_EVERY seconds of calls, and after the last.
    """
    samples, found = [], []
    stop, since = None, 0.0
    for i in range(1_000_000):
        times = call(i)
        if i < 2:
            continue
        stop = stop or time.perf_counter() + seconds
        samples.append(times)
        since += sum(times)
        last = len(samples) >= MIN_CALLS and time.perf_counter() >= stop
        if look and (last or since >= READ_EVERY):
            found.append(look())
            since = 0.0
        if last:
            break
    return [list(part) for part in zip(*samples, strict=True)], found


def measure(row: Any, shape: Shape, tokens: int, routing: str, seconds: float, dram: Any = None) -> dict[str, Any]:
    """Times of one number of tokens. Few tokens rotate over inputs, so that no weights stay in the cache.

    ``*_dram``: the median of what ``dram`` finds between the calls. On a machine shared with others that changes within
    a second, so that a median of times is only comparable with a median of what was there meanwhile.
    """
    look = dram.read if dram and tokens * shape.K <= MEMORY_ROWS * shape.E else None
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
            times, given = repeat(infer, seconds / 2, look)
            parts["infer"] = times[0], given
    point: dict[str, Any] = dict(tokens=tokens, routing=routing, active=active, rows=tokens * shape.K / active)
    for name, (samples, given) in parts.items():
        point |= dict(zip((f"{name}_ms", f"{name}_p20", f"{name}_p80"), quantiles(samples), strict=True))
        if given:
            point[f"{name}_dram"] = statistics.median(given)
    return point | dict(calls=len(parts["fwd"][0]), others=others.cores)


def better(point: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of every part the round with the lower median."""
    best = dict(point, calls=point["calls"] + other["calls"], others=max(point["others"], other["others"]))
    for part in ("fwd", "bwd", "infer"):
        if f"{part}_ms" in other and other[f"{part}_ms"] < point[f"{part}_ms"]:
            best |= {key: value for key, value in other.items() if key.startswith(f"{part}_")}
    return best


def measure_again(
    row: Any, shape: Shape, points: list[dict[str, Any]], seconds: float, dram: Any = None
) -> list[dict[str, Any]]:
    """One more round over the points that have times; of every part the better one is kept."""
    return [
        p if "skipped" in p else better(p, measure(row, shape, p["tokens"], p["routing"], seconds, dram))
        for p in points
    ]


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


def probe(row: Any) -> Any:
    """What reads memory beside our rows; it holds memory itself, so it comes after the row's was measured."""
    return row.dram() if hasattr(row, "dram") else None


def run(job: dict[str, Any]) -> dict[str, Any]:
    """All that ``job`` asks for: row, shape, threads, seconds; tokens (list) and routings, or ``points``."""
    shape = SHAPES[job["shape"]]
    torch.set_num_threads(job["threads"])
    result: dict[str, Any] = dict(row=job["row"], shape=job["shape"], threads=job["threads"], points=[])
    before = memory_before(job)
    row = make_row(job, shape)
    bank.cache_clear()
    if "points" in job:
        return result | dict(points=measure_again(row, shape, job["points"], job["seconds"], probe(row)))
    result["weights_mib"] = row.weight_bytes / 2**20
    if hasattr(row, "pack_seconds"):
        source = 2 * shape.expert_values * shape.E / 1e9 / job["threads"]
        result["packing"] = dict(seconds=row.pack_seconds, gb_per_s_per_thread=source / row.pack_seconds)
        result["memory"] = memory(row, shape, max(job["tokens"]), before)
    expected, dram = check.evaluate(row, shape), probe(row)
    check.check(row, shape, expected, 3, "balanced")
    call_seconds = 0.0
    for tokens, routing in itertools.product(job["tokens"], job["routings"]):
        if call_seconds <= MAX_CALL_SECONDS:
            start = time.perf_counter()
            off = check.check(row, shape, expected, tokens, routing)
            call_seconds = time.perf_counter() - start
        if call_seconds <= MAX_CALL_SECONDS:
            point = measure(row, shape, tokens, routing, job["seconds"], dram) | dict(error=off)
        else:
            point = dict(tokens=tokens, routing=routing, skipped=f"forward and backward took {call_seconds:.0f} s")
        result["points"].append(point)
    return result


def main() -> None:
    job_file, result_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    try:
        result = run(job)
    except check.WrongResult as wrong:
        result = dict(row=job["row"], shape=job["shape"], wrong=str(wrong))
    except (check.Unavailable, ImportError) as error:
        result = dict(row=job["row"], shape=job["shape"], unavailable=str(error))
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
