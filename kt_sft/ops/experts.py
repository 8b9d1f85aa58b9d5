"""Differentiable routed experts (interim torch stand-in with the final interface)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import moe_experts_reference


@dataclass(frozen=True, kw_only=True)
class ExpertsLora:
    """LoRA factors of one layer: gate_a (E,R,D), gate_b (E,F,R), up_a, up_b, down_a (E,R,F), down_b (E,D,R)."""

    gate_a: Tensor | None = None
    gate_b: Tensor | None = None
    up_a: Tensor | None = None
    up_b: Tensor | None = None
    down_a: Tensor | None = None
    down_b: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0  # PEFT's dropout on the adapters' inputs; 0 outside training

    def factors(self) -> dict[str, Tensor]:
        names = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


def moe_experts(hidden_states, topk_ids, topk_weights, packed, lora=None, *, activation_policy="retain") -> Tensor:
    """hidden_states (T,D) any float dtype and device; topk_ids (T,K) int; topk_weights (T,K) float -> (T,D) like hidden_states."""
    gate, up, down = packed.dequantize()
    x = hidden_states.float().cpu()
    x_lora = mask = None
    factors = {}
    if lora is not None:
        factors = {k: v.float().cpu() for k, v in lora.factors().items()}
        if lora.dropout > 0:
            x_lora = torch.nn.functional.dropout(x, lora.dropout)
            mask = torch.nn.functional.dropout(torch.ones(*topk_ids.shape, packed.intermediate_size), lora.dropout)
    out = moe_experts_reference(x, topk_ids.cpu(), topk_weights.float().cpu(), gate.float(), up.float(), down.float(),
                                factors, lora.scaling if lora else 1.0, x_lora, mask)
    return out.to(hidden_states)
