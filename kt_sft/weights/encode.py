"""FP8 and MXFP4 codes made from values, for checkpoints that are not in these formats already.

    fp8     per block of 128 x 128 as DeepSeek-V3 publishes: scale = max |w| / 448 in fp32, codes E4M3 to the nearest
    mxfp4   per row and 32 columns (OCP Microscaling 1.0): scale = 2^e, codes E2M1 to the nearest; of the exponent at
            which max |w| is at most 6 * 2^e and the one below it, which clips, the one with the lower squared error

Ties round to the even code. Shape suffixes: N rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.layout import MatrixFormat
from .quantized import QuantizedWeight, pack_nibbles

ENCODED = ("fp8", "mxfp4")
FP8_BLOCK, MXFP4_GROUP = 128, 32
_FP8_MOST, _E2M1_MOST = 448.0, 6.0
_E2M1_BETWEEN = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # half way from one code to the next
_EXPONENTS = (-127, 127)  # of ue8m0


def encoded_format(name: str, columns: int) -> MatrixFormat:
    """The packed format of what ``encode`` makes of a matrix with so many columns."""
    group = {"fp8": FP8_BLOCK, "mxfp4": MXFP4_GROUP}[name]
    return MatrixFormat(name, group if columns > group else 0)


def encode(w_NK: Tensor, name: str) -> QuantizedWeight:
    """A float matrix as ``fp8`` or ``mxfp4``. Raises ValueError if it holds NaN or Inf."""
    values_NK = w_NK.float()
    if not torch.isfinite(values_NK).all():
        raise ValueError("weights: expected finite values, got NaN or Inf")
    return _ENCODERS[name](values_NK)


def _fp8(w_NK: Tensor) -> QuantizedWeight:
    rows, columns = w_NK.shape
    padded = F.pad(w_NK, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
    scales = blocks.abs().amax((1, 3)) / _FP8_MOST
    scales = torch.where(scales > 0, scales, 1.0)  # of a block of zeros; no quantiser writes a scale of zero
    scaled = (blocks / scales[:, None, :, None]).clamp_(-_FP8_MOST, _FP8_MOST)
    codes = scaled.view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn).view(torch.uint8)
    block = (FP8_BLOCK, FP8_BLOCK)
    return QuantizedWeight(kind="fp8_e4m3", shape=(rows, columns), codes=codes.contiguous(), scales=scales, block=block)


def _mxfp4(w_NK: Tensor) -> QuantizedWeight:
    rows, columns = w_NK.shape
    w_NGg = F.pad(w_NK, (0, -columns % MXFP4_GROUP)).view(rows, -1, MXFP4_GROUP)
    peak_NG = w_NGg.abs().amax(-1)
    peak_NG = torch.where(peak_NG > 0, peak_NG, _E2M1_MOST)  # of zeros any exponent will do
    above_NG = torch.ceil(torch.log2(peak_NG / _E2M1_MOST)).clamp_(*_EXPONENTS)
    trials = []
    for exponent_NG in (above_NG, (above_NG - 1).clamp_(min=_EXPONENTS[0])):
        scale_NG1 = torch.exp2(exponent_NG)[..., None]
        codes_NGg = _e2m1(w_NGg / scale_NG1)
        error_NG = (_E2M1_VALUES[codes_NGg.int()] * scale_NG1 - w_NGg).square().sum(-1)
        trials.append((exponent_NG, codes_NGg, error_NG))
    (exponent_NG, codes_NGg, error_NG), (below_NG, below_codes, below_error) = trials
    better_NG = below_error < error_NG
    codes_NGg = torch.where(better_NG[..., None], below_codes, codes_NGg)
    exponent_NG = torch.where(better_NG, below_NG, exponent_NG)
    return QuantizedWeight(
        kind="e2m1",
        shape=(rows, columns),
        codes=pack_nibbles(codes_NGg.view(rows, -1)[:, :columns]),
        scales=(exponent_NG + 127).to(torch.uint8),
        block=(1, MXFP4_GROUP),
    )


_E2M1_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _e2m1(values: Tensor) -> Tensor:
    """The nearest codes; half way, the even one: the count of midpoints below, or at an odd code also those equal."""
    size = values.abs()
    below = torch.bucketize(size, _E2M1_BETWEEN)
    at_most = torch.bucketize(size, _E2M1_BETWEEN, right=True)
    codes = torch.where(below % 2 == 0, below, at_most)
    return (codes + 8 * (values < 0)).to(torch.uint8)


_ENCODERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {"fp8": _fp8, "mxfp4": _mxfp4}
