"""BF16, FP16 and FP32 matrices, and FP8 with one scale per block, per output channel or per matrix.

    w = float8_e4m3fn(code) * scale

| checkpoints | scale | shape |
|---|---|---|
| DeepSeek-V3, Qwen3-FP8, MiniMax-M2 (quant_method fp8) | weight_scale_inv fp32 or bf16 | [ceil(N/128), ceil(K/128)] |
| the same rounded to powers of two; DeepSeek-V4 in FP8 | .. or scale, float8_e8m0fnu | the same |
| compressed-tensors float-quantized | weight_scale | [N, 1], [N], block grid, or one |

Despite its name weight_scale_inv is multiplied, not divided by (``weight_dequant`` of DeepSeek-V3's inference code).
"""

from __future__ import annotations

import torch

from .quantized import QuantizedWeight
from .stored import Stored

_FLOATS = ("BF16", "F16", "F32")
_SCALES = ("weight_scale_inv", "weight_scale", "scale")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_DEFAULT_BLOCK = (128, 128)
_ROWS = 64  # looked at together for NaN: temporaries that stay in the cache


class Float:
    """``weight`` in BF16, FP16 or FP32."""

    name = "bf16, fp16 or fp32"

    @staticmethod
    def matches(stored: Stored) -> bool:
        return stored.has("weight") and stored.dtype("weight") in _FLOATS

    @staticmethod
    def tensors(stored: Stored) -> list[str]:
        return ["weight"]

    @staticmethod
    def shape(stored: Stored) -> tuple[int, ...]:
        return stored.shape("weight")

    @staticmethod
    def require(stored: Stored, shape: tuple[int, int]) -> None:
        stored.require("weight", _FLOATS, shape)

    @staticmethod
    def read(stored: Stored, shape: tuple[int, int]) -> QuantizedWeight:
        return QuantizedWeight(kind="float", shape=shape, codes=stored.read("weight"))


class Fp8:
    """``weight`` in float8_e4m3fn with a scale beside it."""

    name = "fp8 (e4m3, scales per 128 x 128 block, per channel or per tensor)"

    @staticmethod
    def matches(stored: Stored) -> bool:
        return stored.has("weight") and stored.dtype("weight") == "F8_E4M3"

    @staticmethod
    def tensors(stored: Stored) -> list[str]:
        return ["weight", _scale_of(stored)]

    @staticmethod
    def shape(stored: Stored) -> tuple[int, ...]:
        return stored.shape("weight")

    @staticmethod
    def require(stored: Stored, shape: tuple[int, int]) -> None:
        stored.require("weight", ("F8_E4M3",), shape)
        stored.require(_scale_of(stored), _SCALE_DTYPES, *_grids(stored, shape))

    @staticmethod
    def read(stored: Stored, shape: tuple[int, int]) -> QuantizedWeight:
        suffix = _scale_of(stored)
        codes = stored.read("weight").view(torch.uint8)
        if any(((part & 0x7F) == 0x7F).any() for part in codes.split(_ROWS)):
            raise stored.error("weight", "finite values", "NaN; the checkpoint is damaged: download it again")
        block = _grids(stored, shape)[stored.shape(suffix)]
        grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        scales = stored.read(suffix).reshape(grid)
        weight = QuantizedWeight(kind="fp8_e4m3", shape=shape, codes=codes, scales=scales, block=block)
        stored.require_scales(suffix, weight, positive=True)
        return weight


def _scale_of(stored: Stored) -> str:
    found = [suffix for suffix in _SCALES if stored.has(suffix)]
    if len(found) != 1:
        raise stored.error("weight", f"one of {', '.join(_SCALES)} beside it", found or "none")
    return found[0]


def _grids(stored: Stored, shape: tuple[int, int]) -> dict[tuple[int, ...], tuple[int, int]]:
    """Possible shapes of the scales -> rows and columns per scale. The block grid wins where two agree."""
    rows, columns = shape
    height, width = _block(stored)
    per_tensor, per_channel = (rows, columns), (1, columns)
    grid = (-(-rows // height), -(-columns // width))
    return {(): per_tensor, (1,): per_tensor, (rows,): per_channel, (rows, 1): per_channel, grid: (height, width)}


def _block(stored: Stored) -> tuple[int, int]:
    named = [stored.checkpoint.quantization_config.get("weight_block_size")]
    named += [scheme.get("block_structure") for scheme in stored.schemes]
    block = next((b for b in named if b is not None), None)
    if block is None:
        return _DEFAULT_BLOCK
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ValueError(
            f"{stored.checkpoint.folder / 'config.json'}: expected a block of two sizes, e.g. [128, 128], got {block!r}"
        )
    return block[0], block[1]
