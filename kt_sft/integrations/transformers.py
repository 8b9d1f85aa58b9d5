"""What a plain script calls: a Hugging Face model with packed experts that stock PEFT can adapt.

The functions are those of ``models.convert``; in addition PEFT, where it is installed, learns to handle packed experts.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from ..config import KtConfig
from ..models import convert


def from_pretrained(
    path: str | os.PathLike[str], *, config: KtConfig | dict[str, Any] | None = None, **options: Any
) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` with the routed experts packed on the CPU.

    ``options`` that are fields of ``KtConfig`` (``weight_format="int4"``, ``activation_policy="recompute"`` ...)
    override ``config``; the others go to transformers. ValueError for a model whose experts are not supported.
    """
    _prepare_peft()
    return convert.from_pretrained(path, config=config, **options)


def convert_model(model: Any, config: KtConfig | dict[str, Any] | None = None, **options: Any) -> Any:
    """Pack the routed experts of a loaded Hugging Face model in place; returns the model."""
    _prepare_peft()
    return convert.convert_model(model, config, **options)


def _prepare_peft() -> None:
    if find_spec("peft") is not None:
        from . import peft

        peft.install()
