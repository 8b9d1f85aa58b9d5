"""What a damaged or unknown quantised checkpoint gets: a ValueError with file, tensor, expected and got."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kt_sft.weights.formats import ExpertReader, open_checkpoint

from . import published
from .published import Published

E, D, F = 2, 256, 256
LAYER = "model.layers.0.mlp.experts"
GATE = f"{LAYER}.1.gate_proj"
V4 = "layers.0.ffn.experts.1.w1"
NAN, INF = float("nan"), float("inf")


def make(kind: str) -> Published:
    g = torch.Generator().manual_seed(0)
    stacks = tuple(0.02 * torch.randn(E, D, F, generator=g) for _ in range(3))
    return published.SAFETENSORS[kind]({LAYER: stacks})


def reader(folder: Path, made: Published, experts: int = E) -> ExpertReader:
    return ExpertReader(open_checkpoint(folder), made.layers[LAYER], experts, D, F)


Change = Callable[[Tensor], Tensor]


def filled(value: float) -> Change:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


def byte(value: int) -> Change:
    def change(tensor: Tensor) -> Tensor:
        raw = tensor.clone().view(torch.uint8)
        raw.view(-1)[3] = value
        return raw.view(tensor.dtype)

    return change


SHAPES: list[tuple[str, str, Change, str]] = [
    ("fp8_block", f"{GATE}.weight", lambda t: t[:, :-1], r"expected shape \[256, 256\], got \[256, 255\]"),
    ("fp8_block", f"{GATE}.weight", lambda t: t.to(torch.float8_e5m2), "in a supported format .*F8_E5M2"),
    ("fp8_block", f"{GATE}.weight_scale_inv", lambda t: t[:1], r"or \[2, 2\], got \[1, 2\]"),
    ("fp8_block", f"{GATE}.weight_scale_inv", lambda t: t.double(), "expected dtype F32 or BF16 .*got F64"),
    ("fp8_channel", f"{GATE}.weight_scale", lambda t: t[:-1], r"expected shape .*got \[255, 1\]"),
    ("int4_group32", f"{GATE}.weight_packed", lambda t: t[:, 1:], r"expected shape \[256, 32\], got \[256, 31\]"),
    ("int4_group32", f"{GATE}.weight_packed", lambda t: t.long(), "in a supported format .*I64"),
    ("int4_group32", f"{GATE}.weight_scale", lambda t: t[:, 1:], "expected groups of 32 of the 256 columns, got 7"),
    ("int4_group32", f"{GATE}.weight_scale", lambda t: t.int(), "expected dtype BF16 or F16 or F32, got I32"),
    ("int4_group32_zeros", f"{GATE}.weight_zero_point", lambda t: t[1:], r"expected shape \[32, 8\], got \[31, 8\]"),
    ("mxfp4_gpt_oss", f"{LAYER}.gate_up_proj_blocks", lambda t: t[:, :-1], r"\[512, 8, 16\] for each expert, got"),
    ("mxfp4_gpt_oss", f"{LAYER}.gate_up_proj_scales", lambda t: t[:, :, 1:], r"\[512, 8\] for each expert, got"),
    ("mxfp4_gpt_oss", f"{LAYER}.down_proj_blocks", lambda t: t[:1], "expected 2 experts, got shape"),
    ("mxfp4_gpt_oss", f"{LAYER}.down_proj_scales", lambda t: t.int(), "in a supported format .*I32"),
    ("mxfp4_gpt_oss", f"{LAYER}.down_proj_bias", lambda t: t[:, 1:], r"expected shape \[256\] for each expert"),
    ("mxfp4_deepseek_v4", f"{V4}.weight", lambda t: t[:, 1:], r"expected shape \[256, 128\], got \[256, 127\]"),
    ("mxfp4_deepseek_v4", f"{V4}.scale", lambda t: t[:, 1:], r"expected shape \[256, 8\], got \[256, 7\]"),
    ("gptq", f"{GATE}.qweight", lambda t: t[1:], r"expected shape \[32, 256\], got \[31, 256\]"),
    ("gptq", f"{GATE}.qweight", lambda t: t.long(), "expected dtype I32, got I64"),
    ("gptq", f"{GATE}.qzeros", lambda t: t[:, 1:], r"expected shape \[2, 32\], got \[2, 31\]"),
    ("gptq", f"{GATE}.scales", lambda t: t[:1], "expected groups of 128 of the 256 columns, got 1"),
    ("gptq", f"{GATE}.g_idx", lambda t: t[1:], r"expected shape \[256\], got \[255\]"),
    ("awq", f"{GATE}.qweight", lambda t: t.T.contiguous(), r"expected shape \[256, 32\], got \[32, 256\]"),
    ("awq", f"{GATE}.scales", lambda t: t[:, 1:], r"expected shape \[2, 256\], got \[2, 255\]"),
]


@pytest.mark.parametrize(("kind", "name", "change", "message"), SHAPES)
def test_wrong_shapes_and_dtypes_are_found_without_reading(tmp_path, monkeypatch, kind, name, change, message):
    made = make(kind)
    made.tensors[name] = change(made.tensors[name]).contiguous()
    layer = reader(made.write(tmp_path), made)
    monkeypatch.setattr("kt_sft.weights.checkpoint._read", lambda *a: pytest.fail("data was read"))
    with pytest.raises(ValueError, match=message) as error:
        layer.require()
    stem = re.sub(r"_(blocks|scales)$|\.(weight|scale).*", "", name)
    assert str(tmp_path) in str(error.value) and stem in str(error.value)


VALUES: list[tuple[str, str, Change, str]] = [
    ("fp8_block", f"{GATE}.weight", byte(0x7F), "expected finite values, got NaN"),
    ("fp8_block", f"{GATE}.weight", byte(0xFF), "expected finite values, got NaN"),
    ("fp8_block", f"{GATE}.weight_scale_inv", filled(NAN), "expected finite scales, got NaN"),
    ("fp8_block", f"{GATE}.weight_scale_inv", filled(INF), "expected finite scales, got Inf"),
    ("fp8_block", f"{GATE}.weight_scale_inv", filled(1e37), "expected finite scales, got Inf"),
    ("fp8_block", f"{GATE}.weight_scale_inv", filled(256.0), "expected scales below 256, got 256"),
    ("fp8_block", f"{GATE}.weight_scale_inv", filled(0.0), "expected scales above zero, got 0"),
    ("fp8_block", f"{GATE}.weight_scale_inv", filled(-0.1), "expected scales above zero, got -0.1"),
    ("fp8_channel", f"{GATE}.weight_scale", filled(0.0), "expected scales above zero, got 0"),
    ("int4_group32", f"{GATE}.weight_scale", filled(NAN), "expected finite scales, got NaN"),
    ("int4_group32", f"{GATE}.weight_scale", torch.zeros_like, "expected scales above zero, got 0"),
    ("int4_group32", f"{GATE}.weight_shape", lambda t: t - 1, r"expected \[256, 256\], got \[255, 255\]"),
    ("mxfp4_gpt_oss", f"{LAYER}.down_proj_scales", lambda t: t | 255, "expert 1: expected finite scales, got NaN"),
    ("mxfp4_gpt_oss", f"{LAYER}.down_proj_bias", lambda t: t / 0, "expert 0: expected finite values, got"),
    ("mxfp4_deepseek_v4", f"{V4}.scale", byte(255), "expected finite scales, got NaN"),
    ("mxfp4_deepseek_v4", f"{V4}.scale", byte(253), "expected finite scales, got Inf"),
    ("gptq", f"{GATE}.scales", filled(INF), "expected finite scales, got Inf"),
    ("gptq", f"{GATE}.scales", filled(-1.0), "expected scales above zero, got -1"),
    ("gptq", f"{GATE}.g_idx", filled(2), "expected groups 0 to 1, got 0 to 2"),
    ("gptq", f"{GATE}.g_idx", filled(-1), "expected groups 0 to 1, got -1 to 1"),
    ("awq", f"{GATE}.scales", filled(NAN), "expected finite scales, got NaN"),
]


@pytest.mark.parametrize(("kind", "name", "change", "message"), VALUES)
def test_values_that_no_quantiser_writes(tmp_path, kind, name, change, message):
    made = make(kind)
    made.tensors[name] = change(made.tensors[name])
    layer = reader(made.write(tmp_path), made)
    layer.require()
    if not made.layers[LAYER].stacked:
        layer.read(0)  # the other expert is whole
    with pytest.raises(ValueError, match=message) as error:
        layer.read(1)
        layer.biases(range(2))
    assert str(tmp_path / "model.safetensors") in str(error.value) and name in str(error.value)


MISSING = [
    ("fp8_block", f"{GATE}.weight_scale_inv", "expected one of weight_scale_inv, weight_scale, scale .*got none"),
    ("fp8_block", f"{GATE}.weight", f"expected tensor '{GATE}.weight', found the nearest"),
    ("int4_group32", f"{GATE}.weight_scale", f"expected tensor '{GATE}.weight_scale', found"),
    ("gptq", f"{GATE}.qzeros", f"expected tensor '{GATE}.qzeros', found"),
    ("awq", f"{GATE}.scales", f"expected tensor '{GATE}.scales', found"),
    ("mxfp4_gpt_oss", f"{LAYER}.down_proj_scales", "in a supported format"),
    ("mxfp4_gpt_oss", f"{LAYER}.down_proj_bias", f"expected tensor '{LAYER}.down_proj_bias', found"),
]


@pytest.mark.parametrize(("kind", "name", "message"), MISSING)
def test_a_missing_companion(tmp_path, kind, name, message):
    made = make(kind)
    del made.tensors[name]
    with pytest.raises(ValueError, match=message):
        reader(made.write(tmp_path), made).require()


def test_a_missing_expert(tmp_path):
    made = make("int4_group32")
    folder = made.write(tmp_path)
    with pytest.raises(ValueError, match=rf"expected tensor '{LAYER}\.2\.gate_proj\.weight', found the nearest"):
        reader(folder, made, experts=3).require()
    stacked = make("mxfp4_gpt_oss")
    folder = stacked.write(tmp_path / "stacked")
    with pytest.raises(ValueError, match="expected 3 experts, got shape"):
        reader(folder, stacked, experts=3).require()


CONFIGS = [
    ("gptq", {"bits": 8}, "expected 4 bits, got bits 8 in config.json"),
    ("gptq", {"group_size": 64}, "expected groups of 64 of the 256 columns, got 2 groups"),
    ("gptq", {"group_size": -1}, "expected groups of 256 of the 256 columns, got 2 groups"),
    ("awq", {"version": "gemv"}, "expected AWQ in version gemm, got version gemv"),
    ("gptq", {"quant_method": "exl2"}, "in a supported format .*with quant_method 'exl2'"),
    ("fp8_block", {"weight_block_size": [64, 64]}, r"or \[4, 4\], got \[2, 2\]"),
    ("fp8_block", {"weight_block_size": "128"}, r"config\.json: expected a block of two sizes"),
    ("fp8_block", {"weight_block_size": [0, 128]}, r"config\.json: expected a block of two sizes"),
]


@pytest.mark.parametrize(("kind", "change", "message"), CONFIGS)
def test_a_configuration_that_does_not_fit(tmp_path, kind, change, message):
    made = make(kind)
    assert made.quantization_config is not None
    made.quantization_config.update(change)
    with pytest.raises(ValueError, match=message):
        reader(made.write(tmp_path), made).require()


@pytest.mark.parametrize("text", ["", "[]", "[" * 100000, "{"])
def test_a_malformed_config(tmp_path, text):
    made = make("gptq")
    folder = made.write(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object"):
        reader(folder, made).require()


@pytest.mark.parametrize("where", ["text_config", "compression_config", "absent"])
@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8_block", "int4_group32"])
def test_where_the_configuration_is(tmp_path, kind, where):
    """Vision-language models nest it, old files have another key; without one the tensors must do."""
    made = make(kind)
    folder = made.write(tmp_path)
    expected = reader(folder, made).read(1).gate.dequantize()
    config = made.quantization_config
    nested = {"text_config": {"text_config": {"quantization_config": config}}, "compression_config": {where: config}}
    (folder / "config.json").write_text(json.dumps(nested.get(where, {})))
    layer = reader(folder, made)
    layer.require()
    assert torch.equal(layer.read(1).gate.dequantize(), expected)


def test_formats_that_are_not_supported(tmp_path):
    """NVFP4 and bitsandbytes look like MXFP4 and like plain bytes; both are named, with what there is."""
    g = f"{GATE}."
    nvfp4 = {
        f"{g}weight_packed": torch.zeros(D, F // 2, dtype=torch.uint8),
        f"{g}weight_scale": torch.ones(D, F // 16).to(torch.float8_e4m3fn),
        f"{g}weight_global_scale": torch.ones(1),
    }
    bnb = {f"{g}weight": torch.zeros(D * F // 2, 1, dtype=torch.uint8), f"{g}weight.absmax": torch.ones(64)}
    for method, tensors in (("compressed-tensors", nvfp4), ("bitsandbytes", bnb)):
        made = make("int4_group32")
        made.tensors = {k: v for k, v in made.tensors.items() if not k.startswith(g)} | tensors
        made.quantization_config = {"quant_method": method}
        with pytest.raises(ValueError, match=rf"found .*gate_proj\.weight.*with quant_method '{method}'"):
            reader(made.write(tmp_path / method), made).require()


@pytest.mark.parametrize("kind", ["gptq", "mxfp4_deepseek_v4", "int4_group32"])
def test_odd_sizes(tmp_path, kind):
    made = make(kind)
    layer = ExpertReader(open_checkpoint(made.write(tmp_path)), made.layers[LAYER], E, D - 1, F)
    with pytest.raises(ValueError, match=r"expected (a multiple of|shape)"):
        layer.require()


def test_the_same_tensor_twice_in_one_header(tmp_path):
    file = make("fp8_block").write(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    name = f'"{GATE}.weight":'.encode()
    start = header.index(name)
    row = header[start : header.index(b"}", start) + 1]
    header = header[:start] + row + b"," + header[start:]
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*'{GATE}\.weight' is there twice"):
        open_checkpoint(tmp_path)


def test_pickled_files_are_never_opened(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    monkeypatch.setattr("torch.load", lambda *a, **k: pytest.fail("opened"))
    monkeypatch.setattr("pickle.load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"found only pytorch_model\.bin.*never are: convert"):
        open_checkpoint(tmp_path)
