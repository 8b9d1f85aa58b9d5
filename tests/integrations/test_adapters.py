"""Targets and several adapters through LLaMA-Factory: what is trained, what stays, what the reference is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import write_adapter

from kt_sft.config import KtConfig
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.llamafactory_adapters import put_below
from kt_sft.models.convert import from_pretrained
from tests.families import rms_ratio

pytest.importorskip("llamafactory")

IDS = torch.arange(3, 33).view(2, 15)


@pytest.fixture(scope="module")
def given(workspace: Any) -> dict[str, str]:
    """Two adapters with nonzero factors: all of attention and experts, attention only."""
    return {
        "a": str(write_adapter(workspace.folder / "a", seed=1)),
        "b": str(write_adapter(workspace.folder / "b", seed=2, experts=False)),
    }


def load(workspace: Any) -> Any:
    kt_peft.install()
    settings = KtConfig(weight_format="bf16", cache_dir="none")
    return from_pretrained(workspace.model, config=settings, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def test_frozen_adapters_act_as_if_merged(workspace: Any, given: dict[str, str]) -> None:
    only_a = logits(PeftModel.from_pretrained(load(workspace), given["a"]).eval())
    model = get_peft_model(load(workspace), LoraConfig(r=4, target_modules=["q_proj", "experts"]))
    put_below(model, [given["a"]])
    assert torch.equal(logits(model), only_a)  # the new adapter starts as a no-op
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}
    for name, parameter in model.named_parameters():
        if ".lora_B.default." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert rms_ratio(logits(model), only_a) > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), only_a)
    assert rms_ratio(logits(model), only_a) > 1e-2


def test_adapters_with_whole_modules_cannot_lie_below(workspace: Any, given: dict[str, str], tmp_path: Path) -> None:
    model = get_peft_model(load(workspace), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(workspace), given["a"])
    with pytest.raises(ValueError, match=r"expected adapters with LoRA factors only .*lm_head"):
        put_below(model, [str(tmp_path)])


@pytest.fixture(scope="module")
def jobs(workspace: Any, given: dict[str, str]) -> dict[str, Any]:
    """Everything through LLaMA-Factory, in one process."""
    both = f"{given['a']},{given['b']}"
    plain = {"lora_dropout": 0.0, "max_steps": 2, "save_strategy": "no"}
    sets = {
        "attention": {"lora_target": "q_proj,v_proj"},
        "experts": {"lora_target": "experts"},
        "routers": {"lora_target": "gate,experts", "lora_dropout": 0.1},
        "additional": {"lora_target": "experts", "additional_target": "gate,lm_head"},
        "rslora": {"lora_target": "all", "use_rslora": True, "lora_rank": 2, "lora_alpha": 6},
        "new": {"adapter_name_or_path": given["a"], "create_new_adapter": True, "lora_target": "all"},
        "continued": {"adapter_name_or_path": both},
        "dpo_new": {
            **{"adapter_name_or_path": given["a"], "create_new_adapter": True, "lora_target": "all"},
            **{"stage": "dpo", "dataset": "tiny_pairs"},
        },
    }
    args = {name: workspace.training(f"adapters_{name}", **{**plain, **changes}) for name, changes in sets.items()}
    chat = workspace.base() | {"infer_backend": "huggingface"}
    jobs = [{"verb": "train", "args": value} for value in args.values()]
    jobs += [{"verb": "chat", "args": chat | {"adapter_name_or_path": paths}} for paths in (both, given["a"])]
    return dict(zip([*args, "chat_both", "chat_a"], workspace.drive(*jobs), strict=True))


def kinds(workspace: Any, output: str) -> set[str]:
    """Modules of the saved adapter, without layer and expert numbers."""
    names = workspace.adapter(f"adapters_{output}")
    return {name.split(".lora_")[0].split(".")[-1] if ".lora_" in name else name.split(".")[-2] for name in names}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("attention", {"q_proj", "v_proj"}),
        ("experts", {"gate_proj", "up_proj", "down_proj"}),
        ("routers", {"gate", "gate_proj", "up_proj", "down_proj"}),
        ("additional", {"gate", "lm_head", "gate_proj", "up_proj", "down_proj"}),
        ("rslora", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("new", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("continued", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_what_is_trained(jobs: Any, workspace: Any, output: str, expected: set[str]) -> None:
    assert kinds(workspace, output) == expected
    trained = workspace.adapter(f"adapters_{output}")
    assert any(value.abs().sum() > 0 for name, value in trained.items() if "lora_B" in name)


def test_routers_and_whole_modules_move(jobs: Any, workspace: Any) -> None:
    routers = workspace.adapter("adapters_routers")
    assert all(value.any() for name, value in routers.items() if ".gate.lora_B" in name)
    base = load(workspace).state_dict()
    for name, value in workspace.adapter("adapters_additional").items():
        if ".lora_" not in name:
            assert not torch.equal(value, base[name.removeprefix("base_model.model.")].to(value.dtype)), name


def test_settings_reach_the_adapter(jobs: Any, workspace: Any) -> None:
    config = json.loads((workspace.folder / "adapters_rslora/adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 2, 6)


def test_only_the_last_adapter_is_trained_and_saved(jobs: Any, workspace: Any, given: dict[str, str]) -> None:
    from safetensors.torch import load_file

    before = load_file(f"{given['b']}/adapter_model.safetensors")
    after = workspace.adapter("adapters_continued")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    for output in ("new", "continued", "dpo_new"):
        folders = [path.name for path in (workspace.folder / f"adapters_{output}").iterdir() if path.is_dir()]
        assert not any(name.startswith("below") for name in folders)


def test_reference_of_a_new_adapter_includes_the_frozen_ones(jobs: Any, workspace: Any) -> None:
    """The first step's policy is the reference, so its reward is exactly zero and its loss log 2."""
    first = next(
        entry
        for entry in json.loads((workspace.folder / "adapters_dpo_new/trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    )
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_chat_with_two_adapters(jobs: Any) -> None:
    assert isinstance(jobs["chat_both"], str) and jobs["chat_both"] != jobs["chat_a"]
