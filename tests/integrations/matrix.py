"""The training matrix: stage x variant (what is computed) x policy (how) x launcher, as LLaMA-Factory arguments.

Every run starts from the same adapter with nonzero factors and takes three SGD steps of four examples, so that its
losses and what became of the adapter can be compared: packed experts with stock LLaMA-Factory + PEFT on transformers 4
(where each expert is a Linear), and two processes with one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import write_adapter, write_checkpoint, write_dataset

STAGES: dict[str, dict[str, Any]] = {
    "pt": {"stage": "pt", "dataset": "tiny_text"},
    "sft": {"stage": "sft", "dataset": "tiny"},
    **{
        f"dpo_{loss}": {"stage": "dpo", "dataset": "tiny_pairs", "pref_loss": loss}
        for loss in ("sigmoid", "ipo", "orpo", "simpo")
    },
    "kto": {"stage": "kto", "dataset": "tiny_kto"},
    "rm": {"stage": "rm", "dataset": "tiny_pairs"},
}
# what is computed: the reference takes these too
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "packing": {"packing": True},
    "neat_packing": {"packing": True, "neat_packing": True},
    "aux_loss": {"moe_aux_loss_coef": 0.5},
    "loraplus": {"loraplus_lr_ratio": 4.0},
}
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "store": {"disable_gradient_checkpointing": True},
    "reentrant": {"use_reentrant_gc": True},
    "nonreentrant": {"use_reentrant_gc": False},
}
ACTIVATIONS = ("retain", "recompute")
BATCH = 4


class Case(NamedTuple):
    """One run. ``accumulate``: gradient accumulation steps; the global batch is always BATCH examples."""

    stage: str
    variant: str = "fp32"
    checkpointing: str = "store"
    activation: str = "retain"
    accumulate: int = 1

    @property
    def reference(self) -> Case:
        """The same mathematics in the plainest way. KTO estimates its KL term per batch, so batches must agree."""
        return Case(self.stage, self.variant, accumulate=self.accumulate if self.stage == "kto" else 1)

    def __str__(self) -> str:
        return "-".join(map(str, self))


def makes_sense(case: Case) -> bool:
    """Variants other than the dtype belong to sft. The router's loss is multiplied by the accumulation (Trainer) and
    has no gradient under reentrant checkpointing (transformers 5), which kt_sft refuses."""
    if case.variant == "aux_loss" and (case.accumulate > 1 or case.checkpointing == "reentrant"):
        return False
    return case.stage == "sft" or case.variant in ("fp32", "bf16")


def fits(case: Case, launcher: str) -> bool:
    """The combinations for two processes: what they share with one process is not multiplied again."""
    if case.accumulate > 1 and case.stage != "sft":
        return False
    if case.variant == "bf16" and (case.checkpointing, case.activation) != ("store", "retain"):
        return False
    # under FSDP2 LLaMA-Factory turns reentrant checkpointing off, and reward training is refused
    return launcher != "fsdp2" or (case.checkpointing != "reentrant" and case.stage != "rm")


def arguments(case: Case, folder: Path, output: Path, *, packed: bool, processes: int = 1) -> dict[str, Any]:
    """LLaMA-Factory's arguments for one run in a folder made by :func:`write_inputs`."""
    model = "model16" if case.variant == "bf16" else "model32"
    args: dict[str, Any] = {
        "model_name_or_path": str(folder / model),
        "adapter_name_or_path": str(folder / "initial"),
        "template": "qwen",
        "finetuning_type": "lora",
        "do_train": True,
        "dataset_dir": str(folder / "data"),
        "cutoff_len": 64,
        "output_dir": str(output / str(case)),
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 3,
        "per_device_train_batch_size": BATCH // case.accumulate // processes,
        "gradient_accumulation_steps": case.accumulate,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "seed": 1,
        "use_cpu": True,
        "report_to": "none",
    }
    args |= STAGES[case.stage] | VARIANTS[case.variant] | CHECKPOINTING[case.checkpointing]
    if packed:
        args |= {"use_kt": True, "kt_expert_weight_format": "bf16", "kt_cpu_activation": case.activation}
    return args


def write_inputs(folder: Path) -> None:
    """The checkpoint in both dtypes, data and the initial adapter."""
    write_checkpoint(folder / "model32", torch.float32, embedding_scale=16.0)
    write_checkpoint(folder / "model16", torch.bfloat16, embedding_scale=16.0)
    write_dataset(folder / "data")
    write_adapter(folder / "initial")


def change_ratio(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]
) -> float:
    """||got - expected|| / ||expected - initial||: the error relative to what training changed."""
    error = sum((got[name] - expected[name]).double().pow(2).sum().item() for name in expected)
    change = sum((expected[name] - initial[name]).double().pow(2).sum().item() for name in expected)
    return math.sqrt(error / change)
