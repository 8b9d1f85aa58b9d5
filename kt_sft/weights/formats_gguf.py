"""GGUF blocks -> QuantizedWeight: the simple types in their canonical order, the others as they are.

Blocks of 32 weights (ggml-common.h of llama.cpp); the low nibbles hold weights 0 to 15, the high ones 16 to 31:

    Q4_0, IQ4_NL  fp16 d | 16 bytes of nibbles       MXFP4  ue8m0 byte | 16 bytes of nibbles      Q8_0  fp16 d | 32 int8

F32, F16 and BF16 are plain. Scales may be zero or negative here: the quantisers of llama.cpp make both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gguf_blocks import BLOCKS
from .quantized import QuantizedWeight, pack_nibbles
from .stored import Stored

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_RAW = {kind.upper(): kind for kind in BLOCKS}
TYPES = (*_FLOATS, "Q4_0", "Q8_0", "IQ4_NL", "MXFP4", *_RAW)


class Gguf:
    """``blk.N.ffn_{gate,up,down}_exps.weight``, in any of ``TYPES``."""

    name = "gguf"

    @staticmethod
    def matches(stored: Stored) -> bool:
        return stored.is_gguf

    @staticmethod
    def tensors(stored: Stored) -> list[str]:
        return ["weight"]

    @staticmethod
    def shape(stored: Stored) -> tuple[int, ...]:
        return stored.shape("weight")

    @staticmethod
    def require(stored: Stored, shape: tuple[int, int]) -> None:
        stored.require("weight", TYPES, shape)

    @staticmethod
    def read(stored: Stored, shape: tuple[int, int]) -> QuantizedWeight:
        dtype, raw = stored.dtype("weight"), stored.read_bytes("weight")
        if dtype in _FLOATS:
            return QuantizedWeight(kind="float", shape=shape, codes=raw.view(_FLOATS[dtype]).view(shape))
        if dtype in _RAW:
            return _raw(stored, raw, _RAW[dtype], shape)
        weight = _SIMPLE[dtype](raw.view(shape[0], shape[1] // 32, -1), shape)
        stored.require_scales("weight", weight, positive=False)
        return weight


def _raw(stored: Stored, raw: Tensor, kind: str, shape: tuple[int, int]) -> QuantizedWeight:
    codes = raw.view(shape[0], -1)
    stored.require_finite("weight", BLOCKS[kind].factors(codes), "scales")
    return QuantizedWeight(kind=kind, shape=shape, codes=codes)


def _nibbles(bytes_NGb: Tensor) -> Tensor:
    """(N, G, 16) -> canonical (N, 16 G)."""
    codes = torch.cat([bytes_NGb & 15, bytes_NGb >> 4], dim=-1)
    return pack_nibbles(codes.flatten(1))


def _half(blocks_NGb: Tensor) -> Tensor:
    return blocks_NGb[..., :2].contiguous().view(torch.float16).squeeze(-1)


def _q4_0(blocks_NGb: Tensor, shape: tuple[int, int]) -> QuantizedWeight:
    codes = _nibbles(blocks_NGb[..., 2:])
    return QuantizedWeight(kind="int4", shape=shape, codes=codes, scales=_half(blocks_NGb), block=(1, 32))


def _iq4_nl(blocks_NGb: Tensor, shape: tuple[int, int]) -> QuantizedWeight:
    codes = _nibbles(blocks_NGb[..., 2:])
    return QuantizedWeight(kind="iq4_nl", shape=shape, codes=codes, scales=_half(blocks_NGb), block=(1, 32))


def _q8_0(blocks_NGb: Tensor, shape: tuple[int, int]) -> QuantizedWeight:
    codes = blocks_NGb[..., 2:].contiguous().view(torch.int8).view(shape)
    return QuantizedWeight(kind="int8", shape=shape, codes=codes, scales=_half(blocks_NGb), block=(1, 32))


def _mxfp4(blocks_NGb: Tensor, shape: tuple[int, int]) -> QuantizedWeight:
    codes, scales = _nibbles(blocks_NGb[..., 1:]), blocks_NGb[..., 0].contiguous()
    return QuantizedWeight(kind="e2m1", shape=shape, codes=codes, scales=scales, block=(1, 32))


_SIMPLE: dict[str, Callable[[Tensor, tuple[int, int]], QuantizedWeight]] = {
    "Q4_0": _q4_0,
    "IQ4_NL": _iq4_nl,
    "Q8_0": _q8_0,
    "MXFP4": _mxfp4,
}
