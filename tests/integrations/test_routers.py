"""LoRA on routers, alone and beside the experts: against W + scaling * B A in the unmodified model; files; refusals."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from kt_sft.config import KtConfig
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.peft_targets import routers, uncalled_routers
from kt_sft.models.convert import from_pretrained
from tests.families import dense_weights, rms_ratio, save_checkpoint, stock_model, tiny_model, token_ids

FUSED = int(transformers.__version__.split(".")[0]) >= 5
needs_fused = pytest.mark.skipif(not FUSED, reason="routers are Linears in transformers 4")


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kt_peft.install()
    return save_checkpoint(tiny_model(request.param), tmp_path_factory.mktemp(request.param))


def load(checkpoint: Path) -> Any:
    settings = KtConfig(weight_format="bf16", cache_dir="none")
    return from_pretrained(checkpoint, config=settings, dtype=torch.float32).eval()


def tune(checkpoint: Path, **options: Any) -> PeftModel:
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["gate", "experts"]}
    return get_peft_model(load(checkpoint), LoraConfig(**{**settings, **options})).eval()


def logits(model: Any) -> torch.Tensor:
    return model(token_ids()).logits


def token_errors(got: torch.Tensor, expected: torch.Tensor) -> list[float]:
    return [rms_ratio(*pair) for pair in zip(got.flatten(0, 1), expected.flatten(0, 1), strict=True)]


def median_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Over the tokens: one whose routing is a near-tie may go another way."""
    return statistics.median(token_errors(got, expected))


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@needs_fused
def test_router_adapter_equals_the_merged_router(checkpoint: Path) -> None:
    model = tune(checkpoint, target_modules=["gate"])
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    weights, leaves = dense_weights(model, reference)
    expected = functional_call(reference, weights, (token_ids(),)).logits
    got = logits(model)
    assert median_error(got, expected) < 1e-2
    assert median_error(logits(load(checkpoint)), expected) > 5e-2
    agree = torch.tensor(token_errors(got, expected)).view(got.shape[:2]) < 1e-2
    direction = torch.randn_like(got) * agree[..., None]
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    assert len(leaves) == 2 * len(routers(load(checkpoint)))
    for name, leaf in leaves.items():
        assert rms_ratio(factors(model)[name].grad, leaf.grad) < 5e-2, name


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_routers_with_rules_of_their_own(tmp_path: Path, family: str) -> None:
    """gpt-oss's adds a bias, Llama 4's is a Linear that returns sigmoid scores, which scale the experts' input."""
    kt_peft.install()
    folder = save_checkpoint(tiny_model(family), tmp_path)
    model = tune(folder, target_modules=["router", "experts"])
    reference = stock_model(folder)
    weights, leaves = dense_weights(model, reference)
    expected, got = functional_call(reference, weights, (token_ids(),)).logits, logits(model)
    agree = torch.tensor(token_errors(got, expected)).view(got.shape[:2]) < 1e-2
    assert agree.float().mean() > 0.9
    direction = torch.randn_like(got) * agree[..., None]
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    of_routers = [name for name in leaves if ".router." in name]
    assert len(of_routers) == 4
    for name in of_routers:
        assert rms_ratio(factors(model)[name].grad, leaves[name].grad) < 5e-2, name


@needs_fused
def test_router_and_experts_together_and_off(checkpoint: Path) -> None:
    model, base = tune(checkpoint), logits(load(checkpoint))
    assert any(".gate.lora_A" in name for name in factors(model))
    assert any(".experts." in name for name in factors(model))
    assert rms_ratio(logits(model), base) > 5e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@needs_fused
def test_saved_router_adapter_loads_back_under_the_checkpoint_name(checkpoint: Path, tmp_path: Path) -> None:
    model = tune(checkpoint)
    model.save_pretrained(tmp_path)
    block = "block_sparse_moe" if "mixtral" in str(checkpoint) else "mlp"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"base_model.model.model.layers.1.{block}.gate.lora_A.weight"].shape == (4, 64)
    assert tensors[f"base_model.model.model.layers.1.{block}.gate.lora_B.weight"].shape == (8, 4)
    again = PeftModel.from_pretrained(load(checkpoint), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@needs_fused
def test_dropout_rslora_and_a_second_adapter(tmp_path: Path, checkpoint: Path) -> None:
    model = tune(checkpoint, target_modules=["gate"], lora_dropout=0.5, use_rslora=True)
    layer = next(iter(routers_of(model)))
    assert layer.scaling["default"] == 8 / 4**0.5
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    first = logits(model.eval())
    torch.manual_seed(6)
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, target_modules=["gate"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)


def routers_of(model: Any) -> list[Any]:
    from kt_sft.nn.router import RouterLora

    return [module for module in model.modules() if isinstance(module, RouterLora)]


@needs_fused
def test_variants_and_merging_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"routers: expected plain LoRA.*use_dora"):
        tune(checkpoint, target_modules=["gate"], use_dora=True)
    with pytest.raises(ValueError, match="merge: expected Linear layers, got a router"):
        routers_of(tune(checkpoint, target_modules=["gate"]))[0].merge()


def test_a_router_that_its_block_does_not_call(tmp_path: Path) -> None:
    """DeepseekV2 of transformers 5.6 multiplies with ``self.gate.weight``: an adapter on it would train nothing."""
    kt_peft.install()
    folder = save_checkpoint(tiny_model("deepseek_v2"), tmp_path)
    uncalled = uncalled_routers(load(folder))
    if not uncalled:
        pytest.skip("this transformers release calls the router")
    with pytest.raises(ValueError, match=rf"{uncalled[0]} cannot be adapted"):
        tune(folder)
    model = tune(folder, target_modules="all-linear")
    assert not any(".gate.lora" in name for name in factors(model))
    assert any(".experts." in name for name in factors(model))


@pytest.mark.parametrize("name", ["experts", "mlp"])
def test_additional_target_with_experts_inside(tmp_path: Path, name: str) -> None:
    kt_peft.install()
    folder = save_checkpoint(tiny_model("qwen3_moe"), tmp_path)
    with pytest.raises(ValueError, match=rf"modules_to_save \(additional_target\).*got '{name}'.*experts"):
        tune(folder, target_modules=["q_proj"], modules_to_save=[name])


def test_additional_target_trains_a_router_copy(tmp_path: Path) -> None:
    kt_peft.install()
    folder = save_checkpoint(tiny_model("qwen3_moe"), tmp_path)
    model = tune(folder, target_modules=["experts"], modules_to_save=["gate", "lm_head"])
    names = {name for name in factors(model) if "modules_to_save" in name}
    assert len(names) == 3
    logits(model).square().mean().backward()
    assert all(factors(model)[name].grad.abs().sum() > 0 for name in names)
