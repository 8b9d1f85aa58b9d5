"""One step over a long sequence: the workspace of a short one, and the result of its chunks.

Every token's output and input gradient are its own; only the LoRA gradients add up over the chunks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kt_sft import native
from kt_sft.ops import ExpertsLora, moe_experts, pack_experts
from tests.conftest import rms_ratio

TOKENS, CHUNK = 32_768, 4_096
SMALL = dict(E=16, K=4, D=64, F=48, R=4)
SHAPE_A = dict(E=128, K=8, D=2048, F=768, R=8)  # a layer of Qwen3-30B-A3B


class Layer:
    """Random experts and factors, and ``tokens`` routed tokens."""

    def __init__(self, tokens: int, *, E: int, K: int, D: int, F: int, R: int, policy: str) -> None:
        torch.manual_seed(0)
        self.policy = policy
        self.packed = pack_experts(
            *(torch.randn(E, *shape, dtype=torch.bfloat16) / shape[1] ** 0.5 for shape in ((F, D), (F, D), (D, F))),
            "int8",
        )
        shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        self.factors = {}
        for name, (out, into) in shapes.items():
            self.factors[f"{name}_a"] = (torch.randn(E, R, into) / into**0.5).requires_grad_()
            self.factors[f"{name}_b"] = (torch.randn(E, out, R) / out**0.5).requires_grad_()
        self.x = torch.randn(tokens, D, dtype=torch.bfloat16)
        self.ids = torch.rand(tokens, E).topk(K).indices
        self.weights = torch.softmax(torch.randn(tokens, K), -1)
        self.grad_out = torch.randn(tokens, D, dtype=torch.bfloat16)

    def step(self, part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Forward and backward of some tokens: output, gradients of x and of the routing weights."""
        x, weights = (t[part].clone().requires_grad_() for t in (self.x, self.weights))
        lora = ExpertsLora(**self.factors, scaling=2.0)
        out = moe_experts(x, self.ids[part], weights, self.packed, lora, activation_policy=self.policy)
        out.backward(self.grad_out[part])
        assert x.grad is not None and weights.grad is not None
        return out.detach(), x.grad, weights.grad

    def gradients(self) -> dict[str, torch.Tensor]:
        """The factors' gradients so far, which are then cleared."""
        grads = {}
        for name, factor in self.factors.items():
            assert factor.grad is not None
            grads[name], factor.grad = factor.grad, None
        return grads


def compare_with_chunks(sizes: dict[str, int], policy: str) -> None:
    same = 1e-6 if len(native.nodes()) == 1 else 1e-4  # nodes add wave by wave, and a chunk is one wave
    layer = Layer(TOKENS, **sizes, policy=policy)
    whole, whole_grads = layer.step(slice(None)), layer.gradients()
    parts = [layer.step(slice(start, start + CHUNK)) for start in range(0, TOKENS, CHUNK)]
    for name, got, chunks in zip(("out", "grad_x", "grad_weights"), whole, zip(*parts, strict=True), strict=True):
        assert rms_ratio(got, torch.cat(chunks)) < same, name
    for name, grad in layer.gradients().items():
        assert rms_ratio(whole_grads[name], grad) < 1e-4, name


def workspace_after(tokens: int, sizes: dict[str, int]) -> int:
    """Bytes of workspace of a process that made one step."""
    code = (
        "from tests.ops.test_long_sequences import Layer\nfrom kt_sft import native\n"
        f"Layer({tokens}, **{sizes!r}, policy='recompute').step(slice(None))\nprint(native.workspace_bytes())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    return int(done.stdout)


def compare_workspaces(sizes: dict[str, Any]) -> None:
    short, long = workspace_after(CHUNK, sizes), workspace_after(TOKENS, sizes)
    index = 16 * sizes["K"] * (TOKENS - CHUNK)  # order and token of every further routed row
    assert 0 < short <= long <= short + index + (2 << 20)  # rounded up to a huge page


@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_one_step_equals_its_chunks(policy: str) -> None:
    compare_with_chunks(SMALL, policy)


def test_the_workspace_is_that_of_a_short_sequence() -> None:
    compare_workspaces(SMALL)


@pytest.mark.slow
def test_shape_a(capsys: pytest.CaptureFixture[str]) -> None:
    native.set_workspace_poison(False)  # filling is not what is measured here
    compare_workspaces(SHAPE_A)
    compare_with_chunks(SHAPE_A, "retain")
