"""Every family with packed experts against the unmodified Hugging Face model of the same checkpoint.

The oracle of LoRA is the dense model with W + scaling * B A in place of W, differentiated by autograd.
Tolerances are those of bf16 products: logits 1e-2, every LoRA gradient by name 2e-2 (RMS of the error over RMS).
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from kt_sft.config import KtConfig
from kt_sft.models.convert import convert_model, from_pretrained
from kt_sft.nn.experts import KtExperts
from tests.families import (
    FAMILIES,
    MOE_LAYERS,
    lora_errors,
    loss_of,
    rms_ratio,
    save_checkpoint,
    stock_model,
    tiny_model,
    token_ids,
    with_lora,
)

BF16 = KtConfig(weight_format="bf16", cache_dir="none")


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_checkpoint(tiny_model(request.param), tmp_path_factory.mktemp(request.param))
    reference = stock_model(folder)
    return request.param, folder, reference


def load(folder: Any) -> Any:
    return from_pretrained(folder, config=BF16, dtype=torch.float32).eval()


def experts_of(model: Any) -> list[KtExperts]:
    return [m for m in model.modules() if isinstance(m, KtExperts)]


def test_logits(family: Any) -> None:
    name, folder, reference = family
    model = load(folder)
    assert len(experts_of(model)) == MOE_LAYERS.get(name, 2)
    with torch.no_grad():
        assert rms_ratio(model(token_ids()).logits, reference(token_ids()).logits) < 1e-2


def test_holds_no_expert_parameter_and_loads_quietly(family: Any, caplog: Any, capsys: Any) -> None:
    _, folder, reference = family
    model = load(folder)
    kept = set(model.state_dict())
    routed = {k for k in reference.state_dict() if re.search(r"\.experts\.", k)}
    assert routed and kept == set(reference.state_dict()) - routed
    assert "UNEXPECTED" not in caplog.text + capsys.readouterr().err
    assert "not used when initializing" not in caplog.text


def test_convert_model_equals_from_pretrained(family: Any) -> None:
    _, folder, _ = family
    converted = convert_model(stock_model(folder), BF16)
    for ours, theirs in zip(experts_of(converted), experts_of(load(folder)), strict=True):
        assert torch.equal(ours.packed.storage, theirs.packed.storage)
        assert (ours.names, ours.block_name) == (theirs.names, theirs.block_name)
    with torch.no_grad():
        assert torch.equal(converted(token_ids()).logits, load(folder)(token_ids()).logits)


@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_lora_gradients_by_name(family: Any, policy: str) -> None:
    _, folder, reference = family
    model = from_pretrained(folder, config=BF16, activation_policy=policy, dtype=torch.float32)
    error, errors = lora_errors(model, reference)
    assert error < 1e-2
    assert sum(".experts." in n for n in errors) == 6 * len(experts_of(model))
    assert {n: e for n, e in errors.items() if e > 2e-2} == {}


def test_gradient_checkpointing_changes_nothing(family: Any) -> None:
    _, folder, _ = family
    gradients = []
    for options in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        tuned = with_lora(load(folder), lora_dropout=0.1).train()
        if options is not None:
            tuned.enable_input_require_grads()
            tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        torch.manual_seed(11)
        loss_of(tuned(token_ids(), use_cache=False).logits).backward()
        gradients.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        assert all(torch.equal(other[name], gradients[0][name]) for name in gradients[0])


def test_generate_and_autocast(family: Any, caplog: Any) -> None:
    name, folder, reference = family
    model = load(folder)
    with torch.no_grad():
        short, long = model(token_ids()[:, :-1]).logits, model(token_ids()).logits
        causal = rms_ratio(reference(token_ids()[:, :-1]).logits, reference(token_ids()).logits[:, :-1]) < 1e-2
        assert causal or name == "glm_moe_dsa"  # transformers 5.6 with sdpa
        assert causal != ("causal mask" in caplog.text)
        assert not causal or rms_ratio(short, long[:, :-1]) < 1e-2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert rms_ratio(model(token_ids()).logits, reference(token_ids()).logits) < 5e-2
    output = model.generate(token_ids(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape == (2, token_ids().shape[1] + 4)
