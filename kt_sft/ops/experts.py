"""Differentiable routed experts on packed weights: check, call the kernels, save what backward needs.

The equations are those of :mod:`kt_sft.ops.reference`; the routing (ids and weights) is the model's own.
Hidden states on a GPU come and go through pinned buffers, waiting for the current stream only.
Shape suffixes: T tokens, K top-k, N = T*K routed rows, D hidden, F intermediate, E experts, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft import native

from .packed import PackedExperts
from .threads import keep_openmp_from_spinning

FACTORS = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
POLICIES = ("retain", "recompute")


@dataclass(frozen=True, kw_only=True)
class ExpertsLora:
    """LoRA of one layer's experts: W_e x + scaling * B_e A_e dropout(x) for each projection that has factors.

    gate_a (E, R, D), gate_b (E, F, R), up_a, up_b likewise, down_a (E, R, F), down_b (E, D, R): fp32 or bf16, each
    projection with its own rank or None. ``dropout`` is applied to the adapters' inputs by torch's generator; pass 0
    outside training.
    """

    gate_a: Tensor | None = None
    gate_b: Tensor | None = None
    up_a: Tensor | None = None
    up_b: Tensor | None = None
    down_a: Tensor | None = None
    down_b: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")
        for name in ("gate", "up", "down"):
            if (getattr(self, f"{name}_a") is None) != (getattr(self, f"{name}_b") is None):
                raise ValueError(f"lora: expected both or none of {name}_a and {name}_b")

    def factors(self) -> dict[str, Tensor]:
        """The factors that are there, by name."""
        return {f.name: t for f in fields(self) if f.name in FACTORS and (t := getattr(self, f.name)) is not None}


def _to_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor; from a GPU through pinned memory, complete only after :func:`_wait`."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.to(dtype).contiguous()
    host = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor.to(dtype), non_blocking=True)


def _wait(device: torch.device) -> None:
    """Wait for the copies of this stream, not for the device."""
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        event.synchronize()


def _to_device(tensor: Tensor, like: Tensor) -> Tensor:
    """Send a result back: converted on the host, copied through pinned memory behind the current stream."""
    if like.device.type != "cuda":
        return tensor.to(dtype=like.dtype, device=like.device)
    pinned = torch.empty(tensor.shape, dtype=like.dtype, pin_memory=True).copy_(tensor)
    return pinned.to(like.device, non_blocking=True)


def _kernel_dtype(factor: Tensor) -> torch.dtype:
    return torch.bfloat16 if factor.dtype == torch.bfloat16 else torch.float32


class _MoeExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        x_lora_TD: Tensor | None,
        packed: PackedExperts,
        options: dict[str, Any],
        names: tuple[str, ...],
        *factors: Tensor,
    ) -> Tensor:
        x = _to_host(x_TD, torch.bfloat16)
        ids = _to_host(ids_TK, torch.int64)
        weights = _to_host(weights_TK, torch.float32)
        lora = {name: _to_host(f, _kernel_dtype(f)) for name, f in zip(names, factors, strict=True)}
        lora.update(options["lora"])
        if x_lora_TD is not None:
            lora["x"] = _to_host(x_lora_TD, torch.bfloat16)
        gate = up = None
        if options["retain"]:
            rows = (ids.numel(), packed.intermediate_size)
            gate, up = torch.empty(rows, dtype=torch.bfloat16), torch.empty(rows, dtype=torch.bfloat16)
        _wait(x_TD.device)
        out = torch.empty(x.shape, dtype=torch.float32)
        native.forward(*packed.native_args(), x, ids, weights, lora, gate, up, out)
        ctx.packed, ctx.options, ctx.names = packed, options, names
        ctx.save_for_backward(x, ids, weights, lora.get("x"), gate, up, weights_TK.new_empty(0), *factors)
        return _to_device(out, x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, weights, x_lora, gate, up, like_weights, *factors = ctx.saved_tensors
        grad_out = _to_host(grad_out_TD, torch.bfloat16)
        lora = {name: _to_host(f, _kernel_dtype(f)) for name, f in zip(ctx.names, factors, strict=True)}
        grads = {f"grad_{name}": torch.zeros(f.shape, dtype=torch.float32) for name, f in lora.items()}
        lora.update(ctx.options["lora"])
        if x_lora is not None:
            lora["x"] = x_lora
        _wait(grad_out_TD.device)
        grad_x = torch.empty(x.shape, dtype=torch.float32)
        grad_x_lora = torch.empty(x.shape, dtype=torch.float32) if x_lora is not None else None
        grad_weights = torch.empty(weights.shape, dtype=torch.float32)
        native.backward(
            *ctx.packed.native_args(),
            *(x, ids, weights, {**lora, **grads}, gate, up),
            *(grad_out, grad_x, grad_x_lora, grad_weights),
        )
        return (
            _to_device(grad_x, grad_out_TD),
            None,
            _to_device(grad_weights, like_weights),
            None if grad_x_lora is None else _to_device(grad_x_lora, grad_out_TD),
            None,
            None,
            None,
            *(_to_device(grads[f"grad_{name}"], f) for name, f in zip(ctx.names, factors, strict=True)),
        )


def _check(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, packed: PackedExperts, policy: str) -> None:
    if x_TD.dim() != 2 or x_TD.shape[1] != packed.hidden_size or not x_TD.is_floating_point():
        raise ValueError(
            f"hidden_states: expected a float tensor of shape (T, {packed.hidden_size}), "
            f"got {x_TD.dtype} {tuple(x_TD.shape)}"
        )
    if ids_TK.dim() != 2 or ids_TK.shape[0] != x_TD.shape[0] or ids_TK.is_floating_point():
        raise ValueError(
            f"topk_ids: expected an integer tensor of shape ({x_TD.shape[0]}, K), "
            f"got {ids_TK.dtype} {tuple(ids_TK.shape)}"
        )
    if weights_TK.shape != ids_TK.shape or not weights_TK.is_floating_point():
        raise ValueError(
            f"topk_weights: expected a float tensor of shape {tuple(ids_TK.shape)}, "
            f"got {weights_TK.dtype} {tuple(weights_TK.shape)}"
        )
    for name, tensor in (("topk_ids", ids_TK), ("topk_weights", weights_TK)):
        if tensor.device != x_TD.device:
            raise ValueError(f"{name}: expected the device of hidden_states, {x_TD.device}, got {tensor.device}")
    if policy not in POLICIES:
        raise ValueError(f"activation_policy: expected {' or '.join(POLICIES)}, got {policy!r}")


def moe_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    packed: PackedExperts,
    lora: ExpertsLora | None = None,
    *,
    activation_policy: str = "retain",
) -> Tensor:
    """Routed experts of one layer; differentiable in hidden_states, topk_weights and all LoRA factors.

    hidden_states (T, D) float on any device, topk_ids (T, K) integers below E, topk_weights (T, K) float -> (T, D) with
    the dtype and device of hidden_states. Products take bf16 inputs and accumulate in fp32; the top-k combination is
    fp32. ``activation_policy`` retain keeps gate and up (2F bf16 values per routed row) for backward; recompute keeps
    the hidden states only. Raises ValueError on shapes, dtypes, devices or expert ids that do not fit.
    """
    _check(hidden_states, topk_ids, topk_weights, packed, activation_policy)
    keep_openmp_from_spinning()
    options: dict[str, Any] = {"lora": {}, "retain": activation_policy == "retain" and torch.is_grad_enabled()}
    factors: dict[str, Tensor] = {}
    x_lora = None
    if lora is not None and (factors := lora.factors()):
        options["lora"]["scaling"] = float(lora.scaling)
        if lora.dropout > 0:
            x_lora = torch.nn.functional.dropout(hidden_states, lora.dropout)
            keep_TKF = torch.empty(*topk_ids.shape, packed.intermediate_size, dtype=torch.uint8)
            options["lora"]["down_keep"] = keep_TKF.bernoulli_(1.0 - lora.dropout)
            options["lora"]["keep_scale"] = 1.0 / (1.0 - lora.dropout)
    return _MoeExperts.apply(
        hidden_states, topk_ids, topk_weights, x_lora, packed, options, tuple(factors), *factors.values()
    )
