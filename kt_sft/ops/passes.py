"""Forward and backward of one call on the host: inputs brought there, the kernels run, results sent back.

Constructing a pass starts the transfers, in the caller's thread; ``run`` waits for them and computes, in any thread;
``transfer.deliver`` hands the results to the caller's stream.
Shape suffixes: T tokens, K top-k, N = T*K routed rows, D hidden, F intermediate, E experts, R LoRA rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import LOCAL, Inputs, Kernels
from .packed import PackedExperts
from .transfer import Transfer


class Call(NamedTuple):
    """What a call of the layer is, besides the tensors that autograd follows."""

    packed: PackedExperts
    factor_names: tuple[str, ...]  # of the LoRA factors, in the order in which they are passed
    settings: dict[str, Any]  # of LoRA, as the kernels take them: scaling, down_keep, keep_scale
    differentiable: bool
    retain: bool  # keep gate and up for backward
    int8: bool  # forward products in int8
    int8_gradients: bool  # and those of the gradients of hidden states and routing weights
    kernels: Kernels = LOCAL


class _Target(NamedTuple):
    """Where a result goes and as what."""

    device: torch.device
    dtype: torch.dtype


def _factors(transfer: Transfer, call: Call, factors: tuple[Tensor, ...]) -> dict[str, Any]:
    """LoRA as the kernels take it: factors in bf16 or fp32, and the settings."""
    lora = {
        name: transfer.to_host(f, f.dtype if f.dtype is torch.bfloat16 else torch.float32)
        for name, f in zip(call.factor_names, factors, strict=True)
    }
    return {**lora, **call.settings} if lora else {}


class Forward:
    """out_TD from hidden states, routing and LoRA factors."""

    def __init__(
        self, call: Call, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, x_lora_TD: Tensor | None, *factors: Tensor
    ) -> None:
        self.call, self._target = call, _Target(x_TD.device, x_TD.dtype)
        self.transfer = transfer = Transfer(x_TD.device)
        self._x = transfer.to_host(x_TD, torch.bfloat16)
        self._ids = transfer.to_host(ids_TK, torch.int64)
        self._weights = transfer.to_host(weights_TK, torch.float32)
        self._lora = _factors(transfer, call, factors)
        if x_lora_TD is not None:
            self._lora["x"] = transfer.to_host(x_lora_TD, torch.bfloat16)
        transfer.staged()

    def run(self) -> Tensor:
        call = self.call
        self.transfer.wait()
        inputs = Inputs(call.packed, self._x, self._ids, self._weights, self._lora, call.int8, call.int8_gradients)
        out_TD, self._kept = call.kernels.forward(inputs, call.retain, self._target.dtype)
        out_TD = self.transfer.to_device(out_TD, *self._target)
        self.transfer.sent()
        return out_TD

    def saved(self) -> tuple[Tensor | None, ...]:
        """What :class:`Backward` takes first, on the host."""
        return self._x, self._ids, self._weights, self._lora.get("x"), *self._kept


class Backward:
    """Gradients of hidden states, routing weights, LoRA's own hidden states and the LoRA factors."""

    def __init__(
        self, call: Call, weights_dtype: torch.dtype, saved: tuple[Tensor | None, ...], grad_out_TD: Tensor
    ) -> None:
        """``saved`` is :meth:`Forward.saved`, then the factors."""
        self.call, self._saved = call, saved[:6]
        factors: Any = saved[6:]
        target = _Target(grad_out_TD.device, grad_out_TD.dtype)
        self._targets = [target, target._replace(dtype=weights_dtype), target]
        self._targets += [_Target(f.device, f.dtype) for f in factors]
        self.transfer = transfer = Transfer(grad_out_TD.device)
        self._grad_out = transfer.to_host(grad_out_TD, torch.bfloat16)
        self._lora = _factors(transfer, call, factors)
        transfer.staged()

    def run(self) -> tuple[Tensor | None, ...]:
        """grad_x_TD, grad_weights_TK, grad_x_lora_TD or None, then one gradient per factor."""
        x, ids, weights, x_lora, *kept = self._saved
        assert x is not None and ids is not None and weights is not None
        lora = self._lora if x_lora is None else {**self._lora, "x": x_lora}
        self.transfer.wait()
        inputs = Inputs(self.call.packed, x, ids, weights, lora, self.call.int8, self.call.int8_gradients)
        grad_x_TD, grad_weights_TK, grad_x_lora_TD, factor_grads = self.call.kernels.backward(
            inputs, (kept[0], kept[1]), self._grad_out
        )
        grads = (grad_x_TD, grad_weights_TK, grad_x_lora_TD, *(factor_grads[n] for n in self.call.factor_names))
        sent = tuple(
            g if g is None else self.transfer.to_device(g, *target)
            for g, target in zip(grads, self._targets, strict=True)
        )
        self.transfer.sent()
        return sent
