"""The router's load-balancing loss is transformers' own: same value and gradients with packed experts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kt_sft.config import KtConfig
from kt_sft.integrations.llamafactory import _check_router_loss
from kt_sft.models.convert import from_pretrained
from tests.families import rms_ratio, save_checkpoint, tiny_config, tiny_model, token_ids


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The router's loss of one batch and its gradients of routers and attention."""
    model.zero_grad()
    ids = token_ids(4, 24)
    result = model(ids, labels=ids, output_router_logits=True)
    result.aux_loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "experts" not in n}
    return result.aux_loss.item(), {n: g for n, g in named.items() if ".gate." in n or "q_proj" in n}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_value_and_gradients(family: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model(family), tmp_path)
    settings = KtConfig(weight_format="bf16", cache_dir="none")
    value, gradients = loss_and_gradients(from_pretrained(folder, config=settings, dtype=torch.float32).eval())
    expected, wanted = loss_and_gradients(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    assert value == pytest.approx(expected, rel=1e-2)
    assert gradients.keys() == wanted.keys() and len(wanted) >= 3
    for name, gradient in wanted.items():
        assert rms_ratio(gradients[name], gradient) < 5e-2, name


@pytest.mark.parametrize(("family", "works"), [("qwen3_moe", True), ("mixtral", True), ("deepseek_v3", False)])
def test_models_without_such_a_loss_are_named(family: str, works: bool) -> None:
    loader = SimpleNamespace(load_config=lambda model_args: tiny_config(family))
    _check_router_loss(loader, SimpleNamespace(moe_aux_loss_coef=None))
    if works:
        _check_router_loss(loader, SimpleNamespace(moe_aux_loss_coef=0.1))
    else:
        with pytest.raises(ValueError, match=r"moe_aux_loss_coef: expected a model with a router loss .*deepseek_v3"):
            _check_router_loss(loader, SimpleNamespace(moe_aux_loss_coef=0.1))
