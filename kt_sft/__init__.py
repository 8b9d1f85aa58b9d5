"""kt_sft: LoRA fine-tuning of giant Mixture-of-Experts models with the frozen experts on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import KtConfig
    from .integrations.transformers import convert_model, from_pretrained
    from .ops import Activation, ExpertBiases, ExpertsLora, PackedExperts, moe_experts, pack_experts, submit_experts

__all__ = [
    "Activation",
    "ExpertBiases",
    "ExpertsLora",
    "KtConfig",
    "PackedExperts",
    "__version__",
    "convert_model",
    "from_pretrained",
    "moe_experts",
    "pack_experts",
    "submit_experts",
]

_HOMES = {
    "KtConfig": "config",
    "convert_model": "integrations.transformers",
    "from_pretrained": "integrations.transformers",
    "Activation": "ops",
    "ExpertBiases": "ops",
    "ExpertsLora": "ops",
    "PackedExperts": "ops",
    "moe_experts": "ops",
    "pack_experts": "ops",
    "submit_experts": "ops",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import torch` imports this package for its entry point and must stay cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
