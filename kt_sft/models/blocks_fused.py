"""MoE blocks whose experts are fused but not called with (hidden_states, topk_ids, topk_weights).

Their routers stay; only the call of the experts is another.

gpt-oss in transformers 4 hands its experts the scores of all of them, zero where not chosen (5 hands over the chosen):

    w[t, k] = scores[t, ids[t, k]]    out = experts(x, ids, w)

Llama 4 scales the input of the experts, not their output, and repeats every token for every expert, with score 0
where it is not chosen:

    y[t] = shared(x[t]) + sum_k expert_{ids[t, k]}(scores[t, ids[t, k]] * x[t])
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def gpt_oss_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """hidden_states (batch, length, D) -> the same shape, and router scores (T, E)."""
    scores_TE, ids_TK = self.router(hidden_states)
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    out_TD = self.experts(x_TD, ids_TK, scores_TE.gather(1, ids_TK))
    return out_TD.view(hidden_states.shape), scores_TE


def llama4_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """hidden_states (..., D) -> (T, D), and router logits (T, E)."""
    x_TD = hidden_states.reshape(-1, self.hidden_dim)
    scores_TE, logits_TE = self.router(x_TD)
    ids_TK = torch.topk(logits_TE, self.top_k, dim=1).indices
    # Every chosen (token, expert) pair is a token of its own with one expert of weight 1.
    scaled_TKD = x_TD.unsqueeze(1) * scores_TE.gather(1, ids_TK).unsqueeze(2)
    ids_N1 = ids_TK.reshape(-1, 1)
    routed_ND = self.experts(scaled_TKD.flatten(0, 1), ids_N1, torch.ones_like(ids_N1, dtype=torch.float32))
    return self.shared_expert(x_TD) + routed_ND.view(scaled_TKD.shape).sum(dim=1), logits_TE


def adapted_method(block: nn.Module) -> list[tuple[nn.Module, str, MethodType]]:
    """The method to exchange, as (block, name, method); none for blocks with the common call."""
    cls = type(block)
    if not cls.__module__.startswith("transformers.models."):
        return []
    if cls.__name__ == "Llama4TextMoe":
        return [(block, "forward", MethodType(llama4_forward, block))]
    if cls.__name__ == "GptOssMLP" and not hasattr(block.experts, "_apply_gate"):  # transformers 4
        return [(block, "forward", MethodType(gpt_oss_forward, block))]
    return []
