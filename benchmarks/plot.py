"""The roofline of shape A: routed rows per expert against TFLOP/s, forward and backward, ours and the peers."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks.reach import tflops
from benchmarks.report import Report
from benchmarks.shapes import SHAPES

_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}  # per weight, scales included where they weigh
_X = (0.9, 400.0)


def roofline(report: Report, path: Path) -> None:
    """Write the SVG; the same results give the same file."""
    matplotlib.rcParams.update({"svg.hashsalt": "kt_sft", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axis, part, title in zip(axes, ("fwd", "bwd"), ("forward", "backward"), strict=True):
        _roofs(axis, report)
        for row in [r for r in report.results if r["shape"] == "A" and r.get("isa") == report.limits.isa]:
            timed = [p for p in row.get("points", []) if f"{part}_ms" in p and p["routing"] == "balanced"]
            points = list({p["rows"]: p for p in timed}.values())  # of equal rows the most tokens
            if not points or "+lora" in row["row"]:
                continue
            ours = row["row"].startswith(("bf16", "int"))
            axis.plot(
                [p["rows"] for p in points],
                [tflops(p, part) for p in points],
                **dict(marker="o" if ours else "x", markersize=4 if ours else 5, linewidth=1.8 if ours else 0.8),
                **dict(linestyle="-" if ours else "--", label=row["row"]),
            )
        axis.set(xscale="log", yscale="log", xlim=_X, xlabel="routed rows per active expert", title=title)
        axis.grid(True, which="both", linewidth=0.2)
    axes[0].set_ylabel("TFLOP/s")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(
        f"{SHAPES['A'].name}, one layer, {report.limits.threads} threads, {report.facts['cpu']}", fontsize=10
    )
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _roofs(axis: pyplot.Axes, report: Report) -> None:
    """Compute peaks as lines across; bandwidth * 2 operations per weight and row as lines up to them."""
    limits = report.limits
    axis.axhline(limits.peak, color="black", linewidth=1)
    axis.annotate(f"{limits.isa} peak", (_X[1], limits.peak), ha="right", va="bottom", fontsize=7)
    if limits.int8_peak is not None:
        axis.axhline(limits.int8_peak, color="black", linewidth=1, linestyle=":")
        axis.annotate("int8 peak", (_X[1], limits.int8_peak), ha="right", va="bottom", fontsize=7)
    for name, width in _BYTES.items():
        ridge = limits.peak * 1e3 * width / (2 * limits.dram)  # rows where memory and compute meet
        rows = [_X[0], ridge]
        axis.plot(rows, [2 * limits.dram * r / width / 1e3 for r in rows], color="grey", linewidth=0.8)
        label = dict(ha="center", va="bottom", fontsize=6, color="grey")
        axis.text(ridge, limits.peak * 1.02, f"DRAM\n{name}", **label)
