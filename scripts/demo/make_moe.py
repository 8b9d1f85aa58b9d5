"""Make a Mixture-of-Experts model from a dense one by sparse upcycling (Komatsuzaki et al., 2022, arXiv:2212.05055).

Every MLP is copied into E experts; the top-k weights are normalised, so sum_k w_k * MLP(x) = MLP(x) and the MoE equals
the dense model as long as the copies are equal. Each expert is then perturbed (eps times the standard deviation of the
weight) and a random router N(0, 0.02) spreads the tokens, with the mean input of its layer projected out so that no
expert is preferred by all tokens. Families with a shared expert give it the first neurons of the MLP, the rest is
copied. The folder has the layout of a model hub: per-expert safetensors keys, index, config, tokenizer.

    python -m scripts.demo.make_moe --family mixtral --num-experts 8
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from . import fetch, paths
from .gguf_model import DenseModel, read_dense, write_tokenizer

logger = logging.getLogger(__name__)

LAYERS_PER_SHARD = 8
ROUTER_STD = 0.02
CALIBRATION_CHARACTERS = 4000
DONE = "build.json"


@dataclass(frozen=True, kw_only=True)
class Build:
    """What to make; written beside the model, so that another request rebuilds it."""

    family: str = "mixtral"
    num_experts: int = 8
    top_k: int = 2
    eps: float = 0.02
    seed: int = 0
    layout: int = 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture names and divides the MLP. ``shared`` is the fraction of neurons in the shared expert."""

    moe: str
    expert_names: tuple[str, str, str]  # gate, up, down
    config: Callable[[Build, int, int], dict]
    extras: Callable[[str, int, int], dict[str, Tensor]] = lambda prefix, hidden, experts: {}
    shared: tuple[int, int] = (0, 1)
    shared_name: str = ""
    shared_down_scale: float = 1.0


def _mixtral_config(build: Build, shared: int, routed: int) -> dict:
    return {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": build.num_experts,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }


def _qwen2_moe_config(build: Build, shared: int, routed: int) -> dict:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": build.num_experts,
        "moe_intermediate_size": routed,
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "qkv_bias": True,
    }


def _qwen2_moe_extras(layer: str, hidden: int, experts: int) -> dict[str, Tensor]:
    return {f"{layer}.mlp.shared_expert_gate.weight": torch.zeros(1, hidden, dtype=torch.bfloat16)}


def _glm4_moe_config(build: Build, shared: int, routed: int) -> dict:
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "n_routed_experts": build.num_experts,
        "n_shared_experts": 1,
        "moe_intermediate_size": routed,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
        "partial_rotary_factor": 1.0,
    }


def _glm4_moe_extras(layer: str, hidden: int, experts: int) -> dict[str, Tensor]:
    return {f"{layer}.mlp.gate.e_score_correction_bias": torch.zeros(experts)}


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "mixtral": Family(moe="block_sparse_moe", expert_names=("w1", "w3", "w2"), config=_mixtral_config),
    "qwen2_moe": Family(
        moe="mlp",
        expert_names=PROJECTIONS,
        config=_qwen2_moe_config,
        extras=_qwen2_moe_extras,
        shared=(1, 3),
        shared_name="shared_expert",
        shared_down_scale=2.0,  # the shared expert is gated by sigmoid(0) = 1/2
    ),
    "glm4_moe": Family(
        moe="mlp",
        expert_names=PROJECTIONS,
        config=_glm4_moe_config,
        extras=_glm4_moe_extras,
        shared=(1, 2),
        shared_name="shared_experts",
    ),
}


def moe_config(dense: DenseModel, build: Build) -> dict:
    """config.json of the MoE."""
    family = FAMILIES[build.family]
    intermediate = dense.config["intermediate_size"]
    shared = intermediate * family.shared[0] // family.shared[1]
    config = {**dense.config, "model_type": build.family, "num_experts_per_tok": build.top_k}
    config.update(family.config(build, shared, intermediate - shared))
    if "partial_rotary_factor" in config:
        config["rope_parameters"] = {**config["rope_parameters"], "partial_rotary_factor": 1.0}
    return config


def router_weight(build: Build, layer: int, mean_input_D: Tensor) -> Tensor:
    """Random router (E, D) in bf16, orthogonal to the layer's mean input."""
    generator = torch.Generator().manual_seed(build.seed * 1000 + layer)
    weight_ED = torch.randn(build.num_experts, mean_input_D.numel(), generator=generator) * ROUTER_STD
    unit_D = mean_input_D / mean_input_D.norm().clamp_min(1e-6)
    return (weight_ED - torch.outer(weight_ED @ unit_D, unit_D)).to(torch.bfloat16)


def moe_layer(dense: DenseModel, build: Build, layer: int, mean_input_D: Tensor) -> dict[str, Tensor]:
    """All tensors of one decoder layer of the MoE."""
    family, prefix = FAMILIES[build.family], f"model.layers.{layer}"
    gate_FD, up_FD, down_DF = (dense.weights[f"{prefix}.mlp.{name}.weight"] for name in PROJECTIONS)
    shared = gate_FD.shape[0] * family.shared[0] // family.shared[1]
    tensors = {n: w for n, w in dense.weights.items() if n.startswith(f"{prefix}.") and ".mlp." not in n}
    tensors[f"{prefix}.{family.moe}.gate.weight"] = router_weight(build, layer, mean_input_D)
    tensors |= family.extras(prefix, gate_FD.shape[1], build.num_experts)
    if build.family == "qwen2_moe":
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = dense.weights[f"{prefix}.self_attn.{name}.weight"].shape[0]
            tensors[f"{prefix}.self_attn.{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    if shared:
        parts = (gate_FD[:shared], up_FD[:shared], down_DF[:, :shared] * family.shared_down_scale)
        for name, part in zip(PROJECTIONS, parts, strict=True):
            tensors[f"{prefix}.{family.moe}.{family.shared_name}.{name}.weight"] = part.contiguous()
    generator = torch.Generator().manual_seed(build.seed * 1000 + layer + 500)
    parts = (gate_FD[shared:], up_FD[shared:], down_DF[:, shared:])
    for expert in range(build.num_experts):
        for name, part in zip(family.expert_names, parts, strict=True):
            noise = torch.randn(part.shape, generator=generator) * (build.eps * part.float().std())
            weight = (part.float() + noise).to(torch.bfloat16)
            tensors[f"{prefix}.{family.moe}.experts.{expert}.{name}.weight"] = weight.contiguous()
    return tensors


def dense_hf(dense: DenseModel, dtype: torch.dtype = torch.float32):
    """The dense model as a transformers module."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**dense.config)).to(dtype).eval()
    missing, unexpected = model.load_state_dict(dense.weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"dense model: missing {missing}, unexpected {unexpected}; the GGUF file is not SmolLM2-135M")
    model.tie_weights()
    return model


@torch.no_grad()
def mean_mlp_inputs(dense: DenseModel, tokenizer, text: str) -> list[Tensor]:
    """Mean over the tokens of ``text`` of every layer's MLP input, each (D,)."""
    model = dense_hf(dense)
    means: list[Tensor] = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, args: means.append(args[0].mean(dim=(0, 1))))
    model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    return means


def write_model(dense: DenseModel, build: Build, folder: Path, means: list[Tensor]) -> None:
    """Write the shards, their index, config.json and generation_config.json."""
    starts = range(0, dense.num_layers, LAYERS_PER_SHARD)
    weight_map: dict[str, str] = {}
    total = 0
    for number, start in enumerate(tqdm(starts, desc=f"writing {build.family} E{build.num_experts}", unit="shard")):
        tensors: dict[str, Tensor] = {}
        for layer in range(start, min(start + LAYERS_PER_SHARD, dense.num_layers)):
            tensors |= moe_layer(dense, build, layer, means[layer])
        if start == 0:
            tensors |= {n: w for n, w in dense.weights.items() if not n.startswith("model.layers.")}
        name = f"model-{number + 1:05d}-of-{len(starts):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    config = moe_config(dense, build)
    _write_json(folder / "config.json", config)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", tokens)


def make_moe(build: Build, folder: Path | None = None) -> Path:
    """Build the model unless the folder already holds exactly this one; return the folder."""
    if build.family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, got {build.family!r}")
    if not 1 <= build.top_k <= build.num_experts:
        raise ValueError(f"top_k: expected 1..{build.num_experts} (num_experts), got {build.top_k}")
    folder = folder or paths.moe_dir(build.family, build.num_experts)
    wanted = json.dumps(vars(build), sort_keys=True)
    if (folder / DONE).exists() and (folder / DONE).read_text() == wanted:
        logger.info("model: reusing %s", _short(folder))
        return folder
    from transformers import AutoTokenizer

    logger.info("model: building %s", _short(folder))
    gguf, texts = fetch.fetch_model(), fetch.fetch_texts()
    partial = folder.with_name(folder.name + f".partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_tokenizer(gguf, partial)
        dense = read_dense(gguf)
        text = (texts / "wiki_demo.txt").read_text()[-CALIBRATION_CHARACTERS:]
        means = mean_mlp_inputs(dense, AutoTokenizer.from_pretrained(partial), text)
        write_model(dense, build, partial, means)
        (partial / DONE).write_text(wanted)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _short(path: Path) -> str:
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="mixtral", choices=sorted(FAMILIES))
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--eps", type=float, default=0.02, help="perturbation, in standard deviations of each weight")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build = Build(family=options.family, num_experts=options.num_experts, top_k=options.top_k, eps=options.eps)
    make_moe(build, options.output)


if __name__ == "__main__":
    main()
