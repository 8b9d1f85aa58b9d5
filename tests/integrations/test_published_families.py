"""llamafactory-cli train, two steps with ``lora_target: all``, on every family as its publisher ships it.

The model that such a training loads is compared with transformers' own on the dequantised weights: logits and every
LoRA gradient. Quantised experts are kept as stored.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import _write_tokenizer

from tests.models.layouts import EXPERTS_ONLY, LAYOUTS, PLAIN, checkpoints, plain_checkpoint
from tests.models.test_rules import LIST, write_remote

BANK = r"base_model\.model\.model\.streets\.\d+\.market\.stalls\.\d+\.w_(gate|up|down)"
EXPERT = r"layers\.\d+\.(mlp|block_sparse_moe|feed_forward)\.experts\.\d+\.(gate_proj|up_proj|down_proj|w[123])"
TEMPLATES = {
    "deepseek_v3": "deepseek3",
    "deepseek_v3_1": "deepseek3",
    "deepseek_v2": "deepseek",
    "minimax_m2": "minimax2",
    "mixtral": "mistral",
    "olmoe": "olmo",
    "qwen2_moe": "qwen",
    "qwen3_moe": "qwen3",
    "qwen3_5_moe": "qwen3_nothink",  # text only: its own template asks for an image processor
    "llama4": "empty",  # the same
    "kimi_k2": "moonlight",
    "kimi_k2_thinking": "moonlight",
    "glm4_moe": "glm4_moe",
    "glm_moe_dsa": "glm4_moe",
    "qwen3_next": "qwen3_nothink",
    "qwen3_vl_moe": "qwen3_nothink",
}
SPARE = 32  # rows of the embedding for tokens that a template adds
QUICK = ("deepseek_v3", "mixtral", "qwen3_vl_moe", "remote")
SLOW = tuple(name for name in TEMPLATES if name not in QUICK)


@pytest.fixture(scope="module")
def quick(workspace: Any, tmp_path_factory: Any) -> Any:
    return train(workspace, tmp_path_factory.mktemp("families"), QUICK)


@pytest.fixture(scope="module")
def slow(workspace: Any, tmp_path_factory: Any) -> Any:
    return train(workspace, tmp_path_factory.mktemp("more_families"), SLOW)


def train(workspace: Any, folder: Path, names: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """One process for several families: the workspace with their runs, and the comparisons by family."""
    jobs = []
    for name in names:
        model, twin, changes = remote(folder) if name == "remote" else published(folder / name, name)
        args = workspace.training(f"family_{name}", model_name_or_path=str(model), max_steps=2, save_steps=2, **changes)
        jobs.append({"verb": "train", "args": args})
        exact = args | {"bf16": False, "lora_dropout": 0.0, "reference": str(twin)}
        jobs.append({"verb": "compare", "args": exact})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        results = workspace.drive(*jobs)
    return workspace, dict(zip(names, results[1::2], strict=True))


def published(folder: Path, name: str) -> tuple[Path, Path, dict[str, Any]]:
    """Checkpoint, twin and settings."""
    folder.mkdir()
    vocabulary = _write_tokenizer(folder) + SPARE
    kept = "auto"
    if name in PLAIN:
        model = twin = plain_checkpoint(name, folder / "published", vocab_size=vocabulary)
        kept = "bf16"
    else:
        model, twin = checkpoints((LAYOUTS | EXPERTS_ONLY)[name], folder, vocab_size=vocabulary)
    copy_tokenizer(folder, model)
    settings = {"template": TEMPLATES[name], "kt_config": {"kt_expert_weight_format": kept}}
    return model, twin, settings | {"trust_remote_code": name.startswith("kimi")}


def remote(folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    (folder / "tokenizer").mkdir()
    vocabulary = _write_tokenizer(folder / "tokenizer") + SPARE
    model = write_remote(folder / "remote", "loop", vocab_size=vocabulary)
    copy_tokenizer(folder / "tokenizer", model)
    settings = {"trust_remote_code": True, "disable_gradient_checkpointing": True, "template": "qwen"}
    return model, model, settings | {"kt_config": {"kt_expert_weight_format": "bf16", "kt_family_rules": [LIST]}}


def copy_tokenizer(source: Path, target: Path) -> None:
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)


@pytest.mark.parametrize("name", QUICK)
def test_trains_attention_and_every_expert(quick: Any, name: str) -> None:
    check(quick[0], name)


@pytest.mark.parametrize("name", QUICK)
def test_logits_and_lora_gradients_are_those_of_transformers(quick: Any, name: str) -> None:
    check_errors(quick, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_families_train_attention_and_every_expert(slow: Any, name: str) -> None:
    check(slow[0], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_logits_and_lora_gradients_are_those_of_transformers(slow: Any, name: str) -> None:
    check_errors(slow, name)


def check_errors(compared: Any, name: str) -> None:
    workspace, errors = compared
    gradients = errors[name]["gradients"]
    trained = {key.removesuffix(".weight") for key in workspace.adapter(f"family_{name}")}
    experts = {key for key in gradients if re.search(r"\.(experts|stalls)\.", key)}
    others = {key.replace(".default", "").removesuffix(".weight") for key in gradients.keys() - experts}
    assert experts and others == {key for key in trained if not re.search(r"\.(experts|stalls)\.", key)}
    assert errors[name]["logits"] < 1e-2
    assert {key: error for key, error in gradients.items() if not error < 2e-2} == {}


def check(trained: Any, name: str) -> None:
    losses, adapter = trained.losses(f"family_{name}"), trained.adapter(f"family_{name}")
    assert sorted(losses) == [1, 2] and all(0 < loss < 20 for loss in losses.values())
    pattern = BANK if name == "remote" else EXPERT
    experts = {key for key in adapter if re.search(pattern, key)}
    layers = {re.sub(r"(experts|stalls)\..*", "", key) for key in experts}
    assert len(experts) == len(layers) * 8 * 3 * 2
    assert any("q_proj" in key or "q_b_proj" in key for key in adapter)
    assert not any("visual" in key or "mtp" in key for key in adapter)
    moved = [key for key in experts if "lora_B" in key and adapter[key].any()]
    assert len(moved) > len(experts) // 4 and all(torch.isfinite(value).all() for value in adapter.values())
    config = json.loads((trained.folder / f"family_{name}" / "adapter_config.json").read_text())
    assert "dequantised" not in config["base_model_name_or_path"]
