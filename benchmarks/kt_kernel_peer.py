"""kt-kernel 0.7.2's training layers, through its documented Python wrapper. Runs in an environment of its own:

    python -m venv VENV && VENV/bin/pip install torch==2.13.0 numpy safetensors gguf packaging psutil
    VENV/bin/pip install --no-deps kt-kernel==0.7.2
    KT_SFT_PEER_PYTHON=VENV/bin/python make bench

Rows carry LoRA of rank 16 (RAWINT4: 8, the only one it takes) unless named "no lora". Its pool keeps one thread more
than it is given spinning, so the benchmark also tries one thread fewer and reports the better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Shape, expert_weights, make_weights

MAX_TOKENS = 4096  # sizes its buffers


def _groups(w: Tensor, size: int, top: float) -> tuple[Tensor, Tensor]:
    """Values in groups along the last dimension, and each group's maximum over ``top``."""
    values = w.float().view(w.shape[0], -1, size)
    return values, values.abs().amax(-1).clamp_min(1e-30) / top


def _nibbles(codes: Tensor, shape: torch.Size) -> Tensor:
    """Two 4-bit codes per byte, the even column in the low half."""
    pairs = codes.to(torch.uint8).view(shape[0], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous()


def fp8_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 with one fp32 scale per 128 x 128 block."""
    n, k = w.shape
    blocks = w.float().view(n // 128, 128, k // 128, 128)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / 448.0
    return (blocks / scale[:, None, :, None]).view(n, k).to(torch.float8_e4m3fn), scale


def int4_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """Offset-binary int4 with one bf16 scale per 32 columns."""
    values, scale = _groups(w, 32, 7.0)
    scale = scale.bfloat16()
    return _nibbles((values / scale.float()[..., None]).round().clamp(-8, 7) + 8, w.shape), scale


def mxfp4_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 with a power of two (as bf16) per 32 columns."""
    values, scale = _groups(w, 32, 6.0)
    scale = 2.0 ** torch.ceil(torch.log2(scale))
    steps = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # halfway between 0, 0.5, 1, 1.5, 2, 3, 4, 6
    scaled = values / scale[..., None]
    return _nibbles(torch.bucketize(scaled.abs(), steps) + 8 * (scaled < 0), w.shape), scale.bfloat16()


Quantiser = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """A method of KTMoEWrapper; ``tolerance`` is of its output against float32 on the weights before quantisation."""

    name: str
    tolerance: float
    rank: int = 16
    quantise: Quantiser | None = None
    options: dict[str, Any] = field(default_factory=dict)


_GROUP32 = {"group_size": 32, "zero_point": False}
METHODS = {
    "kt bf16": Method("AMXBF16_SFT", 3e-2),
    "kt int8": Method("AMXINT8_SFT", 6e-2),
    "kt int4": Method("AMXINT4_SFT", 0.4),
    "kt fp8": Method("AMXFP8_SFT", 0.1, quantise=fp8_blocks),
    "kt rawint4": Method("RAWINT4_SFT", 0.3, rank=8, quantise=int4_groups, options=_GROUP32),
    "kt mxfp4": Method("MXFP4_SFT", 0.35, quantise=mxfp4_groups, options={**_GROUP32, "swiglu_limit": 1e4}),
    "kt bf16 no lora": Method("AMXBF16_SFT_SkipLoRA", 3e-2, rank=0),
    "kt int8 no lora": Method("AMXINT8_SFT_SkipLoRA", 6e-2, rank=0),
}


class KtKernel:
    """One layer of kt-kernel."""

    scaling = 2.0

    def __init__(self, shape: Shape, row: str, threads: int) -> None:
        from kt_kernel import KTMoEWrapper

        self.shape, self.method = shape, METHODS[row]
        self.tolerance, self.weight_bytes, self.lora = self.method.tolerance, 0, {}
        rank = self.method.rank
        self.layer = KTMoEWrapper(
            **dict(layer_idx=0, num_experts=shape.E, num_experts_per_tok=shape.K, hidden_size=shape.D),
            **dict(moe_intermediate_size=shape.F, gpu_experts_mask=None, cpuinfer_threads=threads, threadpool_count=1),
            **dict(weight_path=None, chunked_prefill_size=MAX_TOKENS, method=self.method.name, mode="sft"),
            **dict(lora_rank=rank or 16, lora_alpha=self.scaling * (rank or 16), max_cache_depth=1),
            **self.method.options,
        )
        if self.method.name == "AMXFP8_SFT":  # it keeps no second copy of fp8 weights
            self.layer.share_backward_bb = self.layer.share_cache_pool = True
        if rank:
            self._init_lora(rank)
        self._load()

    def _init_lora(self, rank: int) -> None:
        g, s = torch.Generator().manual_seed(77), self.shape
        named = {}
        for name, (out, width) in {"gate": (s.F, s.D), "up": (s.F, s.D), "down": (s.D, s.F)}.items():
            self.lora[f"{name}_a"] = (torch.randn(s.E, rank, width, generator=g) / width**0.5).bfloat16()
            self.lora[f"{name}_b"] = (torch.randn(s.E, out, rank, generator=g) * 0.02).bfloat16()
            for factor in ("a", "b"):
                tensor = self.lora[f"{name}_{factor}"]
                named[f"{name}_lora_{factor}"] = tensor
                named[f"grad_{name}_lora_{factor}"] = torch.zeros_like(tensor)
        self.layer.init_lora_weights(**named)

    def _load(self) -> None:
        experts, order = range(self.shape.E), torch.arange(self.shape.E)
        if self.method.quantise is None:
            self.layer.gate_proj, self.layer.up_proj, self.layer.down_proj = make_weights(self.shape)
            self.layer.load_weights(order)
            return
        pairs = [[self.method.quantise(w) for w in expert_weights(self.shape, e)] for e in experts]
        columns = [[pairs[e][p][i] for e in experts] for p in range(3) for i in range(2)]  # gate, gate scale, up ...
        if self.method.name == "AMXFP8_SFT":
            from kt_kernel.sft.weights import BlockFP8ExpertWeights

            self.layer.load_block_fp8_weights(BlockFP8ExpertWeights(*columns), order)
        elif self.method.name == "RAWINT4_SFT":
            from kt_kernel.sft.weights import RAWINT4ExpertWeights

            self.layer.load_rawint4_weights(RAWINT4ExpertWeights(*map(torch.stack, columns)), order)
        else:
            names = ("gate", "gate_scale", "up", "up_scale", "down", "down_scale")
            self.layer.load_mxfp4_weights(dict(zip(names, columns, strict=True)), order)

    def factors(self) -> dict[str, Tensor]:
        return self.lora

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, record: bool = True) -> Tensor:
        return self.layer.forward(x, ids, weights, save_for_backward=record)

    def backward(self, grad_out: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.layer.backward(grad_out)
