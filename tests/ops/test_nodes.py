"""Work split over NUMA nodes, which are made up here: the same results as on one node, on any machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kt_sft import native
from kt_sft.ops import ExpertsLora, moe_experts, pack_experts
from kt_sft.ops.layout import QUANTISED
from kt_sft.ops.packed import PackedExperts
from tests.conftest import rms_ratio
from tests.ops.test_experts import CASES, Case, assert_close

REORDERED = 3e-3  # sums of Z and dX in another order; dG and dU are rounded to bf16 after it


@pytest.fixture(autouse=True)
def _one_node_afterwards():
    before = native.nodes()
    yield
    native.set_nodes(before)


def on_nodes(count: int, layer: Case, *args, **options) -> dict[str, torch.Tensor]:
    native.set_nodes([[]] * count)
    return layer.run(*args, **options)


def assert_reordered(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    ratios = {name: rms_ratio(got[name], expected[name]) for name in expected}
    assert all(ratio < REORDERED for ratio in ratios.values()), ratios  # all, not max: NaN must fail


SPLIT_CASES = {
    **{name: CASES[name] for name in ("no_lora", "bf16", "int8_group_64", "int4", "odd_sizes", "idle_experts")},
    "one_token": {"T": 1, "D": 96, "F": 160},
    "few_rows": {"T": 5, "E": 3, "D": 160, "F": 96, "fmt": "int4"},
    "fewer_blocks_than_nodes": {"D": 32, "F": 64},
    "no_two_parts_alike": {"D": 352, "F": 224, "fmt": "bf16"},
    "several_segments_and_waves": {"E": 3, "T": 3000, "D": 64, "F": 96, "R": 0},
}


@pytest.mark.parametrize("policy", ["retain", "recompute"])
@pytest.mark.parametrize("case", SPLIT_CASES)
def test_equals_one_node(case: str, policy: str):
    layer = Case(**SPLIT_CASES[case])
    expected = on_nodes(1, layer, policy)
    for count in (2, 4):
        got = on_nodes(count, layer, policy)
        assert torch.equal(got["out"], expected["out"]), f"forward on {count} nodes"
        assert_reordered(got, expected)


@pytest.mark.parametrize("count", [2, 3])
def test_equals_reference(isa, count: int):
    layer = Case(D=96, F=160)
    got = on_nodes(count, layer)
    assert_close(got, layer.reference())


def test_dropout_on_nodes():
    layer = Case(T=40)
    results = []
    for count in (1, 4):
        torch.manual_seed(7)
        results.append(on_nodes(count, layer, dropout=0.3))
    assert torch.equal(results[0]["out"], results[1]["out"])
    assert_reordered(results[1], results[0])


@pytest.mark.parametrize("F", [128, 200, 384, 416])
def test_int8_products_on_nodes(F: int):
    """Activations are quantised in groups of 128 columns, which no node may share with another."""
    if not native.computes_int8():
        pytest.skip(f"{native.isa()} has no int8 products")
    layer = Case(E=2, D=96, F=F, R=0)
    results = []
    for count in (1, 2, 4):
        native.set_nodes([[]] * count)
        with torch.no_grad():
            results.append(moe_experts(layer.x, layer.ids, layer.weights, layer.packed, compute_type="int8"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("D, F", [(96, 128), (600, 416), (530, 200)])
def test_int8_gradients_on_nodes(D: int, F: int, group: int):
    if not native.computes_int8():
        pytest.skip(f"{native.isa()} has no int8 products")
    layer = Case(E=2, D=D, F=F, group=group)
    lora = ExpertsLora(**layer.factors)
    results = []
    for count in (1, 2, 4):
        native.set_nodes([[]] * count)
        out = moe_experts(
            layer.x, layer.ids, layer.weights, layer.packed, lora, compute_type="int8", gradient_compute_type="int8"
        )
        grads = torch.autograd.grad(out, list(layer.inputs().values()), layer.grad_out)
        results.append(dict(zip(layer.inputs(), grads, strict=True)))
    assert_reordered(results[1], results[0])
    assert_reordered(results[2], results[0])


def test_every_column_is_computed_once_whatever_the_sizes():
    """A column left out or added twice changes the output; the workspace is full of NaN before every call."""
    for D, F in [(1, 1), (31, 33), (64, 97), (129, 512), (416, 65)]:
        layer = Case(E=2, D=D, F=F, T=6, R=0)
        expected = on_nodes(1, layer)
        for count in (2, 3, 5, 16):
            got = on_nodes(count, layer)
            assert torch.equal(got["out"], expected["out"]), (D, F, count)
            assert_reordered(got, expected)


def test_same_bits_for_any_number_of_threads():
    layer = Case(E=6, T=150, D=96, F=160)
    native.set_nodes([[]] * 3)
    runs = []
    for threads in (1, 2, 2, 7):
        native.set_num_threads(threads)
        runs.append(layer.run())
    for name, first in runs[0].items():
        assert all(torch.equal(first, run[name]) for run in runs[1:]), name


@pytest.mark.parametrize("fmt", native.formats())
@pytest.mark.parametrize("T", [3, 40])
def test_every_format_on_nodes(fmt: str, T: int):
    """Codes and scales of arbitrary bytes, of which none is a NaN or vanishing scale, copied to other nodes."""
    layer = Case(T=T, R=0, D=288, F=160)
    lowest = 0x7C if fmt == "mxfp4" else 0x3C
    packed = PackedExperts.empty(4, 288, 160, fmt)
    packed.storage.copy_(torch.randint(lowest, lowest + 4, packed.storage.shape))
    layer.packed = packed
    expected = on_nodes(1, layer)
    native.set_nodes([[]] * 3)
    layer.packed = packed.copy()
    assert torch.equal(layer.packed.storage, packed.storage)
    got = on_nodes(3, layer)
    assert torch.equal(got["out"], expected["out"]) and expected["out"].isfinite().all() and expected["out"].any()
    assert_reordered(got, expected)


@pytest.mark.parametrize("fmt", QUANTISED)
def test_packing_and_copying_give_the_same_bytes(fmt: str):
    weights = torch.randn(3, 75, 90), torch.randn(3, 75, 90), torch.randn(3, 90, 75)
    expected = pack_experts(*weights, fmt)
    native.set_nodes([[]] * 4)
    packed = PackedExperts.empty(3, 90, 75, fmt)
    packed.storage.fill_(0xFF)  # all but the padding is written
    for e in range(3):
        packed.pack_expert_(e, *(w[e] for w in weights))
    copied = expected.copy()
    assert copied.storage.data_ptr() != expected.storage.data_ptr()
    assert torch.equal(copied.storage, expected.storage)
    for got, wanted in zip(packed.dequantize(), expected.dequantize(), strict=True):
        assert torch.equal(got, wanted)


def test_copying_other_experts_is_refused():
    a, b = PackedExperts.empty(2, 64, 32), PackedExperts.empty(2, 32, 64)
    with pytest.raises(ValueError, match="copy: expected experts of the same sizes"):
        a.copy_(b)


def test_small_parts_of_matrices_lie_on_small_pages(monkeypatch):
    wishes = []
    monkeypatch.setattr(native, "wish_huge_pages", lambda tensor, wish: wishes.append(wish))
    for nodes, hidden in ((1, 512), (2, 512), (2, 4096)):
        native.set_nodes([[]] * nodes)
        PackedExperts.empty(4, hidden, 4096)  # matrices of 2 and 16 MiB
    assert wishes == [True, False, True]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "NUMA nodes: expected 1 to 16, got 0"),
        ([[]] * 17, "NUMA nodes: expected 1 to 16, got 17"),
        ([[0], []], "expected CPUs for every node or for none, got none for node 1"),
        ([[0], [0]], "NUMA nodes: CPU 0 is named twice"),
        ([[0], [1023]], "NUMA nodes: CPU 1023 of node 1 is not one that this process may use"),
        ([[-1], [0]], "NUMA nodes: CPU -1 of node 0 is not one"),
    ],
)
def test_impossible_nodes_are_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        native.set_nodes(nodes)


BOUND = """
import os, torch
from kt_sft import native
from tests.ops.test_experts import Case
before = set(os.listdir("/proc/self/task"))
print(native.nodes())
native.set_num_threads(3)
Case(T=40).run()
workers = set(os.listdir("/proc/self/task")) - before
bound = [os.sched_getaffinity(int(t)) for t in workers]
print(sorted(map(sorted, (cpus for cpus in bound if len(cpus) == 1))))
print(len(os.sched_getaffinity(0)))
"""


def test_workers_stay_on_the_cpus_of_their_node_and_the_caller_is_free():
    import os

    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one CPU")
    env = {**os.environ, "KT_SFT_NUMA": f"{allowed[0]};{allowed[1]}"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", BOUND], env=env, capture_output=True, text=True, check=True, cwd=root)
    nodes, bound, caller = done.stdout.splitlines()
    assert nodes == str([allowed[:1], allowed[1:2]])
    assert bound == str([allowed[:1], allowed[1:2]])  # thread 0 is the caller; 1 and 2 are dealt to both nodes
    assert int(caller) == len(allowed)
