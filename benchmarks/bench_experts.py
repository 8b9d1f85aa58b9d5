"""Forward and backward of one routed-experts layer: milliseconds, TFLOP/s, fraction of the measured peak, memory held.

    python -m benchmarks.bench_experts                    # shape A, our formats beside stock transformers
    python -m benchmarks.bench_experts --shape B --rows int8,int8+lora16 --tokens 1,64,2048

Each row runs in a process of its own, so that its memory can be read off, and refuses to report a time unless its
output and input gradient agree with a float32 evaluation of the same weights. Times are medians with the 20th and 80th
percentile; calls of few tokens rotate over several inputs, so that weights do not stay in the cache.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rows import SHAPES, Shape, make_inputs, make_row, make_weights
from kt_sft import native
from kt_sft.ops.reference import moe_experts_reference

ROWS = "bf16,int8,int4,int8+lora16,torch loop,torch grouped_mm"
RESULTS = Path(__file__).parent / "results"
FIELDS = ["shape", "row", "tokens", "fwd_ms", "fwd_p20", "fwd_p80", "bwd_ms", "bwd_p20", "bwd_p80"]
FIELDS += [
    "fwd_tflops",
    "bwd_tflops",
    "fwd_of_peak",
    "bwd_of_peak",
    "weights_mib",
    "loaded_mib",
    "held_mib",
    "isa",
    "threads",
    "cpu",
    "commit",
]


def anonymous_mib() -> float:
    """Anonymous memory of this process after returning what the allocator keeps, from /proc/self/status."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1024


def check(row, shape: Shape, weights: tuple[torch.Tensor, ...]) -> None:
    """Raise unless output and input gradient equal the oracle's to bf16 accuracy."""
    x, ids, topk, grad_out = make_inputs(shape, 4, seed=99)
    used = ids.unique()
    if hasattr(row, "packed"):
        weights = row.packed.dequantize()
    dense = [w[used].float() for w in weights]
    local = torch.searchsorted(used, ids)
    lora, scaling = {}, 1.0
    if getattr(row, "lora", None) is not None:
        lora, scaling = {n: f.detach()[used] for n, f in row.lora.factors().items()}, row.lora.scaling
    xr = x.detach().float().requires_grad_()
    expected = moe_experts_reference(xr, local, topk.detach(), *dense, lora, scaling)
    expected.backward(grad_out.float())
    out = row.forward(x, ids, topk)
    out.backward(grad_out)
    for name, got, want in (("output", out, expected), ("input gradient", x.grad, xr.grad)):
        ratio = ((got.float() - want).norm() / want.norm()).item()
        if not ratio < 2e-2:
            raise SystemExit(f"refusing to report: {name} differs from the reference by {ratio:.3g}")


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in ms."""
    t = torch.tensor(samples, dtype=torch.float64) * 1e3
    return tuple(round(v, 4) for v in torch.quantile(t, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist())


def measure(row, shape: Shape, tokens: int, seconds: float) -> tuple[list[float], list[float]]:
    """Forward and backward times in seconds, for at least 5 calls and about `seconds`."""
    inputs = [make_inputs(shape, tokens, seed) for seed in range(max(1, min(16, 64 // tokens)))]
    forward, backward = [], []
    stop = time.perf_counter() + seconds
    while len(forward) < 7 or time.perf_counter() < stop:
        x, ids, topk, grad_out = inputs[len(forward) % len(inputs)]
        t0 = time.perf_counter()
        out = row.forward(x, ids, topk)
        t1 = time.perf_counter()
        out.backward(grad_out)
        t2 = time.perf_counter()
        forward.append(t1 - t0)
        backward.append(t2 - t1)
    return forward[2:], backward[2:]


def run_row(name: str, shape: Shape, tokens: list[int], seconds: float, peak: float) -> list[dict]:
    """All sizes of one row, in this process."""
    weights = make_weights(shape)
    before = anonymous_mib()
    row = make_row(name, shape, weights)
    source = sum(w.nbytes for w in weights) / 2**20
    loaded = anonymous_mib() - before
    check(row, shape, weights)
    del weights
    results = []
    for count in tokens:
        forward, backward = measure(row, shape, count, seconds)
        (f, f20, f80), (b, b20, b80) = percentiles(forward), percentiles(backward)
        rates = [shape.flops(count) / ms / 1e9 for ms in (f, b)]
        result = dict(row=name, tokens=count, fwd_ms=f, fwd_p20=f20, fwd_p80=f80, bwd_ms=b, bwd_p20=b20, bwd_p80=b80)
        result |= dict(
            fwd_tflops=rates[0], bwd_tflops=rates[1], fwd_of_peak=rates[0] / peak, bwd_of_peak=rates[1] / peak
        )
        result |= dict(weights_mib=row.weight_bytes / 2**20, loaded_mib=loaded)
        result["held_mib"] = anonymous_mib() - (before - source)
        results.append(result)
    return results


def cpu_name() -> str:
    """Model name and family of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str:
    """Short hash of the checkout, or unknown."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"


def report(console: Console, shape: Shape, results: list[dict]) -> None:
    table = Table(title=f"{shape.name}: E {shape.E}, top-{shape.K}, D {shape.D}, F {shape.F}")
    for head in (
        "row",
        "T",
        "fwd ms",
        "TFLOP/s",
        "of peak",
        "bwd ms",
        "TFLOP/s",
        "of peak",
        "weights MiB",
        "loaded MiB",
        "held MiB",
    ):
        table.add_column(head, justify="left" if head == "row" else "right")
    for r in sorted(results, key=lambda r: r["tokens"]):
        table.add_row(
            r["row"], str(r["tokens"]), f"{r['fwd_ms']:.1f}", f"{r['fwd_tflops']:.3f}", f"{r['fwd_of_peak']:.0%}",
            f"{r['bwd_ms']:.1f}", f"{r['bwd_tflops']:.3f}", f"{r['bwd_of_peak']:.0%}", f"{r['weights_mib']:.0f}",
            f"{r['loaded_mib']:.0f}", f"{r['held_mib']:.0f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="A")
    parser.add_argument("--rows", default=ROWS, help="comma-separated (default: %(default)s)")
    parser.add_argument("--tokens", default="1,8,64,512,2048")
    parser.add_argument("--threads", type=int, default=native.num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="per point (default: %(default)s)")
    parser.add_argument("--one-row", help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape, tokens = SHAPES[args.shape], [int(t) for t in args.tokens.split(",")]
    native.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    if args.one_row:
        json.dump(run_row(args.one_row, shape, tokens, args.seconds, args.peak), sys.stdout)
        return

    console = Console(width=120)
    peak = max(native.peak_flops(20_000_000) for _ in range(5)) / 1e12
    console.print(
        f"{cpu_name()}, {args.threads} threads, {native.isa()}: peak {peak:.2f} TFLOP/s measured from registers"
    )
    facts = dict(shape=args.shape, isa=native.isa(), threads=args.threads, cpu=cpu_name(), commit=commit())
    results: list[dict] = []
    for name in args.rows.split(","):
        command = [sys.executable, "-m", "benchmarks.bench_experts", "--one-row", name, "--peak", str(peak)]
        command += [
            "--shape",
            args.shape,
            "--tokens",
            args.tokens,
            "--threads",
            str(args.threads),
            "--seconds",
            str(args.seconds),
        ]
        with console.status(f"{name} ..."):
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            )
        if done.returncode:
            raise SystemExit(f"{name}: failed with exit status {done.returncode}")
        results += [facts | r for r in json.loads(done.stdout)]
    report(console, shape, results)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"experts_{args.shape}_{native.isa()}_{args.threads}t.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(results)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
