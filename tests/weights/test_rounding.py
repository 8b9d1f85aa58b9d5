"""Error-compensated rounding: the oracle is the definition, one column at a time in float64; and it must help."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kt_sft.ops.quantize import INT4_LEVELS, dequantize, int4_values, quantize
from kt_sft.weights.quantized import QuantizedWeight
from kt_sft.weights.rounding import DAMPING, round_int4

N, K, T = 48, 320, 1024


def inputs(columns: int = K) -> Tensor:
    """Correlated, of very different sizes."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(T, columns, generator=g) @ (
        torch.randn(columns, columns, generator=g) * torch.linspace(0.05, 2, columns)[:, None]
    )


def matrix(columns: int = K) -> Tensor:
    return 0.02 * torch.randn(N, columns, generator=torch.Generator().manual_seed(1))


def values_of(weight: QuantizedWeight) -> Tensor:
    return int4_values(torch.stack([weight.codes & 15, weight.codes >> 4], dim=-1).flatten(1)).to(torch.int8)


def by_definition(w_NK: Tensor, hessian_KK: Tensor, scale_N: Tensor) -> Tensor:
    """Optimal brain surgeon, column by column: the inverse of what is left is computed anew each time."""
    hessian_KK = hessian_KK.double()
    hessian_KK += DAMPING * hessian_KK.diagonal().mean() * torch.eye(len(hessian_KK))
    left_NK, values_NK = w_NK.double().clone(), torch.empty(w_NK.shape, dtype=torch.int8)
    levels = torch.tensor(INT4_LEVELS, dtype=torch.int8)
    for k in range(w_NK.shape[1]):
        inverse = torch.linalg.inv(hessian_KK[k:, k:])
        values_NK[:, k] = levels[((left_NK[:, k] / scale_N)[:, None] - levels).abs().argmin(1)]
        error_N = (left_NK[:, k] - values_NK[:, k] * scale_N) / inverse[0, 0]
        left_NK[:, k:] -= error_N[:, None] * inverse[0]
    return values_NK


def test_codes_are_those_of_the_definition():
    w, x = matrix(), inputs()
    got = round_int4(w, x.T @ x, 0)
    assert got.scales is not None
    assert torch.equal(got.scales, quantize(w, "int4", 0)[1])
    expected = by_definition(w, x.T @ x, got.scales[:, 0].double())
    assert (values_of(got) == expected).float().mean() > 0.999


@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
@pytest.mark.parametrize("columns", [K, 200])
def test_equal_inputs_that_are_independent_leave_rounding_to_the_nearest(group_size, columns):
    w = matrix(columns)
    got = round_int4(w, 3 * torch.eye(columns), group_size)
    values, scales = quantize(w, "int4", group_size)
    assert got.scales is not None
    assert torch.equal(values_of(got), values)
    assert torch.equal(got.scales, scales)
    assert torch.equal(got.dequantize(torch.bfloat16), dequantize(values, scales, group_size))


@pytest.mark.parametrize("group_size", [0, 32, 128])
def test_the_layer_loses_less(group_size):
    w, x = matrix(), inputs()
    near = dequantize(*quantize(w, "int4", group_size), group_size).float()
    lost = [(x @ (q - w).T).norm().item() for q in (round_int4(w, x.T @ x, group_size).dequantize(), near)]
    assert lost[0] < 0.7 * lost[1]


def test_inputs_that_are_always_zero():
    w, x = matrix(), inputs()
    x[:, 10:20] = 0
    got = round_int4(w, x.T @ x, 32)
    assert torch.isfinite(got.dequantize()).all()
    assert torch.isfinite(round_int4(w, torch.zeros(K, K), 32).dequantize()).all()


def test_refused():
    with pytest.raises(ValueError, match=r"hessian: expected shape \(320, 320\), got \(3, 3\)"):
        round_int4(matrix(), torch.eye(3), 32)
    with pytest.raises(ValueError, match="hessian: expected finite values, got NaN or Inf"):
        round_int4(matrix(), torch.full((K, K), float("nan")), 32)


def test_the_hessian_stays_what_it_is():
    hessian = torch.eye(K, dtype=torch.float64)
    round_int4(matrix(), hessian, 32)
    assert torch.equal(hessian, torch.eye(K, dtype=torch.float64))
