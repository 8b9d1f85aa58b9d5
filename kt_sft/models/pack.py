"""Pack the experts of a checkpoint into a folder that ``weight_path`` accepts, without loading the rest of the model.

The model is built on the meta device, for the names and sizes of its experts modules only; then everything is as in
``fill_experts``: streaming, resumable, checked at the end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import KtConfig
from ..nn.experts import KtExperts
from ..weights.loader import SUFFIX
from .convert import fill_experts, local_path, ruled_tensors, set_threads, swap_experts
from .source import unquantised_configurations


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What a folder of packed experts holds for a model."""

    files: list[Path]
    layers: int
    nbytes: int


def pack_checkpoint(
    model: str | os.PathLike[str],
    config: KtConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Packed:
    """Pack the experts of a folder or hub name into ``config.weight_path``.

    Raises:
        ValueError: the model has no supported experts, or its checkpoint is not whole.
        OSError: the folder cannot be written.
    """
    folder = local_path(model, revision)
    set_threads(config)
    empty = build_empty(folder, config, trust_remote_code=trust_remote_code)
    fill_experts(empty, folder, config)
    return describe(empty, config)


def build_empty(folder: str, config: KtConfig, *, trust_remote_code: bool = False) -> Any:
    """The model that the folder's config.json describes, on the meta device, with empty ``KtExperts``."""
    import transformers

    with unquantised_configurations():
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    names = getattr(settings, "architectures", None) or [""]
    model_class: Any = getattr(transformers, names[0], None)
    with torch.device("meta"):
        if model_class is not None:
            model = model_class._from_config(settings)
        else:
            model = transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    swap_experts(model, config, ruled_tensors(folder, config, None))
    return model


def describe(model: Any, config: KtConfig) -> Packed:
    """What was packed for the filled ``model``."""
    assert config.weight_path is not None
    layers = [m for m in model.modules() if isinstance(m, KtExperts)]
    files = sorted(Path(config.weight_path).expanduser().glob(f"*{SUFFIX}"))
    return Packed(files=files, layers=len(layers), nbytes=sum(m.packed.nbytes for m in layers))
