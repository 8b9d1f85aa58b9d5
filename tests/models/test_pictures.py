"""Vision-language models with a picture between the words: the language part's experts see its embeddings, and pass
gradients on to the vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_sft.models.convert import from_pretrained
from kt_sft.nn.experts import KtExperts
from tests.families import (
    FAMILIES,
    errors_of,
    rms_ratio,
    save_checkpoint,
    stock_model,
    tiny_model,
    token_ids,
    with_lora,
)

START, END, IMAGE, VIDEO = 92, 93, 94, 95  # token ids
TOWERS = {  # layers of the vision tower that get LoRA
    "qwen3_vl_moe": ("qkv", "linear_fc1"),
    "qwen3_5_moe": ("qkv", "linear_fc1"),
    "llama4": ("fc1", "linear_1"),
}


def words_and_picture(family: str) -> dict[str, Tensor]:
    """Two prompts, each with a picture of 4 (Llama 4: of 1) tokens in another place."""
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    ids = token_ids(length=12).clamp(max=START - 1)
    if family == "llama4":
        ids[0, 3] = ids[1, 5] = IMAGE
        return {"input_ids": ids, "pixel_values": pixels}
    for row, start in ((0, 2), (1, 5)):
        ids[row, start : start + 6] = torch.tensor([START, *[IMAGE] * 4, END])
    patches = pixels[:, :, :16, :16].reshape(2 * 16, 3 * 16)  # 4 x 4 patches of 4 x 4 pixels each
    return {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def write(family: str, folder: Path) -> Path:
    model = tiny_model(family)
    names = {"vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": VIDEO}
    for name, value in {**names, "image_token_id": IMAGE, "image_token_index": IMAGE}.items():
        if hasattr(model.config, name):
            setattr(model.config, name, value)
    return save_checkpoint(model, folder)


@pytest.mark.parametrize("family", [name for name in TOWERS if name in FAMILIES])
def test_logits_and_gradients_with_a_picture(family: str, tmp_path: Path) -> None:
    folder = write(family, tmp_path)
    reference, inputs = stock_model(folder), words_and_picture(family)
    model: Any = from_pretrained(folder, weight_format="bf16", cache_dir="none", dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, KtExperts)]
    with torch.no_grad():
        blank = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
        assert rms_ratio(reference(**blank).logits, reference(**inputs).logits) > 0.1
    error, errors = errors_of(with_lora(model, TOWERS[family]).eval(), reference, **inputs)
    assert error < 1e-2
    assert sum(".experts." in name for name in errors) == 6 * len(layers)
    assert any("visual" in name or "vision_model" in name for name in errors)
    assert {name: e for name, e in errors.items() if not e < 2e-2} == {}
