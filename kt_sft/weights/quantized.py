"""A weight matrix as a checkpoint stores it: codes, scales and what they mean.

    w[n, k] = value(code[n, k], zero) * scale[n // block rows, k // block columns]

Codes of a kind have one canonical order, whatever the file's: row-major over (N, K), two 4-bit codes per byte with the
even column in the low nibble. The k-quants of GGUF stay raw blocks of 256 columns. Shape suffixes: N rows (outputs),
K columns (inputs), G scales per row.

| kind | codes | value |
|---|---|---|
| float | bf16, fp16 or fp32 (N, K) | itself, no scales |
| fp8_e4m3 | uint8 (N, K) | float8_e4m3fn |
| int8 | int8 (N, K) | code |
| int4 | uint8 (N, K / 2) | code - zero; zero is 8 where ``zeros`` is None |
| e2m1 | uint8 (N, K / 2) | 0 0.5 1 1.5 2 3 4 6, then the same negative (OCP Microscaling 1.0, section 5.3.3) |
| iq4_nl | uint8 (N, K / 2) | llama.cpp's 16 levels (kvalues_iq4nl in ggml-common.h) |
| q4_k, q5_k, q6_k | uint8 (N, K / 256 * 144, 176, 210) | gguf_blocks.py; the scales are in the blocks |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from . import gguf_blocks

Kind = Literal["float", "fp8_e4m3", "int8", "int4", "e2m1", "iq4_nl", "q4_k", "q5_k", "q6_k"]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_LEVELS = {"int4": tuple(range(16)), "e2m1": _E2M1, "iq4_nl": _IQ4_NL}
_RAW = {"q4_k": gguf_blocks.q4_k, "q5_k": gguf_blocks.q5_k, "q6_k": gguf_blocks.q6_k}
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_SYMMETRIC_ZERO = 8
PEAK = {"fp8_e4m3": 448, "int8": 128, "int4": 15, "e2m1": 6, "iq4_nl": 127}  # the largest |value| before its scale


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """One matrix (N, K).

    Attributes:
        codes: see the table above.
        scales: (ceil(N / block rows), ceil(K / block columns)); fp32, bf16, fp16, or uint8 for ue8m0 (2^(byte - 127)).
        block: rows and columns that share a scale; (1, K) is one scale per output channel.
        zeros: uint8, one per scale (int4 only).
        column_groups: int64 (K,), the scale of every column where it is not k // block columns: GPTQ's act-order.
    """

    kind: Kind
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor | None = None
    block: tuple[int, int] = (1, 1)
    zeros: Tensor | None = None
    column_groups: Tensor | None = None

    def __post_init__(self) -> None:
        _expect("codes", self.codes, _code_dtypes(self.kind), _code_shape(self.kind, self.shape))
        if (self.scales is None) != (self.kind == "float" or self.kind in _RAW):
            raise ValueError(f"scales: {self.kind} expected {'none' if self.scales is not None else 'scales'}")
        if self.scales is not None:
            grid = (-(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1]))
            _expect("scales", self.scales, _SCALE_DTYPES, grid)
            if self.zeros is not None:
                _expect("zeros", self.zeros, (torch.uint8,), grid)
        if self.zeros is not None and self.kind != "int4":
            raise ValueError(f"zeros: expected none for {self.kind}")
        if self.column_groups is not None:
            _expect("column_groups", self.column_groups, (torch.int64,), self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        parts = (self.codes, self.scales, self.zeros, self.column_groups)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (N, K): the product of value and scale in fp32, rounded once to ``dtype``.

        The fp32 product is exact for every kind but the k-quants and scales in fp32.
        """
        if self.kind == "float":
            return self.codes.to(dtype)
        if self.kind in _RAW:
            return _RAW[self.kind](self.codes).to(dtype)
        values_NK = _values(self)
        if self.zeros is not None:
            values_NK -= self._spread(self.zeros.float())
        elif self.kind == "int4":
            values_NK -= _SYMMETRIC_ZERO
        return values_NK.mul_(self._spread(self.scale_values())).to(dtype)

    def scale_values(self) -> Tensor:
        """The scales in fp32; exact."""
        assert self.scales is not None
        return _ue8m0(self.scales) if self.scales.dtype == torch.uint8 else self.scales.float()

    def _spread(self, grid: Tensor) -> Tensor:
        """One value per element of the matrix, (N, K), from one per block."""
        (rows, columns), (block_rows, block_columns) = self.shape, self.block
        if block_rows > 1:
            grid = grid.repeat_interleave(block_rows, 0)[:rows]
        if self.column_groups is not None:
            return grid[:, self.column_groups]
        if columns % block_columns:
            return grid.repeat_interleave(block_columns, 1)[:, :columns]
        return grid.unsqueeze(-1).expand(rows, -1, block_columns).reshape(rows, columns)

    def rows(self, part: slice) -> QuantizedWeight:
        """The matrix of some rows, e.g. the gate of a stacked or interleaved gate and up.

        Raises ValueError if the rows begin or end inside a block that shares a scale.
        """
        start, stop, step = part.indices(self.shape[0])
        height = self.block[0]
        if height > 1 and (step != 1 or start % height or (stop % height and stop != self.shape[0])):
            raise ValueError(f"rows {start}:{stop}:{step}: expected whole blocks of {height} rows that share a scale")
        blocks = part if height == 1 else slice(start // height, -(-stop // height))
        return replace(
            self,
            shape=(len(range(start, stop, step)), self.shape[1]),
            codes=self.codes[part].contiguous(),
            scales=None if self.scales is None else self.scales[blocks].contiguous(),
            zeros=None if self.zeros is None else self.zeros[blocks].contiguous(),
        )


def _ue8m0(exponents: Tensor) -> Tensor:
    # By its bits: 2^-127 (byte 0) is a subnormal, and 255 is NaN.
    bits = exponents.to(torch.int32) << 23
    bits[exponents == 0] = 1 << 22
    bits[exponents == 255] = 0x7FC00000
    return bits.view(torch.float32)


def _values(weight: QuantizedWeight) -> Tensor:
    if weight.kind == "fp8_e4m3":
        return weight.codes.view(torch.float8_e4m3fn).float()
    if weight.kind == "int8":
        return weight.codes.float()
    levels = torch.tensor(_LEVELS[weight.kind], dtype=torch.float32)
    pairs = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=-1)  # by byte: low nibble, high nibble
    return pairs[weight.codes.int()].view(weight.shape)


def pack_nibbles(codes_NK: Tensor) -> Tensor:
    """uint8 codes below 16, (N, K) with even K, two to a byte: (N, K / 2), even columns in the low nibble."""
    return (codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)).contiguous()


def unpack_words(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Nibbles of int32 words, (R, C) -> uint8 (R, 8 C): column 8 c + j is nibble ``order[j]`` of word c."""
    shifts = torch.tensor([4 * nibble for nibble in order], dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(1)


def _code_dtypes(kind: Kind) -> tuple[torch.dtype, ...]:
    special: dict[str, tuple[torch.dtype, ...]] = {
        "float": (torch.float32, torch.bfloat16, torch.float16),
        "int8": (torch.int8,),
    }
    return special.get(kind, (torch.uint8,))


def _code_shape(kind: Kind, shape: tuple[int, int]) -> tuple[int, int]:
    rows, columns = shape
    if kind in _RAW:
        size, nbytes = gguf_blocks.SIZE, gguf_blocks.NBYTES[kind]
    else:
        size, nbytes = (2, 1) if kind in _LEVELS else (1, 1)
    if columns % size:
        raise ValueError(f"{kind}: expected a multiple of {size} columns, got {columns}")
    return rows, columns // size * nbytes


def _expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected {' or '.join(str(d) for d in dtypes)} {tuple(shape)}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
