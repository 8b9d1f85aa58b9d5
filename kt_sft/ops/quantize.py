"""Symmetric quantisation of weight matrices to int8 and int4 codes with bf16 scales, as the oracle of the kernels' own.

For every row n and group g of ``group_size`` columns:  code = clamp(round(w / scale), lo, hi),  w ~ bf16(code * scale).
int8: codes -127 to 127, scale = max|w| / 127, rounded up to bf16 so that nothing is clipped. int4: codes -8 to 7; the
scale has the sign that makes the code of the largest |w| negative, where there is one code more, and of nine sizes the
one with the least squared error in its group.
Shape suffixes: N rows, K columns, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES = {"int8": (-127, 127), "int4": (-8, 7)}
_BLOCK = 32  # columns of a weight block
_INT4_FRACTIONS = (1.04, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of max|w| / 8, besides max|w| / 7 rounded up


def _bf16_ceil(x: Tensor) -> Tensor:
    """The least bf16 that is not below x (x >= 0)."""
    y = x.to(torch.bfloat16)
    bits = y.view(torch.int16)
    return torch.where(y.float() < x, bits + 1, bits).view(torch.bfloat16)


def _squared_error(exact_NGg: Tensor, codes_NGg: Tensor, scale_NG1: Tensor) -> Tensor:
    """scale^2 * sum (codes - exact)^2, (N, G, 1) fp32, added in the kernels' order.

    Column by column within 32 columns, then block by block.
    """
    rows, groups, group = codes_NGg.shape
    residual_NGg = torch.nn.functional.pad(codes_NGg - exact_NGg, (0, -group % _BLOCK))
    squares_NGBb = residual_NGg.square_().view(rows, groups, -1, _BLOCK)
    blocks_NGB = torch.zeros(squares_NGBb.shape[:-1])
    for square_NGB in squares_NGBb.unbind(-1):
        blocks_NGB += square_NGB
    sum_NG = torch.zeros(rows, groups)
    for block_NG in blocks_NGB.unbind(-1):
        sum_NG += block_NG
    return sum_NG.unsqueeze(-1) * scale_NG1 * scale_NG1


def quantize(w_NK: Tensor, weight_format: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Return (codes_NK int8, scales_NG bf16), G = ceil(K / group_size), or 1 per channel.

    Raises ValueError if the weights hold NaN or Inf.
    """
    rows, columns = w_NK.shape
    group = group_size or columns
    pad = -columns % group
    w_NGg = torch.nn.functional.pad(w_NK.float(), (0, pad)).view(rows, -1, group)
    peak_NG1 = w_NGg.abs().amax(-1, keepdim=True)
    if not torch.isfinite(peak_NG1).all():
        raise ValueError("weights: expected finite values, got NaN or Inf")
    least, most = CODES[weight_format]

    def codes_for(scale_NG1: Tensor) -> tuple[Tensor, Tensor]:
        inverse_NG1 = torch.where(scale_NG1.abs() >= torch.finfo(torch.float32).tiny, 1.0 / scale_NG1, 0.0)
        exact_NGg = w_NGg * inverse_NG1
        return exact_NGg.round().clamp_(least, most), exact_NGg

    scale_NG1 = _bf16_ceil(peak_NG1 / most).float()
    if weight_format == "int4":
        sign_NG1 = torch.where(w_NGg.amax(-1, keepdim=True) < peak_NG1, 1.0, -1.0)
        scale_NG1 = scale_NG1 * sign_NG1
    codes_NGg, exact_NGg = codes_for(scale_NG1)
    if weight_format == "int4":
        best_NG1 = _squared_error(exact_NGg, codes_NGg, scale_NG1)
        for fraction in _INT4_FRACTIONS:
            trial_NG1 = (peak_NG1 * (fraction / 8)).to(torch.bfloat16).float() * sign_NG1
            trial_codes, exact_NGg = codes_for(trial_NG1)
            error_NG1 = _squared_error(exact_NGg, trial_codes, trial_NG1)
            better = error_NG1 < best_NG1
            best_NG1 = torch.where(better, error_NG1, best_NG1)
            scale_NG1 = torch.where(better, trial_NG1, scale_NG1)
            codes_NGg = torch.where(better, trial_codes, codes_NGg)
    codes_NK = codes_NGg.to(torch.int8).view(rows, -1)[:, :columns].contiguous()
    return codes_NK, scale_NG1.squeeze(-1).to(torch.bfloat16).contiguous()


def dequantize(codes_NK: Tensor, scales_NG: Tensor, group_size: int) -> Tensor:
    """bf16(code * scale): the values that the kernels multiply with; the independent oracle of unpacking."""
    columns = codes_NK.shape[1]
    scale_NK = scales_NG.float().repeat_interleave(group_size or columns, dim=1)[:, :columns]
    return (codes_NK.float() * scale_NK).to(torch.bfloat16)
