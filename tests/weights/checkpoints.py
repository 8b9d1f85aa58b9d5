"""Synthetic MoE checkpoints in the hub's layouts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from kt_sft.weights.checkpoint import INDEX, ExpertTensors

E, D, F, LAYERS = 3, 96, 64, 2
SIZES = {"num_experts": E, "hidden_size": D, "intermediate_size": F}


def search_path(root: Path) -> str:
    """PYTHONPATH of a process that tests start: the repository first."""
    return os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))


def layer_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts"


def separate_layers(layers: int = LAYERS) -> dict[str, ExpertTensors]:
    def name(layer: int, projection: str) -> str:
        return f"{layer_name(layer)}.{{expert}}.{projection}_proj.weight"

    return {
        layer_name(i): ExpertTensors(gate=name(i, "gate"), up=name(i, "up"), down=name(i, "down"))
        for i in range(layers)
    }


def fused_layers() -> dict[str, ExpertTensors]:
    return {
        layer_name(i): ExpertTensors(gate_up=f"{layer_name(i)}.gate_up_proj", down=f"{layer_name(i)}.down_proj")
        for i in range(LAYERS)
    }


def weights(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, tuple[torch.Tensor, ...]]:
    """layer -> gate (E, F, D), up (E, F, D), down (E, D, F)."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    return {layer_name(i): tuple(torch.randn(*s, generator=g).to(dtype) for s in shapes) for i in range(LAYERS)}


def separate_tensors(all_weights: dict) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.{e}.{projection}_proj.weight": matrix[e].clone()
        for layer, matrices in all_weights.items()
        for projection, matrix in zip(("gate", "up", "down"), matrices, strict=True)
        for e in range(len(matrix))
    }


def fused_tensors(all_weights: dict) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer, (gate, up, down) in all_weights.items():
        tensors[f"{layer}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"{layer}.down_proj"] = down.clone()
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """One ``model.safetensors``, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "test"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
