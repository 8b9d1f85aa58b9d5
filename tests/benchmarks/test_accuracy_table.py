"""The table of docs/accuracy.md: the GGUF that it writes, and how its figures are made."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from benchmarks import accuracy_table
from benchmarks.gguf_experts import encode, encode_q4_k, kind_for, write_gguf
from kt_sft.ops.quantize import dequantize, quantize
from kt_sft.weights.checkpoint import ExpertTensors
from kt_sft.weights.formats import ExpertReader, open_checkpoint
from tests.weights.checkpoints import SIZES, E, layer_name, separate_layers, separate_tensors, weights, write


def matrix(rows: int = 48, columns: int = 512) -> torch.Tensor:
    return 0.03 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.005


def test_q4_k_loses_less_than_q4_0_and_about_as_much_as_int4():
    w = matrix()
    q4_0, q4_k = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_K
    lost = (torch.from_numpy(gguf.quants.dequantize(encode_q4_k(w), q4_k)) - w).norm()
    simple = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), q4_0), q4_0))
    assert lost < 0.9 * (simple - w).norm()
    assert lost < 1.05 * (dequantize(*quantize(w, "int4", 32), 32).float() - w).norm()
    assert lost < 0.08 * w.norm()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5])
def test_q4_k_of_constants(value):
    back = gguf.quants.dequantize(encode_q4_k(torch.full((2, 256), value)), gguf.GGMLQuantizationType.Q4_K)
    assert np.allclose(back, value, rtol=0.01)


def test_refining_helps():
    w = matrix()

    def lost(refinements: int) -> float:
        raw = encode_q4_k(w, refinements)
        return float(np.linalg.norm(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_K) - w.numpy()))

    assert lost(2) < lost(1) < lost(0)


def test_what_is_written_is_what_is_read(tmp_path):
    folder = write(tmp_path / "model", separate_tensors(weights()))
    checkpoint = open_checkpoint(folder)
    sizes = tuple(SIZES.values())
    readers = {name: ExpertReader(checkpoint, tensors, *sizes) for name, tensors in separate_layers().items()}
    file = write_gguf(tmp_path / "experts.gguf", readers, E, "Q4_K", "Q8_0")
    names = [f"blk.1.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
    read = ExpertReader(open_checkpoint(file), ExpertTensors(gate=names[0], up=names[1], down=names[2]), *sizes)
    for got, stack in zip(read.read(2).dequantize(), weights()[layer_name(1)], strict=True):
        raw = encode(stack[2], kind_for(stack.shape[2], "Q4_K", "Q8_0"))
        assert torch.equal(got, torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)))


def test_the_page_names_every_row_and_compares_with_bf16():
    row = accuracy_table.Figures(nbytes=10**6, bits=8.03, layer_error=0.01, perplexity=20.2, loss=1.5, seconds=1.0)
    reference = accuracy_table.Figures(nbytes=2 * 10**6, bits=16.0, layer_error=0, perplexity=20.0, loss=1.5, seconds=1)
    text = accuracy_table.page({"bf16": reference, "int8": row})
    assert "| int8 | 1 MB | 8.03 | 1.00% | 20.200 | +1.00% | 1.5000 |" in text
    assert "| bf16 | 2 MB | 16.00 | 0.00% | 20.000 | +0.00% | 1.5000 |" in text
