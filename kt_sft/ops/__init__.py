"""Differentiable operators on packed experts."""

from .activation import Activation, ExpertBiases
from .experts import ExpertsLora, moe_experts
from .overlap import PendingExperts, submit_experts
from .packed import PackedExperts, pack_experts

__all__ = [
    "Activation",
    "ExpertBiases",
    "ExpertsLora",
    "PackedExperts",
    "PendingExperts",
    "moe_experts",
    "pack_experts",
    "submit_experts",
]
