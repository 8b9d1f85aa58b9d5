"""Whether config.json and the tensors are of one model: before a model of absurd size is built.

transformers builds what config.json says, layer by layer, before it looks at a tensor; what then is missing it makes
up, with a warning. So the counts that can be read from the tensors' names must be there.
"""

from __future__ import annotations

import re
from typing import Any

from ..weights.checkpoint import Checkpoint

_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d{1,9})\.")
_STACK = re.compile(r"(?:^|\.)experts\.\w+$")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_REMEDY = "config.json and the weights are of two models, or files are missing: download the model again"


def require_fitting(checkpoint: Checkpoint) -> None:
    """Raise ValueError if config.json has more layers, or other experts, than the tensors.

    Layers beyond those of config.json are allowed: multi-token-prediction layers are.
    """
    settings = checkpoint.settings | (checkpoint.settings.get("text_config") or {})
    layers, experts = _layers(checkpoint), _experts(checkpoint)
    count = settings.get("num_hidden_layers")
    if layers and type(count) is int and not 1 <= count <= layers:
        raise _error(checkpoint, "num_hidden_layers", f"1 to {layers}, as the tensors have", count)
    for name in _EXPERTS:
        count = settings.get(name)
        if experts and type(count) is int and count != experts:
            raise _error(checkpoint, name, f"{experts}, as the tensors have", count)
    chosen = settings.get("num_experts_per_tok")
    if experts and type(chosen) is int and not 1 <= chosen <= experts:
        raise _error(checkpoint, "num_experts_per_tok", f"1 to {experts} (experts)", chosen)


def _layers(checkpoint: Checkpoint) -> int:
    numbers = (int(match[1]) for match in map(_LAYER.search, checkpoint.names()) if match)
    return max(numbers, default=-1) + 1


def _experts(checkpoint: Checkpoint) -> int:
    """Of the layer that has the most; 0 if the names do not tell."""
    numbers = (int(match[1]) for match in map(_EXPERT.search, checkpoint.names()) if match)
    stacks = [checkpoint.shape(name) for name in checkpoint.names() if _STACK.search(name)]
    return max([*numbers, *(shape[0] - 1 for shape in stacks if len(shape) > 2)], default=-1) + 1


def _error(checkpoint: Checkpoint, name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{checkpoint.folder / 'config.json'}: {name}: expected {expected}, got {got}; {_REMEDY}")
