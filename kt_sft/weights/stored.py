"""One matrix of a checkpoint under its published name: which companion tensors it has, checked reads of them.

A matrix is named as in an unquantised checkpoint, ``...gate_proj.weight`` or (stacked) ``...gate_up_proj``; what a
format puts in its place has another suffix: ``weight_scale_inv``, ``qweight``, ``blocks`` ... In a stack of all experts
``index`` picks one, and shapes are those of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .gguf import GgufCheckpoint
from .quantized import PEAK, SCALES_BELOW, QuantizedWeight

_DAMAGED = "; the checkpoint is damaged: download it again"


def partner(name: str, suffix: str) -> str:
    """The tensor that holds ``suffix`` of the matrix ``name``.

    ``a.gate_proj.weight``, ``qweight`` -> ``a.gate_proj.qweight``; ``a.gate_up_proj``, ``weight_scale`` ->
    ``a.gate_up_proj_scale``; ``a.gate_up_proj``, ``blocks`` -> ``a.gate_up_proj_blocks``.
    """
    if name.endswith(".weight"):
        return name.removesuffix("weight") + suffix
    rest = suffix.removeprefix("weight").lstrip("_")
    return f"{name}_{rest}" if rest else name


def matrix_of(tensor: str, suffix: str) -> str | None:
    """The matrix whose ``suffix`` this tensor is, by its name; None if it is none: the inverse of ``partner``."""
    if tensor.endswith(f".{suffix}"):
        return tensor.removesuffix(suffix) + "weight"
    return tensor.removesuffix(f"_{suffix}") if tensor.endswith(f"_{suffix}") else None


@dataclass(frozen=True)
class Stored:
    """The matrix ``name``, or matrix ``index`` of the stack ``name``."""

    checkpoint: Checkpoint
    name: str
    index: int | None = None

    @property
    def is_gguf(self) -> bool:
        return isinstance(self.checkpoint, GgufCheckpoint)

    def has(self, suffix: str) -> bool:
        return partner(self.name, suffix) in self.checkpoint

    def dtype(self, suffix: str) -> str:
        return self.checkpoint.dtype(partner(self.name, suffix))

    def shape(self, suffix: str) -> tuple[int, ...]:
        shape = self.checkpoint.shape(partner(self.name, suffix))
        return shape if self.index is None else shape[1:]

    def read(self, suffix: str) -> Tensor:
        name = partner(self.name, suffix)
        return self.checkpoint.read(name) if self.index is None else self.checkpoint.read_slice(name, self.index)

    def read_bytes(self, suffix: str) -> Tensor:
        return self.checkpoint.read_bytes(partner(self.name, suffix), self.index)

    def error(self, suffix: str, expected: Any, got: Any, *, of_all: bool = False) -> ValueError:
        name = partner(self.name, suffix)
        expert = "" if self.index is None or of_all else f", expert {self.index}"
        file = self.checkpoint.entry(name).file if name in self.checkpoint else self.checkpoint.folder
        return ValueError(f"{file}: tensor {name!r}{expert}: expected {expected}, got {got}")

    def require(self, suffix: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Raise ValueError unless the tensor exists with one of these dtypes and shapes (of one matrix)."""
        entry = self.checkpoint.entry(partner(self.name, suffix))
        if entry.dtype not in dtypes:
            raise self.error(suffix, f"dtype {' or '.join(dtypes)}", entry.dtype, of_all=True)
        if self.index is not None and (len(entry.shape) < 2 or not self.index < entry.shape[0]):
            raise self.error(suffix, f"a stack of more than {self.index} experts", f"shape {list(entry.shape)}")
        if self.shape(suffix) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            each = "" if self.index is None else " for each expert"
            raise self.error(suffix, f"shape {wanted}{each}", list(self.shape(suffix)), of_all=True)

    def require_finite(self, suffix: str, values: Tensor, what: str = "values") -> None:
        if not torch.isfinite(values).all():
            found = "NaN" if torch.isnan(values).any() else "Inf"
            raise self.error(suffix, f"finite {what}", f"{found}{_DAMAGED}")

    def require_scales(self, suffix: str, weight: QuantizedWeight, *, positive: bool) -> None:
        """Raise ValueError if a scale is NaN, too large or, with ``positive``, is zero or less.

        Most quantisers never write zero; a hole in a download reads as zeros.
        """
        scales = weight.scale_values()
        self.require_finite(suffix, scales * PEAK[weight.kind], "scales")
        limit = SCALES_BELOW.get(weight.kind)
        if limit is not None and scales.abs().max() >= limit:
            raise self.error(suffix, f"scales below {limit:g}", f"{scales.abs().max().item():g}{_DAMAGED}")
        if positive and scales.min() <= 0:
            raise self.error(suffix, "scales above zero", f"{scales.min().item():g}{_DAMAGED}")

    @property
    def schemes(self) -> list[dict[str, Any]]:
        """compressed-tensors' settings of weights in config.json."""
        groups = self.checkpoint.quantization_config.get("config_groups")
        found = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        return [scheme for scheme in found if isinstance(scheme, dict)]
