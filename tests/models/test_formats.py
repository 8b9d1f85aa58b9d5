"""Models whose experts come from a quantised checkpoint: the logits are those of the dequantised weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kt_sft.config import KtConfig
from kt_sft.models.convert import experts_on_cpu, from_pretrained
from kt_sft.models.names import locate
from kt_sft.nn.experts import FusedLayout, KtExperts
from kt_sft.weights.checkpoint import Checkpoint
from tests.families import rms_ratio, save_checkpoint, tiny_model, token_ids
from tests.weights import published

E, D, F = 4, 256, 256
SIZES = dict(hidden_size=D, moe_intermediate_size=F, num_experts=E, num_hidden_layers=1)
LAYER = "model.layers.0.mlp.experts"
IN_PLACE = ["fp8_block", "fp8_channel", "int4_group32", "gptq", "gptq_act_order", "awq"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_model("qwen3_moe", **SIZES), tmp_path_factory.mktemp("qwen3_moe"))


def weights_of(folder: Path) -> published.Weights:
    return published.weights_of(folder, [LAYER], E)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(token_ids()).logits


def stock_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def our_logits(folder: Path, **options: Any) -> torch.Tensor:
    model = from_pretrained(folder, dtype=torch.float32, cache_dir="none", **options)
    assert any(isinstance(m, KtExperts) for m in model.modules())
    return logits(model)


def as_published(model: Path, target: Path, kind: str) -> tuple[Path, published.Published]:
    """The checkpoint as its publisher would ship it: experts quantised, the rest in BF16, one folder."""
    made = published.SAFETENSORS[kind](weights_of(model))
    return published.with_experts(model, target, made.tensors, quantization_config=made.quantization_config), made


@pytest.mark.parametrize("kind", IN_PLACE)
def test_one_folder_as_published(model, tmp_path, kind):
    folder, made = as_published(model, tmp_path / kind, kind)
    twin = published.with_experts(model, tmp_path / "twin", published.dequantised(folder, made.layers, (E, D, F)))
    expected = stock_logits(twin)
    settings = {"weight_format": "bf16"} if kind == "gptq_act_order" else {}  # which no packed format holds
    assert rms_ratio(our_logits(folder, **settings), expected) < 1e-2
    assert rms_ratio(stock_logits(model), expected) > 1e-2  # quantising did change it


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"])
def test_gguf_experts_beside_a_model_folder(model, tmp_path, kind):
    weights = weights_of(model)
    file = published.write_gguf(tmp_path / "gguf" / "model.gguf", weights, kind)
    dequantised = published.dequantised(file, published.gguf_layers(weights), (E, D, F))
    expected = stock_logits(published.with_experts(model, tmp_path / "twin", dequantised))
    for path in (file, file.parent):
        assert rms_ratio(our_logits(model, expert_checkpoint_path=str(path)), expected) < 1e-2


@pytest.mark.parametrize(("weight_format", "least"), [("int8", 35.0), ("int4", 18.0)])
def test_requantised_while_loading_with_the_sqnr_in_the_log(model, tmp_path, caplog, weight_format, least):
    folder, _ = as_published(model, tmp_path / "fp8", "fp8_block")
    with caplog.at_level(logging.INFO, "kt_sft"):
        our_logits(folder, weight_format=weight_format)
    (line,) = [m for m in caplog.messages if "SQNR" in m]
    assert line.startswith(f"{LAYER} packed as {weight_format}: SQNR ")
    assert least < float(line.split("SQNR ")[1].split(" dB")[0]) < 50


def test_the_configuration_is_whole_again_afterwards(model, tmp_path):
    target, _ = as_published(model, tmp_path / "gptq", "gptq")
    with experts_on_cpu(target, KtConfig()):
        assert not hasattr(AutoConfig.from_pretrained(target), "quantization_config")
    assert AutoConfig.from_pretrained(target).quantization_config["quant_method"] == "gptq"


def test_where_gpt_oss_keeps_its_experts(tmp_path):
    made = published.mxfp4_gpt_oss({LAYER: tuple(torch.randn(2, 64, 64) for _ in range(3))})
    fused = FusedLayout(transposed=True, interleaved=True)  # of the class; the file's stacks are not transposed
    experts = KtExperts(num_experts=2, hidden_size=64, intermediate_size=64, fused=fused, has_bias=True)
    assert locate(LAYER, experts, "model", Checkpoint(made.write(tmp_path))) == made.layers[LAYER]
