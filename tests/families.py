"""Tiny random models of every supported family, for tests: a few kilobytes, every routing path taken.

Sizes: hidden 64, experts' intermediate 40 (no multiple of a tile, and 2F != D), 8 experts, top-2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
DEEPSEEK: dict[str, Any] = dict(
    intermediate_size=80,
    moe_intermediate_size=40,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
)
QWEN: dict[str, Any] = dict(
    intermediate_size=80, moe_intermediate_size=40, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
)
# family -> (model_type, settings beside COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", dict(intermediate_size=40, num_local_experts=8, num_experts_per_tok=2)),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1}),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "head_dim": 16, "decoder_sparse_step": 1}),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("deepseek_v3", {**DEEPSEEK, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}),
    "glm4_moe": (
        "glm4_moe",
        {
            **{k: DEEPSEEK[k] for k in ("intermediate_size", "moe_intermediate_size", "n_routed_experts")},
            **{"num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16},
        },
    ),
    "olmoe": ("olmoe", dict(intermediate_size=40, num_experts=8, num_experts_per_tok=2, norm_topk_prob=False)),
}


def tiny_config(family: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    model_type, settings = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**COMMON, **settings, **overrides})


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random causal language model whose weights are large enough for routing and experts to matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
                if "experts" in name:  # values that the bf16 format holds exactly
                    parameter.copy_(parameter.bfloat16())
    return model.to(dtype)


def save_checkpoint(model: Any, folder: Path) -> Path:
    """Write the model as its hub checkpoint: per-expert tensors in safetensors shards, config.json as on the hub."""
    model.save_pretrained(folder, max_shard_size="200KB")
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"].startswith(("qwen", "olmoe")):  # transformers 5 writes num_local_experts
        config["num_experts"] = config.pop("num_local_experts", config.get("num_experts"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, COMMON["vocab_size"], (batch, length), generator=generator)


def rms_ratio(got: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of the expected tensor."""
    error, scale = (got.float() - expected.float()).pow(2).mean().sqrt(), expected.float().pow(2).mean().sqrt()
    return float(error / scale)


def dense_weights(tuned: Any, reference: Any, scaling: float = 2.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """The oracle of LoRA: the reference's parameters with W + scaling * B A for every adapted W of ``tuned``.

    Also returns the leaves: copies of the LoRA factors under tuned's names, to be differentiated.
    """
    leaves = {n: p.detach().clone().requires_grad_() for n, p in tuned.named_parameters() if p.requires_grad}
    weights = {name: p.detach() for name, p in reference.named_parameters()}
    for name, a in leaves.items():
        if ".lora_A." not in name:
            continue
        b = leaves[name.replace("lora_A", "lora_B")]
        path = name.split(".lora_A.")[0].removeprefix("base_model.model.")
        if ".experts." not in path:
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + scaling * b @ a
            continue
        base, projection = path.rsplit(".", 1)
        delta = scaling * torch.einsum("eor,eri->eoi", b, a)
        if f"{base}.down_proj" in weights:  # fused, transformers 5
            part = {"up_proj": 1, "w3": 1}.get(projection, 0)
            key = f"{base}.down_proj" if projection in ("down_proj", "w2") else f"{base}.gate_up_proj"
            zero = torch.zeros_like(delta)
            halves = [delta, zero] if part == 0 else [zero, delta]
            weights[key] = weights[key] + (delta if key.endswith("down_proj") else torch.cat(halves, dim=1))
        else:
            for e in range(delta.shape[0]):
                weights[f"{base}.{e}.{projection}.weight"] = weights[f"{base}.{e}.{projection}.weight"] + delta[e]
    return weights, leaves
