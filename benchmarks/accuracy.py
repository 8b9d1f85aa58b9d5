"""What each format costs in accuracy: relative L2 errors of one layer against float32, on Gaussian data.

    python -m benchmarks.accuracy

Against the weights before quantisation: forward, gradient of the hidden states, and the LoRA factors' gradients (the
worst of six). Against the layer's own dequantised weights ("adjoint"): the largest of all gradients, which shows that
backward is the adjoint of what forward computed. Weights and inputs are bf16 values, as a checkpoint holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.check import Unavailable, error
from benchmarks.ours import Matrices, Ours, parse
from benchmarks.shapes import Shape, make_inputs
from kt_sft.ops.reference import moe_experts_reference

SHAPE = Shape("Qwen3-30B-A3B", 128, 8, 2048, 768, used=16)
TOKENS = 64
ROWS = ("bf16", "bf16+lora16", "int8", "int8+lora16", "int8*int8", "int8*int8+grad8", "int4", "int4+lora16")
# forward, gradient of the hidden states, gradients of the factors (None: no limit of its own)
LIMITS: dict[tuple[str, str], tuple[float, float, float | None]] = {
    ("bf16", "bf16"): (0.005, 0.007, 0.005),
    ("int8", "bf16"): (0.015, 0.016, None),
    ("int8", "int8"): (0.023, 0.026, None),
    ("int4", "bf16"): (0.14, 0.14, None),
}
ADJOINT_LIMIT = 1e-2


@dataclass(frozen=True)
class Accuracy:
    """One row: name -> (error, limit or None)."""

    row: str
    errors: dict[str, tuple[float, float | None]]
    unavailable: str = ""

    @property
    def holds(self) -> bool:
        return all(limit is None or value <= limit for value, limit in self.errors.values())


def gaussian(shape: Shape, e: int) -> Matrices:
    """bf16 gate, up, down of an expert, unit gain, every value drawn."""
    g = torch.Generator().manual_seed(e)
    sizes = ((shape.F, shape.D), (shape.F, shape.D), (shape.D, shape.F))
    return tuple((torch.randn(*size, generator=g) / size[1] ** 0.5).bfloat16() for size in sizes)


def _exact(layer: Ours, weights: list[Matrices], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output and gradients in float32 on the given weights."""
    x, ids, topk, grad_out = inputs
    dense = [torch.stack(ws).float() for ws in zip(*weights, strict=True)]
    factors = {n: f.detach().clone().requires_grad_() for n, f in layer.factors().items()}
    leaves = {"dX": x.float().requires_grad_(), "d router": topk.clone().requires_grad_(), **factors}
    out = moe_experts_reference(leaves["dX"], ids, leaves["d router"], *dense, factors, layer.scaling)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.float())
    return {"forward": out.detach()} | dict(zip(leaves, grads, strict=True))


def measure_row(name: str, shape: Shape = SHAPE, tokens: int = TOKENS) -> Accuracy:
    """Errors of one of our rows."""
    try:
        layer = Ours(shape, name, lambda e: gaussian(shape, e))
    except Unavailable as reason:
        return Accuracy(name, {}, str(reason))
    inputs = make_inputs(shape, tokens, seed=5)
    x, ids, topk, grad_out = inputs
    got = {"forward": layer.forward(x, ids, topk)}
    got["dX"], got["d router"] = layer.backward(grad_out)
    got |= layer.lora_grads

    def errors(weights: list[Matrices]) -> dict[str, float]:
        exact = _exact(layer, weights, inputs)
        return {what: error(got[what], exact[what]) for what in exact}

    row = parse(name)
    forward, dx, lora = LIMITS[row.weight_format, row.compute]
    against_source = errors([gaussian(shape, e) for e in range(shape.E)])
    found: dict[str, tuple[float, float | None]] = {
        "forward": (against_source["forward"], forward),
        "dX": (against_source["dX"], dx),
    }
    if row.rank:
        found["d LoRA"] = (max(against_source[n] for n in layer.factors()), lora)
    own = errors([layer.expert(e) for e in range(shape.E)])
    own.pop("forward")
    found["adjoint"] = (max(own.values()), ADJOINT_LIMIT if row.compute == "bf16" else None)
    return Accuracy(name, found)


def table(rows: list[Accuracy]) -> Table:
    """Errors in percent, each with its limit."""
    columns = ("forward", "dX", "d LoRA", "adjoint")
    result = Table("row", *columns, title=f"relative L2 error, {SHAPE.describe()}, {TOKENS} tokens")
    for row in rows:
        cells = [cell(*row.errors[c]) if c in row.errors else "" for c in columns]
        result.add_row(row.row, *([row.unavailable, "", "", ""] if row.unavailable else cells))
    return result


def cell(value: float, limit: float | None) -> str:
    """``0.42 % (<= 0.5)``, or with ``>`` where the limit does not hold."""
    if limit is None:
        return f"{value:.2%}"
    return f"{value:.2%} ({'<=' if value <= limit else '>'} {limit * 100:g})"


def main() -> None:
    rows = [measure_row(name) for name in ROWS]
    Console(width=120).print(table(rows))
    if not all(row.holds for row in rows):
        raise SystemExit("a limit does not hold")


if __name__ == "__main__":
    main()
