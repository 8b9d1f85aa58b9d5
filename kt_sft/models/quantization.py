"""What transformers hears about the quantisation of a checkpoint whose experts are packed here.

``quantization_config`` makes transformers (and LLaMA-Factory before it) call for the quantiser's package and exchange
Linear layers. Where routed experts are all that is quantised (Kimi-K2-Thinking, gpt-oss), nothing of that is left to
do: the key is taken out of config.json's content while it is read. Where attention or shared experts are quantised
too, it stays, and they are transformers' task.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..weights.formats import open_checkpoint

logger = logging.getLogger(__name__)

_COMPANION = re.compile(r"\.(weight_scale|weight_scale_inv|weight_packed|qweight|scale)$|_(blocks|scales|scale_inv)$")
_ROUTED = re.compile(r"(^|\.)experts\.")


def quantised_beside_experts(names: Iterable[str]) -> list[str]:
    """The tensors, by their checkpoint names, that quantise something else than routed experts."""
    return [name for name in names if _COMPANION.search(name) and not _ROUTED.search(name)]


@contextmanager
def forgotten_quantised_experts(local: Callable[[str], str]) -> Iterator[None]:
    """Inside, configurations are read without ``quantization_config`` if it concerns routed experts only.

    ``local`` gives the folder of a model's name.
    """
    import transformers

    base: Any = transformers.PretrainedConfig
    stock = base.__dict__["get_config_dict"]

    def get_config_dict(cls: type, name: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, rest = stock.__func__(cls, name, *args, **kwargs)
        owners = [owner for owner in (config, config.get("text_config")) if isinstance(owner, dict)]
        quantised = [owner for owner in owners if owner.get("quantization_config")]
        if quantised:
            others = quantised_beside_experts(open_checkpoint(local(name)).names())
            if others:
                logger.info("%s: quantised beside the experts, as transformers does it: e.g. %s", name, others[0])
            for owner in quantised if not others else ():
                del owner["quantization_config"]
        return config, rest

    base.get_config_dict = classmethod(get_config_dict)
    try:
        yield
    finally:
        base.get_config_dict = stock
