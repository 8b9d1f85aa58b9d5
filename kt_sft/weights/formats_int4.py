"""INT4 with one scale per group of input features: compressed-tensors (Kimi-K2-Thinking), GPTQ, AWQ.

    w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g],   g = k // group_size

Eight codes share an int32, the first in its lowest nibble unless said otherwise:

- compressed-tensors pack-quantized: weight_packed [N, K/8] along K, code = value + 8, weight_scale [N, G]; zero = 8, or
  by weight_zero_point [N/8, G] along N.
- GPTQ: qweight [K/8, N] along K, scales [G, N], qzeros [G, N/8] along N. qzeros hold zero - 1, wrapping as in AutoGPTQ
  (zero = (stored + 1) & 15), unless checkpoint_format is gptq_v2. With act-order (desc_act) the group of a column is
  g_idx[k]; where that is not k // group_size, it is kept as ``column_groups``.
- AWQ, version gemm: qweight [K, N/8] along N, scales [G, N], qzeros [G, N/8] along N; nibble i of a word is column
  (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight.

Sources: pack_quantized/helpers.py of compressed-tensors; qlinear_cuda.py of AutoGPTQ; gemm_pack of AutoAWQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantized import QuantizedWeight, pack_nibbles, unpack_words
from .stored import Stored

_FLOATS = ("BF16", "F16", "F32")
_AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # where column j of eight is: the inverse of 0 2 4 6 1 3 5 7


class CompressedInt4:
    """``weight_packed``, ``weight_scale``, ``weight_shape``; with ``weight_zero_point`` if not symmetric."""

    name = "int4 (compressed-tensors pack-quantized)"

    @staticmethod
    def matches(stored: Stored) -> bool:
        return stored.has("weight_packed") and stored.dtype("weight_packed") == "I32"

    @staticmethod
    def tensors(stored: Stored) -> list[str]:
        optional = ("weight_shape", "weight_zero_point", "weight_g_idx")
        return ["weight_packed", "weight_scale", *(s for s in optional if stored.has(s))]

    @staticmethod
    def shape(stored: Stored) -> tuple[int, ...]:
        rows, words = stored.shape("weight_packed")
        return rows, 8 * words

    @staticmethod
    def require(stored: Stored, shape: tuple[int, int]) -> None:
        rows, columns = shape
        _require_multiple(stored, "weight_packed", "columns", columns)
        stored.require("weight_packed", ("I32",), (rows, columns // 8))
        groups = _groups(stored, "weight_scale", columns, _length(stored, "weight_scale", -1))
        stored.require("weight_scale", _FLOATS, (rows, groups))
        if stored.has("weight_zero_point"):
            _require_multiple(stored, "weight_zero_point", "rows", rows)
            stored.require("weight_zero_point", ("I32",), (rows // 8, groups))
        if stored.has("weight_g_idx"):
            stored.require("weight_g_idx", ("I32", "I64"), (columns,))

    @staticmethod
    def read(stored: Stored, shape: tuple[int, int]) -> QuantizedWeight:
        if stored.has("weight_shape") and (found := stored.read("weight_shape").tolist()) != list(shape):
            raise stored.error("weight_shape", list(shape), found)
        zeros = None
        if stored.has("weight_zero_point"):
            zeros = unpack_words(stored.read("weight_zero_point").T).T.contiguous()
        # The file's words hold the nibbles in the canonical order already.
        codes = stored.read("weight_packed").view(torch.uint8)
        scales = stored.read("weight_scale")
        order = stored.read("weight_g_idx") if stored.has("weight_g_idx") else None
        return _weight(stored, "weight_scale", shape, codes, scales, zeros, order)


class Gptq:
    """``qweight``, ``qzeros``, ``scales`` and, of most, ``g_idx``."""

    name = "int4 (GPTQ)"

    @staticmethod
    def matches(stored: Stored) -> bool:
        return stored.has("qweight") and _method(stored) == "gptq"

    @staticmethod
    def tensors(stored: Stored) -> list[str]:
        return ["qweight", "qzeros", "scales", *(["g_idx"] if stored.has("g_idx") else [])]

    @staticmethod
    def shape(stored: Stored) -> tuple[int, ...]:
        words, rows = stored.shape("qweight")
        return rows, 8 * words

    @staticmethod
    def require(stored: Stored, shape: tuple[int, int]) -> None:
        rows, columns = shape
        _require_bits(stored)
        _require_multiple(stored, "qweight", "columns", columns)
        stored.require("qweight", ("I32",), (columns // 8, rows))
        _require_grid(stored, shape)
        if stored.has("g_idx"):
            stored.require("g_idx", ("I32", "I64"), (columns,))

    @staticmethod
    def read(stored: Stored, shape: tuple[int, int]) -> QuantizedWeight:
        codes = stored.read("qweight").T.contiguous().view(torch.uint8)  # along K now, as the canonical order is
        zeros = unpack_words(stored.read("qzeros")).T.contiguous()
        if stored.checkpoint.quantization_config.get("checkpoint_format", "gptq") != "gptq_v2":
            zeros = (zeros + 1) & 15
        order = stored.read("g_idx") if stored.has("g_idx") else None
        return _weight(stored, "scales", shape, codes, stored.read("scales").T.contiguous(), zeros, order)


class Awq:
    """``qweight``, ``qzeros``, ``scales`` of AutoAWQ's gemm version."""

    name = "int4 (AWQ, gemm)"

    @staticmethod
    def matches(stored: Stored) -> bool:
        return stored.has("qweight") and _method(stored) == "awq"

    @staticmethod
    def tensors(stored: Stored) -> list[str]:
        return ["qweight", "qzeros", "scales"]

    @staticmethod
    def shape(stored: Stored) -> tuple[int, ...]:
        columns, words = stored.shape("qweight")
        return 8 * words, columns

    @staticmethod
    def require(stored: Stored, shape: tuple[int, int]) -> None:
        rows, columns = shape
        _require_bits(stored)
        version = str(stored.checkpoint.quantization_config.get("version", "gemm")).lower()
        if version != "gemm":
            raise stored.error("qweight", "AWQ in version gemm", f"version {version} in config.json")
        _require_multiple(stored, "qweight", "rows", rows)
        stored.require("qweight", ("I32",), (columns, rows // 8))
        _require_grid(stored, shape)

    @staticmethod
    def read(stored: Stored, shape: tuple[int, int]) -> QuantizedWeight:
        codes = pack_nibbles(unpack_words(stored.read("qweight"), _AWQ_NIBBLE).T)
        zeros = unpack_words(stored.read("qzeros"), _AWQ_NIBBLE).T.contiguous()
        return _weight(stored, "scales", shape, codes, stored.read("scales").T.contiguous(), zeros, None)


def _weight(
    stored: Stored,
    scale_name: str,
    shape: tuple[int, int],
    codes: Tensor,
    scales_NG: Tensor,
    zeros_NG: Tensor | None,
    order_K: Tensor | None,
) -> QuantizedWeight:
    groups = scales_NG.shape[1]
    block = (1, shape[1] // groups)
    if order_K is not None:
        order_K = order_K.long()
        suffix = "g_idx" if stored.has("g_idx") else "weight_g_idx"
        if order_K.min() < 0 or order_K.max() >= groups:
            raise stored.error(suffix, f"groups 0 to {groups - 1}", f"{order_K.min()} to {order_K.max()}")
        if torch.equal(order_K, torch.arange(shape[1]) // block[1]):
            order_K = None
    weight = QuantizedWeight(
        kind="int4", shape=shape, codes=codes, scales=scales_NG, block=block, zeros=zeros_NG, column_groups=order_K
    )
    stored.require_scales(scale_name, weight, positive=True)
    return weight


def _method(stored: Stored) -> str:
    """gptq or awq, by config.json, else by what is there: only GPTQ has g_idx and packs along K."""
    named = stored.checkpoint.quantization_config.get("quant_method")
    if named is not None:
        return str(named).lower()
    # A word of eight along K: qweight (K/8, N), scales (G, N). Along N: qweight (K, N/8).
    same = stored.has("scales") and stored.shape("scales")[-1:] == stored.shape("qweight")[-1:]
    return "gptq" if stored.has("g_idx") or same else "awq"


def _require_bits(stored: Stored) -> None:
    config = stored.checkpoint.quantization_config
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise stored.error("qweight", "4 bits", f"bits {bits} in config.json")


def _require_multiple(stored: Stored, suffix: str, what: str, count: int) -> None:
    if count % 8:
        raise stored.error(suffix, f"a multiple of 8 {what}", count)


def _require_grid(stored: Stored, shape: tuple[int, int]) -> None:
    """qzeros [G, N/8] and scales [G, N]."""
    rows, columns = shape
    _require_multiple(stored, "qzeros", "rows", rows)
    groups = _groups(stored, "scales", columns, _length(stored, "scales", 0))
    stored.require("scales", _FLOATS, (groups, rows))
    stored.require("qzeros", ("I32",), (groups, rows // 8))


def _length(stored: Stored, suffix: str, dimension: int) -> int:
    stored.require(suffix, _FLOATS, stored.shape(suffix))
    shape = stored.shape(suffix)
    return shape[dimension] if len(shape) == 2 else 0


def _groups(stored: Stored, suffix: str, columns: int, groups: int) -> int:
    """The number of groups, if they divide the columns and agree with config.json's group_size."""
    size = _configured_group_size(stored) or (columns // groups if groups > 0 else 0)
    size = columns if size == -1 else size
    if size < 1 or columns % size or groups * size != columns:
        raise stored.error(suffix, f"groups of {size or 'some'} of the {columns} columns", f"{groups} groups")
    return groups


def _configured_group_size(stored: Stored) -> int | None:
    """By config.json; -1 is one group per row. None if it does not say, or gives different modules different ones."""
    config = stored.checkpoint.quantization_config
    size = config.get("group_size", config.get("q_group_size"))
    if size is None and len(stored.schemes) == 1:
        scheme = stored.schemes[0]
        size = -1 if scheme.get("strategy") == "channel" else scheme.get("group_size")
    return size if type(size) is int else None
