"""Our rows. A name is a weight format, with ``*int8`` for native int8 products, ``+grad8`` for those of the gradients,
too, and ``+lora16`` for adapters of a rank.

    bf16   int8   int4   fp8   mxfp4   int8*int8   int8*int8+grad8   int8+lora16   int8*int8+grad8+lora64

What every row offers, here and in the peers: ``forward(x, ids, weights, record)``, under no_grad unless it records,
``backward(grad_out)`` of the last recorded forward, ``weight_bytes``, ``tolerance`` of its results against float32, and
``expert(e)``: the weights that it ought to compute with.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import probes
from benchmarks.check import Unavailable
from benchmarks.shapes import Shape, expert_weights, watched
from kt_sft import native
from kt_sft.ops import ExpertsLora, PackedExperts, moe_experts
from kt_sft.ops.layout import Layout, uniform
from kt_sft.ops.quantize import dequantize, quantize
from kt_sft.weights.encode import ENCODED, encode, encoded_format
from kt_sft.weights.packed_form import pack
from kt_sft.weights.quantized import QuantizedWeight

Matrices = tuple[Tensor, ...]
NAME = re.compile(r"(bf16|int8|int4|fp8|mxfp4)(\*int8(\+grad8)?)?(?:\+lora(\d+))?")


class Row(NamedTuple):
    """A parsed name; rank 0 is without adapters."""

    weight_format: str
    compute: str
    rank: int
    gradient_compute: str = "bf16"


def parse(name: str) -> Row:
    """Raises ValueError on a name that is not one of ours."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"row: expected a name like int8, int8*int8 or int8+lora16, got {name!r}")
    weight_format, compute, gradients, rank = match.groups()
    return Row(weight_format, "int8" if compute else "bf16", int(rank or 0), "int8" if gradients else "bf16")


def make_lora(shape: Shape, rank: int) -> ExpertsLora:
    """fp32 factors on all three projections, neither of them zero."""
    g = torch.Generator().manual_seed(77)
    factors = {}
    for name, (out, width) in {
        "gate": (shape.F, shape.D),
        "up": (shape.F, shape.D),
        "down": (shape.D, shape.F),
    }.items():
        factors[f"{name}_a"] = (torch.randn(shape.E, rank, width, generator=g) / width**0.5).requires_grad_()
        factors[f"{name}_b"] = (torch.randn(shape.E, out, rank, generator=g) * 0.02).requires_grad_()
    return ExpertsLora(**factors, scaling=2.0)


class Ours:
    """kt_sft's layer: experts are packed one by one, so that memory holds little more than the packed codes.

    ``source(e)`` gives gate, up and down of an expert; by default those of benchmarks/shapes.py.
    """

    def __init__(self, shape: Shape, name: str, source: Callable[[int], Matrices] | None = None) -> None:
        self.row = parse(name)
        self.source = source or partial(expert_weights, shape)
        if self.row.compute == "int8" and not native.computes_int8():
            raise Unavailable(f"int8 products need AMX or AVX512-VNNI, this is {native.isa()}")
        self.tolerance = 5e-2 if self.row.compute == "int8" else 2e-2
        self.packed = PackedExperts.empty(shape.E, shape.D, shape.F, self.layout(shape))
        self.weight_bytes = self.packed.nbytes
        seconds = []
        for e in range(shape.E):
            stored = self.stored(self.source(e))
            for _ in range(2):  # the first time, the system's pages come: its speed, not packing's
                start = time.perf_counter()
                for projection, weight in enumerate(stored):
                    pack(self.packed, e, projection, weight)
                took = time.perf_counter() - start
            seconds.append(took)
        self.pack_seconds = shape.E * statistics.median(seconds)
        self.lora = make_lora(shape, self.row.rank) if self.row.rank else None
        self.threads = native.num_threads()

    def layout(self, shape: Shape) -> Layout:
        """Of what a loader would make of such a checkpoint."""
        name = self.row.weight_format
        if name not in ENCODED:
            return uniform(name)
        return encoded_format(name, shape.D), encoded_format(name, shape.D), encoded_format(name, shape.F)

    def stored(self, weights: Matrices) -> tuple[Tensor | QuantizedWeight, ...]:
        """As a checkpoint of the row's format would have them; values where packing quantises."""
        name = self.row.weight_format
        return tuple(encode(w, name) for w in weights) if name in ENCODED else weights

    def expert(self, e: int) -> Matrices:
        """gate, up, down as packing must have stored them."""
        weights = self.source(e)
        if self.row.weight_format == "bf16":
            return weights
        if self.row.weight_format in ENCODED:
            return tuple(w.dequantize() for w in self.stored(weights))
        group = self.packed.group_size
        return tuple(dequantize(*quantize(w, self.row.weight_format, group), group) for w in weights)

    def factors(self) -> dict[str, Tensor]:
        return self.lora.factors() if self.lora else {}

    def beside(self) -> probes.Beside:
        """Limits of what this row computes with, for times to be compared with."""
        return probes.Beside(self.row.compute == "int8")

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, record: bool = True) -> Tensor:
        self.inputs = watched(x, weights) if record else (x, weights)
        self.out = moe_experts(
            self.inputs[0],
            ids,
            self.inputs[1],
            self.packed,
            self.lora,
            compute_type=self.row.compute,
            gradient_compute_type=self.row.gradient_compute,
        )
        return self.out.detach() if record else self.out

    def backward(self, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and the top-k weights; those of the factors stay in ``lora_grads``."""
        factors = self.factors()
        grad_x, grad_weights, *rest = torch.autograd.grad(self.out, (*self.inputs, *factors.values()), grad_out)
        self.lora_grads = dict(zip(factors, rest, strict=True))
        self.out = self.inputs = None
        return grad_x, grad_weights

    @property
    def scaling(self) -> float:
        return self.lora.scaling if self.lora else 1.0
