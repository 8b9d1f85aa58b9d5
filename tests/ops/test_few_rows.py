"""Products of a few rows, whose activations become 16-bit numbers where the instruction set multiplies those."""

import pytest
import torch

from kt_sft import native
from kt_sft.ops import PackedExperts
from kt_sft.ops.quantize import quantize

EPS = torch.finfo(torch.float32).eps
N, K, GROUP = 96, 416, 128  # 128 activations share a power of two; the last group is not whole


def packed_gate(fmt: str, gate: torch.Tensor) -> PackedExperts:
    packed = PackedExperts.empty(1, gate.shape[1], gate.shape[0], fmt)
    packed.pack_expert_(0, gate, torch.randn(gate.shape), torch.randn(gate.shape[::-1]))
    return packed


def product(packed: PackedExperts, act: torch.Tensor) -> torch.Tensor:
    out = torch.full((act.shape[0], N), float("nan"))
    native.product(*packed.native_args(), 0, 0, False, act, out)
    return out


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_whole_numbers_are_exact(isa, rows):
    """Codes and activations whose sums fp32 holds: any order, and any way to multiply, gives the same bits."""
    gate = torch.randint(-126, 127, (N, K)).float()
    gate[:, 0] = 127  # every scale is 1
    packed = packed_gate("int8", gate)
    assert torch.equal(packed.dequantize()[0][0], gate)
    act = torch.randint(-255, 256, (rows, K)).to(torch.bfloat16) / 8
    assert torch.equal(product(packed, act).double(), act.double() @ gate.double().T)


def exact_weights(packed: PackedExperts, gate: torch.Tensor) -> torch.Tensor:
    codes, scales = quantize(gate, packed.weight_format, packed.group_size)
    return codes.double() * scales.double().repeat_interleave(packed.group_size or K, 1)[:, :K]


@pytest.mark.parametrize("own_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_one_activation_far_above_the_others(isa, fmt, rows, own_weights):
    """An outlier costs its own 128 activations at most 2^-15 of itself each, and those beyond nothing."""
    gate = torch.randn(N, K)
    if not own_weights:
        gate[:, GROUP : 2 * GROUP] = 0  # what is left are the products of the other groups
    packed = packed_gate(fmt, gate)
    weight = exact_weights(packed, gate)
    act = torch.randn(rows, K).to(torch.bfloat16)
    act[:, 200] = 30000
    share = torch.zeros(K, dtype=torch.float64)
    share[GROUP : 2 * GROUP] = 30000 * 2**-15
    bound = (share + K * EPS * act.double().abs()) @ weight.abs().T
    error = (product(packed, act).double() - act.double() @ weight.T).abs()
    assert (error <= bound).all(), f"worst {(error / bound).max():.3f} of the bound"


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_alone(isa, fmt, bad):
    packed = packed_gate(fmt, torch.randn(N, K))
    act = torch.randn(2, K).to(torch.bfloat16)
    clean = product(packed, act)
    act[1, 300] = bad
    out = product(packed, act)
    assert torch.equal(out[0], clean[0])
    assert not out[1].isfinite().any()


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("size", [0.0, 1e-40, 2.0**-126, 1e-30, 1e30])
def test_activations_of_any_size(isa, fmt, size):
    packed = packed_gate(fmt, torch.randn(N, K) / K)
    act = (torch.ones(1, K) * size).to(torch.bfloat16)
    weight = packed.dequantize()[0][0].double()
    error = (product(packed, act).double() - act.double() @ weight.T).abs()
    assert (error <= 2**-8 * (act.double().abs() @ weight.abs().T) + 1e-38).all()
