"""Every row that can run here computes the layer, and the gate refuses one that does not."""

import copy
import json

import pytest
import torch

from benchmarks import __main__ as main
from benchmarks import check, worker
from benchmarks.check import Unavailable, WrongResult
from benchmarks.ours import Ours, parse
from benchmarks.peers import TORCH_PEERS
from benchmarks.shapes import SHAPES, expert_weights, make_inputs, make_weights
from kt_sft import native

TINY = SHAPES["tiny"]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """The peers' own memory is not ours to poison."""


def run(row, tmp_path, monkeypatch, tokens=(1, 16)):
    job = dict(row=row, shape="tiny", tokens=list(tokens), routings=["balanced", "zipf"], threads=1, seconds=0.0)
    files = [tmp_path / "job.json", tmp_path / "result.json"]
    files[0].write_text(json.dumps(job))
    monkeypatch.setattr("sys.argv", ["worker", *map(str, files)])
    worker.main()
    return json.loads(files[1].read_text())


@pytest.mark.parametrize("row", ["bf16", "int8", "int4", "int8+lora4", "int8*int8+grad8", *TORCH_PEERS])
def test_a_row_is_checked_and_timed(row, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    try:
        result = run(row, tmp_path, monkeypatch)
    finally:
        torch.set_num_threads(threads)
    assert [(p["tokens"], p["routing"]) for p in result["points"]] == [
        (1, "balanced"), (1, "zipf"), (16, "balanced"), (16, "zipf"),
    ]  # fmt: skip
    for p in result["points"]:
        assert 0 < p["fwd_p20"] <= p["fwd_ms"] <= p["fwd_p80"] and p["bwd_ms"] > 0 and 0 < p["error"] < 0.06
        assert ("fwd_dram" in p) == (row not in TORCH_PEERS) and p.get("infer_dram", 1) > 0
    assert ("memory" in result) == (row not in TORCH_PEERS)


def test_a_second_visit_keeps_the_better_times(tmp_path, monkeypatch):
    first = run("int8", tmp_path, monkeypatch)["points"]
    first[0] |= dict(fwd_ms=1e-9, bwd_ms=1e9)
    first[1] = dict(tokens=first[1]["tokens"], routing=first[1]["routing"], skipped="it took too long")
    job = json.loads((tmp_path / "job.json").read_text()) | dict(points=copy.deepcopy(first))
    again = worker.run(job)["points"]
    assert again[0]["fwd_ms"] == 1e-9 and 0 < again[0]["bwd_ms"] < 1e9 and again[0]["calls"] > first[0]["calls"]
    assert again[1] == first[1]
    assert [(p["tokens"], p["routing"]) for p in again] == [(p["tokens"], p["routing"]) for p in first]


def test_a_second_visit_keeps_the_threads_of_a_point(monkeypatch):
    jobs = []

    def run_job(job, python):
        jobs.append(job)
        if job["threads"] == 1:
            return dict(row=job["row"], unavailable="took over 600 s")
        return dict(points=[p | dict(fwd_ms=1.0) for p in job["points"]])

    monkeypatch.setattr(main, "run_job", run_job)
    points = [dict(tokens=1, threads=1, fwd_ms=2.0), dict(tokens=8, threads=2, fwd_ms=3.0)]
    result = dict(points=list(points))
    answers = list(main.visit_again(dict(row="int8", threads=2), result))
    assert [(j["threads"], [p["tokens"] for p in j["points"]]) for j in jobs] == [(1, [1]), (2, [8])]
    assert result["points"] == [points[0], dict(tokens=8, threads=2, fwd_ms=1.0)]
    assert answers[0]["unavailable"] == "took over 600 s"


class Broken(Ours):
    """Right for a few tokens, wrong for many; or one wrong factor gradient."""

    what = "output"

    def forward(self, x, ids, weights, record=True):
        out = super().forward(x, ids, weights, record)
        return out * 1.1 if self.what == "output" and len(x) > 3 else out

    def backward(self, grad_out):
        grads = super().backward(grad_out)
        if self.what == "factor":
            self.lora_grads["up_a"] = self.lora_grads["up_a"] * 0.9
        return grads


@pytest.mark.parametrize(("what", "tokens", "message"), [
    ("output", 16, "output of 16 tokens differs from float32"),
    ("factor", 3, "gradient of up_a of 3 tokens differs"),
])  # fmt: skip
def test_wrong_results_have_no_times(what, tokens, message):
    row = Broken(TINY, "bf16+lora4")
    row.what = what
    expected = check.evaluate(row, TINY)
    with pytest.raises(WrongResult, match=message):
        check.check(row, TINY, expected, tokens, "balanced")
    row.what = ""
    assert check.check(row, TINY, expected, tokens, "balanced") < 0.02


def test_a_wrong_row_reports_its_reason_instead_of_times(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.ours.Ours", Broken)
    result = run("int8", tmp_path, monkeypatch)
    assert "points" not in result and "differs from float32" in result["wrong"]


def test_names_of_rows():
    assert parse("int8*int8+lora64") == ("int8", "int8", 64, "bf16") and parse("bf16") == ("bf16", "bf16", 0, "bf16")
    assert parse("int8*int8+grad8+lora8") == ("int8", "int8", 8, "int8")
    for name in ("int8+grad8", "fp9", "int8*bf16", "int8+lora", "int8 "):
        with pytest.raises(ValueError, match="row: expected a name like"):
            parse(name)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "fp8", "mxfp4"])
def test_every_weight_format_packs_the_tiny_layer(name):
    row = Ours(TINY, name)
    assert check.check(row, TINY, check.evaluate(row, TINY), 8, "balanced") < row.tolerance


def test_products_that_the_cpu_lacks_are_a_reason(isa):
    if native.computes_int8():
        assert Ours(TINY, "int8*int8").tolerance > Ours(TINY, "int8").tolerance
    else:
        with pytest.raises(Unavailable, match=f"need AMX or AVX512-VNNI, this is {isa}"):
            Ours(TINY, "int8*int8")


def test_balanced_routing_deals_every_expert_equally_often():
    _, ids, weights, _ = make_inputs(SHAPES["A"], 32, seed=3)
    assert ids.flatten().bincount(minlength=128).tolist() == [2] * 128
    assert torch.allclose(weights.sum(-1), torch.ones(32))


def test_zipf_routing_is_skewed_and_distinct_within_a_token():
    _, ids, _, _ = make_inputs(SHAPES["A"], 512, seed=3, routing="zipf")
    counts = ids.flatten().bincount(minlength=128).sort(descending=True).values
    assert counts[0] > 400 and counts[64] < 32  # balanced: 32 each
    assert all(len(set(row)) == 8 for row in ids.tolist())
    with pytest.raises(ValueError, match="routing: expected one of balanced, zipf"):
        make_inputs(TINY, 1, 0, routing="even")


def test_weights_are_the_same_on_every_call_and_differ_between_experts():
    gate, up, down = make_weights(TINY)
    again = expert_weights(TINY, 3)
    assert all(torch.equal(a[3], b) for a, b in zip((gate, up, down), again, strict=True))
    assert not torch.equal(gate[3], gate[4]) and not torch.equal(gate[3], up[3])
    assert gate.float().std().item() == pytest.approx(TINY.D**-0.5, rel=0.05)


def test_times_of_repeated_calls():
    parts, found = worker.repeat(lambda i: (float(i), 1.0), seconds=0.0)
    assert parts == [[2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 5] and not found  # two calls to warm up
    median, p20, p80 = worker.quantiles([0.001 * i for i in range(11)])
    assert (median, p20, p80) == pytest.approx((5.0, 2.0, 8.0))


def test_memory_is_looked_at_between_the_calls():
    looks = iter(range(100))
    parts, found = worker.repeat(lambda i: (0.6 * worker.READ_EVERY,), 0.0, lambda: float(next(looks)))
    assert len(parts[0]) == 5 and found == [0.0, 1.0, 2.0]  # after two, four and the last
    _, found = worker.repeat(lambda i: (2 * worker.READ_EVERY,), 0.0, lambda: 7.0)
    assert found == [7.0] * 5


def test_the_better_round_of_every_part_counts():
    def point(fwd, bwd, **others):
        names = ("ms", "p20", "p80", "dram")
        times = {f"{part}_{v}": t for part, ts in (("fwd", fwd), ("bwd", bwd)) for v, t in zip(names, ts, strict=True)}
        return times | others

    first = point((5, 4, 6, 40), (7, 6, 8, 40), calls=3, others=0.1, tokens=8)
    second = point((4, 3, 9, 50), (8, 1, 8, 50), calls=4, others=0.3, tokens=8)
    best = point((4, 3, 9, 50), (7, 6, 8, 40), calls=7, others=0.3, tokens=8)
    assert worker.better(first, second) == best
