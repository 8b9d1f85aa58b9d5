"""INT4 codes by error-compensated rounding (GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

Rounding to the nearest minimises |W - Q|; what counts is |X W^T - X Q^T| on the inputs X that the layer sees. With
H = X^T X + damping and U the upper Cholesky factor of H^-1, columns are rounded one after the other, and the columns to
the right take up what each of them lost:

    e_k = (w_k - q_k) / U[k, k]          w_j -= e_k U[k, j]    for all j > k

in blocks of 128 columns, so that most of it is matrix products. The scale of a group is the one of ops/quantize.py
(least squared error), chosen when the group is reached, and q_k the nearest of its 16 levels. The codes are those of
the packed format int4: nothing else about it changes. Columns keep their order, since a group's scale must stay beside
its columns.
Shape suffixes: N rows (outputs), K columns (inputs), G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.quantize import int4_values, inverse_of, nearest_int4, quantize
from .quantized import QuantizedWeight, pack_nibbles

BLOCK = 128  # columns
DAMPING = 0.01  # of the mean of H's diagonal


def round_int4(w_NK: Tensor, hessian_KK: Tensor, group_size: int) -> QuantizedWeight:
    """Codes and bf16 scales of a float matrix, given X^T X of its inputs (fp32); ``group_size`` 0 is per channel.

    Raises ValueError if the weights or the Hessian hold NaN or Inf.
    """
    rows, columns = w_NK.shape
    if hessian_KK.shape != (columns, columns):
        raise ValueError(f"hessian: expected shape {(columns, columns)}, got {tuple(hessian_KK.shape)}")
    group = group_size or columns
    factor_KK = _inverse_factor(hessian_KK)
    left_KN = w_NK.float().T.contiguous()  # what is left to be rounded; a column of W is a row here
    codes_KN = torch.empty(columns, rows, dtype=torch.uint8)
    scales_NG = torch.empty(rows, -(-columns // group), dtype=torch.bfloat16)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors_BN = torch.empty(end - start, rows)
        for k in range(start, end):
            if k % group == 0:
                part_NG = quantize(left_KN[k : k + group].T, "int4", group_size)[1]
                scales_NG[:, k // group] = part_NG[:, 0]
                scale_N = part_NG[:, 0].float()
                inverse_N = inverse_of(scale_N)
            codes_KN[k] = nearest_int4(left_KN[k] * inverse_N)
            errors_BN[k - start] = (left_KN[k] - int4_values(codes_KN[k]) * scale_N) / factor_KK[k, k]
            left_KN[k + 1 : end].addr_(factor_KK[k, k + 1 : end], errors_BN[k - start], alpha=-1)
        left_KN[end:].addmm_(factor_KK[start:end, end:].T, errors_BN, alpha=-1)
    codes = pack_nibbles(codes_KN.T)
    return QuantizedWeight(kind="iq4_nl", shape=(rows, columns), codes=codes, scales=scales_NG, block=(1, group))


def _inverse_factor(hessian_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse; inputs that were always zero are tied to no other column."""
    if not torch.isfinite(hessian_KK).all():
        raise ValueError("hessian: expected finite values, got NaN or Inf; the calibration text overflows this model")
    damped_KK = hessian_KK.to(torch.float64, copy=True)
    diagonal_K = damped_KK.diagonal()
    mean = diagonal_K.mean().item() or 1.0
    diagonal_K += DAMPING * mean
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    return torch.linalg.cholesky(inverse_KK, upper=True).float()
