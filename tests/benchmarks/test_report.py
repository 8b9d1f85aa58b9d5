"""The report holds what was measured: tables, CSV, Markdown and the plot of one made-up run."""

import csv
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from benchmarks import __main__ as bench
from benchmarks import machine, plot
from benchmarks.accuracy import Accuracy
from benchmarks.reach import Line
from benchmarks.report import Report, markdown, not_run_rows, write_csv
from kt_sft import native
from tests.benchmarks.test_reach import LIMITS, point, row

FACTS = dict(cpu="a CPU", commit="abc", date="2020-01-01", command="make bench")


@pytest.fixture
def report():
    olmoe = row("int8", dict(point(64, 0.2), routing="zipf")) | dict(shape="olmoe")
    skipped = dict(tokens=2048, routing="balanced", skipped="forward and backward took 9 s")
    peer = row("bf16", point(1, 0.01), skipped) | dict(row="torch loop")
    failed = dict(row="kt fp8", shape="A", isa="avx512_bf16", unavailable="exit status -11: no message")
    return Report(
        FACTS, LIMITS, [row("int8", point(1, 0.02), point(2048, 0.6)), olmoe, peer, failed],
        [Accuracy("int8", {"forward": (0.012, 0.015), "dX": (0.02, 0.016)})], [Line("x", "<= 1", "2", False)],
    )  # fmt: skip


def test_nothing_is_dropped(report):
    assert not_run_rows(report)[2] == [["kt fp8, shape A, avx512_bf16", "exit status -11: no message"]]
    text = markdown(report)
    for expected in ("kt fp8", "forward and backward took 9 s", "not reached", "OLMoE", "zipf", "1.20% (<= 1.5)",
                     "2.00% (> 1.6)", "a CPU", "commit abc", "50.0 GB/s"):  # fmt: skip
        assert expected in text


def test_csv_has_one_line_per_point_with_the_machine(report, tmp_path):
    points, limits, _ = write_csv(report, tmp_path, "x")
    with points.open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["row"], r["shape"], r["tokens"]) for r in rows] == [
        ("int8", "A", "1"), ("int8", "A", "2048"), ("int8", "olmoe", "64"), ("torch loop", "A", "1"),
        ("torch loop", "A", "2048"),
    ]  # fmt: skip
    assert rows[1]["fwd_tflops"] == "0.6" and rows[1]["cpu"] == "a CPU" and rows[1]["commit"] == "abc"
    assert rows[4]["skipped"] and not rows[4]["fwd_ms"]
    with limits.open() as file:
        assert {r["limit"]: r["measured"] for r in csv.DictReader(file)}["DRAM read, huge pages"] == "50.0 GB/s"


def test_the_plot_is_an_svg_that_names_its_curves(report, tmp_path):
    plot.roofline(report, tmp_path / "a.svg")
    plot.roofline(report, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for expected in ("int8", "torch loop", "avx512_bf16 peak", "forward", "backward"):
        assert expected in text


def test_reasons_end_up_in_the_table(report):
    lonely = replace(report, results=[dict(row="int8", shape="A", isa="avx512_bf16", wrong="output differs")])
    assert not_run_rows(lonely)[2] == [["int8, shape A, avx512_bf16", "output differs"]]


def test_cache_sizes_are_read_from_sysfs(tmp_path):
    for name, kind, level, size in (("index0", "Data", 1, "48K"), ("index1", "Instruction", 1, "32K"),
                                    ("index2", "Unified", 2, "1M")):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        for file, text in (("type", kind), ("level", level), ("size", size)):
            (folder / file).write_text(f"{text}\n")
    assert machine.cache_bytes(1, tmp_path) == 48 << 10 and machine.cache_bytes(2, tmp_path) == 1 << 20
    assert machine.cache_bytes(3, tmp_path) is None


def test_processors_of_one_name_are_told_apart_by_family_and_model(tmp_path):
    one = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n"
    (tmp_path / "cpuinfo").write_text(f"{one}\n{one.replace('25', '26')}\n")
    assert machine.cpu_name(tmp_path / "cpuinfo") == "AMD EPYC (family 25 model 17)"
    (tmp_path / "cpuinfo").write_text("processor : 0\nBogoMIPS : 50.00\n")
    assert machine.cpu_name(tmp_path / "cpuinfo") == "unknown"


def test_a_whole_run_covers_every_row_instruction_set_layer_and_routing(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    args = bench.parse_args()
    jobs = list(bench.jobs(args))
    assert [j["row"] for j in jobs if j["shape"] == "A" and "isa" not in j] == [*bench.OURS, *bench.TORCH, *bench.KT]
    assert {j["isa"] for j in jobs if "isa" in j} == set(native.isas()) - {native.isa(), "amx_model"}
    layers = [j for j in jobs if j["shape"] != "A"]
    assert len(layers) >= 6 and all(j["routings"] == ["balanced", "zipf"] for j in layers)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--rows", "int8", "--tokens", "1"])
    few = bench.parse_args()
    assert not few.whole and [j["tokens"] for j in bench.jobs(few)] == [[1]]
