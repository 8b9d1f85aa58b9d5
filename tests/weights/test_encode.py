"""FP8 and MXFP4 made from values: the nearest codes, sane scales, and packed as the dequantiser says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kt_sft.config import KtConfig
from kt_sft.weights.encode import ENCODED, encode, encoded_format
from kt_sft.weights.loader import load_experts
from kt_sft.weights.packed_form import format_of
from kt_sft.weights.quantized import QuantizedWeight

from .checkpoints import SIZES, layer_name, separate_layers, separate_tensors, weights, write

SHAPES = [(64, 96), (160, 288), (130, 256), (40, 32)]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.exp(torch.randn(shape[0], 1, generator=g))


def relative_error(weight: QuantizedWeight, w: Tensor) -> float:
    return ((weight.dequantize() - w).norm() / w.norm()).item()


def values_of(name: str) -> Tensor:
    """All values that a code may have, before the scale."""
    if name == "mxfp4":
        return torch.cat([-E2M1, E2M1])
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    return every[torch.isfinite(every)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ENCODED)
def test_no_code_is_nearer(name, shape):
    w = matrix(shape)
    got = encode(w, name)
    assert got.scales is not None
    scale = got.scale_values().repeat_interleave(got.block[0], 0).repeat_interleave(got.block[1], 1)
    nearest = ((w / scale[: shape[0], : shape[1]])[..., None] - values_of(name)).abs().amin(-1)
    lost = (got.dequantize() - w).abs() / scale[: shape[0], : shape[1]]
    assert torch.allclose(lost, nearest, rtol=1e-4, atol=1e-3)  # of values up to 448 in fp32


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_packed_format_is_the_one_that_was_said(name, shape):
    assert format_of(encode(matrix(shape), name)) == encoded_format(name, shape[1])


def test_errors():
    w = matrix((256, 256))
    assert 0.02 < relative_error(encode(w, "fp8"), w) < 0.03
    assert 0.09 < relative_error(encode(w, "mxfp4"), w) < 0.12


def test_two_exponents_lose_less_than_either():
    """OCP's rule, floor(log2 max) - 2, clips up to a quarter of the largest; one more never clips."""
    w = matrix((256, 256))
    best = encode(w, "mxfp4")
    for extra in (0, 1):
        exponent = torch.floor(torch.log2(w.view(256, -1, 32).abs().amax(-1))) - 2 + extra
        scale = torch.exp2(exponent).repeat_interleave(32, 1)
        levels = torch.cat([-E2M1, E2M1])
        rounded = levels[((w / scale)[..., None] - levels).abs().argmin(-1)] * scale
        assert relative_error(best, w) < ((rounded - w).norm() / w.norm()).item()


def test_ties_go_to_the_even_code():
    between = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    row = torch.cat([between, -between, torch.full((18,), 6.0)])[None]
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(encode(row, "mxfp4").dequantize()[0, :14], torch.cat([even, -even]))


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -1.0])
def test_constant_matrices(name, value):
    got = encode(torch.full((32, 64), value), name).dequantize()
    assert torch.allclose(got, torch.full((32, 64), value), rtol=0.35)


@pytest.mark.parametrize("name", ENCODED)
def test_not_finite(name):
    w = matrix((32, 64))
    w[3, 4] = float("nan")
    with pytest.raises(ValueError, match="expected finite values, got NaN or Inf"):
        encode(w, name)


@pytest.mark.parametrize("name", ENCODED)
def test_a_bf16_checkpoint_is_packed_so(tmp_path, name):
    source = weights()
    folder = write(tmp_path / "model", separate_tensors(source))
    config = KtConfig(weight_format=name, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # built, then mapped
        packed = load_experts(folder, separate_layers(), config=config, progress=False, **SIZES)
        for layer, matrices in source.items():
            assert packed[layer].weight_format == name
            for got, stack in zip(packed[layer].dequantize(torch.float32), matrices, strict=True):
                for e, w in enumerate(stack):
                    assert torch.equal(got[e], encode(w, name).dequantize())


@pytest.mark.parametrize("name", ENCODED)
def test_damaged_values_are_named(tmp_path, name):
    tensors = separate_tensors(weights())
    damaged = f"{layer_name(1)}.2.up_proj.weight"
    tensors[damaged][0, 0] = float("inf")
    folder = write(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=rf"tensor '{damaged}', expert 2: expected finite values, got Inf"):
        load_experts(
            folder,
            separate_layers(),
            config=KtConfig(weight_format=name, cache_dir="none"),
            progress=False,
            **SIZES,
        )
