"""llamafactory-cli train on quantised checkpoints: step for step the run on the dequantised weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS

from kt_sft.weights.formats import ExpertReader, open_checkpoint
from tests.weights import published

NAMES = [f"model.layers.{i}.mlp.experts" for i in range(LAYERS)]
KINDS = {
    "fp8": published.fp8_block,
    "int4": published.int4_group32,
    "gptq": lambda w: published.gptq(w, group=32),
    "awq": lambda w: published.awq(w, group=32),
}


def copy_of(model: Path, target: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """The model's folder with other expert tensors."""
    shutil.copytree(model, target)
    rest = {k: v for k, v in load_file(target / "model.safetensors").items() if ".experts." not in k}
    save_file({**rest, **tensors}, target / "model.safetensors")
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, **config}))
    return target


def weights_of(model: Path) -> published.Weights:
    tensors = load_file(model / "model.safetensors")
    return {
        name: tuple(
            torch.stack([tensors[f"{name}.{e}.{p}.weight"] for e in range(EXPERTS)]) for p in published.PROJECTIONS
        )
        for name in NAMES
    }


def dequantised(folder: Path, layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layout in layers.items():
        reader = ExpertReader(open_checkpoint(folder), layout, EXPERTS, HIDDEN, INTERMEDIATE)
        for e in range(EXPERTS):
            parts = zip(published.PROJECTIONS, reader.read(e).dequantize(torch.bfloat16), strict=True)
            tensors |= {f"{name}.{e}.{p}.weight": matrix for p, matrix in parts}
    return tensors


@pytest.fixture(scope="module")
def jobs(workspace):
    """Two steps per checkpoint, all in one process: name -> the folder of its run."""
    base, weights = workspace.model, weights_of(workspace.model)
    runs: dict[str, dict[str, Any]] = {}
    for kind, make in KINDS.items():
        made = make(weights)
        folder = copy_of(base, workspace.folder / kind, made.tensors, quantization_config=made.quantization_config)
        twin = copy_of(base, workspace.folder / f"{kind}_twin", dequantised(folder, made.layers))
        runs |= {kind: {"model_name_or_path": str(folder)}, f"{kind}_twin": {"model_name_or_path": str(twin)}}
    file = published.write_gguf(workspace.folder / "experts.gguf", weights, "Q8_0")
    twin = copy_of(base, workspace.folder / "gguf_twin", dequantised(file, published.gguf_layers(weights)))
    runs["gguf"] = {"kt_expert_checkpoint_path": str(file)}
    runs["gguf_twin"] = {"model_name_or_path": str(twin)}
    common = {"kt_config": {"kt_expert_weight_format": "bf16"}, "max_steps": 2, "save_steps": 2}
    workspace.drive(
        *({"verb": "train", "args": workspace.training(f"run_{n}", **common, **r)} for n, r in runs.items())
    )
    return workspace


@pytest.mark.parametrize("kind", [*KINDS, "gguf"])
def test_trains_as_its_dequantised_twin(jobs, kind):
    assert jobs.losses(f"run_{kind}") == jobs.losses(f"run_{kind}_twin")
    assert sorted(jobs.losses(f"run_{kind}")) == [1, 2]
    ours, twins = jobs.adapter(f"run_{kind}"), jobs.adapter(f"run_{kind}_twin")
    assert any(".experts." in name for name in ours) and ours.keys() == twins.keys()
    assert all(torch.equal(ours[name], twins[name]) for name in ours)


def test_the_formats_differ(jobs):
    assert len({jobs.losses(f"run_{kind}")[1] for kind in [*KINDS, "gguf"]}) > 3
