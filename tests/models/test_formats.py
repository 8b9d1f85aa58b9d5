"""Models whose experts come from a quantised checkpoint: the logits are those of the dequantised weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from kt_sft.config import KtConfig
from kt_sft.models.convert import experts_on_cpu, from_pretrained
from kt_sft.nn.experts import KtExperts
from kt_sft.weights.checkpoint import INDEX
from kt_sft.weights.formats import ExpertReader, open_checkpoint
from tests.families import rms_ratio, save_checkpoint, tiny_model, token_ids
from tests.weights import published

E, D, F = 4, 256, 256
SIZES = dict(hidden_size=D, moe_intermediate_size=F, num_experts=E, num_hidden_layers=1)
LAYER = "model.layers.0.mlp.experts"
IN_PLACE = ["fp8_block", "fp8_channel", "int4_group32", "gptq", "gptq_act_order", "awq"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = tiny_model("qwen3_moe", **SIZES)
    return model, save_checkpoint(model, tmp_path_factory.mktemp("qwen3_moe"))


def weights_of(model: Any) -> published.Weights:
    experts = model.get_submodule(LAYER)
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    return {LAYER: (gate, up, experts.down_proj.detach())}


def dequantised_logits(model: Any, folder: Path, layout: Any) -> torch.Tensor:
    """The unmodified model's, with the experts of ``folder`` in bf16."""
    reader = ExpertReader(open_checkpoint(folder), layout, E, D, F)
    experts = model.get_submodule(LAYER)
    kept = experts.gate_up_proj.detach().clone(), experts.down_proj.detach().clone()
    with torch.no_grad():
        for e in range(E):
            gate, up, down = reader.read(e).dequantize(torch.bfloat16)
            experts.gate_up_proj[e] = torch.cat([gate, up]).float()
            experts.down_proj[e] = down.float()
        logits = model(token_ids()).logits
        experts.gate_up_proj.copy_(kept[0])
        experts.down_proj.copy_(kept[1])
    return logits


def logits_of(folder: Path, **options: Any) -> torch.Tensor:
    model = from_pretrained(folder, dtype=torch.float32, cache_dir="none", **options).eval()
    assert any(isinstance(m, KtExperts) for m in model.modules())
    with torch.no_grad():
        return model(token_ids()).logits


def in_place(folder: Path, made: published.Published, target: Path) -> Path:
    """The checkpoint as its publisher would ship it: experts quantised, the rest in BF16, one folder."""
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    rest = {k: v for k, v in tensors.items() if ".experts." not in k}
    made.tensors = {**made.tensors, **rest}
    made.write(target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": made.quantization_config}))
    assert not (target / INDEX).exists()
    return target


@pytest.mark.parametrize("kind", IN_PLACE)
def test_one_folder_as_published(reference, tmp_path, kind):
    model, folder = reference
    made = published.SAFETENSORS[kind](weights_of(model))
    target = in_place(folder, made, tmp_path)
    expected = dequantised_logits(model, target, made.layers[LAYER])
    assert rms_ratio(logits_of(target, weight_format="bf16"), expected) < 1e-2
    with torch.no_grad():
        assert rms_ratio(model(token_ids()).logits, expected) > 1e-2  # what was compared is not the original


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"])
def test_gguf_experts_beside_a_model_folder(reference, tmp_path, kind):
    model, folder = reference
    file = published.write_gguf(tmp_path / "model.gguf", weights_of(model), kind)
    expected = dequantised_logits(model, file, published.gguf_layers({LAYER: ()})[LAYER])
    for path in (file, tmp_path):
        got = logits_of(folder, weight_format="bf16", expert_checkpoint_path=str(path))
        assert rms_ratio(got, expected) < 1e-2


@pytest.mark.parametrize(("weight_format", "least"), [("int8", 35.0), ("int4", 18.0)])
def test_requantised_while_loading_with_the_sqnr_in_the_log(reference, tmp_path, caplog, weight_format, least):
    model, folder = reference
    target = in_place(folder, published.fp8_block(weights_of(model)), tmp_path)
    with caplog.at_level(logging.INFO, "kt_sft"):
        logits_of(target, weight_format=weight_format)
    (line,) = [m for m in caplog.messages if "SQNR" in m]
    assert line.startswith(f"{LAYER} packed as {weight_format}: SQNR ")
    assert least < float(line.split("SQNR ")[1].split(" dB")[0]) < 50


def test_other_quantised_tensors_are_left_to_transformers(reference, tmp_path, caplog):
    model, folder = reference
    made = published.fp8_block(weights_of(model))
    target = in_place(folder, made, tmp_path)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"] = torch.ones(1, 2)
    save_file(tensors, target / "model.safetensors")
    with caplog.at_level(logging.INFO, "kt_sft"), experts_on_cpu(target, KtConfig()):
        assert AutoConfig.from_pretrained(target).quantization_config["quant_method"] == "fp8"
    assert "e.g. model.layers.0.self_attn.q_proj.weight_scale_inv" in caplog.text


def test_the_configuration_is_whole_again_afterwards(reference, tmp_path):
    model, folder = reference
    target = in_place(folder, published.gptq(weights_of(model)), tmp_path)
    with experts_on_cpu(target, KtConfig()):
        assert not hasattr(AutoConfig.from_pretrained(target), "quantization_config")
    assert AutoConfig.from_pretrained(target).quantization_config["quant_method"] == "gptq"
