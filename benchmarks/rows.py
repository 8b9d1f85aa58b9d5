"""What is measured: one routed-experts layer by our kernels and by stock transformers, behind one interface.

A row has ``forward(x, ids, topk_weights) -> out``, differentiable, and ``weight_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.ops import ExpertsLora, moe_experts, pack_experts


@dataclass(frozen=True)
class Shape:
    """E experts, top-k of them per token, hidden size D, intermediate size F."""

    name: str
    E: int
    K: int
    D: int
    F: int

    def flops(self, tokens: int) -> int:
        """Of one forward, or of one backward for the inputs: three products per routed row."""
        return 2 * 3 * self.D * self.F * self.K * tokens


SHAPES = {
    "A": Shape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    "B": Shape("DeepSeek-V2-Lite", 64, 6, 2048, 1408),
    "S": Shape("small", 8, 2, 512, 256),
}


def make_weights(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 gate (E, F, D), up (E, F, D), down (E, D, F), Gaussian with unit gain."""
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, columns: int) -> Tensor:
        out = torch.empty(shape.E, rows, columns, dtype=torch.bfloat16)
        for e in range(shape.E):
            out[e] = torch.randn(rows, columns, generator=generator) / columns**0.5
        return out

    return draw(shape.F, shape.D), draw(shape.F, shape.D), draw(shape.D, shape.F)


def make_inputs(shape: Shape, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden states (T, D) bf16, ids (T, K), normalised top-k weights (T, K), output gradient (T, D) bf16."""
    g = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(tokens, shape.D, generator=g).bfloat16().requires_grad_()
    weights, ids = torch.softmax(torch.randn(tokens, shape.E, generator=g), -1).topk(shape.K)
    weights = (weights / weights.sum(-1, keepdim=True)).requires_grad_()
    return x, ids, weights, torch.randn(tokens, shape.D, generator=g).bfloat16()


class Ours:
    """kt_sft with a weight format, and LoRA of a rank on all three projections (0: none)."""

    def __init__(self, shape: Shape, weights: tuple[Tensor, ...], weight_format: str, rank: int = 0) -> None:
        self.packed = pack_experts(*weights, weight_format)
        self.weight_bytes = self.packed.nbytes
        self.lora = None
        if rank:
            sizes = {"gate": (shape.F, shape.D), "up": (shape.F, shape.D), "down": (shape.D, shape.F)}
            factors = {}
            for name, (out, width) in sizes.items():
                factors[f"{name}_a"] = (torch.randn(shape.E, rank, width) / width**0.5).requires_grad_()
                factors[f"{name}_b"] = (torch.randn(shape.E, out, rank) * 0.02).requires_grad_()
            self.lora = ExpertsLora(**factors, scaling=2.0)

    def forward(self, x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        return moe_experts(x, ids, topk_weights, self.packed, self.lora)


class Transformers:
    """Stock transformers' experts in bf16: its per-expert loop ("eager") or torch's grouped matmul ("grouped_mm")."""

    def __init__(self, shape: Shape, weights: tuple[Tensor, ...], implementation: str) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=shape.D, moe_intermediate_size=shape.F, num_experts=shape.E, num_experts_per_tok=shape.K
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config)
        gate, up, down = weights
        self.experts.gate_up_proj = torch.nn.Parameter(torch.cat((gate, up), 1), requires_grad=False)
        self.experts.down_proj = torch.nn.Parameter(down.clone(), requires_grad=False)
        self.weight_bytes = sum(p.nbytes for p in self.experts.parameters())

    def forward(self, x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        return self.experts(x, ids, topk_weights.to(x.dtype))


def make_row(name: str, shape: Shape, weights: tuple[Tensor, ...]) -> Ours | Transformers:
    """``int8``, ``int8+lora16``, ``torch loop``, ``torch grouped_mm`` ..."""
    if name.startswith("torch"):
        return Transformers(shape, weights, "eager" if name == "torch loop" else "grouped_mm")
    weight_format, _, rank = name.partition("+lora")
    return Ours(shape, weights, weight_format, int(rank or 0))
