"""A call that leaves slots out (id -1): calls that share the slots add up to the whole."""

from __future__ import annotations

import pytest
import torch

from kt_sft import native
from kt_sft.ops import pack_experts
from kt_sft.ops.kernels import LOCAL, Inputs
from tests.conftest import rms_ratio

E, D, F, T, K, R = 5, 48, 40, 37, 3, 4


@pytest.fixture
def call():
    packed = pack_experts(*(torch.randn(s) * 0.2 for s in ((E, F, D), (E, F, D), (E, D, F))), weight_format="bf16")
    x, ids, weights = torch.randn(T, D).bfloat16(), torch.rand(T, E).topk(K).indices, torch.rand(T, K)
    lora = {"scaling": 0.5}
    for name, (inputs, outputs) in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items():
        lora |= {f"{name}_a": torch.randn(E, R, inputs) * 0.2, f"{name}_b": torch.randn(E, outputs, R) * 0.2}
    return packed, x, ids, weights, lora


def shares(ids: torch.Tensor) -> list[torch.Tensor]:
    """Three calls; one of them gets nothing."""
    owner = torch.randint(0, 2, ids.shape)
    return [torch.where(owner == part, ids, -1) for part in range(3)]


@pytest.mark.parametrize("retain", [True, False])
def test_shares_add_up(call, retain, isa):
    packed, x, ids, weights, lora = call
    grad_out = torch.randn(T, D).bfloat16()
    out, kept = LOCAL.forward(Inputs(packed, x, ids, weights, lora, False), retain)
    whole = LOCAL.backward(Inputs(packed, x, ids, weights, lora, False), kept, grad_out)
    parts = []
    for part in shares(ids):
        shared = {**lora, "share": True}
        inputs = Inputs(packed, x, part, weights, shared, False)
        out_part, kept = LOCAL.forward(inputs, retain)
        parts.append((out_part, LOCAL.backward(inputs, kept, grad_out)))
    assert rms_ratio(sum(p for p, _ in parts), out) < 1e-2
    for i in (0, 1):
        assert rms_ratio(sum(grads[i] for _, grads in parts), whole[i]) < 1e-2
    for name, grad in whole[3].items():
        assert rms_ratio(sum(grads[3][name] for _, grads in parts), grad) < 1e-2
    assert not parts[2][0].any()


def test_slots_are_left_out_only_where_others_compute_them(call):
    packed, x, ids, weights, lora = call
    with pytest.raises(ValueError, match="expected expert ids 0 to 4, got -1"):
        native.forward(*packed.native_args(), x, shares(ids)[0], weights, lora, None, False, torch.empty(T, D))
