"""What an expert computes between its products: the gated activation, and the biases that are added to products.

    G = X Wg^T + bg    U = X Wu^T + bu    H = activation(G, U)    Y = H Wd^T + bd

| kind | H |
|---|---|
| silu | G sigmoid(G) U |
| clamped_swiglu (gpt-oss) | C sigmoid(alpha C) (clamp(U, -limit, limit) + 1) with C = min(G, limit) |

Shape suffixes: E experts, D hidden, F intermediate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

ActivationKind = Literal["silu", "clamped_swiglu"]


@dataclass(frozen=True)
class Activation:
    """A gated activation; ``alpha`` and ``limit`` belong to clamped_swiglu."""

    kind: ActivationKind = "silu"
    alpha: float = 1.0
    limit: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ActivationKind):
            raise ValueError(f"activation: expected {' or '.join(get_args(ActivationKind))}, got {self.kind!r}")
        if not math.isfinite(self.alpha) or not 0 <= self.limit < math.inf:
            raise ValueError(
                f"activation: expected a finite alpha and a limit of at least 0, got {self.alpha} and {self.limit}"
            )

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """H in torch, with torch's gradients: slope 1 up to and at the bounds of a clamp, 0 beyond."""
        if self.kind == "silu":
            return torch.nn.functional.silu(gate) * up
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up.clamp(-self.limit, self.limit) + 1)


SILU = Activation()


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertBiases:
    """Frozen biases of gate (E, F), up (E, F) and down (E, D)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def as_kernels_take_them(self, num_experts: int, hidden_size: int, intermediate_size: int) -> ExpertBiases:
        """fp32 on the CPU. Raises ValueError on a wrong shape or dtype and on NaN or Inf."""
        width = {"gate": intermediate_size, "up": intermediate_size, "down": hidden_size}
        checked = {}
        for name, columns in width.items():
            bias = getattr(self, name)
            if tuple(bias.shape) != (num_experts, columns) or not bias.is_floating_point():
                raise ValueError(
                    f"{name} bias: expected a float tensor of shape {(num_experts, columns)}, "
                    f"got {bias.dtype} {tuple(bias.shape)}"
                )
            checked[name] = bias.detach().to("cpu", torch.float32, copy=True).contiguous()
            if not torch.isfinite(checked[name]).all():
                raise ValueError(f"{name} bias: expected finite values, got NaN or Inf")
        return ExpertBiases(**checked)
