"""FP8 and MXFP4 codes made from values, for checkpoints that are not in these formats already.

    fp8     per block of 128 x 128 as DeepSeek-V3 publishes: scale = max |w| / 448 in fp32, codes E4M3 to the nearest
    mxfp4   per row and 32 columns (OCP Microscaling 1.0): scale = 2^e, codes E2M1 to the nearest; of the exponent at
            which max |w| is at most 6 * 2^e and the one below it, which clips, the one with the lower squared error

Ties round to the even code. Shape suffixes: N rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.layout import MatrixFormat
from .quantized import QuantizedWeight, pack_nibbles

ENCODED = ("fp8", "mxfp4")
FP8_BLOCK, MXFP4_GROUP = 128, 32
_FP8_MOST, _E2M1_MOST = 448.0, 6.0
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
    # As many rows at a time as an FP8 block has: temporaries stay in the cache.
    parts = [_ENCODERS[name](part) for part in values_NK.split(FP8_BLOCK)]
    codes, scales = (torch.cat(pieces) for pieces in zip(*((p.codes, p.scales) for p in parts), strict=True))
    return replace(parts[0], shape=(len(w_NK), w_NK.shape[1]), codes=codes, scales=scales)


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
        sizes_NGg = _e2m1((w_NGg / scale_NG1).abs_())
        error_NG = (w_NGg.abs() - sizes_NGg * scale_NG1).square_().sum(-1)
        trials.append((exponent_NG, sizes_NGg, error_NG))
    (exponent_NG, sizes_NGg, error_NG), (below_NG, below_sizes, below_error) = trials
    better_NG = below_error < error_NG
    sizes_NGg = torch.where(better_NG[..., None], below_sizes, sizes_NGg)
    exponent_NG = torch.where(better_NG, below_NG, exponent_NG)
    codes_NGg = (_at_size(sizes_NGg, 2 * sizes_NGg, sizes_NGg + 2, sizes_NGg / 2 + 4) + 8 * (w_NGg < 0)).to(torch.uint8)
    return QuantizedWeight(
        kind="e2m1",
        shape=(rows, columns),
        codes=pack_nibbles(codes_NGg.view(rows, -1)[:, :columns]),
        scales=(exponent_NG + 127).to(torch.uint8),
        block=(1, MXFP4_GROUP),
    )


def _e2m1(sizes: Tensor) -> Tensor:
    """The nearest of 0 0.5 1 1.5 2 3 4 6; half way, the one with the even code."""
    return _at_size(sizes, (2 * sizes).round_() / 2, sizes.round(), 2 * (sizes / 2).round_()).clamp_(max=_E2M1_MOST)


def _at_size(sizes: Tensor, below_2: Tensor, below_4: Tensor, above: Tensor) -> Tensor:
    """Codes are half apart below 2, one below 4, two above."""
    return torch.where(sizes < 2, below_2, torch.where(sizes < 4, below_4, above))


_ENCODERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {"fp8": _fp8, "mxfp4": _mxfp4}
