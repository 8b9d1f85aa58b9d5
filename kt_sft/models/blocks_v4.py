"""MoE blocks of transformers 4, where the experts are a ModuleList that the block itself loops over.

Two shapes of block exist there:

- blocks with a method ``moe(hidden_states, topk_ids, topk_weights)`` after a router of their own (DeepSeek-V2/V3,
  GLM-4 and their copies): only that method is replaced, by one call of the experts module;
- five blocks whose forward does softmax routing and the loop in one piece: their forward is replaced by
  ``softmax_topk_forward``, the same routing followed by one call. They are listed by name, never guessed.

    weights, ids = topk(softmax_fp32(gate(x)));  weights /= sum(weights) if the model normalises
    y = experts(x, ids, weights)  [+ sigmoid(shared_expert_gate(x)) * shared_expert(x)]
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .spec import unsupported

SOFTMAX_TOPK_BLOCKS = {
    "MixtralSparseMoeBlock",
    "OlmoeSparseMoeBlock",
    "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeSparseMoeBlock",
    "Qwen3NextSparseMoeBlock",
}


def softmax_topk_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """hidden_states (batch, length, D) -> the same shape, and router logits (T, E)."""
    jitter = getattr(self, "jitter_noise", 0)
    if self.training and jitter > 0:
        hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - jitter, 1.0 + jitter)
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    router_logits_TE = self.gate(x_TD)
    weights_TK, ids_TK = torch.topk(torch.softmax(router_logits_TE, dim=1, dtype=torch.float), self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):  # Mixtral always normalises and has no such attribute
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    out_TD = self.experts(x_TD, ids_TK, weights_TK.to(x_TD.dtype))
    if hasattr(self, "shared_expert"):
        out_TD = out_TD + torch.sigmoid(self.shared_expert_gate(x_TD)) * self.shared_expert(x_TD)
    return out_TD.view(hidden_states.shape), router_logits_TE


def routed_moe(self: Any, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    return self.experts(hidden_states, topk_ids, topk_weights)


def adapted_method(block: nn.Module, where: str) -> tuple[str, MethodType]:
    """The attribute to set on the block, and its value, so that it calls ``self.experts(hidden_states, ids, weights)``.

    A block that is not known raises ValueError.
    """
    cls = type(block)
    if not cls.__module__.startswith("transformers.models."):
        raise unsupported(where, f"{cls.__name__} from {cls.__module__} (code outside transformers)")
    if cls.__name__ in SOFTMAX_TOPK_BLOCKS:
        return "forward", MethodType(softmax_topk_forward, block)
    if hasattr(cls, "moe") and len(inspect.signature(cls.moe).parameters) == 4:
        return "moe", MethodType(routed_moe, block)
    raise unsupported(where, f"{cls.__name__}, whose routing is tied to its experts (transformers 5 unties it)")
