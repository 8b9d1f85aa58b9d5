"""MXFP4: E2M1 codes with one power-of-two scale (ue8m0) per 32 input features.

    w[n, k] = e2m1(code[n, k]) * 2^(scale[n, k // 32] - 127),   even k in the low nibble of a byte

| checkpoints | codes | scales |
|---|---|---|
| gpt-oss | ..._blocks uint8 [E, N, K/32, 16] | ..._scales uint8 [E, N, K/32] |
| DeepSeek-V4-Flash | weight int8 [N, K/2] | scale float8_e8m0fnu [N, K/32] |
| compressed-tensors mxfp4-pack-quantized | weight_packed uint8 [N, K/2] | weight_scale uint8 [N, K/32] |

Sources: convert_moe_packed_tensors of transformers; cast_e2m1fn_to_e4m3fn of DeepSeek-V4-Flash's inference/convert.py.
"""

from __future__ import annotations

import torch

from .quantized import QuantizedWeight
from .stored import Stored

_GROUP = 32
_BYTES = ("U8", "I8")
_EXPONENTS = ("U8", "F8_E8M0")
_LAYOUTS = (("blocks", "scales"), ("weight", "scale"), ("weight_packed", "weight_scale"))


class Mxfp4:
    """``blocks`` and ``scales``, ``weight`` and ``scale``, or ``weight_packed`` and ``weight_scale``."""

    name = "mxfp4"

    @staticmethod
    def matches(stored: Stored) -> bool:
        return _layout(stored) is not None

    @staticmethod
    def tensors(stored: Stored) -> list[str]:
        return list(_layout(stored) or ())

    @staticmethod
    def shape(stored: Stored) -> tuple[int, ...]:
        layout = _layout(stored)
        assert layout is not None
        rows, columns = stored.shape(layout[0])[:2]
        return rows, columns * (_GROUP if layout[0] == "blocks" else 2)

    @staticmethod
    def require(stored: Stored, shape: tuple[int, int]) -> None:
        layout = _layout(stored)
        assert layout is not None
        rows, columns = shape
        if columns % _GROUP:
            raise stored.error(layout[0], f"a multiple of {_GROUP} columns", columns)
        packed = (rows, columns // 32, 16) if layout[0] == "blocks" else (rows, columns // 2)
        stored.require(layout[0], _BYTES, packed)
        stored.require(layout[1], _EXPONENTS, (rows, columns // _GROUP))

    @staticmethod
    def read(stored: Stored, shape: tuple[int, int]) -> QuantizedWeight:
        layout = _layout(stored)
        assert layout is not None
        codes = stored.read(layout[0]).view(torch.uint8).reshape(shape[0], -1)
        scales = stored.read(layout[1])
        weight = QuantizedWeight(kind="e2m1", shape=shape, codes=codes, scales=scales, block=(1, _GROUP))
        stored.require_scales(layout[1], weight, positive=False)
        return weight


def _layout(stored: Stored) -> tuple[str, str] | None:
    for codes, scales in _LAYOUTS:
        found = stored.has(codes) and stored.has(scales)
        if found and stored.dtype(codes) in _BYTES and stored.dtype(scales) in _EXPONENTS:
            return codes, scales
    return None
