"""A config.json that is not the checkpoint's: one error, before transformers builds or allocates what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kt_sft.models.convert import from_pretrained
from kt_sft.models.fitting import require_fitting
from kt_sft.weights.checkpoint import INDEX
from kt_sft.weights.formats import open_checkpoint
from tests.families import FAMILIES, save_checkpoint, tiny_model

WIDE = 10**9 if transformers.__version__ >= "5" else 10**5  # 4 allocates each matrix before it forgets it
EXPERT_3 = "model.layers.0.mlp.experts.3.gate_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Path:
    return save_checkpoint(tiny_model("qwen3_moe", dtype=torch.bfloat16), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tiny_model(family, dtype=torch.bfloat16), tmp_path))
    require_fitting(checkpoint)
    settings = checkpoint.settings.get("text_config") or checkpoint.settings
    (name,) = (n for n in ("num_experts", "num_local_experts", "n_routed_experts") if n in settings)
    settings[name] += 1
    with pytest.raises(ValueError, match=f"{name}: expected 8, as the tensors have, got 9"):
        require_fitting(checkpoint)


ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 10**9}, r"config\.json: num_experts: expected 8, as the tensors have, got 1000000000; .*download"),
    ({"num_experts": 10**18}, "num_experts: expected 8"),
    ({"num_experts": 0}, "num_experts: expected 8"),
    ({"num_experts": -3}, "num_experts: expected 8"),
    ({"num_experts": 7}, "num_experts: expected 8"),
    ({"num_experts_per_tok": 9}, r"num_experts_per_tok: expected 1 to 8 \(experts\), got 9"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected 1 to 2, as the tensors have, got 1000000"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: expected 1 to 2"),
    ({"hidden_size": WIDE}, rf"safetensors: tensor '.*gate_proj.weight': expected shape \[40, {WIDE}\], got"),
    ({"moe_intermediate_size": WIDE}, rf"gate_proj.weight': expected shape \[{WIDE}, 64\], got \[40, 64\]"),
    ({"text_config": 3}, "text_config: expected a JSON object, got 3"),
]


@pytest.mark.parametrize(("settings", "message"), ABSURD, ids=str)
def test_what_the_tensors_do_not_have(folder: Path, settings: dict[str, Any], message: str) -> None:
    change(folder, **settings)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(folder, cache_dir="none")
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100000])
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got"):
        from_pretrained(folder, cache_dir="none")


def test_a_layer_more_may_be_there(folder: Path) -> None:
    """Multi-token prediction."""
    change(folder, num_hidden_layers=1)
    from_pretrained(folder, cache_dir="none")


def drop(folder: Path, part: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if part not in k}
    (folder / INDEX).write_text(json.dumps(index))


def test_the_last_expert_is_missing(folder: Path) -> None:
    drop(folder, ".experts.7.")
    with pytest.raises(ValueError, match=r"num_experts: expected 7, as the tensors have, got 8; .* files are missing"):
        from_pretrained(folder, cache_dir="none")


def test_an_expert_in_the_middle_is_missing(folder: Path) -> None:
    drop(folder, EXPERT_3)
    with pytest.raises(ValueError, match=rf"expected tensor '{EXPERT_3}', found the nearest are"):
        from_pretrained(folder, cache_dir="none")


def test_integers_as_experts(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({k: v.int() if k == EXPERT_3 else v for k, v in tensors.items()}, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"expected '{EXPERT_3}' in a supported format .*\(I32\)"):
        from_pretrained(folder, cache_dir="none")
