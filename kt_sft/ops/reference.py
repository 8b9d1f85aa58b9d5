"""Naive oracle of one routed MoE layer, in plain torch: any dtype, autograd for every gradient, no speed.

For every token t and chosen slot k with e = topk_ids[t, k], s = lora.scaling:

    G = x Wg_e^T + s (drop(x) Ag_e^T) Bg_e^T
    U = x Wu_e^T + s (drop(x) Au_e^T) Bu_e^T
    H = silu(G) * U, or another activation
    Y = H Wd_e^T + s (drop(H) Ad_e^T) Bd_e^T
    out[t] += topk_weights[t, k] * Y

Biases, where there are some, are added to G, U and Y. It deliberately knows nothing about packing, threads or devices.
Shape suffixes: T tokens, D hidden, F intermediate, E experts, K top-k, R LoRA rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import SILU, Activation, ExpertBiases


def moe_experts_reference(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    lora: dict[str, Tensor] | None = None,
    scaling: float = 1.0,
    x_lora_TD: Tensor | None = None,
    down_mask_TKF: Tensor | None = None,
    *,
    activation: Activation = SILU,
    biases: ExpertBiases | None = None,
) -> Tensor:
    """Return out_TD in the dtype of the inputs.

    ``lora`` holds any of gate_a (E,R,D), gate_b (E,F,R), up_a, up_b, down_a (E,R,F), down_b (E,D,R), in pairs.
    ``x_lora_TD`` replaces x as the input of the gate and up adapters (dropout already applied);
    ``down_mask_TKF`` multiplies the input of the down adapter (0 or 1/(1-p)).
    """
    out_TD = torch.zeros_like(x_TD)
    x_lora_TD = x_TD if x_lora_TD is None else x_lora_TD
    lora = lora or {}

    def delta(name: str, e: int, inputs: Tensor) -> Tensor | float:
        if f"{name}_a" not in lora:
            return 0.0
        return scaling * (inputs @ lora[f"{name}_a"][e].T) @ lora[f"{name}_b"][e].T

    def bias(name: str, e: int) -> Tensor | float:
        return 0.0 if biases is None else getattr(biases, name)[e]

    for e in range(gate_EFD.shape[0]):
        token_N, slot_N = (topk_ids_TK == e).nonzero(as_tuple=True)
        if token_N.numel() == 0:
            continue
        x_ND, x_lora_ND = x_TD[token_N], x_lora_TD[token_N]
        gate_NF = x_ND @ gate_EFD[e].T + delta("gate", e, x_lora_ND) + bias("gate", e)
        up_NF = x_ND @ up_EFD[e].T + delta("up", e, x_lora_ND) + bias("up", e)
        h_NF = activation(gate_NF, up_NF)
        h_lora_NF = h_NF if down_mask_TKF is None else h_NF * down_mask_TKF[token_N, slot_N]
        y_ND = h_NF @ down_EDF[e].T + delta("down", e, h_lora_NF) + bias("down", e)
        out_TD = out_TD.index_add(0, token_N, topk_weights_TK[token_N, slot_N, None] * y_ND)
    return out_TD
