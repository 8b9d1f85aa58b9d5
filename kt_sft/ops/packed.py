"""Packed frozen experts (interim torch stand-in with the final interface)."""

from __future__ import annotations

import torch
from torch import Tensor


class PackedExperts:
    def __init__(self, num_experts, hidden_size, intermediate_size, weight_format, group_size, storage):
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.weight_format, self.group_size = weight_format, group_size
        self.storage = storage  # uint8 (nbytes,)

    @staticmethod
    def nbytes_for(num_experts, hidden_size, intermediate_size, weight_format, group_size=None) -> int:
        return num_experts * 3 * hidden_size * intermediate_size * 2

    @classmethod
    def empty(cls, num_experts, hidden_size, intermediate_size, weight_format="int8", group_size=None):
        n = cls.nbytes_for(num_experts, hidden_size, intermediate_size, weight_format, group_size)
        return cls(num_experts, hidden_size, intermediate_size, weight_format, group_size, torch.empty(n, dtype=torch.uint8))

    @classmethod
    def from_storage(cls, storage, num_experts, hidden_size, intermediate_size, weight_format, group_size=None):
        return cls(num_experts, hidden_size, intermediate_size, weight_format, group_size, storage)

    @property
    def nbytes(self) -> int:
        return self.storage.numel()

    def _views(self):
        v = self.storage.view(torch.bfloat16).view(self.num_experts, 3, -1)
        E, D, F = self.num_experts, self.hidden_size, self.intermediate_size
        return v[:, 0].view(E, F, D), v[:, 1].view(E, F, D), v[:, 2].view(E, D, F)

    def pack_expert_(self, index: int, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> None:
        for dst, src in zip(self._views(), (gate_FD, up_FD, down_DF)):
            w = src.float()
            if self.weight_format != "bf16":
                q = 127 if self.weight_format == "int8" else 7
                g = self.group_size or w.shape[1]
                w3 = w.view(w.shape[0], -1, g)
                s = (w3.abs().amax(-1, keepdim=True) / q).clamp_min(1e-12)
                w = ((w3 / s).round().clamp(-q, q) * s).view_as(w)
            dst[index].copy_(w)

    def dequantize(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(t.clone() for t in self._views())


def pack_experts(gate_proj, up_proj, down_proj, weight_format="int8", group_size=None) -> PackedExperts:
    E, F, D = gate_proj.shape
    packed = PackedExperts.empty(E, D, F, weight_format, group_size)
    for e in range(E):
        packed.pack_expert_(e, gate_proj[e], up_proj[e], down_proj[e])
    return packed
