"""A weight matrix as a checkpoint stores it: codes, scales and what they mean.

    w[n, k] = value(code[n, k], zero) * scale[n // block rows, k // block columns]

Codes of a kind have one canonical order, whatever the file's: row-major over (N, K), two 4-bit codes per byte with the
even column in the low nibble. GGUF blocks with more than a scale in them stay raw. Shape suffixes: N rows (outputs),
K columns (inputs), G scales per row.

| kind | codes | value |
|---|---|---|
| float | bf16, fp16 or fp32 (N, K) | itself, no scales |
| fp8_e4m3 | uint8 (N, K) | float8_e4m3fn |
| int8 | int8 (N, K) | code |
| int4 | uint8 (N, K / 2) | code - zero; zero is 8 where ``zeros`` is None |
| e2m1 | uint8 (N, K / 2) | 0 0.5 1 1.5 2 3 4 6, then the same negative (OCP Microscaling 1.0, section 5.3.3) |
| iq4_nl | uint8 (N, K / 2) | llama.cpp's 16 levels (kvalues_iq4nl in ggml-common.h) |
| q4_k, q6_k ... | uint8 (N, K / weights per block * bytes per block) | gguf_blocks.py; the scales are in the blocks |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .gguf_blocks import BLOCKS, IQ4_LEVELS

KINDS = ("float", "fp8_e4m3", "int8", "int4", "e2m1", "iq4_nl", *BLOCKS)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BYTE_CODES = ("float", "fp8_e4m3", "int8")  # a code is a whole number of bytes
_LEVELS = {"int4": tuple(range(16)), "e2m1": _E2M1, "iq4_nl": IQ4_LEVELS}
_SYMMETRIC = tuple(range(-8, 8))  # int4 around its usual zero, 8
_FP8_LEVELS = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_CHUNK = 1 << 18  # elements, 1 MiB in fp32
SCALES_BELOW = {"fp8_e4m3": 256.0}  # what the kernels compute with; those of trained weights are far below 1
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

    kind: str
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor | None = None
    block: tuple[int, int] = (1, 1)
    zeros: Tensor | None = None
    column_groups: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {self.kind!r}")
        _expect("codes", self.codes, _code_dtypes(self.kind), _code_shape(self.kind, self.shape))
        if (self.scales is None) != (self.kind == "float" or self.kind in BLOCKS):
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

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The matrix (N, K): the product of value and scale in fp32, rounded once to ``dtype`` (or to that of ``out``).

        The fp32 product is exact for every kind but GGUF's raw blocks and scales in fp32.
        """
        out_NK = torch.empty(self.shape, dtype=dtype) if out is None else out
        if self.kind == "float":
            return out_NK.copy_(self.codes)
        rows, columns = self.shape
        # A few rows at a time: temporaries stay in the cache and need no fresh pages.
        height = self.block[0] * max(1, _CHUNK // (columns * self.block[0]))
        for start in range(0, rows, height):
            part = slice(start, min(start + height, rows))
            out_NK[part] = self.rows(part)._decode()
        return out_NK

    def _decode(self) -> Tensor:
        """All rows at once, fp32."""
        if self.kind in BLOCKS:
            return BLOCKS[self.kind].dequantize(self.codes)
        values_NK = _values(self)
        if self.zeros is not None:
            values_NK = self._with_grid(torch.Tensor.sub_, values_NK, self.zeros.float())
        return self._with_grid(torch.Tensor.mul_, values_NK, self.scale_values())

    def scale_values(self) -> Tensor:
        """The scales in fp32; exact."""
        assert self.scales is not None
        return _ue8m0(self.scales) if self.scales.dtype == torch.uint8 else self.scales.float()

    def _with_grid(self, operation: Callable[[Tensor, Tensor], Tensor], values_NK: Tensor, grid: Tensor) -> Tensor:
        """``operation`` in place on every element and the value of its block."""
        (rows, columns), (block_rows, block_columns) = self.shape, self.block
        if block_rows > 1:
            grid = grid.repeat_interleave(block_rows, 0)[:rows]
        if self.column_groups is not None:
            return operation(values_NK, grid[:, self.column_groups])
        if columns % block_columns:
            return operation(values_NK, grid.repeat_interleave(block_columns, 1)[:, :columns])
        return operation(values_NK.view(rows, -1, block_columns), grid.unsqueeze(-1)).view(rows, columns)

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

    def transposed(self) -> QuantizedWeight:
        """The matrix (K, N). Raises ValueError for kinds whose codes share bytes along K, and for act-order."""
        if self.kind not in _BYTE_CODES or self.column_groups is not None:
            raise ValueError(f"{self.kind}: expected outputs before inputs, got a transposed matrix of shared bytes")
        return replace(
            self,
            shape=self.shape[::-1],
            codes=self.codes.T.contiguous(),
            scales=None if self.scales is None else self.scales.T.contiguous(),
            block=self.block[::-1],
        )


def _ue8m0(exponents: Tensor) -> Tensor:
    # By its bits: 2^-127 (byte 0) is a subnormal, and 255 is NaN.
    bits = exponents.to(torch.int32) << 23
    bits[exponents == 0] = 1 << 22
    bits[exponents == 255] = 0x7FC00000
    return bits.view(torch.float32)


def _values(weight: QuantizedWeight) -> Tensor:
    """What the codes stand for, before the scales: fp32 (N, K), in fresh memory."""
    if weight.kind == "int8":
        return weight.codes.float()
    if weight.kind == "fp8_e4m3":
        return torch.from_numpy(np.take(_FP8_LEVELS, weight.codes.numpy()))
    levels = _SYMMETRIC if weight.kind == "int4" and weight.zeros is None else _LEVELS[weight.kind]
    # One look-up by byte for both of its codes: the low nibble's value, then the high one's.
    pairs = np.stack([np.tile(levels, 16), np.repeat(levels, 16)], axis=-1).astype(np.float32).view(np.int64)[:, 0]
    return torch.from_numpy(np.take(pairs, weight.codes.numpy()).view(np.float32))


def pack_nibbles(codes_NK: Tensor) -> Tensor:
    """uint8 codes below 16, (N, K) with even K, two to a byte: (N, K / 2), even columns in the low nibble."""
    return (codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)).contiguous()


def unpack_words(words: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
    """Nibbles of int32 words, (R, C) -> uint8 (R, 8 C): column 8 c + j is nibble ``order[j]`` (j) of word c."""
    parts = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    nibbles = torch.stack([parts & 15, parts >> 4], dim=-1).flatten(-2)
    return (nibbles if order is None else nibbles[..., list(order)]).flatten(1)


def _code_dtypes(kind: str) -> tuple[torch.dtype, ...]:
    special: dict[str, tuple[torch.dtype, ...]] = {
        "float": (torch.float32, torch.bfloat16, torch.float16),
        "int8": (torch.int8,),
    }
    return special.get(kind, (torch.uint8,))


def _code_shape(kind: str, shape: tuple[int, int]) -> tuple[int, int]:
    rows, columns = shape
    if kind in BLOCKS:
        size, nbytes = BLOCKS[kind].size, BLOCKS[kind].nbytes
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
