"""The experts of an unquantised checkpoint as a GGUF file, quantised here, for benchmarks/accuracy_table.py.

The gguf package quantises Q8_0 and the other simple types. For Q4_K, which it only reads, this has an encoder:

    w ~ d * s * q - dmin * m      q of 4 bits per weight, s and m of 6 bits per 32, d and dmin fp16 per 256 weights

Range first, then scale and minimum of every 32 weights by least squares for the codes found, twice. llama.cpp searches
longer and weighs by the size of the weights; its files are a little better.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from kt_sft.weights.formats import ExpertReader

K_BLOCK = 256


def encode_q4_k(w_NK: Tensor, refinements: int = 2) -> np.ndarray:
    """fp32 (N, K), K a multiple of 256 -> uint8 (N, K / 256 * 144)."""
    blocks = w_NK.reshape(-1, 8, 32)
    low = blocks.amin(-1).clamp(max=0)
    scale, minimum = (blocks.amax(-1).clamp(min=0) - low) / 15, -low
    for _ in range(refinements):
        codes = _codes(blocks, scale, minimum)
        scale, minimum = _least_squares(blocks, codes, scale, minimum)
    d, s = _six_bits(scale)
    dmin, m = _six_bits(minimum)
    codes = _codes(blocks, d * s, dmin * m).to(torch.uint8).view(-1, 4, 2, 32)
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    packed = [
        s[:, :4] | (s[:, 4:] >> 4 << 6),
        m[:, :4] | (m[:, 4:] >> 4 << 6),
        (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
    ]
    factors = torch.cat([d, dmin], dim=1).half().view(torch.uint8)
    raw = torch.cat([factors, *packed, (codes[:, :, 0] | (codes[:, :, 1] << 4)).flatten(1)], dim=1)
    return raw.view(len(w_NK), -1).numpy()


def _codes(blocks: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0.0)[..., None]
    return ((blocks + minimum[..., None]) * inverse).round().clamp(0, 15)


def _least_squares(blocks: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and minimum (both >= 0) with the least squared error for the codes, where they are determined."""
    mean_w, mean_q = blocks.mean(-1), codes.mean(-1)
    spread = (codes - mean_q[..., None]).square().mean(-1)
    slope = ((codes - mean_q[..., None]) * blocks).mean(-1) / spread.clamp(min=1e-12)
    offset = slope * mean_q - mean_w
    valid = (spread > 0) & (slope > 0) & (offset >= 0)
    return torch.where(valid, slope, scale), torch.where(valid, offset, minimum)


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Per block: a factor that fp16 holds, (n, 1), and whole numbers up to 63, (n, 8)."""
    factor = (values.amax(-1, keepdim=True) / 63).half().float()
    return factor, torch.where(factor > 0, values / factor, 0.0).round().clamp(0, 63)


def encode(w_NK: Tensor, kind: str) -> np.ndarray:
    """The raw blocks (N, bytes of a row) of ``kind``, e.g. Q8_0."""
    if kind == "Q4_K":
        return encode_q4_k(w_NK.float())
    return gguf.quants.quantize(w_NK.float().numpy(), gguf.GGMLQuantizationType[kind])


def kind_for(columns: int, kind: str, fallback: str) -> str:
    """K-quants take multiples of 256 columns; llama.cpp too falls back to a type of 32 for other matrices."""
    return fallback if kind.endswith("_K") and columns % K_BLOCK else kind


def write_gguf(file: Path, readers: dict[str, ExpertReader], num_experts: int, kind: str, fallback: str) -> Path:
    """``blk.N.ffn_{gate,up,down}_exps.weight`` of every layer, in order."""
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=True)
    for layer, reader in enumerate(readers.values()):
        stacks: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
        for e in range(num_experts):
            for stack, matrix in zip(stacks.values(), reader.read(e).dequantize(), strict=True):
                stack.append(matrix)
        for name, matrices in stacks.items():
            chosen = kind_for(matrices[0].shape[1], kind, fallback)
            data = np.stack([encode(matrix, chosen) for matrix in matrices])
            qtype = gguf.GGMLQuantizationType[chosen]
            writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
