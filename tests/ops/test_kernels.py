"""Every kernel row that this CPU can run: products per format, direction and odd shape, to the bound of fp32 sums."""

import pytest
import torch

from kt_sft import native
from kt_sft.ops import PackedExperts

EPS = torch.finfo(torch.float32).eps
# m, n, k: one row, tile edges and beyond, more rows than one call takes, several reduction panels
SHAPES = [(1, 16, 32), (7, 33, 31), (16, 32, 64), (17, 40, 300), (33, 130, 96), (600, 48, 520), (3, 200, 1100)]


@pytest.mark.parametrize("direction", ["forward", "input_gradient"])
@pytest.mark.parametrize("fmt", native.formats())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(isa, fmt, direction, shape):
    m, n, k = shape
    packed = PackedExperts.empty(1, k, n, fmt)  # gate: (F, D) = (n, k)
    packed.pack_expert_(0, torch.randn(n, k), torch.randn(n, k), torch.randn(k, n))
    weight = packed.dequantize()[0][0].double()
    weight = weight if direction == "forward" else weight.T
    act = torch.randn(m, weight.shape[1]).to(torch.bfloat16)
    out = torch.full((m, weight.shape[0]), float("nan"))
    native.product(*packed.native_args(), 0, 0, direction == "input_gradient", act, out)
    exact = act.double() @ weight.T
    bound = weight.shape[1] * EPS * (act.double().abs() @ weight.T.abs()) + 1e-30
    assert ((out.double() - exact).abs() <= bound).all(), (
        f"worst {((out.double() - exact).abs() / bound).max():.3f} of the bound"
    )


@pytest.mark.parametrize("fmt", native.formats())
def test_directions_are_adjoint(isa, fmt):
    """<y, W x> = <W^T y, x> on the same packed codes."""
    n, k = 96, 160
    packed = PackedExperts.empty(1, k, n, fmt)
    packed.pack_expert_(0, torch.randn(n, k), torch.randn(n, k), torch.randn(k, n))
    x, y = torch.randn(5, k).to(torch.bfloat16), torch.randn(5, n).to(torch.bfloat16)
    wx, wty = torch.full((5, n), float("nan")), torch.full((5, k), float("nan"))
    native.product(*packed.native_args(), 0, 0, False, x, wx)
    native.product(*packed.native_args(), 0, 0, True, y, wty)
    left, right = (y.double() * wx.double()).sum(1), (wty.double() * x.double()).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


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
