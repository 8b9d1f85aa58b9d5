"""Measured results as tables: for the terminal (rich), for docs/measurements.md (Markdown) and as CSV."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.accuracy import Accuracy, cell
from benchmarks.probes import Limits
from benchmarks.reach import Line, tflops
from benchmarks.shapes import SHAPES
from benchmarks.visits import QUICK, QUICK_TURNS, ROUNDS

TIMES = [f"{part}_{q}" for part in ("fwd", "bwd", "infer") for q in ("p20", "ms", "p80", "peak", "dram")]
FIELDS = ["shape", "row", "isa", "threads", "routing", "tokens", "rows", "active", *TIMES, "fwd_tflops", "bwd_tflops"]
FIELDS += ["error", "calls", "others", "weights_mib", "skipped", "cpu", "commit"]


@dataclass
class Report:
    """Everything that one run of the benchmark found; ``facts``: cpu, commit, date, command."""

    facts: dict[str, str]
    limits: Limits
    results: list[dict[str, Any]] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def points(self, shape_is_a: bool = True) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(row, point) of shape A on the chosen instruction set, or of all other shapes."""
        chosen = [r for r in self.results if r.get("isa") == self.limits.isa and (r["shape"] == "A") == shape_is_a]
        return [(r, p) for r in chosen for p in r.get("points", [])]

    def not_run(self) -> list[tuple[str, str]]:
        """(row, reason) of every row that has no times."""
        reasons = [(r, r.get("unavailable") or r.get("wrong")) for r in self.results]
        return [(f"{r['row']}, shape {r['shape']}, {r['isa']}", reason) for r, reason in reasons if reason]

    def others(self) -> float:
        """The most cores that other processes took during a measurement."""
        return max((p.get("others", 0.0) for r in self.results for p in r.get("points", [])), default=0.0)


Rows = tuple[str, list[str], list[list[str]]]  # title, head, body


def limit_rows(report: Report) -> Rows:
    limits = report.limits
    body = [[f"{isa} products, from registers", f"{v:.2f} TFLOP/s"] for isa, v in limits.peaks.items()]
    body += [[f"{isa} int8 products, from registers", f"{v:.2f} TOP/s"] for isa, v in limits.int8_peaks.items()]
    body += [["L2 read", f"{limits.l2:.0f} GB/s"], ["DRAM read, huge pages", f"{limits.dram:.1f} GB/s"]]
    body += [["DRAM read, 4 KiB pages", f"{limits.dram_4k:.1f} GB/s"]]
    return f"limits, {limits.threads} threads together", ["limit", "measured"], body


def _ms(point: dict[str, Any], part: str) -> str:
    if f"{part}_ms" not in point:
        return ""
    return f"{point[f'{part}_ms']:.3g} ({point[f'{part}_p20']:.3g} to {point[f'{part}_p80']:.3g})"


def point_rows(report: Report) -> Rows:
    """Shape A, by tokens, then in the order of the rows."""
    body = []
    for row, p in sorted(report.points(), key=lambda pair: pair[1]["tokens"]):
        head = [str(p["tokens"]), f"{p['rows']:.1f}" if "rows" in p else "", row["row"]]
        if "skipped" in p:
            body.append([*head, p["skipped"], "", "", "", ""])
            continue
        rates = [f"{tflops(p, part):.3g}" for part in ("fwd", "bwd")]
        share = f"{tflops(p) / report.limits.peak:.0%}"
        body.append([*head, _ms(p, "infer"), _ms(p, "fwd"), _ms(p, "bwd"), " / ".join(rates), share])
    heads = ["T", "rows per expert", "row", "inference ms", "forward ms", "backward ms", "TFLOP/s", "of the best peak"]
    return SHAPES["A"].describe() + ", balanced routing", heads, body


def shape_rows(report: Report) -> Rows:
    body = []
    for row, p in report.points(shape_is_a=False):
        head = [SHAPES[row["shape"]].describe(), row["row"], p["routing"], str(p["tokens"])]
        if "skipped" in p:
            body.append([*head, p["skipped"], "", "", ""])
            continue
        rates = " / ".join(f"{tflops(p, part, row['shape']):.3g}" for part in ("fwd", "bwd"))
        body.append([*head, f"{p['active']:.0f}", _ms(p, "fwd"), _ms(p, "bwd"), rates])
    heads = ["layer", "row", "routing", "T", "active experts", "forward ms", "backward ms", "TFLOP/s"]
    return "other published layers", heads, body


def reach_rows(report: Report) -> Rows:
    body = [[x.what, x.goal, x.figure, x.verdict] for x in report.lines]
    return "reach", ["what", "goal", "measured", ""], body


def accuracy_rows(report: Report) -> Rows:
    columns = ["forward", "dX", "d LoRA", "adjoint"]
    body = []
    for row in report.accuracy:
        cells = [cell(*row.errors[c]) if c in row.errors else "" for c in columns]
        body.append([row.row, *([row.unavailable, "", "", ""] if row.unavailable else cells)])
    return "relative L2 error against float32, shape A with 16 experts", ["row", *columns], body


def not_run_rows(report: Report) -> Rows:
    return "not run", ["row", "reason"], [list(pair) for pair in report.not_run()]


TABLES = (limit_rows, point_rows, shape_rows, accuracy_rows, not_run_rows, reach_rows)


def rich_table(rows: Rows) -> Table:
    title, head, body = rows
    table = Table(*head, title=title)
    for cells in body:
        table.add_row(*cells)
    return table


def markdown(report: Report) -> str:
    """docs/measurements.md: written by the benchmark, never by hand."""
    facts = report.facts
    text = [
        "# Measurements",
        f"Written by `{facts['command']}` on {facts['date']}: {facts['cpu']}, {report.limits.threads} threads, "
        f"{report.limits.isa}, commit {facts['commit']}. Times are medians with the 20th and 80th percentile, in the "
        f"best of {ROUNDS} rounds over all rows ({ROUNDS * QUICK_TURNS} where one takes under {QUICK:.0f} s); other "
        f"processes took up to {report.others():.1f} cores meanwhile. "
        "Limits are the best that was found; up to 64 rows, reach compares with what was found between the same calls. "
        "What limits what: [performance.md](performance.md).",
        "![roofline](roofline.svg)",
    ]
    for make in (limit_rows, reach_rows, accuracy_rows, point_rows, shape_rows, not_run_rows):
        title, head, body = make(report)
        if body:
            lines = [head, ["---"] * len(head), *body]
            text += [f"## {title[0].upper()}{title[1:]}", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    return "\n\n".join(text) + "\n"


def write_csv(report: Report, folder: Path, name: str) -> list[Path]:
    """``points_NAME.csv`` with every timed point and ``limits_NAME.csv``; returns their paths."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{kind}_{name}.csv" for kind in ("points", "limits", "reach")]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in report.results:
            for point in row.get("points", []):
                rates = {}
                if "fwd_ms" in point:
                    rates = {f"{part}_tflops": tflops(point, part, row["shape"]) for part in ("fwd", "bwd")}
                writer.writerow({k: _rounded(v) for k, v in (row | point | rates | report.facts).items()})
    for path, (_, head, body) in zip(paths[1:], (limit_rows(report), reach_rows(report)), strict=True):
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [[*head, "cpu", "commit"], *([*cells, report.facts["cpu"], report.facts["commit"]] for cells in body)]
            )
    return paths


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
