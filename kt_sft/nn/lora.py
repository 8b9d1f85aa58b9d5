"""LoRA on one projection of packed experts, as a PEFT layer.

Per adapter it holds ``lora_A`` (E, R, in) and ``lora_B`` (E, out, R): ordinary parameters inside the decoder layer, so
optimizer, clipping, saving, resuming and FSDP2 (dim 0 = experts) treat them as any other. For expert e the projection
becomes

    y = x W_e^T + scaling * (dropout(x) A_e^T) B_e^T,      scaling = alpha / R, or alpha / sqrt(R) with rsLoRA

which ``KtExperts`` computes; this layer only hands out the factors of its active adapters. Merging into the packed
(possibly quantised) weights is deliberately not offered.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NoReturn

import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from torch import nn

from .experts import KtExpertsLinear, LoraTerm


class ExpertFactor(nn.Module):
    """One LoRA factor for all experts: ``weight`` (E, rows, columns)."""

    def __init__(self, num_experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, rows, columns))

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("a LoRA factor of packed experts is computed by KtExperts, got a direct call; call the model")


class ExpertsLinearLora(nn.Module, LoraLayer):
    """PEFT layer around a ``KtExpertsLinear``. The class name keeps PEFT's convention that "Linear" marks a target."""

    def __init__(
        self, base_layer: KtExpertsLinear, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig
    ) -> None:
        super().__init__()
        with warnings.catch_warnings():  # PEFT warns about every layer class it does not list
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig | None = None, **options: Any
    ) -> None:
        """Add an adapter with the settings of ``config`` (PEFT 0.18 passes them one by one, as ``options``)."""
        settings = options if config is None else vars(config)
        init_lora_weights, use_rslora = settings["init_lora_weights"], settings["use_rslora"]
        lora_dropout, inference_mode = settings["lora_dropout"], settings.get("inference_mode", False)
        if r <= 0:
            raise ValueError(f"r: expected a positive rank, got {r}; set lora_rank to at least 1")
        refuse_variants(init_lora_weights, settings)
        base: Any = self.get_base_layer()
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.use_rslora[adapter_name] = use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self.lora_A[adapter_name] = ExpertFactor(base.num_experts, r, base.in_features)
        self.lora_B[adapter_name] = ExpertFactor(base.num_experts, base.out_features, r)
        self.reset_lora_parameters(adapter_name, init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """PEFT's initialisation, per expert: A uniform as nn.Linear (or normal with std 1/r), B zero; False: both."""
        a, b = self._factors(adapter_name)
        bound_a, bound_b = 1 / math.sqrt(a.shape[2]), 1 / math.sqrt(b.shape[2])
        if init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / self.r[adapter_name])
        else:
            nn.init.uniform_(a, -bound_a, bound_a)
        if init_lora_weights is False:
            nn.init.uniform_(b, -bound_b, bound_b)
        else:
            nn.init.zeros_(b)

    def lora_terms(self) -> list[LoraTerm]:
        """The active adapters of this projection; none while adapters are disabled."""
        if self.disable_adapters:
            return []
        terms = []
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self._factors(name)
                dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
                terms.append(LoraTerm(a=a, b=b, scaling=self.scaling[name], dropout=dropout))
        return terms

    def _factors(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        a: Any = self.lora_A[adapter_name]
        b: Any = self.lora_B[adapter_name]
        return a.weight, b.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)  # raises: the parent computes

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "merge: expected adapters on unpacked weights, got packed (frozen, possibly quantised) experts; keep the "
            "adapter separate (it loads beside the base model), or merge it into the original checkpoint"
        )

    def unmerge(self) -> None:
        raise ValueError("unmerge: adapters are never merged into packed experts; nothing to undo")


# Settings of LoraConfig (and of update_layer in PEFT 0.18) that make another method of it.
_VARIANTS = (
    *("use_dora", "use_alora", "alora_invocation_tokens", "use_qalora", "use_bdlora", "lora_bias"),
    *("arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)


def refuse_variants(init_lora_weights: bool | str, settings: dict[str, Any]) -> None:
    wanted = [name for name in _VARIANTS if settings.get(name)]
    if isinstance(init_lora_weights, str) and init_lora_weights != "gaussian":
        wanted.append(f"init_lora_weights={init_lora_weights!r} (it needs the unpacked weight)")
    if wanted:
        raise ValueError(
            f"LoRA on packed experts and their routers: expected plain LoRA or rsLoRA with default, gaussian or False "
            f"initialisation, got {' and '.join(wanted)}; drop it, or leave them out of target_modules"
        )
