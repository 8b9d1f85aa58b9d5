"""A checkpoint's codes in packed form: which format holds them as they are, and what packing takes.

A matrix that none of the formats holds (GPTQ with act-order, GGUF's rarer types, values) has to be quantised anew.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..config import KtConfig
from ..ops.layout import QUANTISED, Layout, MatrixFormat, resolve_group_size
from ..ops.packed import PackedExperts
from .encode import ENCODED, encode, encoded_format
from .formats import ExpertWeights
from .gguf_blocks import BLOCKS, affine_scales, q6_k_scales
from .quantized import QuantizedWeight

logger = logging.getLogger(__name__)

_BLOCK = 32  # rows and columns of a packed block
_NOT_FINITE = {  # exponents of NaN and Inf; of ue8m0 NaN
    torch.uint8: np.uint8(0xFF),
    torch.float16: np.uint16(0x7C00),
    torch.bfloat16: np.uint16(0x7F80),
    torch.float32: np.uint32(0x7F800000),
}
_SUPER_SCALES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "q4_k": affine_scales,
    "q5_k": affine_scales,
    "q6_k": q6_k_scales,
}
# (kind, scale dtype, with zero points) of a scale per row and group -> format
_BY_GROUP = {
    ("int8", torch.bfloat16, False): "int8",
    ("int8", torch.float16, False): "q8_0",
    ("int4", torch.bfloat16, False): "int4_sym",
    ("iq4_nl", torch.bfloat16, False): "int4",
    ("int4", torch.float16, False): "q4_0",
    ("int4", torch.bfloat16, True): "uint4",
    ("int4", torch.float16, True): "uint4_fp16",
    ("e2m1", torch.uint8, False): "mxfp4",
    ("iq4_nl", torch.float16, False): "iq4_nl",
}


def format_of(weight: QuantizedWeight) -> MatrixFormat | None:
    """The packed format that holds the codes and scales bit for bit; None if there is none."""
    (rows, columns), (height, width) = weight.shape, weight.block
    if weight.kind in _SUPER_SCALES:
        return MatrixFormat(weight.kind, 0)
    if weight.scales is None or weight.column_groups is not None or columns % 2:
        return None
    group = 0 if width >= columns else width
    if group % _BLOCK:
        return None
    if weight.kind == "fp8_e4m3":
        if height == 1:
            return MatrixFormat("fp8_channel", group)
        return MatrixFormat("fp8", group) if height % _BLOCK == 0 or height >= rows else None
    name = _BY_GROUP.get((weight.kind, weight.scales.dtype, weight.zeros is not None))
    return MatrixFormat(name, group) if name is not None and height == 1 else None


_FAMILIES = {  # what a setting accepts
    "fp8": ("fp8", "fp8_channel"),
    "mxfp4": ("mxfp4",),
    "gguf": ("q8_0", "q4_0", "iq4_nl", "mxfp4", "q4_k", "q5_k", "q6_k"),
}
_OTHERWISE = "int8"  # of what no format holds as it is


def wanted(config: KtConfig) -> str:
    """The setting as one word, for names of files: auto, int8-g0, int4-g32 ..."""
    if config.weight_format not in QUANTISED:
        return config.weight_format + (f"-g{config.group_size}" if config.group_size else "")
    return f"{config.weight_format}-g{resolve_group_size(config.weight_format, config.group_size)}"


def choose_layout(layer: str, first: ExpertWeights, config: KtConfig) -> Layout:
    """The packed formats of a layer's matrices, by its first expert and the setting.

    Raises ValueError if the setting names a format that the checkpoint does not have.
    """

    def chosen(name: str, weight: QuantizedWeight) -> MatrixFormat:
        stored = format_of(weight)
        if config.weight_format in QUANTISED:
            matrix = MatrixFormat(config.weight_format, resolve_group_size(config.weight_format, config.group_size))
            same = stored == MatrixFormat("int4_sym", matrix.group_size) and matrix.name == "int4"
            return stored if stored is not None and same else matrix  # INT4 is not quantised twice
        if config.weight_format == "auto":
            return stored or MatrixFormat(_OTHERWISE, resolve_group_size(_OTHERWISE, config.group_size))
        if weight.kind == "float" and config.weight_format in ENCODED:
            return encoded_format(config.weight_format, weight.shape[1])
        if stored is None or stored.name not in _FAMILIES[config.weight_format]:
            raise ValueError(
                f"weight_format {config.weight_format}: expected a checkpoint with experts in "
                f"{_acceptable(config.weight_format)}, got {stored or weight.kind} ({layer}, {name}); "
                "use auto (as they are stored, or int8), int8 or int4"
            )
        return stored

    return chosen("gate", first.gate), chosen("up", first.up), chosen("down", first.down)


def requantised(weights: ExpertWeights, config: KtConfig) -> set[str]:
    """The stored formats of an expert, in words, that ``auto`` cannot keep."""
    parts = (weights.gate, weights.up, weights.down)
    lost = (part for part in parts if part.kind != "float" and format_of(part) is None)
    return {_in_words(part) for part in lost} if config.weight_format == "auto" else set()


def report_requantised(layers: Iterable[set[str]]) -> None:
    """Log which stored formats are not kept, and in how many layers."""
    for stored, count in Counter(chain.from_iterable(layers)).items():
        logger.warning(
            "%d layer%s stored as %s, which no packed format holds: packed as %s instead (SQNR of every layer below); "
            "kt_expert_weight_format: bf16 keeps more of it, in more memory",
            *(count, "s are" if count > 1 else " is", stored, _OTHERWISE),
        )


def _in_words(weight: QuantizedWeight) -> str:
    if weight.column_groups is not None:
        return f"{weight.kind} with act-order (g_idx)"
    if weight.scales is None:
        return weight.kind
    dtype = str(weight.scales.dtype).removeprefix("torch.")
    return f"{weight.kind} with {dtype} scales per {weight.block[0]} x {weight.block[1]}"


def _acceptable(setting: str) -> str:
    return " or ".join([*_FAMILIES[setting], *(["bf16"] if setting in ENCODED else [])])


def pack(packed: PackedExperts, index: int, projection: int, weight: Tensor | QuantizedWeight) -> None:
    """Pack one matrix of one expert: values are quantised or encoded, codes kept as they are.

    Raises ValueError on a wrong shape, values or scales that are NaN or Inf, and codes of another format.
    """
    expected = packed.layout[projection]
    if isinstance(weight, Tensor):
        if expected.name not in ENCODED:
            packed.pack_matrix_(index, projection, weight)
            return
        weight = encode(weight, expected.name)
    found = format_of(weight)
    if found != expected:
        got = weight.kind if found is None else _with_group(found)
        raise ValueError(f"expected every expert of the layer stored as {_with_group(expected)}, got {got}")
    packed.pack_codes_(index, projection, weight.codes.view(torch.uint8), _planes(weight))


def _with_group(matrix: MatrixFormat) -> str:
    return f"{matrix} with a scale per {f'{matrix.group_size} columns' if matrix.group_size else 'row'}"


def _planes(weight: QuantizedWeight) -> list[Tensor]:
    rows = weight.shape[0]
    if weight.kind in _SUPER_SCALES:
        _require_finite(BLOCKS[weight.kind].factors(weight.codes))
        blocks = weight.codes.reshape(-1, BLOCKS[weight.kind].nbytes)
        return [plane.reshape(rows, -1) for plane in _SUPER_SCALES[weight.kind](blocks)]
    assert weight.scales is not None
    _require_finite(weight.scales)
    if weight.kind == "fp8_e4m3":
        values, height = weight.scale_values(), weight.block[0]
        if height > 1:  # one per row of packed blocks
            values = values.repeat_interleave(max(1, -(-height // _BLOCK)), 0)[: -(-rows // _BLOCK)]
        return [_bytes(values)]
    return [_bytes(weight.scales), *([] if weight.zeros is None else [weight.zeros])]


def _bytes(scales: Tensor) -> Tensor:
    # Flat in between: a single column may be called contiguous with any stride, and would not become bytes.
    return scales.contiguous().as_strided((scales.numel(),), (1,)).view(torch.uint8).view(len(scales), -1)


def _require_finite(scales: Tensor) -> None:
    """By the bits of their exponents, on one thread: torch's own would spin beside those that pack."""
    mask = _NOT_FINITE[scales.dtype]
    if ((_bytes(scales).numpy().view(mask.dtype) & mask) == mask).any():
        raise ValueError("scales: expected finite values, got NaN or Inf")
