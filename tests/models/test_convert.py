"""Loading with packed experts: layouts of checkpoints, options, and models that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kt_sft.config import KtConfig
from kt_sft.models.convert import convert_model, experts_on_cpu, from_pretrained
from kt_sft.nn.experts import KtExperts
from tests.families import COMMON, rms_ratio, save_checkpoint, tiny_model, token_ids

BF16: dict[str, Any] = {"weight_format": "bf16", "cache_dir": "none", "dtype": torch.float32}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_model("mixtral"), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def expected(mixtral: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).eval())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(token_ids()).logits


def rewritten(source: Path, target: Path, rename: Any) -> Path:
    """The checkpoint as one file with ``rename`` applied to the dictionary of its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in source.glob("*.safetensors"):
        tensors.update(load_file(shard))
    save_file({k: v.contiguous() for k, v in rename(tensors).items()}, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_options_go_to_kt_sft_or_to_transformers(mixtral: Path) -> None:
    model = from_pretrained(
        mixtral, config={"kt_backend": "AMXBF16", "cache_dir": "none"}, weight_format="int8", dtype=torch.bfloat16
    )
    experts = next(m for m in model.modules() if isinstance(m, KtExperts))
    assert experts.packed.weight_format == "int8"
    assert model.lm_head.weight.dtype == experts.weight.dtype == torch.bfloat16
    model = from_pretrained(mixtral, activation_policy="recompute", cache_dir="none")
    assert next(m for m in model.modules() if isinstance(m, KtExperts)).activation_policy == "recompute"
    assert model.lm_head.weight.dtype == torch.float32


def test_context_works_with_any_auto_class_and_leaves_transformers_as_it_was(
    mixtral: Path, expected: torch.Tensor
) -> None:
    before = (PreTrainedModel.post_init, PreTrainedModel.__dict__["from_pretrained"])
    with experts_on_cpu(mixtral, KtConfig(weight_format="bf16", cache_dir="none")):
        model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).eval()
    assert before == (PreTrainedModel.post_init, PreTrainedModel.__dict__["from_pretrained"])
    assert rms_ratio(logits(model), expected) < 1e-2
    with pytest.raises(RuntimeError, match="inside"), experts_on_cpu(mixtral, KtConfig()):
        raise RuntimeError("inside")
    assert before == (PreTrainedModel.post_init, PreTrainedModel.__dict__["from_pretrained"])
    assert not any(isinstance(m, KtExperts) for m in tiny_model("mixtral").modules())


def test_fused_checkpoint(mixtral: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {k: v for k, v in tensors.items() if ".experts." not in k}
        for layer in (0, 1):
            base = f"model.layers.{layer}.block_sparse_moe.experts"
            w1, w2, w3 = (torch.stack([tensors[f"{base}.{e}.w{i}.weight"] for e in range(8)]) for i in (1, 2, 3))
            out[f"{base}.gate_up_proj"], out[f"{base}.down_proj"] = torch.cat([w1, w3], dim=1), w2
        return out

    model = from_pretrained(rewritten(mixtral, tmp_path, fuse), **BF16).eval()
    assert rms_ratio(logits(model), expected) < 1e-2


def test_missing_expert_is_named(mixtral: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v for k, v in tensors.items() if "layers.1.block_sparse_moe.experts.5.w3" not in k}

    with pytest.raises(ValueError, match=r"layers\.1\.block_sparse_moe\.experts\.5\.w3"):
        from_pretrained(rewritten(mixtral, tmp_path, drop), **BF16)


def test_missing_layer_is_named(mixtral: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v for k, v in tensors.items() if "layers.1.block_sparse_moe.experts" not in k}

    with pytest.raises(ValueError, match=r"layers\.1\..*expected tensors such as .*experts\.0\.w1\.weight, got"):
        from_pretrained(rewritten(mixtral, tmp_path, drop), **BF16)


def test_next_token_prediction_layers_are_left_out(tmp_path: Path) -> None:
    source = save_checkpoint(tiny_model("deepseek_v3"), tmp_path)
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "more").mkdir()
    target = rewritten(source, tmp_path / "more", lambda t: {**t, **extra_layer(t, config["num_hidden_layers"])})
    experts = [m for m in from_pretrained(target, **BF16).modules() if isinstance(m, KtExperts)]
    assert len(experts) == 1


def extra_layer(tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    return {k.replace("layers.1.", f"layers.{index}."): v.clone() for k, v in tensors.items() if "layers.1." in k}


def test_dense_model_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON, intermediate_size=64)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*a model without routed experts"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*a model without routed experts"):
        convert_model(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_convert_model_packs_float_weights() -> None:
    experts = [m for m in convert_model(tiny_model("mixtral")).modules() if isinstance(m, KtExperts)]
    assert {m.packed.weight_format for m in experts} == {"int8"}
    with pytest.raises(ValueError, match=r"expected bf16, int8, int4 or auto .* got fp8"):
        convert_model(tiny_model("mixtral"), weight_format="fp8")


def test_meta_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="expected loaded weights, got a meta model"):
        convert_model(tiny_model("mixtral").to("meta"))


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "nemotron_h": (
        dict(
            **dict(moe_intermediate_size=40, n_routed_experts=4, num_experts_per_tok=2, head_dim=16, n_groups=1),
            **dict(moe_shared_expert_intermediate_size=32, layers_block_type=["moe"], ssm_state_size=16),
        ),
        r"NemotronHExperts with tensors \['down_proj', 'up_proj'\]",
    ),
    "mixtral": (dict(intermediate_size=40, num_local_experts=4, hidden_act="gelu"), "with activation"),
}


@pytest.mark.parametrize("model_type", [name for name in UNSUPPORTED if name in CONFIG_MAPPING])
def test_unsupported_experts_are_named(model_type: str) -> None:
    settings, message = UNSUPPORTED[model_type]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **settings}))
    parameters = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        convert_model(model)
    assert parameters == [name for name, _ in model.named_parameters()]


def test_code_outside_transformers_is_refused() -> None:
    model = tiny_model("mixtral")
    block = next(m for m in model.modules() if type(m).__name__ == "MixtralSparseMoeBlock")
    block.__class__ = type("RemoteMoe", (type(block),), {"__module__": "transformers_modules.remote"})
    block.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    with pytest.raises(ValueError, match=r"RemoteMoe from transformers_modules\.remote"):
        convert_model(model)
