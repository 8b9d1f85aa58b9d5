"""Packing: bitwise round trips, sizes, quantisation quality, and what bad input gets."""

import pytest
import torch

from kt_sft import native
from kt_sft.ops import PackedExperts, pack_experts
from kt_sft.ops.quantize import INT4_LEVELS, dequantize, int4_values, quantize

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


def _matrix_by_contract(packed: PackedExperts) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values (N, K) and scales (N, G) of the first expert's gate, read as csrc/kernels/panel.h lays them out."""
    N, K = packed.intermediate_size, packed.hidden_size
    NB, KB = -(-N // 32), -(-K // 32)
    pair_bytes = {"bf16": 4, "int8": 2, "int4": 1}[packed.weight_format]
    own = 64 if packed.weight_format != "bf16" and (packed.group_size or KB * 32) == 32 else 0  # bytes behind the codes
    blocks = packed.storage[: NB * KB * (512 * pair_bytes + own)].view(NB * KB, -1)
    codes = blocks[:, : 512 * pair_bytes].flatten()
    if packed.weight_format == "int4":  # words of 8 nibbles: the first columns of 4 pairs, then their second ones
        nibbles = torch.stack((codes & 15, codes >> 4), -1).view(NB, KB, 4, 32, 2, 4)
        pairs = int4_values(nibbles.permute(0, 1, 2, 5, 3, 4)).to(torch.int8)
    else:
        pairs = codes.view({"bf16": torch.bfloat16, "int8": torch.int8}[packed.weight_format])
    codes_NK = pairs.reshape(NB, KB, 16, 32, 2).permute(0, 3, 1, 2, 4).reshape(NB * 32, KB * 32)
    nothing = 1 if packed.weight_format == "int4" else 0  # int4 has no zero: rows beyond the matrix have scale 0
    assert codes_NK[N:].eq(nothing).all() and codes_NK[:, K:].eq(nothing).all()
    if packed.weight_format == "bf16":
        return codes_NK[:N, :K], None
    groups = -(-KB * 32 // packed.group_size) if packed.group_size else 1
    scales = packed.storage[blocks.numel() : blocks.numel() + NB * groups * 64]
    if own:
        scales = blocks[:, 512 * pair_bytes :].flatten()
    scales_NG = scales.view(torch.bfloat16).view(NB, groups, 32).transpose(1, 2).reshape(NB * 32, groups)
    assert scales_NG[N:].eq(0).all()
    return codes_NK[:N, :K], scales_NG[:N]


@pytest.mark.parametrize(("fmt", "group"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_isa_stores_the_oracles_codes_where_the_layout_says(isa, fmt, group, dtype):
    gate, up, down = (w.to(dtype) for w in _weights(1, 200, 75))
    packed = pack_experts(gate, up, down, fmt, group)
    codes_NK, scales_NG = _matrix_by_contract(packed)
    if scales_NG is None:
        assert torch.equal(codes_NK, gate[0].to(torch.bfloat16))
    else:
        expected_codes, expected_scales = quantize(gate[0], fmt, packed.group_size)
        assert torch.equal(codes_NK, expected_codes)
        assert torch.equal(scales_NG[:, : expected_scales.shape[1]], expected_scales)
        codes_NK = dequantize(expected_codes, expected_scales, packed.group_size)
    assert torch.equal(packed.dequantize()[0][0], codes_NK)


@pytest.mark.parametrize(("fmt", "group"), [("int8", 0), ("int8", 32), ("int4", 0), ("int4", 32)])
def test_tiny_and_huge_weights_quantise_like_the_oracle(isa, fmt, group):
    magnitude = torch.tensor([0.0, 1e-45, 1e-39, 1e-37, 1e-30, 1e-22, 1e-15, 1e15, 1e22, 1e37])
    w = torch.randn(10, 96) * magnitude[:, None]
    packed = pack_experts(w[None], w[None], w.T.contiguous()[None], fmt, group)
    codes_NK, scales_NG = _matrix_by_contract(packed)
    expected_codes, expected_scales = quantize(w, fmt, packed.group_size)
    assert torch.equal(codes_NK, expected_codes) and torch.equal(scales_NG, expected_scales)


LEVELS = torch.tensor(INT4_LEVELS).double()
ROWS, COLUMNS = 16, 512
DRAWS = {
    "gaussian": lambda: torch.randn(ROWS, COLUMNS),
    "bf16": lambda: torch.randn(ROWS, COLUMNS).bfloat16().float(),
    "uniform": lambda: 2 * torch.rand(ROWS, COLUMNS) - 1,
    "laplacian": lambda: torch.distributions.Laplace(0.0, 1.0).sample((ROWS, COLUMNS)),
    "one large weight": lambda: torch.randn(ROWS, COLUMNS) * torch.where(torch.arange(COLUMNS) % 32 == 7, 40.0, 1.0),
    "positive": lambda: torch.rand(ROWS, COLUMNS),
}


def _squared_error(w_NGg, scales_NG1):
    """Of every group, in float64, with the nearest level for every weight."""
    exact_NGg = w_NGg / scales_NG1
    above_NGg = torch.searchsorted(LEVELS, exact_NGg).clamp(1, 15)
    low_NGg, high_NGg = LEVELS[above_NGg - 1], LEVELS[above_NGg]
    return (torch.minimum((exact_NGg - low_NGg).abs(), (exact_NGg - high_NGg).abs()) * scales_NG1).square().sum(-1)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("group", [32, 128, 0])
def test_int4_finds_nearly_the_best_scale_and_never_a_worse_one_than_the_peak_gives(group, draw):
    """Against 120 scales in float64, and in every group against the one that gives the peak the lowest level."""
    w_NK = DRAWS[draw]()
    values_NK, scales_NG = quantize(w_NK, "int4", group)
    w_NGg = w_NK.double().view(ROWS, -1, group or COLUMNS)
    got_NG = (values_NK.view_as(w_NGg) * scales_NG.double().unsqueeze(-1) - w_NGg).square().sum(-1)
    peak_NG1 = w_NGg.abs().amax(-1, keepdim=True)
    plain_NG1 = torch.where(w_NGg.amax(-1, keepdim=True) == peak_NG1, -peak_NG1, peak_NG1) / 127
    plain_NG1 = plain_NG1.to(torch.bfloat16).double()
    assert (got_NG <= _squared_error(w_NGg, plain_NG1) * (1 + 1e-3)).all()
    sizes = [sign * size for sign in (1, -1) for size in torch.linspace(0.6, 1.25, 60).tolist()]
    best_NG = torch.stack([_squared_error(w_NGg, size * plain_NG1) for size in sizes]).amin(0)
    assert got_NG.sum() <= (1.03 if group else 1.06) * best_NG.sum()


def test_int4_error_on_gaussian_weights():
    """With even steps it is 0.081."""
    w = torch.randn(256, 2048)
    assert ((dequantize(*quantize(w, "int4", 32), 32).float() - w).norm() / w.norm()).item() <= 0.0745


def test_int4_weights_that_are_levels_already_stay_exact():
    """Where the largest has one of the outermost levels."""
    levels = LEVELS.float()[torch.randint(0, 16, (64, 256))]
    levels[:32, ::32] = -127
    levels[32:] = levels[32:].clamp(min=-104)
    levels[32:, ::32] = 113
    scales = torch.randn(64, 8).to(torch.bfloat16)
    w = dequantize(levels.to(torch.int8), scales, 32)
    assert torch.equal(dequantize(*quantize(w.float(), "int4", 32), 32), w)


def test_int4_zeros_stay_zeros():
    w = torch.randn(3, 64) * torch.tensor([1.0, 0.0, 1e-40])[:, None]
    w[0, :32] = 0
    got = pack_experts(w[None], w[None], w.T.contiguous()[None], "int4").dequantize()[0][0]
    assert got[0, :32].eq(0).all() and got[0, 32:].ne(0).all() and got[1:].eq(0).all()


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
    ("int4", 0): 20.1, ("int4", 128): 21.2, ("int4", 64): 21.8, ("int4", 32): 22.7,
}  # fmt: skip


@pytest.mark.parametrize(("fmt", "group"), SQNR_DB)
def test_quantisation_quality_on_gaussian_weights(fmt, group):
    w = torch.randn(64, 2048)
    error = dequantize(*quantize(w, fmt, group), group).float() - w
    sqnr = 10 * torch.log10(w.square().sum() / error.square().sum()).item()
    assert sqnr == pytest.approx(SQNR_DB[fmt, group], abs=0.1)


def test_extremes_quantise_exactly():
    w = torch.zeros(3, 64)
    w[0, 0], w[1] = 1e-30, torch.linspace(-1, 1, 64)
    codes, scales = quantize(w, "int8", 0)
    assert codes[2].eq(0).all() and scales[2] == 0
    assert codes.abs().max() <= 127 and codes[1, 0] == -codes[1, -1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [(3, 5), (-1, -1), (16, 64)])  # the last column stands in a block of its own
def test_nan_and_inf_are_refused_by_name(fmt, bad, dtype, place, isa):
    gate, up, down = (w.to(dtype) for w in _weights(2, 66, 70))
    up[(1, *place)] = bad
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


@pytest.mark.parametrize("group", [0, 32, 128])
def test_int4_sym_codes_are_packed_as_they_are(group):
    """Codes -8 to 7, as compressed-tensors stores them: dequantised values bit for bit, no rounding on the way."""
    E, F, D = 2, 96, 160
    packed, sources = PackedExperts.empty(E, D, F, "int4_sym", group), {}
    for expert in range(E):
        for projection, (rows, columns) in enumerate(((F, D), (F, D), (D, F))):
            codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
            scales = torch.randn(rows, -(-columns // (group or columns))).to(torch.bfloat16)
            sources[expert, projection] = dequantize(codes.to(torch.int8) - 8, scales, group)
            pairs = codes[:, 0::2] | codes[:, 1::2] << 4
            packed.pack_codes_(expert, projection, pairs, [scales.view(torch.uint8)])
    for projection, weights in enumerate(packed.dequantize()):
        for expert in range(E):
            assert torch.equal(weights[expert], sources[expert, projection])
