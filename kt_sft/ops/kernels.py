"""The two passes of a layer on host tensors: what runs them is exchangeable (here: this process alone).

Shape suffixes: T tokens, K top-k, N = T*K routed rows, D hidden, F intermediate, E experts, R LoRA rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kt_sft import native

from . import memory
from .packed import PackedExperts

Kept = tuple[Tensor | None, Tensor | None]


class Inputs(NamedTuple):
    """Of either pass, as ``native.forward`` takes them."""

    packed: PackedExperts
    x: Tensor  # (T, D) bf16
    ids: Tensor  # (T, K) int64
    weights: Tensor  # (T, K) fp32
    lora: dict[str, Any]
    int8: bool  # forward products in int8
    int8_gradients: bool = False  # and those of the gradients of x and weights


class Kernels(Protocol):
    """What runs the passes."""

    def forward(self, inputs: Inputs, retain: bool, dtype: torch.dtype) -> tuple[Tensor, Kept]:
        """out (T, D) in fp32, or in the ``dtype`` that the caller turns it into, and what backward wants to see again
        (here gate and up, (2, N, F), and what the A of their adapters gave); None where nothing is retained."""

    def backward(
        self, inputs: Inputs, kept: Kept, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        """fp32 gradients of x, weights, lora["x"] (None without) and of every factor by its name."""


class LocalKernels:
    """Every expert in this process."""

    def forward(self, inputs: Inputs, retain: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Kept]:
        packed, x, ids, weights, lora, int8, _ = inputs
        gate_up = low_rank = None
        if retain:
            gate_up = memory.recycled((2, ids.numel(), packed.intermediate_size), torch.bfloat16)
            if rank := sum(lora[name].shape[1] for name in ("gate_a", "up_a") if name in lora):
                low_rank = memory.recycled((ids.numel(), rank), torch.bfloat16)
                lora = {**lora, "low_rank": low_rank}
        rounded = dtype is torch.bfloat16 and x.numel() <= _MOST_ROUNDED
        out = memory.recycled(x.shape, torch.bfloat16 if rounded else torch.float32)
        native.forward(*packed.native_args(), x, ids, weights, lora, gate_up, int8, out)
        return out, (gate_up, low_rank)

    @staticmethod
    def few_tokens(packed: PackedExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """The result in bf16, without adapters, if the tensors are as the kernels take them, else None.

        Nothing but the kernels' own checks: after the codes of a layer, Python finds the caches empty, and what it
        does for a token would take a tenth of the time.
        """
        return native.few_tokens(*packed.native_args(), x, ids, weights, _MOST_ROUNDED)

    def backward(
        self, inputs: Inputs, kept: Kept, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        packed, x, ids, weights, lora, int8, int8_gradients = inputs
        grads = {name: memory.recycled(lora[name].shape, torch.float32) for name in factor_names(lora)}
        grad_x, grad_weights = memory.recycled(x.shape, torch.float32), memory.recycled(weights.shape, torch.float32)
        grad_x_lora = memory.recycled(x.shape, torch.float32) if "x" in lora else None
        gate_up, low_rank = kept
        if low_rank is not None:
            lora = {**lora, "low_rank": low_rank}
        arguments = {**lora, **{f"grad_{name}": grad for name, grad in grads.items()}}
        native.backward(
            *packed.native_args(), x, ids, weights, arguments, gate_up, int8, int8_gradients,
            grad_out, grad_x, grad_x_lora, grad_weights,
        )  # fmt: skip
        return grad_x, grad_weights, grad_x_lora, grads


_MOST_ROUNDED = 1 << 18  # numbers of a result that the kernels round to bf16: their sums take 1 MiB of workspace
FACTORS = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
LOCAL = LocalKernels()


def factor_names(lora: dict[str, Any]) -> list[str]:
    return [name for name in FACTORS if name in lora]
