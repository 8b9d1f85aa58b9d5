"""gpt-oss without a GPU: stock LLaMA-Factory asks for FlashAttention-3's kernel for it, whatever the machine.

Its attention has sinks, which torch's SDPA cannot compute, so the alternative is transformers' eager attention.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)


def patch_patcher(patcher: Any) -> None:
    """Replace ``configure_attn_implementation`` where ``patch_config`` calls it."""
    stock = patcher.configure_attn_implementation

    @functools.wraps(stock)
    def configure_attn_implementation(config: Any, model_args: Any) -> None:
        import torch

        from .llamafactory import active_config

        without_kernel = getattr(config, "model_type", None) == "gpt_oss" and not torch.cuda.is_available()
        if active_config() is None or not without_kernel:
            return stock(config, model_args)
        config._attn_implementation = config._attn_implementation_internal = "eager"
        logger.info("gpt-oss: eager attention, since FlashAttention-3 needs a GPU.")

    patcher.configure_attn_implementation = configure_attn_implementation
