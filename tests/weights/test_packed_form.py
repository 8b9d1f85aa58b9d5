"""Codes kept as checkpoints store them: every format, bit for bit and through every kernel, both directions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kt_sft import native
from kt_sft.ops import ExpertsLora, PackedExperts, moe_experts
from kt_sft.ops.layout import MatrixFormat
from kt_sft.ops.quantize import INT4_LEVELS, quantize
from kt_sft.weights.gguf_blocks import BLOCKS
from kt_sft.weights.packed_form import format_of, pack
from kt_sft.weights.quantized import QuantizedWeight, pack_nibbles
from tests.conftest import exact_rows

EPS = torch.finfo(torch.float32).eps


def _scales(shape, dtype):
    if dtype == torch.uint8:  # ue8m0, with its smallest
        scales = torch.randint(118, 124, shape, dtype=torch.uint8)
        scales.view(-1)[0] = 0
        return scales
    sign = torch.randint(0, 2, shape) * 2 - 1 if dtype == torch.float16 else 1
    return ((torch.rand(shape) + 0.5) * 0.02 * sign).to(dtype)


def _simple(kind, dtype, block, zeros=False):
    def make(rows, columns):
        height, width = {"channel": (1, columns), "tensor": (rows, columns)}.get(block, block)
        grid = (-(-rows // height), -(-columns // width))
        if kind == "fp8_e4m3":
            codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
            codes[(codes & 0x7F) == 0x7F] = 1  # NaN -> the smallest subnormal
        elif kind == "int8":
            codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        else:
            codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        return QuantizedWeight(
            kind=kind,
            shape=(rows, columns),
            codes=codes,
            scales=_scales(grid, dtype),
            block=(height, width),
            zeros=torch.randint(0, 16, grid, dtype=torch.uint8) if zeros else None,
        )

    return make


def _super(kind):
    def make(rows, columns):
        block = BLOCKS[kind]
        raw = torch.randint(0, 256, (rows * columns // 256, block.nbytes), dtype=torch.uint8)
        factors = (torch.randn(len(raw), (block.halves.stop - block.halves.start) // 2) * 1e-3).to(torch.float16)
        raw[:, block.halves] = factors.view(torch.uint8)
        return QuantizedWeight(kind=kind, shape=(rows, columns), codes=raw.view(rows, -1))

    return make


MAKERS = {
    "int4": _simple("iq4_nl", torch.bfloat16, (1, 32)),
    "int4_sym": _simple("int4", torch.bfloat16, (1, 32)),
    "int8": _simple("int8", torch.bfloat16, "channel"),
    "fp8": _simple("fp8_e4m3", torch.float32, (128, 128)),
    "fp8 bf16 scales": _simple("fp8_e4m3", torch.bfloat16, (128, 128)),
    "fp8 ue8m0": _simple("fp8_e4m3", torch.uint8, (32, 64)),
    "fp8 per tensor": _simple("fp8_e4m3", torch.float32, "tensor"),
    "fp8_channel": _simple("fp8_e4m3", torch.bfloat16, "channel"),
    "mxfp4": _simple("e2m1", torch.uint8, (1, 32)),
    "uint4": _simple("int4", torch.bfloat16, (1, 64), zeros=True),
    "uint4_fp16": _simple("int4", torch.float16, (1, 128), zeros=True),
    "q8_0": _simple("int8", torch.float16, (1, 32)),
    "q4_0": _simple("int4", torch.float16, (1, 32)),
    "iq4_nl": _simple("iq4_nl", torch.float16, (1, 32)),
    "q4_k": _super("q4_k"),
    "q5_k": _super("q5_k"),
    "q6_k": _super("q6_k"),
}

ROUNDED = {"uint4", "uint4_fp16", "q4_k", "q5_k", "q6_k"}  # whose scales cannot be applied to sums


def _packed(name, E, D, F):
    """Experts (gate (F, D), up (F, D), down (D, F)) of one maker, and the sources."""
    sources = [[MAKERS[name](*shape) for shape in ((F, D), (F, D), (D, F))] for _ in range(E)]
    packed = PackedExperts.empty(E, D, F, tuple(format_of(weight) for weight in sources[0]))
    packed.storage.fill_(0xAA)  # whatever packing leaves out shows
    for e, expert in enumerate(sources):
        for projection, weight in enumerate(expert):
            pack(packed, e, projection, weight)
    return packed, sources


def test_every_format_of_the_kernels_has_a_maker():
    formats = {format_of(make(64, 256)).name for make in MAKERS.values()}
    assert formats == set(native.formats()) - {"bf16"}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("sizes", [(256, 256), (768, 256), (256, 512)], ids=str)
def test_unpacking_gives_the_dequantised_values_bit_for_bit(isa, name, sizes):
    packed, sources = _packed(name, 2, *sizes)
    for dtype in (torch.float32, torch.bfloat16):
        for projection, values in enumerate(packed.dequantize(dtype)):
            for e in range(2):
                expected = sources[e][projection].dequantize().to(dtype)
                assert torch.equal(values[e], expected), (projection, e)


@pytest.mark.parametrize("name", [name for name in MAKERS if not name.startswith("q")] + ["q8_0", "q4_0"])
def test_odd_sizes(isa, name):
    """Rows that end within a block of 32 and, where the format allows, columns."""
    packed, sources = _packed(name, 1, 96, 70)
    for values, source in zip(packed.dequantize(torch.float32), sources[0], strict=True):
        assert torch.equal(values[0], source.dequantize())


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 40, 65])
@pytest.mark.parametrize("name", MAKERS)
def test_products_in_both_directions(isa, name, rows):
    """Few rows take the exact values, more of them the values rounded to bf16 once."""
    packed, _ = _packed(name, 1, 512, 256)
    for transposed in (False, True):
        exact = rows <= (4 if name in ROUNDED else exact_rows(isa, not transposed))
        weight = packed.dequantize(torch.float32 if exact else torch.bfloat16)[0][0].double()
        weight = weight.T if transposed else weight
        act = torch.randn(rows, weight.shape[1]).to(torch.bfloat16)
        out = torch.full((rows, weight.shape[0]), float("nan"))
        native.product(*packed.native_args(), 0, 0, transposed, act, out)
        bound = 2 * weight.shape[1] * EPS * (act.double().abs() @ weight.T.abs()) + 1e-30
        assert ((out.double() - act.double() @ weight.T).abs() <= bound).all()


@pytest.mark.parametrize("name", ["fp8", "fp8_channel"])
def test_fp8_scales_up_to_the_largest(isa, name):
    """The kernels multiply them by 2^120, which may not overflow, nor lose what is small."""
    weight = MAKERS[name](256, 128)
    weight.scales[0], weight.scales[-1] = 255, 1e-36
    packed = PackedExperts.empty(1, 128, 256, (format_of(weight),) * 2 + (format_of(MAKERS[name](128, 256)),))
    pack(packed, 0, 0, weight)
    for rows in (1, 5, 16, 40):
        for transposed in (False, True):
            exact = weight.dequantize() if rows <= exact_rows(isa, not transposed) else weight.dequantize().bfloat16()
            exact = exact.double() if transposed else exact.double().T
            act = torch.randn(rows, len(exact)).to(torch.bfloat16)
            out = torch.full((rows, exact.shape[1]), float("nan"))
            native.product(*packed.native_args(), 0, 0, transposed, act, out)
            sizes = act.double().abs()
            bound = 2 * len(exact) * EPS * (sizes @ exact.abs()) + torch.finfo().tiny * sizes.sum(1, keepdim=True)
            assert ((out.double() - act.double() @ exact).abs() <= bound).all(), (rows, transposed)
    weight.scales[0] = 256
    with pytest.raises(ValueError, match=r"scales: expected values below 256 for fp8.*, got 256"):
        pack(packed, 0, 0, weight)


def test_a_layer_of_mixed_formats_trains_like_its_bf16_values():
    """What GGUF's mixed files have: gate and up in one format, down in another."""
    E, D, F, T, K, R = 4, 256, 512, 64, 2, 8
    sources = [[MAKERS["q4_k"](F, D), MAKERS["q4_k"](F, D), MAKERS["q6_k"](D, F)] for _ in range(E)]
    packed = PackedExperts.empty(E, D, F, tuple(format_of(weight) for weight in sources[0]))
    for e, expert in enumerate(sources):
        for projection, weight in enumerate(expert):
            pack(packed, e, projection, weight)
    assert packed.weight_format == "q4_k/q4_k/q6_k"
    plain = PackedExperts.empty(E, D, F, "bf16")
    for e, parts in enumerate(zip(*packed.dequantize(), strict=True)):
        plain.pack_expert_(e, *parts)
    x, ids = torch.randn(T, D).to(torch.bfloat16), torch.randint(0, E, (T, K))
    weights, grad = torch.rand(T, K), torch.randn(T, D).to(torch.bfloat16)
    factors = [torch.randn(E, *s) * 0.05 for s in ((R, D), (F, R), (R, D), (F, R), (R, F), (D, R))]

    def run(experts):
        inputs = [x.clone(), weights.clone(), *(f.clone() for f in factors)]
        for tensor in inputs:
            tensor.requires_grad_()
        names = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
        lora = ExpertsLora(**dict(zip(names, inputs[2:], strict=True)), scaling=2.0, dropout=0.0)
        out = moe_experts(inputs[0], ids, inputs[1], experts, lora)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    for got, expected in zip(run(packed), run(plain), strict=True):
        assert torch.equal(got, expected)


def test_memory_is_that_of_the_checkpoint():
    for name, make in MAKERS.items():
        packed, sources = _packed(name, 1, 1024, 768)
        stored = sum(weight.nbytes for weight in sources[0])
        zeros = sum(weight.zeros.numel() / 2 for weight in sources[0] if weight.zeros is not None)  # 4 bits each there
        assert packed.nbytes <= 1.03 * (stored - zeros), (name, packed.nbytes / (stored - zeros))
        assert make(32, 256).dequantize().isfinite().all()


def test_what_no_format_holds():
    weight = MAKERS["uint4"](64, 128)
    order = torch.arange(128) % 2
    changed = [
        {"column_groups": order},
        {"scales": weight.scales.float()},
        {
            "block": (1, 16),
            "scales": weight.scales.repeat_interleave(4, 1),
            "zeros": weight.zeros.repeat_interleave(4, 1),
        },
    ]
    for change in changed:
        assert format_of(QuantizedWeight(**{**vars(weight), **change})) is None
    assert format_of(QuantizedWeight(kind="float", shape=(4, 4), codes=torch.zeros(4, 4))) is None
    assert format_of(weight) == MatrixFormat("uint4", 64)


def test_codes_of_another_format_and_bad_scales_are_refused():
    packed, sources = _packed("mxfp4", 1, 64, 64)
    with pytest.raises(ValueError, match="as mxfp4 with a scale per 32 columns, got q4_0 with a scale per 32"):
        pack(packed, 0, 0, MAKERS["q4_0"](64, 64))
    with pytest.raises(ValueError, match="got values"):
        packed.pack_matrix_(0, 1, torch.randn(64, 64))
    sources[0][0].scales[0, 0] = 255
    with pytest.raises(ValueError, match="finite"):
        pack(packed, 0, 0, sources[0][0])
    with pytest.raises(ValueError, match=r"codes: expected shape \(64, 32\)"):
        packed.pack_codes_(0, 0, torch.zeros(64, 64, dtype=torch.uint8), [torch.zeros(64, 2, dtype=torch.uint8)])
    short = PackedExperts.empty(1, 96, 64, "q4_k")
    with pytest.raises(ValueError, match="codes: q4_k expected a multiple of 256 columns, got 96"):
        short.pack_codes_(0, 0, torch.zeros(64, 0, dtype=torch.uint8), [torch.zeros(64, 2, dtype=torch.uint8)] * 4)
    with pytest.raises(ValueError, match="planes: expected 1, got 2"):
        planes = [torch.zeros(64, 2, dtype=torch.uint8)] * 2
        packed.pack_codes_(0, 0, torch.zeros(64, 32, dtype=torch.uint8), planes)


@pytest.mark.parametrize(("maker", "bad"), [
    ("int8", "nan"), ("int8", "inf"), ("q8_0", "nan"), ("q8_0", "-inf"), ("fp8", "nan"), ("fp8", "-inf"),
])  # fmt: skip
def test_scales_of_every_type_have_to_be_finite(maker, bad):
    weight = MAKERS[maker](64, 64)
    packed = PackedExperts.empty(1, 64, 64, (format_of(weight),) * 3)
    if weight.scales.shape[1] == 1:  # as of a slice of a checkpoint's tensor; still contiguous
        weight = replace(weight, scales=weight.scales.as_strided(weight.scales.shape, (1, 3)))
    weight.scales[-1, -1] = 255 if maker == "fp8" else torch.finfo(weight.scales.dtype).max
    pack(packed, 0, 0, weight)
    weight.scales[-1, -1] = float(bad)
    with pytest.raises(ValueError, match="scales: expected finite values, got NaN or Inf"):
        pack(packed, 0, 0, weight)


def test_int4_of_the_quantiser_is_the_same_packed_either_way():
    w = torch.randn(64, 96)
    values, scales = quantize(w, "int4", 32)
    codes = torch.searchsorted(torch.tensor(INT4_LEVELS), values.long()).to(torch.uint8)
    source = QuantizedWeight(kind="iq4_nl", shape=(64, 96), codes=pack_nibbles(codes), scales=scales, block=(1, 32))
    first, second = PackedExperts.empty(1, 96, 64, "int4"), PackedExperts.empty(1, 96, 64, "int4")
    for packed in (first, second):
        packed.storage.zero_()
    first.pack_matrix_(0, 0, w)
    pack(second, 0, 0, source)
    assert np.array_equal(first.storage.numpy(), second.storage.numpy())
