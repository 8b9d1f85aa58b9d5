"""What is computed: published layers, their weights and their tokens. Needs torch only.

Weights are Gaussian with unit gain, in bf16. They are cut from one bank of random values, because times do not depend
on the values and drawing gigabytes of them takes longer than the measurement; the accuracy table draws its own.
Shape suffixes: T tokens, K top-k, D hidden, F intermediate, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_BANK = 1 << 22  # values
_PIECE = 1 << 18
ROUTINGS = ("balanced", "zipf")


@dataclass(frozen=True)
class Shape:
    """E experts (``used`` of them where memory is short), top-k, hidden size D, intermediate size F."""

    name: str
    experts: int
    K: int
    D: int
    F: int
    used: int = 0

    @property
    def E(self) -> int:
        return self.used or self.experts

    @property
    def expert_values(self) -> int:
        """Weights of one expert."""
        return 3 * self.D * self.F

    def flops(self, tokens: int) -> int:
        """Of one forward, or of one backward for the inputs: three products per routed row."""
        return 2 * self.expert_values * self.K * tokens

    def describe(self) -> str:
        fewer = f" ({self.used} of them here)" if self.used else ""
        return f"{self.name}: {self.experts} experts{fewer}, top-{self.K}, D {self.D}, F {self.F}"


SHAPES = {
    "A": Shape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    "B": Shape("DeepSeek-V2-Lite", 64, 6, 2048, 1408),
    "C": Shape("DeepSeek-V3", 256, 8, 7168, 2048, used=32),
    "mixtral": Shape("Mixtral-8x7B", 8, 2, 4096, 14336),
    "olmoe": Shape("OLMoE-1B-7B", 64, 8, 2048, 1024),
    "qwen2": Shape("Qwen2-57B-A14B", 64, 8, 3584, 2560),
    "glm45air": Shape("GLM-4.5-Air", 128, 8, 4096, 1408),
    "gptoss": Shape("gpt-oss-20b", 32, 4, 2880, 2880),
    "minimax": Shape("MiniMax-M2", 256, 8, 3072, 1536, used=128),
    "tiny": Shape("tiny", 8, 2, 64, 32),
}
TINY = SHAPES["tiny"]


@cache
def bank(columns: int) -> Tensor:
    """Random values with the deviation of a weight that sums over ``columns``; kept until ``bank.cache_clear()``."""
    values = torch.randn(_BANK, generator=torch.Generator().manual_seed(columns))
    return (values / columns**0.5).bfloat16()


def expert_weights(shape: Shape, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 gate (F, D), up (F, D), down (D, F) of one expert; the same on every call."""
    generator = torch.Generator().manual_seed(7919 * (expert + 1))

    def cut(rows: int, columns: int) -> Tensor:
        values = bank(columns)
        flat = torch.empty(rows * columns, dtype=torch.bfloat16)
        for piece in flat.split(_PIECE):
            start = int(torch.randint(_BANK - _PIECE, (1,), generator=generator))
            piece.copy_(values[start : start + len(piece)])
        return flat.view(rows, columns)

    return cut(shape.F, shape.D), cut(shape.F, shape.D), cut(shape.D, shape.F)


def make_weights(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 gate (E, F, D), up (E, F, D), down (E, D, F)."""
    sizes = ((shape.F, shape.D), (shape.F, shape.D), (shape.D, shape.F))
    stacked = tuple(torch.empty(shape.E, *size, dtype=torch.bfloat16) for size in sizes)
    for e in range(shape.E):
        for whole, part in zip(stacked, expert_weights(shape, e), strict=True):
            whole[e] = part
    return stacked


def route(shape: Shape, tokens: int, routing: str, generator: torch.Generator) -> Tensor:
    """Expert ids (T, K), distinct within a token.

    balanced: dealt from shuffled decks of all experts, so that their counts differ by one at most while K divides E;
    zipf: drawn without replacement with probabilities proportional to 1 / rank (Gumbel top-k).
    """
    if routing == "balanced":
        hands = shape.E // shape.K
        decks = [torch.randperm(shape.E, generator=generator) for _ in range(-(-tokens // hands))]
        return torch.cat([deck[: hands * shape.K].view(hands, shape.K) for deck in decks])[:tokens].contiguous()
    if routing == "zipf":
        ranks = torch.randperm(shape.E, generator=generator) + 1.0
        noise = -torch.log(-torch.log(torch.rand(tokens, shape.E, generator=generator).clamp(1e-9, 1 - 1e-7)))
        return (noise - ranks.log()).topk(shape.K).indices
    raise ValueError(f"routing: expected one of {', '.join(ROUTINGS)}, got {routing!r}")


def make_inputs(
    shape: Shape, tokens: int, seed: int, routing: str = "balanced"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (T, D) bf16, ids (T, K), top-k weights (T, K) that sum to 1, output gradient (T, D) bf16."""
    g = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(tokens, shape.D, generator=g).bfloat16()
    weights = torch.softmax(torch.randn(tokens, shape.K, generator=g), -1)
    return x, route(shape, tokens, routing, g), weights, torch.randn(tokens, shape.D, generator=g).bfloat16()


def watched(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The same values, for autograd to follow."""
    return tuple(value.detach().requires_grad_() for value in inputs)
