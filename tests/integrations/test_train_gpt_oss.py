"""llamafactory-cli train on gpt-oss (MXFP4 as published, and BF16) and on Llama 4, with every expert adapted.

The models that these trainings load are compared with transformers' own on the dequantised weights.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import save_checkpoint, tiny_model
from tests.models.test_gpt_oss import fused
from tests.weights import published

LAYERS = [f"model.layers.{i}.mlp.experts" for i in range(2)]
SIZES = (8, 64, 96)  # experts, hidden, intermediate


def with_tokenizer(folder: Path, source: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    return folder


def checkpoints(folder: Path, tokenizer: Path) -> dict[str, Path]:
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]) + 8
    model = tiny_model("gpt_oss", intermediate_size=SIZES[2], vocab_size=vocabulary, dtype=torch.bfloat16)
    weights: published.Weights = {}
    for path in LAYERS:
        gate_up, down = (model.get_submodule(path).get_parameter(n).data.mT for n in ("gate_up_proj", "down_proj"))
        weights[path] = (gate_up[:, 0::2], gate_up[:, 1::2], down)
    bf16 = with_tokenizer(save_checkpoint(model, folder / "bf16"), tokenizer)
    made = published.mxfp4_gpt_oss(weights)
    mxfp4 = published.with_experts(bf16, folder / "mxfp4", made.tensors, quantization_config=made.quantization_config)
    biases = {name: tensor for name, tensor in made.tensors.items() if name.endswith("bias")}
    twin = published.with_experts(bf16, folder / "mxfp4_twin", fused(mxfp4, made.layers, biases, SIZES))
    llama = tiny_model("llama4", vocab_size=vocabulary, dtype=torch.bfloat16)
    return {
        "bf16": bf16,
        "mxfp4": mxfp4,
        "mxfp4_twin": twin,
        "llama4": with_tokenizer(save_checkpoint(llama, folder / "llama4"), tokenizer),
    }


TEMPLATES = {"bf16": "gpt_oss", "mxfp4": "gpt_oss", "llama4": "empty"}  # llama4 wants a picture processor


@pytest.fixture(scope="module")
def compared(workspace: Any) -> tuple[Any, dict[str, Any]]:
    """Two steps on each, and the comparisons, in one process."""
    made = checkpoints(workspace.folder / "gpt_oss", workspace.model)
    jobs = []
    for name, template in TEMPLATES.items():
        kept = {"kt_expert_weight_format": "auto" if name == "mxfp4" else "bf16"}
        common = {"max_steps": 2, "save_steps": 2, "lora_dropout": 0.0, "kt_config": kept}
        args = workspace.training(f"stacks_{name}", model_name_or_path=str(made[name]), template=template, **common)
        reference = str(made["mxfp4_twin" if name == "mxfp4" else name])
        jobs.append({"verb": "train", "args": args})
        jobs.append({"verb": "compare", "args": args | {"bf16": False, "reference": reference}})
    return workspace, dict(zip(TEMPLATES, workspace.drive(*jobs)[1::2], strict=True))


@pytest.fixture
def runs(compared: Any) -> Any:
    return compared[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_logits_and_lora_gradients_are_those_of_transformers(compared: Any, name: str) -> None:
    errors = compared[1][name]
    assert errors["logits"] < 1e-2
    assert sum(".experts." in key for key in errors["gradients"]) == 12
    assert {key: error for key, error in errors["gradients"].items() if not error < 2e-2} == {}


@pytest.mark.parametrize(("name", "block"), [("bf16", "mlp"), ("mxfp4", "mlp"), ("llama4", "feed_forward")])
def test_two_steps_with_every_expert_adapted(runs: Any, name: str, block: str) -> None:
    losses = runs.losses(f"stacks_{name}")
    assert sorted(losses) == [1, 2] and all(0 < loss < 20 for loss in losses.values())
    adapter = runs.adapter(f"stacks_{name}")
    experts = [
        key for key in adapter if re.search(rf"layers\.[01]\.{block}\.experts\.\d\.(gate|up|down)_proj\.lora_B", key)
    ]
    assert len(experts) == 2 * 8 * 3
    assert sum(float(adapter[key].abs().sum()) > 0 for key in experts) > len(experts) / 2
    assert any(".self_attn.q_proj." in key for key in adapter)


def test_mxfp4_is_another_model_than_bf16(runs: Any) -> None:
    assert runs.losses("stacks_mxfp4")[1] != runs.losses("stacks_bf16")[1]
