"""Packing: bitwise round trips, sizes, quantisation quality, and what bad input gets."""

import pytest
import torch

from kt_sft import native
from kt_sft.ops import PackedExperts, pack_experts
from kt_sft.ops.quantize import dequantize, quantize

SHAPES = [(2, 64, 96), (3, 33, 70), (1, 160, 40), (2, 1, 1)]  # E, D, F
FORMATS = [
    ("bf16", None), ("int8", None), ("int8", 32), ("int8", 64), ("int8", 128),
    ("int4", None), ("int4", 0), ("int4", 64), ("int4", 128),
]  # fmt: skip


def _weights(E, D, F):
    return torch.randn(E, F, D) * 0.1, torch.randn(E, F, D), torch.randn(E, D, F) * 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("fmt", "group"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpack_returns_the_quantised_values_bit_for_bit(shape, fmt, group, dtype):
    weights = tuple(w.to(dtype) for w in _weights(*shape))
    packed = pack_experts(*weights, fmt, group)
    for got, weight in zip(packed.dequantize(), weights, strict=True):
        for e in range(shape[0]):
            if fmt == "bf16":
                expected = weight[e].to(torch.bfloat16)
            else:
                expected = dequantize(*quantize(weight[e], fmt, packed.group_size), packed.group_size)
            assert torch.equal(got[e].view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4"])
def test_packing_does_not_depend_on_threads_or_isa(fmt, isa):
    weights = _weights(2, 96, 64)
    threads = native.num_threads()
    native.select_isa("avx2")
    first = pack_experts(*weights, fmt).storage
    native.select_isa(isa)
    native.set_num_threads(3)
    try:
        assert torch.equal(pack_experts(*weights, fmt).storage, first)
    finally:
        native.set_num_threads(threads)


def test_sizes_hold_codes_and_scales_only():
    E, D, F = 4, 256, 512
    elements = 3 * E * D * F
    sizes = {f: PackedExperts.nbytes_for(E, D, F, f) for f in ("bf16", "int8", "int4")}
    assert sizes["bf16"] == 2 * elements
    assert sizes["int8"] == elements + 2 * E * (2 * F + D)  # one bf16 scale per output channel
    assert sizes["int4"] == elements // 2 + 2 * elements // 32  # one bf16 scale per 32 weights


SQNR_DB = {
    ("int8", 0): 41.4, ("int8", 128): 43.4, ("int8", 64): 44.1, ("int8", 32): 44.9,
    ("int4", 0): 18.8, ("int4", 128): 19.5, ("int4", 64): 20.0, ("int4", 32): 20.8,
}  # fmt: skip


@pytest.mark.parametrize(("fmt", "group"), SQNR_DB)
def test_quantisation_quality_on_gaussian_weights(fmt, group):
    w = torch.randn(64, 2048)
    error = dequantize(*quantize(w, fmt, group), group).float() - w
    sqnr = 10 * torch.log10(w.square().sum() / error.square().sum()).item()
    assert sqnr == pytest.approx(SQNR_DB[fmt, group], abs=0.2)


def test_extremes_quantise_exactly():
    w = torch.zeros(3, 64)
    w[0, 0], w[1] = 1e-30, torch.linspace(-1, 1, 64)
    codes, scales = quantize(w, "int8", 0)
    assert codes[2].eq(0).all() and scales[2] == 0
    assert codes.abs().max() <= 127 and codes[1, 0] == -codes[1, -1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4"])
def test_nan_and_inf_are_refused_by_name(fmt, bad):
    gate, up, down = _weights(2, 64, 64)
    up[1, 3, 5] = bad
    with pytest.raises(ValueError, match=r"up_proj of expert 1.*NaN or Inf"):
        pack_experts(gate, up, down, fmt)


def test_bad_arguments_raise_value_errors():
    gate, up, down = _weights(2, 64, 96)
    with pytest.raises(ValueError, match="down_proj: expected shape"):
        pack_experts(gate, up, up)
    with pytest.raises(ValueError, match="up_proj: expected shape"):
        pack_experts(gate, up[:1], down)
    with pytest.raises(ValueError, match="weight_format: expected one of"):
        pack_experts(gate, up, down, "int5")
    with pytest.raises(ValueError, match="group_size: expected 32, 64, 128"):
        pack_experts(gate, up, down, "int8", 48)
    with pytest.raises(ValueError, match="no scales"):
        pack_experts(gate, up, down, "bf16", 32)
    with pytest.raises(ValueError, match="storage: expected a CPU uint8 tensor"):
        PackedExperts(torch.zeros(10, dtype=torch.uint8), 2, 64, 96, "int8")
    packed = pack_experts(gate, up, down)
    with pytest.raises(ValueError, match="expert: expected 0 to 1, got 2"):
        packed.pack_expert_(2, gate[0], up[0], down[0])
    with pytest.raises(ValueError, match="float tensor"):
        packed.pack_expert_(0, gate[0].int(), up[0], down[0])
