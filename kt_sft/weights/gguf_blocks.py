"""Blocks of GGUF that stay as they are: several scales, or a scale and a minimum, in a block.

| kind | weights, bytes | layout | weight |
|---|---|---|---|
| q4_1 | 32, 20 | d, m, 16 nibble pairs | d * q + m |
| q5_0 | 32, 22 | d, 32 fifth bits, 16 nibble pairs | d * (q - 16) |
| q5_1 | 32, 24 | d, m, 32 fifth bits, 16 nibble pairs | d * q + m |
| q2_k | 256, 84 | 16 x (s, min) of 4 bits, 64 bytes of 2-bit codes, d, dmin | (d * s) * q - (dmin * min) per 16 |
| q3_k | 256, 110 | 256 third bits, 64 bytes of 2-bit codes, 16 x s of 6 bits, d | (d * (s - 32)) * (q - 4) per 16 |
| q4_k | 256, 144 | d, dmin, 8 x (s, min) of 6 bits, 128 nibble pairs | (d * s) * q - (dmin * min) per 32 |
| q5_k | 256, 176 | d, dmin, 8 x (s, min) of 6 bits, 256 fifth bits, 128 nibble pairs | the same |
| q6_k | 256, 210 | 128 nibble pairs, 64 bytes of upper bit pairs, 16 x int8 s, d | (d * s) * (q - 32) per 16 |
| iq4_xs | 256, 136 | d, 8 x s of 6 bits in 2 + 4 bytes, 128 nibble pairs | (d * (s - 32)) * level[q] per 32 |

d, m and dmin are fp16. All arithmetic is fp32 in this order of operations, so that the results are those of llama.cpp's
dequantize_row_* bit for bit. Source of the layouts: the structs block_* in ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.quantize import INT4_LEVELS

IQ4_LEVELS = INT4_LEVELS  # our own int4 has them too


@dataclass(frozen=True)
class Block:
    """``decode`` takes blocks (n, nbytes) and gives n * size elements in fp32; the fp16 factors are at ``halves``."""

    size: int
    nbytes: int
    halves: slice
    decode: Callable[[Tensor], Tensor]

    def factors(self, raw: Tensor) -> Tensor:
        """The fp16 factors of every block, as fp32."""
        return half(raw.reshape(-1, self.nbytes)[:, self.halves])

    def dequantize(self, raw: Tensor) -> Tensor:
        """uint8 (N, K / size * nbytes) -> fp32 (N, K)."""
        return self.decode(raw.reshape(-1, self.nbytes)).view(len(raw), -1)


def half(two_bytes: Tensor) -> Tensor:
    """uint8 (n, 2 m) holding fp16 -> fp32 (n, m)."""
    return two_bytes.contiguous().view(torch.float16).float()


def _shifted(packed: Tensor, run: int, bits: int) -> Tensor:
    """(n, bytes) -> codes (n, bytes / run, 8 / bits, run): of every ``run`` bytes first the lowest bits of all."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    return (packed.reshape(len(packed), -1, 1, run) >> shifts) & ((1 << bits) - 1)


def _bits(packed: Tensor) -> Tensor:
    """(n, bytes) -> (n, 8 bytes): the bits, lowest first, as they are stored one after the other."""
    return ((packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def _q4_1(blocks: Tensor) -> Tensor:
    factors = half(blocks[:, 0:4])
    return factors[:, 0:1] * _shifted(blocks[:, 4:], 16, 4).flatten(1).float() + factors[:, 1:2]


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _shifted(blocks[:, 6:], 16, 4).flatten(1) | (_bits(blocks[:, 2:6]) << 4)
    return half(blocks[:, 0:2]) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    factors = half(blocks[:, 0:4])
    codes = _shifted(blocks[:, 8:], 16, 4).flatten(1) | (_bits(blocks[:, 4:8]) << 4)
    return factors[:, 0:1] * codes.float() + factors[:, 1:2]


def _q2_k(blocks: Tensor) -> Tensor:
    factors = half(blocks[:, 80:84])
    scale = factors[:, 0:1] * (blocks[:, :16] & 15).float()
    minimum = factors[:, 1:2] * (blocks[:, :16] >> 4).float()
    codes = _shifted(blocks[:, 16:80], 32, 2).reshape(-1, 16, 16).float()
    return scale.unsqueeze(-1) * codes - minimum.unsqueeze(-1)


def _q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    low, high = _shifted(packed[:, :8], 8, 4).flatten(1), _shifted(packed[:, 8:], 4, 2).flatten(1)
    scale = half(blocks[:, 108:110]) * ((low | (high << 4)).float() - 32)
    codes = _shifted(blocks[:, 32:96], 32, 2).reshape(-1, 16, 16)
    third = _shifted(blocks[:, :32], 32, 1).reshape(-1, 16, 16)
    return scale.unsqueeze(-1) * ((codes | (third << 2)).float() - 4)


def _q4_k(blocks: Tensor) -> Tensor:
    return _affine(blocks, _shifted(blocks[:, 16:], 32, 4).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    fifth = _shifted(blocks[:, 16:48], 32, 1).reshape(-1, 8, 32)
    return _affine(blocks, _shifted(blocks[:, 48:], 32, 4).reshape(-1, 8, 32) | (fifth << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = _shifted(blocks[:, :128], 64, 4).reshape(-1, 16, 16)
    high = _shifted(blocks[:, 128:192], 32, 2).reshape(-1, 16, 16)
    scale = half(blocks[:, 208:210]) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return scale.unsqueeze(-1) * ((low | (high << 4)).float() - 32)


def _iq4_xs(blocks: Tensor) -> Tensor:
    low, high = _shifted(blocks[:, 4:8], 1, 4).flatten(1), _shifted(blocks[:, 2:4], 1, 2).flatten(1)
    scale = half(blocks[:, 0:2]) * ((low | (high << 4)).float() - 32)
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32)
    return scale.unsqueeze(-1) * levels[_shifted(blocks[:, 8:], 16, 4).reshape(-1, 8, 32).int()]


def _affine(blocks: Tensor, codes: Tensor) -> Tensor:
    """q4_k and q5_k, from codes (n, 8, 32)."""
    factors = half(blocks[:, 0:4])
    scale, minimum = _six_bit_pairs(blocks[:, 4:16])
    d = (factors[:, 0:1] * scale.float()).unsqueeze(-1)
    m = (factors[:, 1:2] * minimum.float()).unsqueeze(-1)
    return d * codes.float() - m


def affine_scales(blocks: Tensor) -> list[Tensor]:
    """Of q4_k and q5_k: d, dmin (n, 2 bytes of fp16), scales and minima (n, 8), all uint8."""
    return [blocks[:, 0:2], blocks[:, 2:4], *_six_bit_pairs(blocks[:, 4:16])]


def q6_k_scales(blocks: Tensor) -> list[Tensor]:
    """d (n, 2 bytes of fp16), scales (n, 16) of int8, as uint8."""
    return [blocks[:, 208:210], blocks[:, 192:208]]


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 12) -> scales (n, 8), minima (n, 8): the first four whole in bytes 0-3 and 4-7, the others in pieces."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    minimum = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scale, minimum


BLOCKS = {
    "q4_1": Block(32, 20, slice(0, 4), _q4_1),
    "q5_0": Block(32, 22, slice(0, 2), _q5_0),
    "q5_1": Block(32, 24, slice(0, 4), _q5_1),
    "q2_k": Block(256, 84, slice(80, 84), _q2_k),
    "q3_k": Block(256, 110, slice(108, 110), _q3_k),
    "q4_k": Block(256, 144, slice(0, 4), _q4_k),
    "q5_k": Block(256, 176, slice(0, 4), _q5_k),
    "q6_k": Block(256, 210, slice(208, 210), _q6_k),
    "iq4_xs": Block(256, 136, slice(0, 2), _iq4_xs),
}
