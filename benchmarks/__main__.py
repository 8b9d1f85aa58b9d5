"""One MoE layer beside this machine's limits and the peers: ``python -m benchmarks`` (``make bench``).

Order: tests of the kernels (no report if one fails), limits, our rows and the peers' on the layer of Qwen3-30B-A3B,
every other instruction set, other published layers, accuracy, reach. Every row is a process of its own and is compared
with float32 before it is timed; rows take turns, point by point. Writes benchmarks/results/*.csv, docs/measurements.md
and docs/roofline.svg.

    python -m benchmarks --quick                              # six minutes, writes nothing
    python -m benchmarks --rows int8,int8+lora16 --tokens 1,2048
    KT_SFT_PEER_PYTHON=VENV/bin/python python -m benchmarks   # with kt-kernel: see benchmarks/kt_kernel_peer.py
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks import accuracy, machine, mapping, overhead, plot, probes, reach
from benchmarks.report import TABLES, Report, limit_rows, markdown, rich_table, write_csv
from benchmarks.shapes import ROUTINGS
from benchmarks.visits import QUICK_TURNS, ROUNDS, Row, groups, points_of, results, rounds
from kt_sft import native

OURS = ["bf16", "int8", "int4", "fp8", "mxfp4", "int8*int8", "int8*int8+grad8"]
OURS += ["int8+lora8", "int8+lora16", "int8+lora64", "fp8+lora16"]
TORCH = ["torch loop", "torch grouped_mm", "onednn prepacked", "torch int_mm"]
KT = ["kt bf16", "kt int8", "kt int4", "kt fp8", "kt rawint4", "kt mxfp4", "kt bf16 no lora", "kt int8 no lora"]
TOKENS = [1, 8, 64, 256, 512, 1024, 2048]
KT_TOKENS = [1, 64, 256, 2048]  # its slow formats take seconds a call
# Tokens of the other layers: one, and what gives every expert about 64 rows.
LAYERS = {
    "B": 682,
    "C": 256,
    "mixtral": 256,
    "olmoe": 512,
    "qwen2": 512,
    "glm45air": 1024,
    "gptoss": 512,
    "minimax": 1024,
}
PEER_PYTHON = "KT_SFT_PEER_PYTHON"
GATE = ["tests/ops/test_kernels.py", "tests/ops/test_experts.py", "tests/weights/test_packed_form.py"]


def start(job: dict[str, Any]) -> list[Row]:
    """The row of a job; of kt-kernel one with as many threads as ours and one with one fewer (kt_kernel_peer.py)."""
    if not job["row"].startswith("kt "):
        return [Row(job)]
    if not (python := os.environ.get(PEER_PYTHON)):
        return [Row(job, unavailable=f"{PEER_PYTHON} is not set")]
    return [Row(job | dict(threads=threads), python) for threads in (job["threads"], job["threads"] - 1) if threads > 0]


def jobs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every row to run, in order."""
    common = dict(threads=args.threads, seconds=args.seconds)
    for row in args.rows:
        tokens = [t for t in args.tokens if not row.startswith("kt ") or t in KT_TOKENS]
        yield common | dict(row=row, shape="A", tokens=tokens, routings=["balanced"])
    for isa in native.isas():
        if args.whole and isa not in (native.isa(), "amx_model"):
            yield common | dict(row="bf16", shape="A", tokens=[2048], routings=["balanced"], isa=isa)
    for shape in args.layers:
        yield common | dict(row="int8", shape=shape, tokens=[1, LAYERS[shape]], routings=list(ROUTINGS))


def run_rows(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """All results; stops at the first of our rows that is wrong."""
    found = []
    for rows in groups(list(jobs(args)), start):
        total = args.rounds * QUICK_TURNS * len(points_of(rows)) * len(rows)
        names = ", ".join(row.job["row"] for row in rows)
        for row in track(rounds(rows, args.rounds), f"in turn: {names}", total, console=console, transient=True):
            if "wrong" in row.result and not row.job["row"].startswith(("kt ", "torch ", "onednn ")):
                raise SystemExit(
                    f"refusing to report: {row.job['row']}, shape {row.job['shape']}: {row.result['wrong']}"
                )
        for result in results(rows):
            console.print(_short(result))
            found.append(result)
    return found


def _short(result: dict[str, Any]) -> str:
    head = f"{result['row']}, shape {result['shape']}, {result['isa']}: "
    times = [f"T={p['tokens']} {p['fwd_ms']:.3g}/{p['bwd_ms']:.3g}" for p in result.get("points", []) if "fwd_ms" in p]
    return head + (
        ", ".join(times) + " ms" if times else result.get("unavailable") or result.get("wrong") or "no times"
    )


def run_tests(console: Console) -> None:
    """Raises SystemExit unless the tests of the kernels pass."""
    with console.status("tests of the kernels ..."):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *GATE]
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"refusing to report: the tests fail\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
    console.print(f"tests: {done.stdout.strip().splitlines()[-1]}")


def overhead_seconds(threads: int) -> dict[str, Any]:
    """Seconds of a call that computes next to nothing, without and with gradients recorded."""
    kinds = {"moe_experts, no grad": "no gradients", "moe_experts, forward": "recorded"}
    costs = overhead.measure(threads=(threads,))
    return {kinds[c.what]: c.median / 1e6 for c in costs if c.what in kinds}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and points; writes nothing")
    parser.add_argument("--rows", help="comma-separated; writes nothing")
    parser.add_argument("--tokens", help="comma-separated; writes nothing")
    parser.add_argument("--threads", type=int, default=native.num_threads())
    parser.add_argument("--seconds", type=float, help="per point (default: 0.4; quick: 0.3)")
    args = parser.parse_args()
    args.whole = not (args.quick or args.rows or args.tokens)
    quick_rows = ["bf16", "int8", "int4", "int8*int8", "int8*int8+grad8", "int8+lora16"]
    quick_rows += ["torch grouped_mm", "onednn prepacked"]
    rows = args.rows.split(",") if args.rows else None
    args.rows = rows or (quick_rows if args.quick else [*OURS, *TORCH, *KT])
    quick_tokens = [1, 8, 256, 2048]
    args.tokens = [int(t) for t in args.tokens.split(",")] if args.tokens else quick_tokens if args.quick else TOKENS
    args.layers = list(LAYERS) if args.whole else ["olmoe"] if args.quick else []
    args.seconds = args.seconds or (0.3 if args.quick else 0.4)
    args.rounds = 2 if args.quick else ROUNDS
    return args


def main() -> None:
    args = parse_args()
    console = Console(width=150)
    native.set_num_threads(args.threads)
    run_tests(console)
    date = datetime.date.today().isoformat()
    facts = dict(cpu=machine.cpu_name(), commit=machine.commit(), date=date, command="make bench")
    report = Report(facts, probes.measure())
    console.print(rich_table(limit_rows(report)))
    report.results = run_rows(args, console)
    report.limits = report.limits.better(probes.measure())  # the best of several tries, like every row
    if args.whole or args.quick:
        report.accuracy = [accuracy.measure_row(name) for name in accuracy.ROWS]
        report.lines = reach.lines(report.results, report.limits, mapping.measure(), overhead_seconds(args.threads))
    for make in TABLES:
        if (rows := make(report))[2]:
            console.print(rich_table(rows))
    if args.whole:
        name = machine.slug(f"{facts['cpu']} {report.limits.isa} {args.threads}t")
        paths = write_csv(report, machine.ROOT / "benchmarks" / "results", name)
        docs = machine.ROOT / "docs"
        plot.roofline(report, docs / "roofline.svg")
        (docs / "measurements.md").write_text(markdown(report))
        written = [*paths, docs / "roofline.svg", docs / "measurements.md"]
        console.print("written: " + ", ".join(str(p.relative_to(machine.ROOT)) for p in written))


if __name__ == "__main__":
    main()
