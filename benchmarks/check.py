"""The gate before every time: a row's output and gradients against float32, at every number of tokens that is timed.

Output and input gradients of a token depend on that token only. So three tokens are evaluated in float32 once, and
stand at the end of every batch; what a batch of 2048 gives for them must agree as well as the batch of three.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import ROOT
from benchmarks.shapes import Shape, expert_weights, make_inputs


class WrongResult(Exception):
    """A row's numbers are not those of the layer."""


class Unavailable(Exception):
    """Why a row cannot run here."""


def _oracle() -> ModuleType:
    """kt_sft's reference without the package: a peer's environment has torch, but not the compiled extension."""
    bare = ModuleType("kt_sft_oracle")
    bare.__path__ = [str(ROOT / "kt_sft" / "ops")]
    sys.modules.setdefault(bare.__name__, bare)
    return importlib.import_module(f"{bare.__name__}.reference")


@dataclass(frozen=True)
class Expected:
    """Three tokens with their float32 results: inputs (3, ...), output (3, D), gradients of x, weights and factors."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    out: Tensor
    grad_x: Tensor
    grad_weights: Tensor
    grad_lora: dict[str, Tensor]
    experts: Tensor


def evaluate(row: Any, shape: Shape) -> Expected:
    """Float32 results on the weights that ``row`` ought to compute with. Uses the first K experts and the last."""
    x, _, weights, grad_out = make_inputs(shape, 3, seed=99)
    first, last = torch.arange(shape.K), shape.E - 1
    ids = torch.stack([first, torch.cat((first[:-1], torch.tensor([last]))), first.flip(0)])
    used = ids.unique()
    expert = getattr(row, "expert", lambda e: expert_weights(shape, e))
    dense = [torch.stack(ws).float() for ws in zip(*(expert(int(e)) for e in used), strict=True)]
    factors = {n: f.detach()[used].float().requires_grad_() for n, f in getattr(row, "factors", dict)().items()}
    xr, wr = x.float().requires_grad_(), weights.clone().requires_grad_()
    out = _oracle().moe_experts_reference(
        xr, torch.searchsorted(used, ids), wr, *dense, factors, getattr(row, "scaling", 1.0)
    )
    grad_x, grad_weights, *rest = torch.autograd.grad(out, (xr, wr, *factors.values()), grad_out.float())
    grads = dict(zip(factors, rest, strict=True))
    return Expected((x, ids, weights, grad_out), out.detach(), grad_x, grad_weights, grads, used)


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN where anything is NaN."""
    return ((got.float() - want).norm() / want.norm()).item()


def check(row: Any, shape: Shape, expected: Expected, tokens: int, routing: str) -> float:
    """The largest relative error of a batch of ``tokens``; raises WrongResult where it exceeds the row's tolerance."""
    known = min(3, tokens)
    batch = make_inputs(shape, tokens, seed=0, routing=routing)
    for whole, part in zip(batch, expected.inputs, strict=True):
        whole[tokens - known :] = part[:known]
    x, ids, weights, grad_out = batch
    out = row.forward(x, ids, weights, True)
    grad_x, grad_weights = row.backward(grad_out)
    pairs = {"output": (out, expected.out), "gradient of the hidden states": (grad_x, expected.grad_x)}
    if grad_weights is not None:
        pairs["gradient of the router's weights"] = (grad_weights, expected.grad_weights)
    errors = {name: error(got[tokens - known :], want[:known]) for name, (got, want) in pairs.items()}
    if tokens == 3:  # the batch is these tokens only, so the factors' gradients are known too
        grads = getattr(row, "lora_grads", {})
        errors |= {f"gradient of {n}": error(g[expected.experts], expected.grad_lora[n]) for n, g in grads.items()}
    for name, value in errors.items():
        if not value <= row.tolerance:
            raise WrongResult(
                f"{name} of {tokens} tokens differs from float32 by {value:.3g}, allowed {row.tolerance:g}"
            )
    return max(errors.values())
