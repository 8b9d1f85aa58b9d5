"""Native int8 products against integer sums in torch, and the layer that uses them against the float64 oracle."""

import pytest
import torch

from kt_sft import native
from kt_sft.config import KtConfig
from kt_sft.ops import ExpertsLora, PackedExperts, moe_experts, pack_experts
from kt_sft.ops.quantize import quantize
from kt_sft.ops.reference import moe_experts_reference
from tests.conftest import rms_ratio

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def int8_isa(isa):
    if not native.computes_int8():
        pytest.skip(f"{isa} has no int8 products")
    return isa


def quantize_rows(x, group):
    """int8 codes and fp32 scales of x (M, K) per row and group of columns."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % group)).view(rows, -1, group)
    scale = padded.abs().amax(-1, keepdim=True) * torch.tensor(1.0 / 127.0)
    return (padded * (1.0 / scale)).round(), scale


@pytest.mark.parametrize("weight_group", [0, 64, 128])
@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize("shape", [(1, 16, 32), (7, 33, 31), (16, 40, 300), (600, 48, 520), (33, 130, 1100)], ids=str)
def test_product_is_the_integer_sum_with_both_scales(int8_isa, shape, group, weight_group):
    m, n, k = shape
    packed = PackedExperts.empty(1, k, n, "int8", weight_group)
    weight, act = torch.randn(n, k), torch.randn(m, k).to(torch.bfloat16)
    packed.pack_expert_(0, weight, torch.randn(n, k), torch.randn(k, n))
    out = torch.full((m, n), float("nan"))
    native.product_int8(*packed.native_args(), 0, 0, act, group, out)
    codes, scales = quantize(weight, "int8", weight_group)
    w_scales = scales.double().repeat_interleave(weight_group or k, 1)[:, :k]
    a_codes, a_scales = quantize_rows(act, group)
    dequantised = (a_codes.double() * a_scales.double()).view(m, -1)[:, :k]
    exact = dequantised @ (codes.double() * w_scales).T
    bound = 64 * EPS * (dequantised.abs() @ (codes.double() * w_scales).abs().T) + 1e-30
    assert ((out.double() - exact).abs() <= bound).all()


def layer(T=200, E=4, K=2, D=256, F=192, R=0):
    weights = [torch.randn(s) / s[-1] ** 0.5 for s in ((E, F, D), (E, F, D), (E, D, F))]
    x, topk = torch.randn(T, D).bfloat16().requires_grad_(), torch.softmax(torch.randn(T, K), -1).requires_grad_()
    ids = torch.randn(T, E).topk(K, -1).indices
    shapes = {"gate_a": (E, R, D), "gate_b": (E, F, R), "up_a": (E, R, D), "up_b": (E, F, R)}
    shapes |= {"down_a": (E, R, F), "down_b": (E, D, R)}
    factors = {n: (torch.randn(s) / s[-1] ** 0.5).requires_grad_() for n, s in shapes.items()} if R else {}
    return weights, x, ids, topk, factors


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("tokens", [3, 40, 1400])  # few rows per expert take the path without quantised activations
def test_layer(int8_isa, tokens, rank):
    weights, x, ids, topk, factors = layer(tokens, R=rank)
    packed = pack_experts(*weights, "int8")
    lora = ExpertsLora(**factors, scaling=2.0) if rank else None
    out = moe_experts(x, ids, topk, packed, lora, compute_type="int8")
    out.backward(torch.ones_like(out))
    reference = moe_experts_reference(
        x.double(), ids, topk.double(), *(w.double() for w in packed.dequantize()),
        {n: f.double() for n, f in factors.items()}, 2.0,
    )  # fmt: skip
    assert rms_ratio(out, reference) < 2.5e-2
    assert all(t.grad.isfinite().all() for t in (x, topk, *factors.values()))


def test_quantised_activations_are_used_and_recomputed_alike(int8_isa):
    weights, x, ids, topk, _ = layer()
    packed = pack_experts(*weights, "int8")
    grads = {}
    for policy in ("retain", "recompute"):
        x.grad = None
        out = moe_experts(x, ids, topk, packed, activation_policy=policy, compute_type="int8")
        out.backward(torch.ones_like(out))
        grads[policy] = (out.detach(), x.grad.clone())
    assert all(torch.equal(a, b) for a, b in zip(*grads.values(), strict=True))
    assert not torch.equal(grads["retain"][0], moe_experts(x, ids, topk, packed))


def test_accuracy_on_gaussian_data(int8_isa):
    """Against the unquantised weights: the limit for native int8 is 2.3 %."""
    weights, x, ids, topk, _ = layer(T=128, E=2, D=1024, F=768)
    out = moe_experts(x, ids, topk, pack_experts(*weights, "int8"), compute_type="int8")
    reference = moe_experts_reference(x.double(), ids, topk.double(), *(w.double() for w in weights), {}, 1.0)
    assert rms_ratio(out, reference) < 2.3e-2


def test_what_cannot_compute_in_int8_is_refused():
    weights, x, ids, topk, _ = layer(T=4)
    for fmt, group in (("bf16", None), ("int4", None), ("int8", 32)):
        with pytest.raises(ValueError, match=r"compute_type: int8 products need int8 weights"):
            moe_experts(x, ids, topk, pack_experts(*weights, fmt, group), compute_type="int8")
        with pytest.raises(ValueError, match=r"compute_type: int8 products need weight_format int8"):
            KtConfig(weight_format=fmt, group_size=group, compute_type="int8")
    with pytest.raises(ValueError, match=r"compute_type: expected bf16 or int8, got 'int4'"):
        moe_experts(x, ids, topk, pack_experts(*weights), compute_type="int4")
    before = native.isa()
    native.select_isa("avx2")
    try:
        with pytest.raises(ValueError, match=r"int8 needs a CPU with AMX or AVX512-VNNI, got avx2"):
            moe_experts(x, ids, topk, pack_experts(*weights), compute_type="int8")
    finally:
        native.select_isa(before)
