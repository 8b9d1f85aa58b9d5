"""LoRA on a router whose class is not a Linear (transformers 5), as a PEFT layer.

Such a router computes its logits with one ``linear(x, W)`` and chooses experts from them by the family's own rules.
This layer adds the adapters' term to that product and leaves the rest to the router:

    logits (T, E) = x W^T + sum over active adapters of scaling * (dropout(x) A^T) B^T

A (R, D) and B (E, R) are ordinary Linears, so files look like those of a router that is a Linear (transformers 4).
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NoReturn

import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .lora import refuse_variants

_OPTIONS = ("lora_dropout", "init_lora_weights", "use_rslora", "lora_bias")


class RouterLora(nn.Module, LoraLayer):
    """PEFT layer around a router; its other attributes (biases, counts) are those of the router."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig) -> None:
        refuse_variants(config.init_lora_weights, vars(config))
        super().__init__()
        with warnings.catch_warnings():  # PEFT warns about every layer class it does not list
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self.out_features, self.in_features = base_layer.weight.shape  # type: ignore[misc]
        self._active_adapter = adapter_name
        newer = "config" in inspect.signature(LoraLayer.update_layer).parameters  # PEFT >= 0.19
        options: dict[str, Any] = {"config": config} if newer else {name: getattr(config, name) for name in _OPTIONS}
        self.update_layer(adapter_name, r, lora_alpha, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return self.base_layer(*args, **kwargs)
        with _AddToLinear(self, active) as mode:
            result = self.base_layer(*args, **kwargs)
        if mode.calls != 1:
            raise ValueError(
                f"LoRA on {type(self.base_layer).__name__}: expected a router with one linear product, got "
                f"{mode.calls}; leave this router out of target_modules (lora_target)"
            )
        return result

    def lora_logits(self, x: Tensor, active: list[str]) -> Tensor:
        """x (..., D) -> (..., E): the adapters' term."""
        terms = []
        for name in active:
            a: Any = self.lora_A[name]
            dropped = self.lora_dropout[name](self._cast_input_dtype(x, a.weight.dtype))
            terms.append(self.lora_B[name](a(dropped)) * self.scaling[name])
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise ValueError("merge: expected Linear layers, got a router; keep the adapter separate")

    def unmerge(self) -> NoReturn:
        raise ValueError("unmerge: adapters are never merged into routers; nothing to undo")


class _AddToLinear(TorchFunctionMode):
    """Inside, the router's ``linear`` also adds the LoRA term. Counts the calls."""

    def __init__(self, layer: RouterLora, active: list[str]) -> None:
        super().__init__()
        self.layer, self.active, self.calls = layer, active, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.calls += 1
            result = result + self.layer.lora_logits(args[0], self.active).to(result.dtype)
        return result
