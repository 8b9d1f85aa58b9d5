"""Hidden states on a GPU: the same results as on the CPU, through pinned copies on streams of their own."""

import threading
from types import SimpleNamespace

import pytest
import torch

from kt_sft.ops import ExpertsLora, moe_experts, overlap, submit_experts
from tests.ops.test_experts import Case


def call_plain(*args, **options):
    return moe_experts(*args, **options)


def call_in_two_halves(*args, **options):
    return submit_experts(*args, **options).wait()


@pytest.mark.parametrize("call", [call_plain, call_in_two_halves])
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_equals_the_cpu(policy, call):
    layer = Case(T=100)
    expected = layer.run(policy)
    inputs = {name: t.detach().cuda().requires_grad_() for name, t in layer.inputs().items()}
    lora = ExpertsLora(**{n: inputs[n] for n in layer.factors}, scaling=layer.scaling)
    args = inputs["hidden_states"], layer.ids.cuda(), inputs["topk_weights"], layer.packed, lora
    out = call(*args, activation_policy=policy)
    out.backward(layer.grad_out.cuda())
    assert torch.equal(out.cpu(), expected["out"])
    for name, tensor in inputs.items():
        assert torch.equal(tensor.grad.cpu(), expected[name]), name


@pytest.mark.parametrize("call", [call_plain, call_in_two_halves])
def test_inputs_and_results_are_ordered_with_the_current_stream(call):
    """The inputs are still being computed when the call begins, and the output is used at once, over and over."""
    layer = Case(T=200, R=0)
    want = layer.run()["out"]
    x, ids, weights = layer.x.detach().cuda(), layer.ids.cuda(), layer.weights.detach().cuda()
    load = torch.randn(4096, 4096, device="cuda")
    for _ in range(10):
        late = x + (0 * (load @ load)[:200, :64]).to(x.dtype)
        out = call(late, ids, weights, layer.packed)
        del late
        torch.full((200, 64), float("nan"), dtype=x.dtype, device="cuda")  # what took the place of a freed input
        assert torch.equal((out + 0).cpu(), want)


def test_the_gpu_computes_while_the_kernels_run():
    layer = Case(T=50, R=0)
    want = layer.run()["out"]
    x, ids, weights = layer.x.detach().cuda(), layer.ids.cuda(), layer.weights.detach().cuda()
    release = threading.Event()
    overlap._start(SimpleNamespace(run=lambda: release.wait(60)))
    try:
        pending = submit_experts(x, ids, weights, layer.packed)
        beside = (x * 2).cpu()  # waits for the stream; would not end if the stream waited for the kernels
        assert not pending.done()
    finally:
        release.set()
    assert torch.equal(pending.wait().cpu(), want) and torch.equal(beside, layer.x.detach() * 2)


@pytest.mark.parametrize("factors_on", ["cuda", "cpu"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_stay_where_they_are(factors_on, dropout):
    """Gradients come on the device and in the dtype of what they belong to."""
    layer = Case(factor_dtype=torch.bfloat16 if factors_on == "cpu" else torch.float32)
    factors = {n: f.detach().to(factors_on).requires_grad_() for n, f in layer.factors.items()}
    x = layer.x.detach().cuda().requires_grad_()
    lora = ExpertsLora(**factors, scaling=layer.scaling, dropout=dropout)
    moe_experts(x, layer.ids.cuda(), layer.weights.detach().cuda(), layer.packed, lora).sum().backward()
    for tensor in (x, *factors.values()):
        assert tensor.grad.device == tensor.device and tensor.grad.dtype == tensor.dtype
        assert tensor.grad.isfinite().all() and tensor.grad.any()
