"""Differentiable routed experts on packed weights: check, run the passes, save what backward needs.

The equations are those of :mod:`kt_sft.ops.reference`; the routing (ids and weights) is the model's own.
Shape suffixes: T tokens, K top-k, D hidden, F intermediate, E experts, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kt_sft import native

from .kernels import FACTORS, LOCAL, Kernels
from .packed import PackedExperts
from .passes import Backward, Call, Forward
from .threads import keep_openmp_from_spinning

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
        return {name: factor for name in FACTORS if (factor := getattr(self, name)) is not None}


def _check(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, packed: PackedExperts, policy: str) -> None:
    x_shape, ids_shape = x_TD.shape, ids_TK.shape
    if len(x_shape) != 2 or x_shape[1] != packed.hidden_size or not x_TD.dtype.is_floating_point:
        raise ValueError(
            f"hidden_states: expected a float tensor of shape (T, {packed.hidden_size}), "
            f"got {x_TD.dtype} {tuple(x_shape)}"
        )
    if len(ids_shape) != 2 or ids_shape[0] != x_shape[0] or ids_TK.dtype.is_floating_point:
        raise ValueError(
            f"topk_ids: expected an integer tensor of shape ({x_shape[0]}, K), got {ids_TK.dtype} {tuple(ids_shape)}"
        )
    if weights_TK.shape != ids_shape or not weights_TK.dtype.is_floating_point:
        raise ValueError(
            f"topk_weights: expected a float tensor of shape {tuple(ids_shape)}, "
            f"got {weights_TK.dtype} {tuple(weights_TK.shape)}"
        )
    device = x_TD.device
    for name, tensor in (("topk_ids", ids_TK), ("topk_weights", weights_TK)):
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device of hidden_states, {device}, got {tensor.device}")
    if policy not in POLICIES:
        raise ValueError(f"activation_policy: expected {' or '.join(POLICIES)}, got {policy!r}")


def _computes_in_int8(packed: PackedExperts, compute_type: str) -> bool:
    if compute_type == "bf16":
        return False
    if compute_type != "int8":
        raise ValueError(f"compute_type: expected bf16 or int8, got {compute_type!r}")
    if packed.weight_format != "int8" or packed.group_size == 32:
        raise ValueError(
            "compute_type: int8 products need int8 weights with group_size 0, 64 or 128, "
            f"got {packed.weight_format} with group_size {packed.group_size}; use compute_type bf16"
        )
    if not native.computes_int8():
        raise ValueError(
            f"compute_type: int8 needs a CPU with AMX or AVX512-VNNI, got {native.isa()}; use compute_type bf16"
        )
    return True


def _gradients_in_int8(compute_type: str, gradient_compute_type: str) -> bool:
    if gradient_compute_type not in ("bf16", "int8"):
        raise ValueError(f"gradient_compute_type: expected bf16 or int8, got {gradient_compute_type!r}")
    if gradient_compute_type == "int8" and compute_type != "int8":
        raise ValueError(
            f"gradient_compute_type: int8 goes with compute_type int8 only, got compute_type {compute_type}; "
            "set both to int8, or gradient_compute_type to bf16"
        )
    return gradient_compute_type == "int8"


class Arguments(NamedTuple):
    """Of one call, checked: what it is, and the tensors that autograd follows."""

    call: Call
    tensors: tuple[Any, ...]  # hidden_states, topk_ids, topk_weights, LoRA's hidden states or None, factors


def checked_arguments(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    packed: PackedExperts,
    lora: ExpertsLora | None = None,
    *,
    activation_policy: str = "retain",
    compute_type: str = "bf16",
    gradient_compute_type: str = "bf16",
    kernels: Kernels = LOCAL,
) -> Arguments:
    """Check what :func:`moe_experts` takes and draw its dropout. Raises ValueError."""
    _check(hidden_states, topk_ids, topk_weights, packed, activation_policy)
    factors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    x_lora = None
    if lora is not None and (factors := lora.factors()):
        settings["scaling"] = float(lora.scaling)
        if lora.dropout > 0:
            x_lora = torch.nn.functional.dropout(hidden_states, lora.dropout)
            keep_TKF = torch.empty(*topk_ids.shape, packed.intermediate_size, dtype=torch.uint8)
            settings["down_keep"] = keep_TKF.bernoulli_(1.0 - lora.dropout)
            settings["keep_scale"] = 1.0 / (1.0 - lora.dropout)
    differentiable = torch.is_grad_enabled() and (
        hidden_states.requires_grad or topk_weights.requires_grad or any(f.requires_grad for f in factors.values())
    )
    retain = differentiable and activation_policy == "retain"
    int8 = _computes_in_int8(packed, compute_type)
    int8_gradients = _gradients_in_int8(compute_type, gradient_compute_type)
    call = Call(packed, tuple(factors), settings, differentiable, retain, int8, int8_gradients, kernels)
    return Arguments(call, (hidden_states, topk_ids, topk_weights, x_lora, *factors.values()))


class _MoeExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> Tensor:
        forward = Forward(call, *tensors)
        out_TD = forward.run()
        ctx.call, ctx.weights_dtype = call, tensors[2].dtype
        ctx.save_for_backward(*forward.saved(), *tensors[4:])
        forward.transfer.deliver(out_TD)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        backward = Backward(ctx.call, ctx.weights_dtype, ctx.saved_tensors, grad_out_TD)
        grads = backward.run()
        backward.transfer.deliver(*grads)
        return input_gradients(grads)


def input_gradients(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of :meth:`Backward.run` in the order of a call and its tensors, which hold ids besides."""
    grad_x, grad_weights, *others = grads
    return None, grad_x, None, grad_weights, *others


def moe_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    packed: PackedExperts,
    lora: ExpertsLora | None = None,
    *,
    activation_policy: str = "retain",
    compute_type: str = "bf16",
    gradient_compute_type: str = "bf16",
    kernels: Kernels = LOCAL,
) -> Tensor:
    """Routed experts of one layer; differentiable in hidden_states, topk_weights and all LoRA factors.

    hidden_states (T, D) float on any device, topk_ids (T, K) integers below E, topk_weights (T, K) float -> (T, D) with
    the dtype and device of hidden_states. Products take bf16 inputs and accumulate in fp32; the top-k combination is
    fp32. ``activation_policy`` retain keeps gate and up (2F bf16 values per routed row) for backward; recompute keeps
    the hidden states only. ``compute_type`` int8 computes the forward products on int8 codes, with the hidden states
    quantised per row and 256 columns, silu(gate) * up per row and 128 columns. ``gradient_compute_type`` int8, which
    needs the former, does the same for the gradients of hidden_states and topk_weights, quantised likewise after the
    weights' scales were multiplied in; the adapters' terms and gradients stay in bf16. Where an expert has 4 rows or
    fewer, all products are bf16. Raises ValueError on shapes, dtypes, devices or expert ids that do not fit, and on a
    compute type that this CPU or these weights do not allow.
    """
    keep_openmp_from_spinning()
    plain = lora is None and kernels is LOCAL and compute_type == gradient_compute_type == "bf16"
    if plain and activation_policy in POLICIES and not torch.is_grad_enabled():
        out_TD = LOCAL.few_tokens(packed, hidden_states, topk_ids, topk_weights)
        if out_TD is not None:
            return out_TD
    call, tensors = checked_arguments(
        hidden_states,
        topk_ids,
        topk_weights,
        packed,
        lora,
        activation_policy=activation_policy,
        compute_type=compute_type,
        gradient_compute_type=gradient_compute_type,
        kernels=kernels,
    )
    if call.differentiable:
        return _MoeExperts.apply(call, *tensors)
    forward = Forward(call, *tensors)
    out_TD = forward.run()
    forward.transfer.deliver(out_TD)
    return out_TD
