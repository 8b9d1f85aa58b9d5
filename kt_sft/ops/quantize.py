"""Quantisation of weight matrices to int8 and int4 codes with bf16 scales, as the oracle of the kernels' own.

For every row n and group g of ``group_size`` columns a code stands for a value:  w ~ bf16(value * scale), the value
nearest to w / scale. int8: -127 to 127, scale = max|w| / 127, rounded up to bf16 so that nothing is clipped.

int4: the 16 uneven levels of llama.cpp's IQ4_NL (kvalues_iq4nl in ggml-common.h of https://github.com/ggml-org/llama.cpp),
dense near zero as weights are: 9 % less error on Gaussian weights than even steps. The scale may be negative. In units
of the scale s that gives the largest |w| the level -127, with x = round(256 w / s) / 256, each of nine trials t takes
the levels q nearest to x / t and the scale that fits these levels best, and the largest gain wins:

    d = sum q x    n = sum q^2    scale = bf16(s d / n)    f = scale / s
    gain = sum x^2 - sum (x - f q)^2 = f (2 d - f n)

s itself, with the levels of t = 1, is the tenth candidate. Shape suffixes: N rows, K columns, G groups.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import torch
from torch import Tensor

INT4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_LEVELS = torch.tensor(INT4_LEVELS, dtype=torch.int32)
_MIDDLES = [(a + b) / 2 for a, b in pairwise(INT4_LEVELS)]
_MIDPOINTS = torch.tensor(_MIDDLES)
_HALVES = 512  # midpoints are whole or half numbers: the level nearest to a number, by the half below it
_BY_HALF = torch.tensor(
    [INT4_LEVELS[bisect_right(_MIDDLES, i / 2)] for i in range(-_HALVES, _HALVES)], dtype=torch.int32
)
_BLOCK = 32  # columns of a weight block
_TRIALS = (1, 0.80, 0.88, 0.94, 0.98, 1.04, 1.16, -1.04, -1.12)
_TINY = torch.finfo(torch.float32).tiny


def nearest_int4(exact: Tensor) -> Tensor:
    """Codes (int32, 0 to 15) of the int4 levels nearest to fp32 numbers in units of the scale, the upper one of two."""
    return torch.bucketize(exact, _MIDPOINTS, right=True, out_int32=True)


def int4_values(codes: Tensor) -> Tensor:
    """The levels that int4 codes (0 to 15) stand for: int32 of the same shape."""
    return _take(_LEVELS, codes.int())


def _take(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.flatten()).view(index.shape)


def inverse_of(scale: Tensor) -> Tensor:
    """1 / scale, fp32; 0 where that might overflow."""
    return torch.where(scale.abs() >= _TINY, 1.0 / scale, 0.0)


def _bf16_ceil(x: Tensor) -> Tensor:
    """The least bf16 that is not below x (x >= 0)."""
    y = x.to(torch.bfloat16)
    bits = y.view(torch.int16)
    return torch.where(y.float() < x, bits + 1, bits).view(torch.bfloat16)


def _sum_of_blocks(whole_NGg: Tensor) -> Tensor:
    """Sums of whole numbers over a group, (N, G, 1) fp32: exact within 32 columns, then block by block."""
    rows, groups, group = whole_NGg.shape
    whole_NGBb = torch.nn.functional.pad(whole_NGg, (0, -group % _BLOCK)).view(rows, groups, -1, _BLOCK)
    blocks_NGB = whole_NGBb.sum(-1, dtype=torch.int32)
    sum_NG = torch.zeros(rows, groups)
    for block_NG in blocks_NGB.unbind(-1):
        sum_NG += block_NG.float()
    return sum_NG.unsqueeze(-1)


def _int4_scale(w_NGg: Tensor, peak_NG1: Tensor, inside_Gg: Tensor) -> Tensor:
    """The scale (N, G, 1) of every group; ``inside_Gg`` is 0 for columns that the matrix lacks."""
    sign_NG1 = torch.where(w_NGg.amax(-1, keepdim=True) < peak_NG1, 1.0, -1.0)
    plain_NG1 = (peak_NG1 / 127).to(torch.bfloat16).float() * sign_NG1
    inverse_NG1 = inverse_of(plain_NG1)
    x_NGg = (w_NGg * inverse_NG1 * 256).round().int()
    scale_NG1, best_NG1 = plain_NG1, torch.empty(0)
    for trial in _TRIALS:
        c = int(2**14 / trial + (0.5 if trial > 0 else -0.5))
        halves_NGg = (x_NGg * c + 2**14) >> 21  # of x / t, rounded to 1 / 128 before
        q_NGg = _take(_BY_HALF, halves_NGg + _HALVES) * inside_Gg
        d_NG1, n_NG1 = _sum_of_blocks(q_NGg * x_NGg), _sum_of_blocks(q_NGg * q_NGg)
        if trial == 1:
            best_NG1 = 256 * (2 * d_NG1 - 256 * n_NG1)
        trial_NG1 = (plain_NG1 * (d_NG1 / n_NG1 / 256)).to(torch.bfloat16).float()
        f_NG1 = trial_NG1 * inverse_NG1 * 256
        gain_NG1 = f_NG1 * (2 * d_NG1 - f_NG1 * n_NG1)
        better = best_NG1 < gain_NG1
        best_NG1 = torch.where(better, gain_NG1, best_NG1)
        scale_NG1 = torch.where(better, trial_NG1, scale_NG1)
    return torch.where(scale_NG1.abs() < _TINY, 0.0, scale_NG1)


def quantize(w_NK: Tensor, weight_format: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Return (values_NK int8: what the codes stand for, scales_NG bf16), G = ceil(K / group_size), or 1 per channel.

    Raises ValueError if the weights hold NaN or Inf, and on a format that is neither int8 nor int4.
    """
    if weight_format not in ("int8", "int4"):
        raise ValueError(f"weight_format: expected int8 or int4, got {weight_format!r}")
    rows, columns = w_NK.shape
    group = group_size or columns
    pad = -columns % group
    w_NGg = torch.nn.functional.pad(w_NK.float().contiguous(), (0, pad)).view(rows, -1, group)
    peak_NG1 = w_NGg.abs().amax(-1, keepdim=True)
    if not torch.isfinite(peak_NG1).all():
        raise ValueError("weights: expected finite values, got NaN or Inf")
    if weight_format == "int8":
        scale_NG1 = _bf16_ceil(peak_NG1 / 127).float()
        values_NGg = (w_NGg * inverse_of(scale_NG1)).round().clamp_(-127, 127)
    else:
        inside_Gg = (torch.arange(columns + pad) < columns).int().view(-1, group)
        scale_NG1 = _int4_scale(w_NGg, peak_NG1, inside_Gg)
        values_NGg = int4_values(nearest_int4(w_NGg * inverse_of(scale_NG1)))
    values_NK = values_NGg.to(torch.int8).view(rows, -1)[:, :columns].contiguous()
    return values_NK, scale_NG1.squeeze(-1).to(torch.bfloat16).contiguous()


def dequantize(values_NK: Tensor, scales_NG: Tensor, group_size: int) -> Tensor:
    """bf16(value * scale): the values that the kernels multiply with; the independent oracle of unpacking."""
    columns = values_NK.shape[1]
    scale_NK = scales_NG.float().repeat_interleave(group_size or columns, dim=1)[:, :columns]
    return (values_NK.float() * scale_NK).to(torch.bfloat16)
