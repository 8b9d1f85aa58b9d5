"""Differentiable operators on packed experts."""

from .experts import ExpertsLora, moe_experts
from .packed import PackedExperts, pack_experts

__all__ = ["ExpertsLora", "PackedExperts", "moe_experts", "pack_experts"]
