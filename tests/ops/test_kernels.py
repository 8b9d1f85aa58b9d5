"""Every kernel row that this CPU can run: products per format, direction and odd shape, to the bound of fp32 sums."""

import pytest
import torch

from kt_sft import native
from kt_sft.ops import PackedExperts
from kt_sft.ops.layout import QUANTISED
from kt_sft.ops.quantize import quantize
from tests.conftest import exact_rows

EPS = torch.finfo(torch.float32).eps
# m, n, k: one row, tile edges and beyond, more rows than one call takes, several reduction panels
SHAPES = [(1, 16, 32), (7, 33, 31), (16, 32, 64), (17, 40, 300), (33, 130, 96), (600, 48, 520), (3, 200, 1100)]
SHAPES += [(2, 5000, 70), (4, 129, 4200), (5, 64, 64)]  # few rows: more steps than are converted at once
SHAPES += [(64, 70, 2200), (65, 70, 2200)]  # more steps than one visit of the sums; the last rows that are exact


def weights_of(packed: PackedExperts, source: torch.Tensor, exact: bool) -> torch.Tensor:
    """The values that a product multiplies with, in float64."""
    if not exact or packed.weight_format == "bf16":
        return packed.dequantize()[0][0].double()
    codes, scales = quantize(source, packed.weight_format, packed.group_size)
    group = packed.group_size or source.shape[1]
    return codes.double() * scales.double().repeat_interleave(group, 1)[:, : source.shape[1]]


@pytest.mark.parametrize("direction", ["forward", "input_gradient"])
@pytest.mark.parametrize("fmt", QUANTISED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(isa, fmt, direction, shape):
    m, n, k = shape
    packed = PackedExperts.empty(1, k, n, fmt)  # gate: (F, D) = (n, k)
    gate = torch.randn(n, k)
    packed.pack_expert_(0, gate, torch.randn(n, k), torch.randn(k, n))
    weight = weights_of(packed, gate, m <= exact_rows(isa, direction == "forward"))
    weight = weight if direction == "forward" else weight.T
    act = torch.randn(m, weight.shape[1]).to(torch.bfloat16)
    out = torch.full((m, weight.shape[0]), float("nan"))
    native.product(*packed.native_args(), 0, 0, direction == "input_gradient", act, out)
    exact = act.double() @ weight.T
    bound = weight.shape[1] * EPS * (act.double().abs() @ weight.T.abs()) + 1e-30
    assert ((out.double() - exact).abs() <= bound).all(), (
        f"worst {((out.double() - exact).abs() / bound).max():.3f} of the bound"
    )


@pytest.mark.parametrize("fmt", QUANTISED)
@pytest.mark.parametrize("rows", [4, 5, 65])
def test_directions_are_adjoint(isa, fmt, rows):
    """<y, W x> = <W^T y, x> on the same packed codes, but for the rounding to bf16 where only one side does without."""
    n, k = 96, 160
    packed = PackedExperts.empty(1, k, n, fmt)
    packed.pack_expert_(0, torch.randn(n, k), torch.randn(n, k), torch.randn(k, n))
    x, y = torch.randn(rows, k).to(torch.bfloat16), torch.randn(rows, n).to(torch.bfloat16)
    wx, wty = torch.full((rows, n), float("nan")), torch.full((rows, k), float("nan"))
    native.product(*packed.native_args(), 0, 0, False, x, wx)
    native.product(*packed.native_args(), 0, 0, True, y, wty)
    left, right = (y.double() * wx.double()).sum(1), (wty.double() * x.double()).sum(1)
    weight = packed.dequantize()[0][0].double().abs()
    alike = fmt == "bf16" or (rows <= exact_rows(isa, True)) == (rows <= exact_rows(isa, False))
    rounding = EPS * (n + k) if alike else 2**-9 * (1 + 2**-7)
    assert ((left - right).abs() <= rounding * (y.double().abs() @ weight * x.double().abs()).sum(1)).all()


def test_sort_by_expert_is_the_stable_sort():
    ids = torch.randint(0, 7, (50,))
    counts, order = torch.empty(9, dtype=torch.int32), torch.empty(50, dtype=torch.int32)
    native.sort_by_expert(ids, 9, counts, order)
    assert torch.equal(counts, torch.bincount(ids, minlength=9).int())
    assert torch.equal(order, torch.sort(ids, stable=True).indices.int())


def test_an_isa_that_the_cpu_lacks_is_refused():
    with pytest.raises(ValueError, match=r"unknown 'sse9'; expected auto or one of: amx"):
        native.select_isa("sse9")
    for name in ("amx", "avx512_bf16", "avx512", "avx2"):
        if name not in native.isas():
            with pytest.raises(ValueError, match=f"cannot run '{name}'"):
                native.select_isa(name)
