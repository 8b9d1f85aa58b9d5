"""The k-quants of GGUF: blocks of 256 weights with scales of their own.

    q4_k   144 bytes: d fp16 | dmin fp16 | 8 x (scale, min) of 6 bits in 12 bytes | 128 bytes of nibbles
    q5_k   176 bytes: d | dmin | 12 bytes as above | 32 bytes of fifth bits | 128 bytes of nibbles
           w = (d * scale) * q - (dmin * min), per 32 weights
    q6_k   210 bytes: 128 bytes of nibbles | 64 bytes of upper bit pairs | 16 int8 scales | d fp16
           w = (d * scale) * (q - 32), per 16 weights

All arithmetic is fp32 in this order of operations, so that the results are those of llama.cpp's dequantize_row_* bit
for bit. Source of the layouts: block_q4_K, block_q5_K and block_q6_K in ggml-common.h of llama.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 256
NBYTES = {"q4_k": 144, "q5_k": 176, "q6_k": 210}


def q4_k(raw: Tensor) -> Tensor:
    """uint8 (N, K / 256 * 144) -> fp32 (N, K)."""
    blocks = raw.reshape(-1, NBYTES["q4_k"])
    return _affine(blocks, _nibbles(blocks[:, 16:], 32)).view(len(raw), -1)


def q5_k(raw: Tensor) -> Tensor:
    """uint8 (N, K / 256 * 176) -> fp32 (N, K)."""
    blocks = raw.reshape(-1, NBYTES["q5_k"])
    fifth = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(1, 8, 1)) & 1
    return _affine(blocks, _nibbles(blocks[:, 48:], 32) | (fifth << 4)).view(len(raw), -1)


def q6_k(raw: Tensor) -> Tensor:
    """uint8 (N, K / 256 * 210) -> fp32 (N, K)."""
    blocks = raw.reshape(-1, NBYTES["q6_k"])
    low = _nibbles(blocks[:, :128], 64).view(-1, 16, 16)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = (pairs >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)) & 3
    codes = (low | (high.reshape(-1, 16, 16) << 4)).float() - 32
    scales = half(blocks[:, 208:210]) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scales.unsqueeze(-1) * codes).view(len(raw), -1)


def super_scales(kind: str, raw: Tensor) -> Tensor:
    """The fp16 factors of every block, as fp32 (blocks, 1 or 2)."""
    blocks = raw.reshape(-1, NBYTES[kind])
    return half(blocks[:, 208:210]) if kind == "q6_k" else half(blocks[:, 0:4])


def half(two_bytes: Tensor) -> Tensor:
    """uint8 (n, 2 m) holding fp16 -> fp32 (n, m)."""
    return two_bytes.contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """(n, 128) bytes -> codes (n, 8, 32): of every ``run`` bytes first all low nibbles, then all high ones."""
    shifts = torch.tensor([0, 4], dtype=torch.uint8).view(1, 1, 2, 1)
    return ((packed.reshape(len(packed), -1, 1, run) >> shifts) & 15).view(-1, 8, 32)


def _affine(blocks: Tensor, codes: Tensor) -> Tensor:
    factors = half(blocks[:, 0:4])
    scale, minimum = _six_bit_pairs(blocks[:, 4:16])
    d = (factors[:, 0:1] * scale.float()).unsqueeze(-1)
    m = (factors[:, 1:2] * minimum.float()).unsqueeze(-1)
    return d * codes.float() - m


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 12) -> scales (n, 8), minima (n, 8): the first four whole in bytes 0-3 and 4-7, the others in pieces."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    minimum = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scale, minimum
