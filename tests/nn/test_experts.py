"""KtExperts as a module: what it computes, what it hides, how adapters combine."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kt_sft.nn.experts import KtExperts, LoraTerm, ProjectionNames, combine_lora
from kt_sft.ops import pack_experts
from kt_sft.ops.reference import moe_experts_reference
from tests.families import rms_ratio

E, D, F, T, K, R = 5, 48, 24, 7, 3, 4


def weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    return tuple(torch.randn(shape).mul(0.2).bfloat16().float() for shape in shapes)  # type: ignore[return-value]


@pytest.fixture
def experts() -> KtExperts:
    module = KtExperts(num_experts=E, hidden_size=D, intermediate_size=F)
    module.packed = pack_experts(*weights(), weight_format="bf16")
    return module


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return torch.randn(T, D), ids, torch.rand(T, K)


def term(outputs: int, inputs: int, rank: int = R, scaling: float = 1.0, dropout: float = 0.0) -> LoraTerm:
    return LoraTerm(a=torch.randn(E, rank, inputs), b=torch.randn(E, outputs, rank), scaling=scaling, dropout=dropout)


def test_forward_equals_the_reference(experts: KtExperts) -> None:
    x, ids, weight = routing()
    expected = moe_experts_reference(x, ids, weight, *(w.float() for w in experts.packed.dequantize()))
    assert rms_ratio(experts(x, ids, weight), expected) < 1e-2
    batched = experts(x.view(1, T, D), ids, weight)
    assert batched.shape == (1, T, D) and torch.equal(batched[0], experts(x, ids, weight))


def test_submit_and_wait_are_the_forward(experts: KtExperts) -> None:
    x, ids, weight = routing()
    pending = experts.submit(x, ids, weight)
    beside = x @ torch.ones(D, D)
    assert torch.equal(pending.wait() + beside, experts(x, ids, weight) + beside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_has_the_dtype_of_the_input(experts: KtExperts, dtype: torch.dtype) -> None:
    x, ids, weight = routing()
    assert experts(x.to(dtype), ids, weight).dtype == dtype


def test_nothing_of_it_is_state(experts: KtExperts) -> None:
    assert not list(experts.parameters()) and not list(experts.buffers()) and not experts.state_dict()
    before = experts.packed.storage.data_ptr()
    assert experts.to(torch.float16).half().packed.storage.data_ptr() == before
    assert experts.weight.numel() == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradient(experts: KtExperts, reentrant: bool) -> None:
    x, ids, weight = routing()
    gradients = []
    for wrap in (False, True):
        leaf = x.clone().requires_grad_()
        out = checkpoint(experts, leaf, ids, weight, use_reentrant=reentrant) if wrap else experts(leaf, ids, weight)
        out.square().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)


def test_placeholders_carry_the_familys_names() -> None:
    module = KtExperts(num_experts=E, hidden_size=D, intermediate_size=F, names=ProjectionNames("w1", "w3", "w2"))
    sizes = {name: (child.in_features, child.out_features) for name, child in module.named_children()}
    assert sizes == {"w1": (D, F), "w3": (D, F), "w2": (F, D)}
    with pytest.raises(ValueError, match="computed by its KtExperts parent"):
        module.w1(torch.ones(1, D))


def test_empty_and_foreign_weights_are_refused() -> None:
    module = KtExperts(num_experts=E, hidden_size=D, intermediate_size=F)
    with pytest.raises(ValueError, match="expected loaded weights"):
        module(*routing())
    with pytest.raises(ValueError, match=r"got \(1, 48, 24\)"):
        module.packed = pack_experts(*(w[:1] for w in weights()), weight_format="bf16")


def test_combine_without_adapters_is_none() -> None:
    assert combine_lora([], [], []) is None


def test_combine_one_adapter_passes_it_through() -> None:
    gate, down = term(F, D, scaling=2.0), term(D, F, scaling=2.0)
    lora = combine_lora([gate], [], [down])
    assert lora is not None and lora.gate_a is gate.a and lora.down_b is down.b
    assert lora.up_a is None and lora.scaling == 2.0


def test_combine_sums_the_deltas_of_all_adapters() -> None:
    gate = [term(F, D, scaling=2.0), term(F, D, rank=2, scaling=0.5)]
    lora = combine_lora(gate, [term(F, D, scaling=3.0)], [])
    assert lora is not None and lora.gate_a is not None and lora.gate_b is not None and lora.up_b is not None
    assert lora.gate_a.shape == (E, R + 2, D)
    expected = sum(t.scaling * t.b @ t.a for t in gate)
    torch.testing.assert_close(lora.scaling * lora.gate_b @ lora.gate_a, expected)


def test_different_dropouts_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_dropout.*\[0.0, 0.1\]"):
        combine_lora([term(F, D), term(F, D, dropout=0.1)], [], [])
