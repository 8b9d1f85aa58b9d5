"""In which formats a model's experts are packed, in words: one format, or which layers have which."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import nn

from ..nn.experts import KtExperts


def formats_in_words(model: nn.Module) -> str:
    """``int8``, or ``fp8 (layers 3-60), bf16 (layer 61)``; ``q4_k/q4_k/q6_k`` is gate's, up's and down's."""
    layers: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, KtExperts):
            number = re.findall(r"\.(\d+)\.", f".{path}.")
            layers.setdefault(module.packed.weight_format, []).append(number[-1] if number else path)
    if len(layers) == 1:
        return next(iter(layers))
    return ", ".join(f"{name} (layer{'s' if len(of) > 1 else ''} {_runs(of)})" for name, of in layers.items())


def _runs(names: Iterable[str]) -> str:
    """3, 4, 5, 8 -> 3-5, 8; what is no number stays as it is."""
    parts = []
    for _, run in groupby(enumerate(names), key=_distance):
        of_run = [name for _, name in run]
        parts.append(of_run[0] if len(of_run) == 1 else f"{of_run[0]}-{of_run[-1]}")
    return ", ".join(parts)


def _distance(item: tuple[int, str]) -> Any:
    index, name = item
    return int(name) - index if name.isdigit() else name
