"""Families in the layouts that their publishers ship: quantised beside the experts, more layers than are trained.

Everything is compared with unmodified transformers on a twin checkpoint that holds the dequantised weights in BF16.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kt_sft.models.convert import from_pretrained
from kt_sft.nn.experts import KtExperts
from tests.families import lora_errors, rms_ratio, stock_model, token_ids
from tests.models.layouts import EXPERTS_ONLY, LAYOUTS, checkpoints

BF16: dict[str, Any] = {"weight_format": "bf16", "dtype": torch.float32}
QUICK = ("deepseek_v3", "glm4_moe", "llama4", "minimax_m2", "qwen3_vl_moe")
HERE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="module", params=HERE)
def published(request: Any, tmp_path_factory: Any) -> tuple[Path, Path, Path]:
    """The published checkpoint, its twin, and an empty cache folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return *checkpoints(LAYOUTS[request.param], folder), folder / "cache"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(token_ids()).logits


def test_logits_and_lora_gradients(published: Any) -> None:
    folder, twin, cache = published
    model = from_pretrained(folder, cache_dir=str(cache), **BF16)
    reference = stock_model(twin)
    layers = [m for m in model.modules() if isinstance(m, KtExperts)]
    error, errors = lora_errors(model, reference)
    assert error < 1e-2
    assert sum(".experts." in name for name in errors) == 6 * len(layers)
    assert {name: e for name, e in errors.items() if e > 2e-2} == {}


def test_everything_but_the_experts_is_the_twins_bit_for_bit(published: Any) -> None:
    folder, twin, cache = published
    model = from_pretrained(folder, cache_dir=str(cache), weight_format="bf16")
    ours, theirs = model.state_dict(), stock_model(twin, torch.bfloat16).state_dict()
    assert {k: v.dtype for k, v in ours.items() if v.dtype != torch.bfloat16 and v.ndim > 1} == {}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name].to(ours[name].dtype))] == []


def test_the_model_goes_by_its_own_name(published: Any, caplog: Any, capsys: Any) -> None:
    folder, _, cache = published
    model = from_pretrained(folder, cache_dir=str(cache), **BF16)
    assert model.name_or_path == model.config._name_or_path == str(folder)
    assert getattr(model.config, "quantization_config", None) is None
    assert "UNEXPECTED" not in caplog.text + capsys.readouterr().err


def test_the_copy_is_made_once(published: Any, caplog: Any) -> None:
    folder, _, cache = published
    with caplog.at_level(logging.INFO, "kt_sft"):
        from_pretrained(folder, cache_dir=str(cache), **BF16)
        caplog.clear()
        from_pretrained(folder, cache_dir=str(cache), **BF16)
    assert "as BF16 into" not in caplog.text
    (copy,) = (path for path in cache.iterdir() if path.is_dir())
    names = {name for shard in copy.glob("*.safetensors") for name in load_file(shard)}
    assert not any(re.search(r"\.experts\.|scale", name) for name in names)
    assert not any("layers.2." in name for name in names)  # the multi-token-prediction layer


def test_nothing_stays_on_disk_without_a_cache(published: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, twin, _ = published
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = from_pretrained(folder, cache_dir="none", **BF16)
    assert list(tmp_path.iterdir()) == []
    assert rms_ratio(logits(model), logits(stock_model(twin))) < 1e-2


def test_where_only_experts_are_quantised_no_copy_is_made(tmp_path: Path) -> None:
    folder, twin = checkpoints(EXPERTS_ONLY["kimi_k2_thinking"], tmp_path)
    model = from_pretrained(folder, cache_dir=str(tmp_path / "cache"), trust_remote_code=True, **BF16)
    assert type(model).__name__ == "DeepseekV3ForCausalLM" and type(model).__module__.startswith("transformers.")
    error, errors = lora_errors(model, stock_model(twin))
    assert error < 1e-2 and max(errors.values()) < 2e-2
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    kept = from_pretrained(folder, cache_dir="none", weight_format="int4")
    assert rms_ratio(logits(kept), logits(stock_model(twin, torch.bfloat16))) < 5e-2


def test_quantised_experts_stay_what_they_are(published: Any) -> None:
    folder, twin, _ = published
    model = from_pretrained(folder, cache_dir="none", dtype=torch.float32)
    kinds = {m.packed.weight_format for m in model.modules() if isinstance(m, KtExperts)}
    assert kinds <= {"fp8", "fp8_channel"}
    assert rms_ratio(logits(model), logits(stock_model(twin))) < 1e-2
