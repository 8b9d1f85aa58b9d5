"""Every row that can run here computes the layer, and the gate refuses one that does not."""

import pytest
import torch

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


JOB = dict(shape="tiny", threads=1, seconds=0.0, most_tokens=16)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("row", ["bf16", "int8", "int4", "int8+lora4", "int8*int8+grad8", *TORCH_PEERS])
def test_a_row_is_checked_and_timed(row, one_thread):
    isa = native.isa()
    layer = worker.Layer(JOB | dict(row=row))
    for tokens, routing in ((1, "balanced"), (1, "zipf"), (16, "balanced"), (16, "zipf"), (1, "zipf")):
        p = layer.point(tokens, routing)
        assert (p["tokens"], p["routing"]) == (tokens, routing)
        assert 0 < p["fwd_p20"] <= p["fwd_ms"] <= p["fwd_p80"] and p["bwd_ms"] > 0 and 0 < p["error"] < 0.06
        for limit in ("fwd_dram", "fwd_peak"):
            assert (limit in p) == (row not in TORCH_PEERS and (limit, isa) != ("fwd_peak", "amx_model"))
        assert all(p[name] > 0 for name in p if name.endswith(("_dram", "_peak")))
    assert ("memory" in layer.answer) == (row not in TORCH_PEERS)


def test_what_takes_too_long_once_is_skipped_and_the_rest_goes_on(one_thread, monkeypatch):
    layer = worker.Layer(JOB | dict(row="int8"))
    layer.point(1, "balanced")
    monkeypatch.setattr(worker, "MAX_CALL_SECONDS", -1.0)
    assert layer.point(16, "balanced")["skipped"].startswith("forward and backward took")
    assert layer.point(1, "balanced")["fwd_ms"] > 0


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


def test_a_wrong_row_has_no_layer(one_thread, monkeypatch):
    monkeypatch.setattr("benchmarks.ours.Ours", Broken)
    layer = worker.Layer(JOB | dict(row="int8"))  # right for three tokens
    with pytest.raises(WrongResult, match="differs from float32"):
        layer.point(16, "balanced")


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


def test_times_of_repeated_calls(monkeypatch):
    parts, found = worker.repeat(lambda i: (float(i), 1.0), seconds=0.0)
    assert parts == [[2.0, 3.0, 4.0], [1.0] * 3] and not found  # two calls to warm up
    monkeypatch.setattr(worker, "WARM_SECONDS", 0.0)
    parts, _ = worker.repeat(lambda i: (float(i), 1.0), seconds=0.0)
    assert parts[0] == [1.0, 2.0, 3.0]  # slow ones are warm after one
    median, p20, p80 = worker.quantiles([0.001 * i for i in range(11)])
    assert (median, p20, p80) == pytest.approx((5.0, 2.0, 8.0))


def test_limits_are_looked_at_between_the_calls():
    looks = iter(range(100))
    parts, found = worker.repeat(lambda i: (0.6 * worker.READ_EVERY,), 0.0, lambda: {"dram": float(next(looks))})
    assert len(parts[0]) == 3 and found == {"dram": 0.5} and next(looks) == 2  # after two calls and the last
    seconds = 2.5 * worker.READ_AGAIN  # three looks after each of three calls
    _, found = worker.repeat(lambda i: (seconds,), 0.0, lambda: {"dram": 7.0, "peak": float(next(looks))})
    assert found == {"dram": 7.0, "peak": 7.0} and next(looks) == 12
