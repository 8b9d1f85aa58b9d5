"""The goals of a layer's speed and size as lines: figure, limit, reached or not. Pure functions of measured results.

A result is what benchmarks/worker.py writes; times are medians. Roofline: min(compute peak, DRAM bandwidth * operations
per byte of the packed experts that a call needs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.probes import Limits
from benchmarks.shapes import SHAPES

MANY_ROWS, FEW_ROWS = 128, (16, 64)  # routed rows per active expert
FORMATS = ("bf16", "int8", "int4", "fp8", "mxfp4")
RANKS = (8, 16, 64)


@dataclass(frozen=True)
class Line:
    """One goal. ``reached`` is None where it could not be measured; ``figure`` then says why."""

    what: str
    goal: str
    figure: str
    reached: bool | None

    @property
    def verdict(self) -> str:
        return {True: "reached", False: "not reached", None: "not measured"}[self.reached]


class Results:
    """Points of shape A with balanced routing, by row name and tokens."""

    def __init__(self, results: list[dict[str, Any]], limits: Limits) -> None:
        self.limits = limits
        self.rows = {r["row"]: r for r in results if r["shape"] == "A" and r.get("isa", limits.isa) == limits.isa}
        self.other_isas = [r for r in results if r.get("isa", limits.isa) != limits.isa]

    def points(self, row: str) -> list[dict[str, Any]]:
        points = self.rows.get(row, {}).get("points", [])
        return [p for p in points if p["routing"] == "balanced" and "skipped" not in p]

    def many(self, row: str) -> dict[str, Any] | None:
        """The point of the fewest rows that count as many."""
        return next((p for p in sorted(self.points(row), key=lambda p: p["tokens"]) if p["rows"] >= MANY_ROWS), None)

    def why_not(self, row: str) -> str:
        return reason(self.rows.get(row), row)

    def bytes_read(self, row: str, point: dict[str, Any]) -> float:
        """Packed bytes of the experts that a call of this point uses."""
        return self.rows[row]["weights_mib"] * 2**20 / SHAPES["A"].E * point["active"]

    def roof(self, row: str, point: dict[str, Any]) -> float:
        """TFLOP/s that compute and memory allow, as they were beside the measurement; where nobody looked, at best."""
        intensity = SHAPES["A"].flops(point["tokens"]) / self.bytes_read(row, point)
        return min(float(point.get("fwd_peak") or self.limits.peak), self.dram(point) * intensity / 1e3)

    def dram(self, point: dict[str, Any], part: str = "fwd") -> float:
        """GB/s that memory gave beside the measurement of a part, or, where nobody looked, at best."""
        return float(point.get(f"{part}_dram") or self.limits.dram)


def reason(result: dict[str, Any] | None, row: str) -> str:
    """Why a result lacks a point."""
    if result is None:
        return f"{row} was not run"
    skipped = [f"T = {p['tokens']}: {p['skipped']}" for p in result.get("points", []) if "skipped" in p]
    return result.get("unavailable") or result.get("wrong") or "; ".join(skipped) or f"{row} has no such point"


def tflops(point: dict[str, Any], part: str = "fwd", shape: str = "A") -> float:
    """Operations of the base products over the time of forward or backward."""
    return SHAPES[shape].flops(point["tokens"]) / point[f"{part}_ms"] / 1e9


def _step(point: dict[str, Any]) -> float:
    return point["fwd_ms"] + point["bwd_ms"]


def forward_lines(r: Results) -> Iterator[Line]:
    """Forward with bf16 products at many rows, by format, and how far the formats are apart."""
    times = {}
    for row in FORMATS:
        if (point := r.many(row)) is None:
            yield Line(f"forward, bf16 products, {row}, {MANY_ROWS} rows", ">= 50 % of peak", r.why_not(row), None)
            continue
        times[row] = point["fwd_ms"]
        share = tflops(point) / r.limits.peak
        figure = f"{share:.0%} ({tflops(point):.2f} of {r.limits.peak:.2f} TFLOP/s)"
        yield Line(f"forward, bf16 products, {row}, {point['rows']:.0f} rows", ">= 50 % of peak", figure, share >= 0.5)
    if len(times) == len(FORMATS):
        spread = max(times.values()) / min(times.values()) - 1
        yield Line("formats against each other, forward", "<= 15 %", f"{spread:.0%}", spread <= 0.15)


def int8_lines(r: Results) -> Iterator[Line]:
    """Native int8 products against their own peak and against bf16 products."""
    what = f"forward, int8 products, {MANY_ROWS} rows"
    point, base = r.many("int8*int8"), r.many("int8")
    if point is None or base is None:
        yield Line(what, ">= 40 % of the int8 peak", r.why_not("int8*int8"), None)
        yield Line(what, ">= 1.5 x bf16 products", r.why_not("int8*int8"), None)
        return
    if r.limits.int8_peak is None:
        yield Line(what, ">= 40 % of the int8 peak", "no probe of the int8 peak", None)
    else:
        share = tflops(point) / r.limits.int8_peak
        figure = f"{share:.0%} ({tflops(point):.2f} of {r.limits.int8_peak:.2f} TOP/s)"
        yield Line(what, ">= 40 % of the int8 peak", figure, share >= 0.4)
    faster = base["fwd_ms"] / point["fwd_ms"]
    yield Line(what, ">= 1.5 x bf16 products", f"{faster:.2f} x", faster >= 1.5)


def backward_lines(r: Results) -> Iterator[Line]:
    for row in (*FORMATS, "int8*int8+grad8"):  # gradients on the same compute type
        what, goal = f"backward for the inputs, {row}", "<= 1.25 x forward"
        if (point := r.many(row)) is None:
            yield Line(what, goal, r.why_not(row), None)
            continue
        ratio = point["bwd_ms"] / point["fwd_ms"]
        yield Line(what, goal, f"{ratio:.2f} x ({point['bwd_ms']:.0f} / {point['fwd_ms']:.0f} ms)", ratio <= 1.25)


def lora_lines(r: Results) -> Iterator[Line]:
    base = r.many("int8")
    for rank in RANKS:
        what, goal = f"LoRA rank {rank}, forward + backward", "<= 1.35 x without"
        point = r.many(f"int8+lora{rank}")
        if point is None or base is None:
            yield Line(what, goal, r.why_not(f"int8+lora{rank}"), None)
            continue
        ratio = _step(point) / _step(base)
        yield Line(what, goal, f"{ratio:.2f} x ({_step(point):.0f} / {_step(base):.0f} ms)", ratio <= 1.35)


def decode_lines(r: Results) -> Iterator[Line]:
    """One row per expert: codes read once, against the bandwidth of DRAM."""
    for row in ("int8", "int4"):
        for tokens in (1, 8):
            what, goal = f"T = {tokens}, {row}", ">= 80 % of DRAM read bandwidth"
            point = next((p for p in r.points(row) if p["tokens"] == tokens), None)
            if point is None:
                yield Line(what, goal, r.why_not(row), None)
                continue
            rate = r.bytes_read(row, point) / point["infer_ms"] / 1e6
            dram = r.dram(point, "infer")
            share = rate / dram
            figure = f"{share:.0%} ({rate:.1f} of {dram:.1f} GB/s, {point['infer_ms']:.2f} ms)"
            yield Line(what, goal, figure, share >= 0.8)


def few_rows_lines(r: Results) -> Iterator[Line]:
    for row in FORMATS:
        points = [p for p in r.points(row) if FEW_ROWS[0] <= p["rows"] <= FEW_ROWS[1]]
        if not points:
            yield Line(f"16 to 64 rows, {row}", ">= 70 % of the roofline", r.why_not(row), None)
        for point in points:
            roof = r.roof(row, point)
            share = tflops(point) / roof
            figure = f"{share:.0%} ({tflops(point):.2f} of {roof:.2f} TFLOP/s)"
            yield Line(f"{point['rows']:.0f} rows, {row}", ">= 70 % of the roofline", figure, share >= 0.7)


def isa_lines(r: Results) -> Iterator[Line]:
    """Every instruction set but AMX against its own peak; AMX is judged by :func:`forward_lines`."""
    found = [(x["isa"], x) for x in r.other_isas]
    if r.limits.isa != "amx":
        found.insert(0, (r.limits.isa, r.rows.get("bf16")))
    for isa, result in found:
        points = [
            p for p in (result or {}).get("points", []) if p.get("rows", 0) >= MANY_ROWS and p["routing"] == "balanced"
        ]
        if not points:
            yield Line(f"{isa}, bf16", ">= 60 % of its peak", reason(result, "bf16"), None)
            continue
        rate, peak = tflops(points[0]), r.limits.peaks[isa]
        figure = f"{rate / peak:.0%} ({rate:.2f} of {peak:.2f} TFLOP/s)"
        yield Line(f"{isa}, bf16, {points[0]['rows']:.0f} rows", ">= 60 % of its peak", figure, rate / peak >= 0.6)


def memory_lines(r: Results) -> Iterator[Line]:
    """1.03 x packed codes + one workspace, and with a recorded forward the saved activations besides."""
    for row in FORMATS:
        what, goal = f"memory after backward, {row}", "<= 1.03 x packed + workspace"
        if (m := r.rows.get(row, {}).get("memory")) is None:
            yield Line(what, goal, r.why_not(row), None)
            continue
        allowed = 1.03 * m["packed_mib"] + m["workspace_mib"]
        figure = f"{m['held_mib']:.0f} of {allowed:.0f} MiB (packed {m['packed_mib']:.0f})"
        yield Line(what, goal, figure, m["held_mib"] <= allowed)
        allowed += m["activations_mib"]
        figure = f"{m['saved_mib']:.0f} of {allowed:.0f} MiB"
        yield Line(f"memory between, {row}", "the same + 2F + D bf16 per row", figure, m["saved_mib"] <= allowed)


def packing_lines(r: Results) -> Iterator[Line]:
    for row in FORMATS:
        what, goal = f"quantise + pack from bf16, {row}", ">= 1 GB/s per core"
        if (packing := r.rows.get(row, {}).get("packing")) is None:
            yield Line(what, goal, r.why_not(row), None)
            continue
        rate = packing["gb_per_s_per_thread"]
        yield Line(what, goal, f"{rate:.2f} GB/s ({packing['seconds']:.2f} s a layer)", rate >= 1.0)


def other_lines(mapping: dict[str, Any], overhead: dict[str, Any]) -> Iterator[Line]:
    """Mapping a packed file against reading it, and the cost of a call that computes next to nothing."""
    goal = "as fast as the disk"
    if "unavailable" in mapping:
        yield Line("mapping a cached model", goal, mapping["unavailable"], None)
    else:
        ratio = mapping["mapped_gb_per_s"] / mapping["read_gb_per_s"]
        figure = f"{mapping['mapped_gb_per_s']:.1f} GB/s; plain read {mapping['read_gb_per_s']:.1f}"
        yield Line("mapping a cached model, checksums included", goal, figure, ratio >= 0.8)
    goal = "<= 30 us"
    if "unavailable" in overhead:
        yield Line("a call, python to kernel, T = 1", goal, overhead["unavailable"], None)
        return
    for name, seconds in overhead.items():
        yield Line(f"a call, python to kernel, T = 1, {name}", goal, f"{seconds * 1e6:.0f} us", seconds <= 30e-6)


def lines(
    results: list[dict[str, Any]], limits: Limits, mapping: dict[str, Any], overhead: dict[str, Any]
) -> list[Line]:
    """The whole table."""
    r = Results(results, limits)
    parts = (forward_lines, int8_lines, backward_lines, lora_lines, decode_lines, few_rows_lines, isa_lines)
    found = [line for part in (*parts, memory_lines, packing_lines) for line in part(r)]
    return found + list(other_lines(mapping, overhead))
