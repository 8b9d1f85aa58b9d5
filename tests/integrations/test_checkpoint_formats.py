"""llamafactory-cli train on quantised checkpoints: step for step the run on the dequantised weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS

from tests.weights import published

SIZES = (EXPERTS, HIDDEN, INTERMEDIATE)
NAMES = [f"model.layers.{i}.mlp.experts" for i in range(LAYERS)]
KINDS = {
    "fp8": published.fp8_block,
    "int4": published.int4_group32,
    "gptq": lambda w: published.gptq(w, group=32),
    "awq": lambda w: published.awq(w, group=32),
}


@pytest.fixture(scope="module")
def jobs(workspace):
    """Two steps per checkpoint, all in one process: name -> the folder of its run."""
    base, folder = workspace.model, workspace.folder
    weights = published.weights_of(base, NAMES, EXPERTS)
    runs: dict[str, dict[str, Any]] = {}

    def add(kind: str, path: Any, layers: Any, **run: Any) -> None:
        twin = published.with_experts(base, folder / f"{kind}_twin", published.dequantised(path, layers, SIZES))
        runs.update({kind: run, f"{kind}_twin": {"model_name_or_path": str(twin)}})

    for kind, make in KINDS.items():
        made = make(weights)
        config = {"quantization_config": made.quantization_config}
        path = published.with_experts(base, folder / kind, made.tensors, **config)
        add(kind, path, made.layers, model_name_or_path=str(path))
    file = published.write_gguf(folder / "experts.gguf", weights, "Q8_0")
    add("gguf", file, published.gguf_layers(weights), kt_expert_checkpoint_path=str(file))
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
