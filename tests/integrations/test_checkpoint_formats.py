"""llamafactory-cli train on quantised checkpoints, kept as they are: the losses of a run on the dequantised weights.

Not bit for bit: few rows are multiplied with the exact values, those of the twin are rounded to bf16, and in bf16 a
near-tie of the router then falls to another expert.
"""

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
        bf16 = {"kt_expert_weight_format": "bf16"}
        runs.update({kind: run, f"{kind}_twin": {"model_name_or_path": str(twin), "kt_config": bf16}})

    for kind, make in KINDS.items():
        made = make(weights)
        config = {"quantization_config": made.quantization_config}
        path = published.with_experts(base, folder / kind, made.tensors, **config)
        add(kind, path, made.layers, model_name_or_path=str(path))
    file = published.write_gguf(folder / "experts.gguf", weights, "Q8_0")
    add("gguf", file, published.gguf_layers(weights), kt_expert_checkpoint_path=str(file))
    common = {"max_steps": 2, "save_steps": 2}
    workspace.drive(
        *({"verb": "train", "args": workspace.training(f"run_{n}", **common, **r)} for n, r in runs.items())
    )
    return workspace


@pytest.mark.parametrize("kind", [*KINDS, "gguf"])
def test_trains_as_its_dequantised_twin(jobs, kind):
    losses, twin_losses = jobs.losses(f"run_{kind}"), jobs.losses(f"run_{kind}_twin")
    assert sorted(losses) == [1, 2] and losses == pytest.approx(twin_losses, rel=1e-2)
    ours, twins = jobs.adapter(f"run_{kind}"), jobs.adapter(f"run_{kind}_twin")
    assert any(".experts." in name for name in ours) and ours.keys() == twins.keys()
    moved = torch.cat([ours[name].float().flatten() for name in ours])
    expected = torch.cat([twins[name].float().flatten() for name in ours])
    assert (moved - expected).norm() < 1e-1 * expected.norm()  # Adam makes full steps of small differences too


def test_the_formats_differ(jobs):
    assert len({jobs.losses(f"run_{kind}")[1] for kind in [*KINDS, "gguf"]}) > 3
