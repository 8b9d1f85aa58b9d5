"""Hidden states on a GPU: the same results as on the CPU, through pinned copies."""

import pytest
import torch

from kt_sft.ops import ExpertsLora, moe_experts
from tests.ops.test_experts import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_equals_the_cpu(policy):
    layer = Case(T=100)
    expected = layer.run(policy)
    inputs = {name: t.detach().cuda().requires_grad_() for name, t in layer.inputs().items()}
    lora = ExpertsLora(**{n: inputs[n] for n in layer.factors}, scaling=layer.scaling)
    args = inputs["hidden_states"], layer.ids.cuda(), inputs["topk_weights"], layer.packed, lora
    out = moe_experts(*args, activation_policy=policy)
    out.backward(layer.grad_out.cuda())
    assert torch.equal(out.cpu(), expected["out"])
    for name, tensor in inputs.items():
        assert torch.equal(tensor.grad.cpu(), expected[name]), name


def test_no_device_wide_synchronize(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("device-wide synchronize"))
    layer = Case(T=10)
    x = layer.x.detach().cuda().requires_grad_()
    moe_experts(x, layer.ids.cuda(), layer.weights.detach().cuda(), layer.packed).sum().backward()
    assert x.grad.isfinite().all()
