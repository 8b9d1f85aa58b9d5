"""How a checkpoint stores its weights, from ``quantization_config``: bytes per weight of experts and of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ops.layout import MatrixFormat
from .model import ModelParts

_WIDTH = {"float32": 4, "fp32": 4, "float": 4, "bfloat16": 2, "float16": 2, "bf16": 2, "fp16": 2}
_NEVER_QUANTISED = ("embeddings and head", "routers", "norms", "other", "vision and audio")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes per weight, scales included. ``rest`` applies to attention, shared experts and dense MLPs.

    ``kept``: the packed format that holds the experts as they are stored; None where they are not quantised.
    """

    name: str
    experts: float
    rest: float
    width: int = 2  # bytes of whatever is not quantised
    kept: MatrixFormat | None = None

    def nbytes(self, parts: ModelParts) -> int:
        """Size of the checkpoint."""
        return round(self.expert_bytes(parts) + self.rest_bytes(parts))

    def expert_bytes(self, parts: ModelParts) -> float:
        weights = sum(group.weights for group in parts.experts)
        return weights * self.experts + (parts.expert_parameters - weights) * self.width

    def rest_bytes(self, parts: ModelParts) -> float:
        kept = sum(count for name, count in parts.rest.items() if name in _NEVER_QUANTISED)
        return kept * self.width + (parts.rest_parameters - kept) * self.rest

    def copy_bytes(self, parts: ModelParts) -> int:
        """The BF16 copy of everything but the experts (weights/plain.py), where that is quantised too."""
        return 2 * parts.rest_parameters if self.rest < self.width else 0


def storage(config: dict[str, Any]) -> Storage:
    """The storage that config.json declares. ValueError for a quantisation that is not known, with its name."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    dtype = str(config.get("dtype") or config.get("torch_dtype") or (text or {}).get("dtype") or "bfloat16")
    width = _WIDTH.get(dtype.removeprefix("torch."), 2)
    quantization = config.get("quantization_config")
    if not quantization:
        name = "fp32" if width == 4 else dtype.removeprefix("torch.").replace("float", "f")
        return Storage(name=name, experts=width, rest=width, width=width)
    method = str(quantization.get("quant_method", "")).lower()
    if method == "fp8":
        rows, columns = quantization.get("weight_block_size") or (1, 1 << 30)
        size = 1 + 4 / (rows * columns)
        kept = MatrixFormat("fp8", columns) if rows > 1 else MatrixFormat("fp8_channel", 0)
        return Storage(name=f"fp8, scales per {rows} x {columns}", experts=size, rest=size, kept=kept)
    if method == "mxfp4":
        return Storage(name="mxfp4", experts=0.5 + 1 / 32, rest=width, kept=MatrixFormat("mxfp4", 32))
    if method == "compressed-tensors":
        return _compressed(quantization, width)
    if method in ("gptq", "awq"):
        bits, group = int(quantization.get("bits", 4)), int(quantization.get("group_size") or 128)
        size = bits / 8 + (2 + bits / 8) / group
        exact = MatrixFormat("uint4_fp16", max(group, 0)) if bits == 4 else None
        return Storage(name=f"{method} int{bits}, group {group}", experts=size, rest=size, kept=exact)
    raise ValueError(
        f"quantization_config: expected quant_method fp8, mxfp4, compressed-tensors, gptq or awq, got {method!r}; "
        "plan with the config.json of the BF16 checkpoint"
    )


def _compressed(quantization: dict[str, Any], width: int) -> Storage:
    groups = quantization.get("config_groups") or {}
    weights = next((g.get("weights") or {} for g in groups.values() if isinstance(g, dict)), {})
    bits, group = weights.get("num_bits"), weights.get("group_size")
    if not isinstance(bits, int):
        raise ValueError(
            f"quantization_config: expected config_groups with weights.num_bits, got {groups!r}; "
            "plan with the config.json of the BF16 checkpoint"
        )
    size = bits / 8 + (2 / group if isinstance(group, int) and group > 0 else 0)
    kind = "fp" if weights.get("type") == "float" else "int"
    experts_only = any("attn" in str(pattern) for pattern in quantization.get("ignore") or [])
    scales = f"group {group}" if isinstance(group, int) and group > 0 else "per channel"
    rest = width if experts_only else size
    kept = {("int", 4): MatrixFormat("int4_sym", group or 0), ("fp", 8): MatrixFormat("fp8_channel", 0)}.get(
        (kind, bits)
    )
    return Storage(name=f"{kind}{bits}, {scales}", experts=size, rest=rest, width=width, kept=kept)
