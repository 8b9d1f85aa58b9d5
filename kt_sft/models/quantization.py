"""What transformers hears about the quantisation of a checkpoint whose experts are packed here.

``quantization_config`` makes transformers call for its quantiser's package and exchange Linear layers. Where routed
experts are all that is quantised (Kimi-K2-Thinking, gpt-oss), nothing of that is left to do: it is taken out of the
configuration. Where attention or shared experts are quantised too, it stays, and they are transformers' task.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from ..weights.checkpoint import Checkpoint
from ..weights.formats import open_checkpoint

logger = logging.getLogger(__name__)

_COMPANION = re.compile(r"\.(weight_scale|weight_scale_inv|weight_packed|qweight|scale)$|_(blocks|scales|scale_inv)$")
_ROUTED = re.compile(r"(^|\.)experts\.|_exps\.")


def quantised_beside_experts(names: Iterable[str]) -> list[str]:
    """The tensors, by their checkpoint names, that quantise something else than routed experts."""
    return [name for name in names if _COMPANION.search(name) and not _ROUTED.search(name)]


def forget_quantised_experts(config: Any, directory: str) -> None:
    """Take ``quantization_config`` out of the model's configuration if only routed experts in ``directory`` have it."""
    if getattr(config, "quantization_config", None) is None:
        return
    checkpoint: Checkpoint = open_checkpoint(directory)
    others = quantised_beside_experts(checkpoint.names())
    if others:
        logger.info(
            "%s: %d other quantised tensors, e.g. %s, are left to transformers", directory, len(others), others[0]
        )
    else:
        del config.quantization_config
