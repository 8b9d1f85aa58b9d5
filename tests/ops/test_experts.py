"""The autograd function against the float64 oracle on the dequantised weights: every output and gradient by name."""

import contextlib
import copy
import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kt_sft import native
from kt_sft.ops import ExpertsLora, moe_experts, pack_experts
from kt_sft.ops.reference import moe_experts_reference
from tests.conftest import rms_ratio

OUT_RMS, GRAD_RMS = 1e-2, 2e-2


class Case:
    """One layer with random weights, tokens and adapters."""

    def __init__(
        self, E=4, K=2, D=64, F=96, T=33, R=8, fmt="int8", group=None, dtype=torch.bfloat16, factor_dtype=torch.float32
    ):
        shapes = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
        self.packed = pack_experts(*(torch.randn(s) / s[-1] ** 0.5 for s in shapes.values()), fmt, group)
        self.x = torch.randn(T, D).to(dtype).requires_grad_()
        self.ids = torch.randn(T, E).topk(K, -1).indices
        self.weights = torch.softmax(torch.randn(T, K), -1).requires_grad_()
        self.grad_out = torch.randn(T, D).to(torch.bfloat16).to(dtype)
        self.factors = {}
        for name, (_, out, width) in shapes.items() if R else ():
            self.factors[f"{name}_a"] = torch.randn(E, R, width) / width**0.5
            self.factors[f"{name}_b"] = torch.randn(E, out, R) / out**0.5
        self.factors = {n: f.to(factor_dtype).requires_grad_() for n, f in self.factors.items()}
        self.scaling = 2.0

    def inputs(self):
        return {"hidden_states": self.x, "topk_weights": self.weights, **self.factors}

    def forward(self, policy="retain", dropout=0.0):
        lora = ExpertsLora(**self.factors, scaling=self.scaling, dropout=dropout) if self.factors else None
        return moe_experts(self.x, self.ids, self.weights, self.packed, lora, activation_policy=policy)

    def run(self, policy="retain", dropout=0.0):
        """Output and gradients by name."""
        for tensor in self.inputs().values():
            tensor.grad = None
        out = self.forward(policy, dropout)
        out.backward(self.grad_out)
        return {"out": out.detach(), **{n: t.grad.clone() for n, t in self.inputs().items()}}

    def reference(self, dropout_masks=None):
        inputs = {n: t.detach().double().requires_grad_() for n, t in self.inputs().items()}
        factors = {n: inputs[n] for n in self.factors}
        x_mask, down_mask = dropout_masks or (None, None)
        x_lora = None if x_mask is None else inputs["hidden_states"] * x_mask
        out = moe_experts_reference(
            inputs["hidden_states"], self.ids, inputs["topk_weights"],
            *(w.double() for w in self.packed.dequantize()), factors, self.scaling, x_lora, down_mask,
        )  # fmt: skip
        out.backward(self.grad_out.double())
        return {"out": out.detach(), **{n: t.grad for n, t in inputs.items()}}


def assert_close(got, expected):
    ratios = {name: rms_ratio(got[name], expected[name]) for name in expected}
    bad = {n: r for n, r in ratios.items() if not r <= (OUT_RMS if n == "out" else GRAD_RMS)}
    assert not bad, f"RMS ratios too large: {bad}"


CASES = {
    "no_lora": {"R": 0},
    "bf16": {"fmt": "bf16"},
    "int8": {"fmt": "int8"},
    "int8_group_64": {"fmt": "int8", "group": 64},
    "int4": {"fmt": "int4"},
    "int4_per_channel": {"fmt": "int4", "group": 0},
    "rank_1": {"R": 1},
    "rank_7": {"R": 7},
    "rank_64": {"R": 64},
    "rank_beyond_a_column_block": {"R": 150},
    "odd_sizes": {"E": 5, "D": 50, "F": 71, "T": 19},
    "one_row": {"T": 1, "K": 1},
    "k_is_e": {"K": 4},
    "idle_experts": {"E": 40, "T": 3},
    "few_rows_in_wide_tasks": {"E": 3, "T": 3, "D": 1100, "F": 1300},
    "few_rows_in_wide_tasks_int4": {"E": 3, "T": 2, "D": 1300, "F": 1100, "fmt": "int4"},
    "more_rows_in_wide_tasks": {"E": 3, "T": 60, "D": 700, "F": 600},
    "more_rows_in_wide_tasks_bf16": {"E": 2, "T": 50, "K": 1, "D": 600, "F": 700, "fmt": "bf16"},
    "few_and_more_rows_in_wide_tasks": {"E": 16, "T": 30, "D": 700, "F": 600, "fmt": "int4"},
    "five_tiles_of_rows": {"E": 2, "T": 70},
    "six_tiles_of_rows_bf16": {"E": 2, "T": 90, "fmt": "bf16"},
    "several_segments_and_waves": {"E": 3, "T": 3000, "D": 32, "F": 32, "K": 2},
    "fp32_hidden_states": {"dtype": torch.float32},
    "bf16_factors": {"factor_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("policy", ["retain", "recompute"])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(isa, case, policy):
    layer = Case(**CASES[case])
    assert_close(layer.run(policy), layer.reference())


def test_all_tokens_on_one_expert(isa):
    layer = Case(T=600, K=1)
    layer.ids[:] = 2
    assert_close(layer.run(), layer.reference())
    assert layer.factors["gate_a"].grad[[0, 1, 3]].eq(0).all()


def test_adapters_on_some_projections_with_their_own_ranks(isa):
    layer = Case()
    layer.factors = {n: f for n, f in layer.factors.items() if not n.startswith("up")}
    layer.factors["gate_a"] = layer.factors["gate_a"].detach()[:, :3].contiguous().requires_grad_()
    layer.factors["gate_b"] = layer.factors["gate_b"].detach()[:, :, :3].contiguous().requires_grad_()
    assert_close(layer.run(), layer.reference())


@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_dropout_equals_reference_with_the_same_masks(isa, policy):
    layer, p = Case(T=40), 0.3
    torch.manual_seed(7)
    got = layer.run(policy, dropout=p)
    torch.manual_seed(7)
    x_mask = torch.nn.functional.dropout(torch.ones_like(layer.x), p).double()
    keep = torch.empty(*layer.ids.shape, layer.packed.intermediate_size, dtype=torch.uint8).bernoulli_(1 - p)
    expected = layer.reference((x_mask, keep.double() / (1 - p)))
    assert_close(got, expected)
    assert 0.6 < keep.float().mean() < 0.8


def test_same_bits_on_every_run_and_for_any_number_of_threads(isa):
    layer = Case(E=6, T=150, D=96, F=160)
    threads, runs = native.num_threads(), []
    try:
        for count in (1, 2, 2, 5):
            native.set_num_threads(count)
            runs.append(layer.run())
    finally:
        native.set_num_threads(threads)
    for name, first in runs[0].items():
        assert all(torch.equal(first, run[name]) for run in runs[1:]), name


def test_retain_and_recompute_give_the_same_gradients():
    layer = Case()
    retain, recompute = layer.run("retain"), layer.run("recompute")
    assert all(torch.equal(retain[name], recompute[name]) for name in retain)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_gives_the_same_gradients(use_reentrant, dropout):
    layer = Case()
    torch.manual_seed(3)
    plain = layer.run(dropout=dropout)
    for tensor in layer.inputs().values():
        tensor.grad = None
    torch.manual_seed(3)
    out = checkpoint(
        lambda *_: layer.forward(dropout=dropout), layer.x, *layer.factors.values(), use_reentrant=use_reentrant
    )
    out.backward(layer.grad_out)
    assert torch.equal(out, plain["out"])
    for name, tensor in layer.inputs().items():
        if name != "topk_weights" or not use_reentrant:  # reentrant: gradients only reach what was passed in
            assert torch.equal(tensor.grad, plain[name]), name


def test_several_forwards_before_one_backward():
    a, b = Case(T=9), Case(T=50)
    expected = {**{f"a.{n}": t for n, t in a.run().items()}, **{f"b.{n}": t for n, t in b.run().items()}}
    for tensor in (*a.inputs().values(), *b.inputs().values()):
        tensor.grad = None
    outs = a.forward(), b.forward()
    torch.autograd.backward(outs, (a.grad_out, b.grad_out))
    for prefix, case in (("a", a), ("b", b)):
        for name, tensor in case.inputs().items():
            assert torch.equal(tensor.grad, expected[f"{prefix}.{name}"]), name


@pytest.mark.parametrize("rank", [0, 8])
def test_no_grad_and_autocast(rank):
    layer = Case(R=rank)
    expected = layer.run()["out"]
    with torch.no_grad():
        assert torch.equal(layer.forward(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.forward(), expected)


def test_no_tokens():
    layer = Case(T=33)
    out = moe_experts(layer.x[:0], layer.ids[:0], layer.weights[:0], layer.packed, ExpertsLora(**layer.factors))
    assert out.shape == (0, 64)
    out.sum().backward()
    assert layer.factors["down_b"].grad.eq(0).all()


def test_double_backward_is_refused():
    layer = Case()
    out = layer.forward()
    (grad,) = torch.autograd.grad(out.sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


def test_nan_in_one_token_stays_in_that_token():
    layer = Case(T=8)
    clean = layer.forward().detach()
    with torch.no_grad():
        layer.x[3, 5] = float("nan")
    out = layer.forward().detach()
    assert out[3].isnan().all()
    assert torch.equal(out[[0, 1, 2, 4, 5, 6, 7]], clean[[0, 1, 2, 4, 5, 6, 7]])


def test_calls_from_several_threads():
    layer = Case(T=64)
    expected, failures = layer.run()["out"], []

    def work():
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(layer.forward(), expected):
                    failures.append("different")

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(
    "change",
    [
        {"x": lambda c: c.x.T.contiguous().T},
        {"x": lambda c: c.x.float()},
        {"x": lambda c: torch.cat([c.x.flatten()[:1], c.x.flatten()])[1:].view(c.x.shape)},  # two bytes off
        {"ids": lambda c: c.ids.int()},
        {"ids": lambda c: torch.stack([c.ids, c.ids], -1)[..., 0]},
        {"weights": lambda c: c.weights.double()},
    ],
    ids=["strided", "fp32", "unaligned", "int32", "strided_ids", "fp64_weights"],
)  # fmt: skip
def test_inference_takes_what_training_takes(isa, tokens, change):
    """Tensors as the kernels take them pass without a check in Python; any others as in a recorded call."""
    layer = Case(T=tokens, R=0)
    with torch.no_grad():
        expected = layer.forward()
        for name, make in change.items():
            setattr(layer, name, make(layer))
        assert torch.equal(layer.forward().to(expected.dtype), expected)
    assert expected.dtype is torch.bfloat16 and not expected.requires_grad


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("record", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda c: c.x[:, :-1]}, "hidden_states: expected a float tensor of shape"),
        ({"ids": lambda c: c.ids.float()}, "topk_ids: expected an integer tensor"),
        ({"ids": lambda c: c.ids[:-1]}, "topk_ids: expected an integer tensor of shape"),
        ({"ids": lambda c: c.ids + 1}, "topk_ids: expected expert ids 0 to 3, got 4"),
        ({"ids": lambda c: c.ids - 4}, "topk_ids: expected expert ids 0 to 3, got -"),
        ({"weights": lambda c: c.weights[:, :1]}, "topk_weights: expected a float tensor of shape"),
        ({"weights": lambda c: c.weights.to("meta")}, "topk_weights: expected the device of hidden_states"),
    ],
)  # fmt: skip
def test_bad_arguments_raise_value_errors(change, message, record, rank):
    layer = Case(K=4, R=rank)
    for name, make in change.items():
        setattr(layer, name, make(layer))
    with torch.set_grad_enabled(record), pytest.raises(ValueError, match=message):
        layer.forward()


def test_bad_factors_and_settings_raise_value_errors():
    layer = Case()
    for case in (layer, Case(R=0)):
        with torch.no_grad(), pytest.raises(ValueError, match="activation_policy: expected retain or recompute"):
            case.forward("forget")
    with pytest.raises(ValueError, match="dropout: expected"):
        ExpertsLora(**layer.factors, dropout=1.0)
    with pytest.raises(ValueError, match="both or none of gate_a and gate_b"):
        ExpertsLora(gate_a=layer.factors["gate_a"])
    layer.factors["up_b"] = layer.factors["up_b"].detach()[:, :-1]
    with pytest.raises(ValueError, match=r"up_b: expected shape \(4, 96, 8\), got \(4, 95, 8\)"):
        layer.forward()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", [1.0], r"hidden_states: expected a torch tensor, got <class 'list'>"),
        ("x", torch.zeros(5, 64), "hidden_states: expected dtype torch.bfloat16, got torch.float32"),
        ("x", torch.zeros(5, 64, dtype=torch.bfloat16, device="meta"), "expected a CPU tensor, got one on meta"),
        ("x", torch.zeros(64, 5, dtype=torch.bfloat16).T, "hidden_states: expected a contiguous tensor"),
        ("x", torch.zeros(4, 64, dtype=torch.bfloat16), r"hidden_states: expected shape \(5, 64\), got \(4, 64\)"),
        ("ids", 3, r"topk_ids: expected a torch tensor, got <class 'int'>"),
        ("ids", torch.zeros(5, dtype=torch.int64), r"topk_ids: expected shape \(T, K\), got \(5\)"),
        ("weights", torch.zeros(5, 3), r"topk_weights: expected shape \(5, 2\), got \(5, 3\)"),
        ("lora", {"gate_a": torch.zeros(4, 2, 64)}, "lora: expected both or none of gate_a and gate_b"),
        ("lora", {"up_a": torch.zeros(4, 64), "up_b": 0}, r"up_a: expected shape \(E, R, 64\), got \(4, 64\)"),
        ("lora", {"up_a": torch.zeros(4, 2, 64).half(), "up_b": 0}, "dtype torch.bfloat16 or torch.float32, got"),
        ("out", torch.zeros(5, 64).double(), "dtype torch.float32 or torch.bfloat16, got torch.float64"),
    ],
)  # fmt: skip
def test_the_kernels_check_their_arguments(argument, value, message):
    layer = Case(T=5)
    arguments = {"x": layer.x, "ids": layer.ids, "weights": layer.weights, "lora": {}, "gate_up": None}
    arguments |= {"int8": False, "out": torch.empty(5, 64)}
    native.forward(*layer.packed.native_args(), *arguments.values())
    arguments[argument] = value
    with pytest.raises(ValueError, match=message):
        native.forward(*layer.packed.native_args(), *arguments.values())


@pytest.mark.parametrize("shape", [(5, 2), (1, 2), (5, 1), (1, 1), (0, 2)])
def test_the_kernels_and_torch_agree_what_is_contiguous(shape):
    tokens, top_k = shape
    layer = Case(T=tokens, K=top_k)
    weights, seen = torch.rand(100), set()
    for strides in itertools.product((0, 1, 2, 3, 9), repeat=2):
        given = weights.as_strided(shape, strides, 1)
        arguments = (layer.x, layer.ids, given, {}, None, False, torch.empty(tokens, 64))
        context = contextlib.nullcontext()
        if not given.is_contiguous():
            context = pytest.raises(ValueError, match="topk_weights: expected a contiguous tensor")
        with context:
            native.forward(*layer.packed.native_args(), *arguments)
        seen.add(given.is_contiguous())
    assert seen == ({True} if min(shape) == 0 or shape == (1, 1) else {True, False})


ATTRIBUTES = """
import pytest, torch
torch.Tensor.__dlpack_c_exchange_api__ = None
reads, data_ptr = [], torch.Tensor.data_ptr
torch.Tensor.data_ptr = lambda tensor: reads.append(tensor.shape) or data_ptr(tensor)
tests = "kernels_check or contiguous or inference or bad_ or packed_experts_stay or round_a_result"
failed = pytest.main(["-q", "-p", "no:cacheprovider", "tests/ops/test_experts.py", "-k", tests])
print(int(failed), len(reads))
"""


def test_older_torch_is_read_by_attributes():
    """The checks above with a torch that cannot describe its tensors; in another process."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", ATTRIBUTES], capture_output=True, text=True, cwd=root, timeout=300)
    failed, reads = map(int, done.stdout.splitlines()[-1].split())
    assert failed == 0 and reads > 1000, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 4, 2), (1, 4, 2), (33, 4, 2), (200, 300, 8)])
def test_the_kernels_round_a_result_as_torch_does(isa, tokens, experts, top_k):
    layer = Case(E=experts, K=top_k, T=tokens, R=0)  # the last: rows of more experts than one wave holds
    weights = layer.weights.detach()
    weights[tokens // 2 :] *= torch.finfo().tiny  # subnormal results
    weights[tokens - 1 :] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounded up, -0
    out, rounded = torch.empty(tokens, 64), torch.empty(tokens, 64, dtype=torch.bfloat16)
    for result in (out, rounded):
        native.forward(
            *layer.packed.native_args(), layer.x.detach(), layer.ids, weights, {}, None, False, result
        )  # fmt: skip
    assert torch.equal(rounded.isnan(), out.isnan()) and out.isnan().any() == (tokens > 0)
    assert torch.equal(rounded.nan_to_num(), out.bfloat16().nan_to_num())


def test_packed_experts_stay_where_they_are_or_are_copied():
    layer = Case(T=5, R=0)
    expected = layer.forward()
    with pytest.raises(AttributeError):
        layer.packed.storage = layer.packed.storage.clone()
    original, layer.packed = layer.packed, copy.deepcopy(layer.packed)
    assert layer.packed.storage.data_ptr() != original.storage.data_ptr()
    assert torch.equal(layer.forward(), expected)
    layer.packed.storage.resize_(4 * layer.packed.nbytes)
    with pytest.raises(ValueError, match="storage: expected the memory that these experts were made of"):
        layer.forward()


def test_gate_and_up_are_kept_only_for_a_backward(monkeypatch):
    kept, forward = [], native.forward
    monkeypatch.setattr(native, "forward", lambda *args: kept.append(args[-3] is not None) or forward(*args))
    layer = Case(T=5, R=0)
    layer.forward("retain")
    layer.forward("recompute")
    layer.ids = layer.ids.int()  # int64 would go to few_tokens, which has no place for them
    with torch.no_grad():
        layer.forward("retain")
    layer.x, layer.weights = layer.x.detach(), layer.weights.detach()
    assert not layer.forward("retain").requires_grad
    assert kept == [True, False, False, False]


WORKSPACE = """
from kt_sft import native
from tests.ops.test_experts import Case
for tokens in (5000, 20000):
    Case(E=4, T=tokens, D=32, F=32).run()
    print(native.workspace_bytes())
"""


def test_workspace_does_not_grow_with_the_tokens():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", WORKSPACE], capture_output=True, text=True, check=True, cwd=root)
    small, large = map(int, done.stdout.split())
    index_bytes = 8 * 2 * 15000  # order and token of every further routed row
    assert 0 < small <= large <= small + index_bytes + (2 << 20)  # rounded up to a huge page


CHANGING_THREADS = """
import threading, time, torch
from kt_sft import native
from tests.ops.test_experts import Case
layer = Case(T=200, R=0)
expected, stop = layer.run()["out"], threading.Event()
def change():
    while not stop.is_set():
        for count in (1, 12):
            native.set_num_threads(count)
            time.sleep(0.0003)
thread = threading.Thread(target=change)
thread.start()
try:
    with torch.no_grad():
        for _ in range(300):
            assert torch.equal(layer.forward(), expected)
finally:
    stop.set()
    thread.join()
"""


def test_threads_may_change_between_calls_of_another_thread():
    """In a process of its own: the alternative was a segmentation fault."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", CHANGING_THREADS], check=True, cwd=root, timeout=120)
