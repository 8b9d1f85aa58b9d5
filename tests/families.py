"""Tiny random models of every supported family, for tests: a few kilobytes, every routing path taken.

Sizes: hidden 64, experts' intermediate 40 (no multiple of a tile, and 2F != D), 8 experts, top-2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

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
LINEAR_ATTENTION: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_conv_kernel_dim=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
VISION: dict[str, Any] = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=64,
    num_position_embeddings=16,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=1,
)
MROPE: dict[str, Any] = dict(
    rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2], mrope_interleaved=True, partial_rotary_factor=1.0
)
# family -> (model_type, settings beside COMMON; those of a text_config beside COMMON in it)
ALL: dict[str, tuple[str, dict[str, Any]]] = {
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
    "gpt_oss": ("gpt_oss", dict(intermediate_size=40, num_local_experts=8, num_experts_per_tok=2, head_dim=16)),
    "llama4": (
        "llama4",
        dict(
            text_config={
                **dict(intermediate_size=40, intermediate_size_mlp=80, num_local_experts=8, num_experts_per_tok=1),
                **dict(head_dim=16, interleave_moe_layer_step=1),
            },
            vision_config={
                **dict(
                    hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=28
                ),
                **dict(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
            },
            **dict(boi_token_index=90, eoi_token_index=91, image_token_index=92),
        ),
    ),
    "olmoe": ("olmoe", dict(intermediate_size=40, num_experts=8, num_experts_per_tok=2, norm_topk_prob=False)),
    "qwen3_next": (
        "qwen3_next",
        {**QWEN, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 48, "head_dim": 16, "decoder_sparse_step": 1},
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        dict(
            text_config={**QWEN, "head_dim": 16, "decoder_sparse_step": 1, "rope_parameters": MROPE},
            vision_config={**VISION, "deepstack_visual_indexes": [0]},
        ),
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        dict(
            text_config={
                **{k: QWEN[k] for k in ("moe_intermediate_size", "num_experts", "num_experts_per_tok")},
                **{**LINEAR_ATTENTION, "shared_expert_intermediate_size": 48, "head_dim": 16, "rope_parameters": MROPE},
            },
            vision_config=VISION,
        ),
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {
            **{k: v for k, v in DEEPSEEK.items() if k != "first_k_dense_replace"},
            **{"mlp_layer_types": ["dense", "sparse"], "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2},
        },
    ),
    "minimax_m2": (
        "minimax_m2",
        dict(intermediate_size=40, num_local_experts=8, num_experts_per_tok=2, head_dim=16, rotary_dim=8),
    ),
}
MOE_LAYERS = {"deepseek_v2": 1, "deepseek_v3": 1, "glm4_moe": 1, "glm_moe_dsa": 1}  # of the two; otherwise both
NEED_TRANSFORMERS_5 = ("qwen3_vl_moe", "qwen3_5_moe", "glm_moe_dsa", "minimax_m2")
FAMILIES = {k: v for k, v in ALL.items() if transformers.__version__ >= "5" or k not in NEED_TRANSFORMERS_5}


def tiny_config(family: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    model_type, settings = FAMILIES[family]
    if "text_config" in settings:
        text = {**COMMON, **settings["text_config"], **overrides}
        return AutoConfig.for_model(model_type, **{**settings, "text_config": text})
    return AutoConfig.for_model(model_type, **{**COMMON, **settings, **overrides})


def auto_class(config: Any) -> Any:
    """What LLaMA-Factory loads a model of this configuration with."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def stock_model(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The checkpoint as unmodified transformers loads it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, **options)
    return auto_class(config).from_pretrained(folder, dtype=dtype, **options).eval()


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model whose weights are large enough for routing and experts to matter."""
    torch.manual_seed(seed)
    config = tiny_config(family, **overrides)
    model = auto_class(config).from_config(config).eval()
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
    if config["model_type"] == "qwen3_vl_moe":  # published with inputs first, unlike what transformers 5 saves
        for shard in folder.glob("*.safetensors"):
            tensors = load_file(shard)
            stacks = {k: v.transpose(1, 2).contiguous() for k, v in tensors.items() if ".experts." in k}
            save_file({**tensors, **stacks}, shard, {"format": "pt"})
    return folder


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, COMMON["vocab_size"], (batch, length), generator=generator)


def rms_ratio(got: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of the expected tensor."""
    error, scale = (got.float() - expected.float()).pow(2).mean().sqrt(), expected.float().pow(2).mean().sqrt()
    return float(error / scale)


STACKS = (("gate_up_proj", "down_proj"), ("w_in", "w_out"))  # of transformers 5, and of tests/models/remote_model.py
OTHER_NAMES = {"w1": "w_gate", "w3": "w_up", "w2": "w_down"}  # what that model calls them itself


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
        if b.ndim == 2:
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + scaling * b @ a
            continue
        base, projection = path.rsplit(".", 1)
        delta = scaling * torch.einsum("eor,eri->eoi", b, a)
        stacks = next((pair for pair in STACKS if f"{base}.{pair[1]}" in weights), None)
        if stacks is not None:
            part = {"up_proj": 1, "w3": 1}.get(projection, 0)
            is_down = projection in ("down_proj", "w2")
            key = f"{base}.{stacks[is_down]}"
            if not is_down:
                zero = torch.zeros_like(delta)
                halves = [delta, zero] if part == 0 else [zero, delta]
                alternate = f"{key}_bias" in weights  # gpt-oss
                delta = torch.stack(halves, 2).flatten(1, 2) if alternate else torch.cat(halves, dim=1)
            weights[key] = weights[key] + (delta if delta.shape == weights[key].shape else delta.mT)
        else:
            if f"{base}.0.{projection}.weight" not in weights:
                projection = OTHER_NAMES[projection]
            for e in range(delta.shape[0]):
                weights[f"{base}.{e}.{projection}.weight"] = weights[f"{base}.{e}.{projection}.weight"] + delta[e]
    return weights, leaves


def with_lora(model: Any, more: tuple[str, ...] = (), **options: Any) -> Any:
    """LoRA of rank 4 with random factors on attention, every expert and ``more`` modules."""
    from peft import LoraConfig, get_peft_model

    from kt_sft.integrations import peft as kt_peft

    kt_peft.install()
    targets = ["q_proj", "o_proj", "kv_b_proj", *kt_peft.expert_target_names(model), *more]
    if not more and any("vision_model." in name for name, _ in model.named_modules()):  # only pictures train it
        options["exclude_modules"] = r"(.*\.)?vision_model\..*"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)
    torch.manual_seed(5)  # no routing near-tie that bf16 products would flip
    return get_peft_model(model, config)


def loss_of(logits: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = token_ids() if ids is None else ids
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def lora_errors(model: Any, reference: Any) -> tuple[float, dict[str, float]]:
    """RMS ratios of the logits, and of every LoRA gradient by name, to those of the dense ``reference``."""
    return errors_of(with_lora(model).eval(), reference)


def errors_of(tuned: Any, reference: Any, **inputs: torch.Tensor) -> tuple[float, dict[str, float]]:
    """The same of a model that has its LoRA layers (alpha is twice the rank), for ``inputs`` other than some text."""
    inputs = inputs or {"input_ids": token_ids()}
    weights, leaves = dense_weights(tuned, reference)
    expected = torch.func.functional_call(reference, weights, (), inputs).logits
    loss_of(expected, inputs["input_ids"]).backward()
    got = tuned(**inputs).logits
    loss_of(got, inputs["input_ids"]).backward()
    errors = {}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:  # nothing reaches GLM-5's indexer, which only chooses
            neither = parameter.grad is None and leaves[name].grad is None
            errors[name] = 0.0 if neither else rms_ratio(parameter.grad, leaves[name].grad)
    return rms_ratio(got.detach(), expected.detach()), errors
