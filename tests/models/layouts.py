"""Families in the layouts that their publishers ship, each with a twin: the dequantised weights in BF16.

``LAYOUTS`` quantise attention or shared experts as well, ``EXPERTS_ONLY`` nothing but the routed experts, ``PLAIN`` are
in BF16.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families import FAMILIES, save_checkpoint, tiny_model
from tests.weights.published import blocks_of, power_of_two, spread
from tests.weights.published import int4_group32 as published_int4

Parts = dict[str, Tensor]  # by suffix
KEPT = r"embed_tokens|lm_head|norm|mlp\.gate\.|block_sparse_moe\.gate\.|shared_expert_gate|visual|conv1d|weights_proj"
NOT_EXPERTS = r"^(?!.*\.experts\.)"
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
SCHEME = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": SCHEME, "input_activations": None}},
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
LLAMA4 = CHANNEL | {
    "ignore": [f"re:.*{name}" for name in ("lm_head", "self_attn", "router", "vision_model", "multi_modal_projector")]
}
INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*self_attn.*"]}
INT4["config_groups"] = {
    "group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}}
}
KIMI = {"model_type": "kimi_k2", "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}


def fp8_block(w: Tensor, ue8m0: bool = False) -> tuple[Parts, Tensor]:
    """What is stored, and what it stands for."""
    scale = blocks_of(w, 128, 128) / 448
    scale = power_of_two(scale) if ue8m0 else scale
    grid = spread(scale, 128, 128, w.shape)
    codes = (w / grid).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * grid


def fp8_ue8m0(w: Tensor) -> tuple[Parts, Tensor]:
    return fp8_block(w, ue8m0=True)


def fp8_channel(w: Tensor) -> tuple[Parts, Tensor]:
    scale = (w.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (w / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def int4_group32(w: Tensor) -> tuple[Parts, Tensor]:
    made = published_int4({"x.experts": (w[None], w[None], w[None])}).tensors
    parts = {name.rpartition(".")[2]: value for name, value in made.items() if ".gate_proj." in name}
    scale = parts["weight_scale"].float().repeat_interleave(32, 1)
    return parts, torch.clamp((w / scale).round(), -8, 7) * scale


@dataclass(frozen=True)
class Layout:
    """What a publisher makes of a family's checkpoint."""

    family: str
    quantization: dict[str, Any] = field(default_factory=lambda: FP8)
    quantise: Callable[[Tensor], tuple[Parts, Tensor]] = fp8_block
    config: dict[str, Any] = field(default_factory=dict)
    more_layers: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    kept: str = KEPT  # what is not quantised
    one_by_one: bool = False  # experts are published one by one though transformers saves stacks
    seed: int = 0  # of the weights


SIZES = {"hidden_size": 160, "moe_intermediate_size": 136}  # no multiples of a block
STACKS = {"hidden_size": 384, "moe_intermediate_size": 128}  # gate and up share a stack: whole blocks, as published
_LAYOUTS = {
    "deepseek_v3": Layout("deepseek_v3", more_layers=1, sizes=SIZES),
    "deepseek_v3_1": Layout("deepseek_v3", FP8 | {"scale_fmt": "ue8m0"}, fp8_ue8m0, more_layers=1, sizes=SIZES),
    "kimi_k2": Layout("deepseek_v3", config=KIMI, sizes=SIZES),
    "minimax_m2": Layout("minimax_m2", sizes={"hidden_size": 160, "intermediate_size": 136}),
    "glm_moe_dsa": Layout("glm_moe_dsa", more_layers=1, sizes=SIZES),
    "glm4_moe": Layout("glm4_moe", CHANNEL, fp8_channel, more_layers=1, sizes=SIZES),
    "qwen3_moe": Layout("qwen3_moe", sizes=SIZES),
    "qwen3_next": Layout("qwen3_next", sizes=SIZES),
    "qwen3_vl_moe": Layout("qwen3_vl_moe", sizes=STACKS),
    "qwen3_5_moe": Layout("qwen3_5_moe", sizes={**STACKS, "hidden_size": 256}),
    "llama4": Layout(
        "llama4",
        LLAMA4,
        fp8_channel,
        sizes={"hidden_size": 160, "intermediate_size": 136},
        kept=r"embed_tokens|lm_head|norm|router|self_attn|vision_model|multi_modal_projector",
        one_by_one=True,
        # Of seed 0 a token's best two experts differ by 0.0099 in a router logit, and BF16 activations move logits by
        # 0.0186: any sum in another order may choose the other one. Here they differ by 0.039 at least, moved by 0.012.
        seed=1,
    ),
}
_EXPERTS_ONLY = {
    "kimi_k2_thinking": Layout(
        "deepseek_v3",
        INT4,
        int4_group32,
        config=KIMI,
        sizes={"hidden_size": 160, "moe_intermediate_size": 96},
        kept=NOT_EXPERTS,
    ),
}
LAYOUTS, EXPERTS_ONLY = (
    {name: layout for name, layout in layouts.items() if layout.family in FAMILIES}
    for layouts in (_LAYOUTS, _EXPERTS_ONLY)
)
PLAIN = ("mixtral", "qwen2_moe", "olmoe", "deepseek_v2")


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain_checkpoint(family: str, folder: Path, **sizes: int) -> Path:
    return save_checkpoint(tiny_model(family, dtype=torch.bfloat16, **sizes), folder)


def checkpoints(layout: Layout, folder: Path, **sizes: int) -> tuple[Path, Path]:
    """The published checkpoint and its dequantised twin."""
    plain = save_checkpoint(tiny_model(layout.family, layout.seed, **layout.sizes, **sizes), folder / "plain")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(plain.glob("*.safetensors")):
        tensors |= {k: v.bfloat16() if v.ndim > 1 else v for k, v in load_file(shard).items()}
    config = json.loads((plain / "config.json").read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    source = one_by_one(tensors) if layout.one_by_one else dict(tensors)
    if layout.more_layers:
        source |= next_token_prediction(tensors, config["num_hidden_layers"])
    out: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for name, value in source.items():
        if value.ndim < 2 or re.search(layout.kept, name):
            out[name] = value
        else:
            made, exact[name] = quantised(layout, name, value)
            out |= made
    twin = tensors | {k: v for k, v in (stacked(exact) if layout.one_by_one else exact).items() if k in tensors}
    extra = {"num_nextn_predict_layers": layout.more_layers} if layout.more_layers else {}
    settings = {**config, **extra, **layout.config, "quantization_config": layout.quantization}
    return write(folder / "published", out, settings), write(folder / "twin", twin, config)


def quantised(layout: Layout, name: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a matrix, or of a stack of them, and the values in BF16."""
    stack = value.float() if value.ndim == 3 else value.float()[None]
    parts, values = zip(*map(layout.quantise, stack), strict=True)
    out = {}
    for suffix in parts[0]:
        whole = torch.stack([part[suffix].view(torch.uint8) for part in parts]).view(parts[0][suffix].dtype)
        key = name.removesuffix("weight") + suffix if value.ndim == 2 else name + suffix.removeprefix("weight")
        out[key] = whole[0] if value.ndim == 2 else whole
    return out, torch.stack(values).view(value.shape).bfloat16()


def one_by_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama 4's stacks, inputs first, as the matrices of every expert; the other tensors as they are."""
    out = {}
    for name, value in tensors.items():
        base, _, leaf = name.rpartition(".")
        if not base.endswith(".experts"):
            out[name] = value
            continue
        names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        for part, stack in zip(names, value.mT.chunk(len(names), 1), strict=True):
            out |= {f"{base}.{e}.{part}.weight": matrix.clone() for e, matrix in enumerate(stack)}
    return out


def stacked(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse."""
    out = {name: value for name, value in matrices.items() if ".experts." not in name}
    for base in {name.partition(".experts.")[0] for name in matrices if ".experts." in name}:
        count = sum(name.startswith(f"{base}.experts.") for name in matrices) // 3

        def stack(part: str, base: str = base, count: int = count) -> Tensor:
            return torch.stack([matrices[f"{base}.experts.{e}.{part}.weight"] for e in range(count)])

        out[f"{base}.experts.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], 1).mT
        out[f"{base}.experts.down_proj"] = stack("down_proj").mT
    return out


def next_token_prediction(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """DeepSeek-V3's multi-token-prediction layer: a decoder layer, an embedding, a head and a projection."""
    layer = f"model.layers.{index}"
    out = {k.replace("model.layers.1", layer): v.clone() for k, v in tensors.items() if "model.layers.1." in k}
    out[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    out[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    out[f"{layer}.shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    hidden = len(tensors["model.norm.weight"])
    out[f"{layer}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
    return out
