"""Checkpoints in every format, loaded: codes and scales reach memory without a rounding, unless asked otherwise."""

import logging
import math
import re
from pathlib import Path

import pytest
import torch

from kt_sft.config import KtConfig
from kt_sft.weights.formats import ExpertReader, open_checkpoint
from kt_sft.weights.loader import load_experts

from . import published
from .test_formats import LAYER, D, E, F, weights

SIZES = {"num_experts": E, "hidden_size": D, "intermediate_size": F}
KEPT = {
    "fp8_block": "fp8",
    "fp8_block_bf16_scales": "fp8",
    "fp8_block_ue8m0": "fp8",
    "fp8_channel": "fp8_channel",
    "int4_group32": "int4_sym",
    "int4_group32_zeros": "uint4",
    "mxfp4_deepseek_v4": "mxfp4",
    "gptq": "uint4_fp16",
    "gptq_v2": "uint4_fp16",
    "awq": "uint4_fp16",
}
KEPT_GGUF = {kind: kind.lower() for kind in ("Q4_0", "Q8_0", "IQ4_NL", "MXFP4", "Q4_K", "Q5_K", "Q6_K")}
SETTINGS = {"fp8": "FP8", "fp8_channel": "FP8", "int4_sym": "RAWINT4", "mxfp4": "MXFP4"}


def stored_values(folder: Path, layers, expert: int):
    """The reader's exact values, and the bytes that the checkpoint has for them."""
    stored = ExpertReader(open_checkpoint(folder), layers[LAYER], E, D, F).read(expert)
    parts = (stored.gate, stored.up, stored.down)
    zeros = sum(part.zeros.numel() for part in parts if part.zeros is not None)  # four bits each in the file
    return [part.dequantize() for part in parts], sum(part.nbytes for part in parts) - zeros / 2


def assert_kept(packed, folder: Path, layers) -> None:
    nbytes = 0
    for expert in range(E):
        values, size = stored_values(folder, layers, expert)
        nbytes += size
        for got, expected in zip(packed.dequantize(torch.float32), values, strict=True):
            assert torch.equal(got[expert], expected)
    assert packed.nbytes <= 1.03 * nbytes


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", KEPT)
def test_bit_for_bit(tmp_path, caplog, kind, cached):
    made = published.SAFETENSORS[kind](weights())
    folder = made.write(tmp_path / "model")
    backend = SETTINGS.get(KEPT[kind], "auto")
    settings = {"kt_backend": backend, "cache_dir": str(tmp_path / "cache") if cached else "none"}
    with caplog.at_level(logging.INFO, logger="kt_sft"):
        config = KtConfig.from_dict(settings, "test")
        packed = load_experts(folder, made.layers, config=config, progress=False, **SIZES)[LAYER]
    assert f"{LAYER}: {KEPT[kind]} kept as stored" in caplog.messages
    assert packed.weight_format == KEPT[kind]
    assert_kept(packed, folder, made.layers)
    if cached:  # from the file now
        again = load_experts(folder, made.layers, config=config, progress=False, **SIZES)[LAYER]
        assert again.layout == packed.layout and torch.equal(again.storage, packed.storage)


@pytest.mark.parametrize("kind", KEPT_GGUF)
def test_gguf_bit_for_bit(tmp_path, kind):
    file = published.write_gguf(tmp_path / "model.gguf", weights(), kind)
    layers = published.gguf_layers(weights())
    config = KtConfig.from_dict({"kt_backend": "LLAMAFILE", "cache_dir": "none"}, "test")
    packed = load_experts(file, layers, config=config, progress=False, **SIZES)[LAYER]
    assert packed.weight_format == KEPT_GGUF[kind]
    assert_kept(packed, file, layers)


def test_every_layer_and_matrix_may_have_its_own(tmp_path):
    """As in GGUF's Q4_K_M: more bits for some matrices, and not in every layer."""
    both = {LAYER: weights()[LAYER], LAYER.replace("0", "1"): weights()[LAYER]}
    kinds = {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"}
    file = published.write_gguf(tmp_path / "model.gguf", both, kinds)
    config = KtConfig(cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # packed, and mapped
        packed = load_experts(file, published.gguf_layers(both), config=config, progress=False, **SIZES)
        assert [p.weight_format for p in packed.values()] == ["q4_k/q4_k/q6_k"] * 2
        assert_kept(packed[LAYER], file, published.gguf_layers(both))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("int4_group32", {"weight_format": "int4", "group_size": 64}),
        ("int4_group32", {"weight_format": "int8"}),
        ("int4_group32_zeros", {"weight_format": "int4"}),
        ("fp8_block", {"weight_format": "int4"}),
        ("gptq_act_order", {}),
    ],
)
def test_other_groups_formats_and_orders_are_quantised_anew(tmp_path, caplog, kind, settings):
    made = published.SAFETENSORS[kind](weights())
    config = KtConfig(**{"cache_dir": "none", **settings})
    with caplog.at_level(logging.INFO, logger="kt_sft"):
        packed = load_experts(made.write(tmp_path), made.layers, config=config, progress=False, **SIZES)[LAYER]
    assert packed.weight_format == settings.get("weight_format", "int8")
    assert any("SQNR" in message for message in caplog.messages)


ANEW = {kind: kind.lower() for kind in ("Q2_K", "Q3_K", "Q4_1", "Q5_0", "Q5_1", "IQ4_XS")}
ANEW["gptq_act_order"] = r"int4 with act-order \(g_idx\)"


@pytest.mark.parametrize("kind", ANEW)
def test_what_no_format_holds_becomes_int8_and_the_log_says_so(tmp_path, caplog, kind):
    """SQNR: of the reader's values, which are the public dequantisers' (test_formats.py)."""
    if kind in published.SAFETENSORS:
        made = published.SAFETENSORS[kind](weights())
        path, layers = made.write(tmp_path / "model"), made.layers
    else:
        path = published.write_gguf(tmp_path / "model.gguf", weights(), kind)
        layers = published.gguf_layers(weights())
    with caplog.at_level(logging.INFO, logger="kt_sft"):
        packed = load_experts(path, layers, config=KtConfig(cache_dir="none"), progress=False, **SIZES)[LAYER]
    assert packed.weight_format == "int8"
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert re.match(rf"1 layer is stored as {ANEW[kind]}, which no packed format holds: packed as int8", said.message)
    values, _ = stored_values(path, layers, 0)
    got = [part[0] for part in packed.dequantize(torch.float32)]
    signal = sum(v.square().sum() for v in values)
    noise = sum((g - v).square().sum() for g, v in zip(got, values, strict=True))
    sqnr = 10 * math.log10(signal / noise)
    assert sqnr > 35
    assert f"{LAYER} packed as int8: SQNR {sqnr:.1f} dB (expert 0)" in caplog.messages


def test_values_that_become_int8_need_no_warning(tmp_path, caplog):
    made = published.fp8_block(weights())
    for config in (KtConfig(cache_dir="none"), KtConfig(cache_dir="none", weight_format="int8")):
        with caplog.at_level(logging.INFO, logger="kt_sft"):
            load_experts(made.write(tmp_path), made.layers, config=config, progress=False, **SIZES)
    assert caplog.messages and not any("no packed format" in message for message in caplog.messages)


def test_a_format_that_the_checkpoint_does_not_have(tmp_path):
    made = published.SAFETENSORS["fp8_block"](weights())
    folder = made.write(tmp_path)
    config = KtConfig(weight_format="mxfp4", cache_dir="none")
    with pytest.raises(
        ValueError, match=r"weight_format mxfp4: expected a checkpoint with experts in mxfp4 or bf16, got fp8"
    ):
        load_experts(folder, made.layers, config=config, progress=False, **SIZES)


def test_a_scale_that_is_not_finite_is_refused(tmp_path):
    made = published.int4_group32(weights())
    made.tensors[f"{LAYER}.1.up_proj.weight_scale"][3, 2] = float("nan")
    config = KtConfig(weight_format="int4", cache_dir="none")
    with pytest.raises(ValueError, match=r"up_proj.*finite"):
        load_experts(made.write(tmp_path), made.layers, config=config, progress=False, **SIZES)
