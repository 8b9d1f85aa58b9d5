"""The torch peers: stock transformers' two implementations, and two written here from torch's fastest CPU products.

    torch loop        transformers' per-expert loop, bf16, autograd
    torch grouped_mm  transformers on torch's grouped matmul, bf16, autograd
    onednn prepacked  oneDNN linears on weights reordered once, bf16, a second transposed copy for backward
    torch int_mm      torch._int_mm: int8 weights per output channel, activations quantised per row

The last two write backward out by hand, so that autograd costs them nothing. None has adapters on its experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import Shape, expert_weights, make_weights, watched


def by_expert(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its slots in ids.flatten()) for every expert that has rows."""
    flat = ids.flatten()
    slots = torch.argsort(flat, stable=True).split(torch.bincount(flat, minlength=experts).tolist())
    return ((e, part) for e, part in enumerate(slots) if len(part))


class Transformers:
    """Stock transformers' experts module with one of its implementations."""

    tolerance = 2e-2

    def __init__(self, shape: Shape, implementation: str) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=shape.D, moe_intermediate_size=shape.F, num_experts=shape.E, num_experts_per_tok=shape.K
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.experts = Qwen3MoeExperts(config)
        gate, up, down = make_weights(shape)
        self.experts.gate_up_proj = torch.nn.Parameter(torch.cat((gate, up), 1), requires_grad=False)
        self.experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
        self.weight_bytes = sum(p.nbytes for p in self.experts.parameters())

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, record: bool = True) -> Tensor:
        self.inputs = watched(x, weights) if record else (x, weights)
        self.out = self.experts(self.inputs[0], ids, self.inputs[1].to(x.dtype))
        return self.out.detach() if record else self.out

    def backward(self, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        grads = torch.autograd.grad(self.out, self.inputs, grad_out)
        self.out = self.inputs = None
        return grads


class _ByHand(ABC):
    """A layer from the two products of an expert, x -> G|U and h -> y, and their adjoints."""

    @abstractmethod
    def up(self, e: int, x: Tensor) -> Tensor: ...
    @abstractmethod
    def down(self, e: int, h: Tensor) -> Tensor: ...
    @abstractmethod
    def up_adjoint(self, e: int, grad: Tensor) -> Tensor: ...
    @abstractmethod
    def down_adjoint(self, e: int, grad: Tensor) -> Tensor: ...

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @torch.no_grad()
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, record: bool = True) -> Tensor:
        out = torch.zeros(x.shape)
        flat, self.saved, self.weights = weights.flatten(), [], weights
        for e, slots in by_expert(ids, self.shape.E):
            tokens = slots // self.shape.K
            gate_up = self.up(e, x[tokens])
            gate, up = gate_up.chunk(2, -1)
            y = self.down(e, F.silu(gate) * up)
            out.index_add_(0, tokens, y.float() * flat[slots, None])
            if record:
                self.saved.append((e, slots, tokens, gate_up.bfloat16(), y.bfloat16()))
        return out.to(x.dtype)

    @torch.no_grad()
    def backward(self, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_weights = torch.zeros(grad_out.shape), torch.zeros(self.weights.shape)
        flat = self.weights.flatten()
        for e, slots, tokens, gate_up, y in self.saved:
            grad_y = grad_out[tokens]
            grad_weights.view(-1)[slots] = (y * grad_y).float().sum(-1)
            grad_h = self.down_adjoint(e, grad_y * flat[slots, None])
            gate, up = gate_up.chunk(2, -1)
            sigmoid = torch.sigmoid(gate)
            d_gate = grad_h * up * (sigmoid * (1 + gate * (1 - sigmoid)))
            grad_x.index_add_(0, tokens, self.up_adjoint(e, torch.cat((d_gate, grad_h * gate * sigmoid), -1)).float())
        self.saved = []
        return grad_x.to(grad_out.dtype), grad_weights


class OneDnn(_ByHand):
    """torch.ops.mkldnn, as torch's inductor uses it for frozen weights."""

    tolerance = 2e-2

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        pack = torch.ops.mkldnn._reorder_linear_weight
        rows = max(1, 512 * shape.K // shape.E)  # what the layout is tuned for
        self.packed: list[tuple[Tensor, ...]] = []
        for e in range(shape.E):
            gate, up, down = expert_weights(shape, e)
            gate_up = torch.cat((gate, up))
            self.packed.append(tuple(pack(w.contiguous(), rows) for w in (gate_up, down, gate_up.T, down.T)))
        self.weight_bytes = 4 * shape.expert_values * shape.E  # two copies

    def _linear(self, e: int, which: int, a: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(a.bfloat16(), self.packed[e][which], None, "none", [], "")

    def up(self, e: int, x: Tensor) -> Tensor:
        return self._linear(e, 0, x)

    def down(self, e: int, h: Tensor) -> Tensor:
        return self._linear(e, 1, h)

    def up_adjoint(self, e: int, grad: Tensor) -> Tensor:
        return self._linear(e, 2, grad)

    def down_adjoint(self, e: int, grad: Tensor) -> Tensor:
        return self._linear(e, 3, grad)


class IntMm(_ByHand):
    """torch._int_mm; the channels' scales are folded into the gradient before it is quantised."""

    tolerance = 6e-2

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.gate_up, self.down_weight = [], []
        for e in range(shape.E):
            gate, up, down = expert_weights(shape, e)
            self.gate_up.append(self._quantize(torch.cat((gate, up))))
            self.down_weight.append(self._quantize(down))
        self.weight_bytes = sum(t.nbytes for pair in (*self.gate_up, *self.down_weight) for t in pair)

    @staticmethod
    def _quantize(a: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes and one fp32 scale per row."""
        a = a.float()
        scale = a.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return (a / scale).round_().to(torch.int8), scale

    def _product(self, a: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
        codes, scale = self._quantize(a)
        return torch._int_mm(codes, weight[0].T).float().mul_(scale).mul_(weight[1].T)

    def _adjoint(self, a: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
        codes, scale = self._quantize(a.float() * weight[1].T)
        return torch._int_mm(codes, weight[0]).float().mul_(scale)

    def up(self, e: int, x: Tensor) -> Tensor:
        return self._product(x, self.gate_up[e])

    def down(self, e: int, h: Tensor) -> Tensor:
        return self._product(h, self.down_weight[e])

    def up_adjoint(self, e: int, grad: Tensor) -> Tensor:
        return self._adjoint(grad, self.gate_up[e])

    def down_adjoint(self, e: int, grad: Tensor) -> Tensor:
        return self._adjoint(grad, self.down_weight[e])


TORCH_PEERS: dict[str, Callable[[Shape], Transformers | _ByHand]] = {
    "torch loop": lambda shape: Transformers(shape, "eager"),
    "torch grouped_mm": lambda shape: Transformers(shape, "grouped_mm"),
    "onednn prepacked": OneDnn,
    "torch int_mm": IntMm,
}
