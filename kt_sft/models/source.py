"""What transformers gets to see of a checkpoint: one without quantisation, under a model type that it knows.

``quantization_config`` makes transformers (and LLaMA-Factory before it) call for the quantiser's package or a GPU and
exchange Linear layers. Routed experts are packed here whatever they are stored as; where they are all that is quantised
(Kimi-K2-Thinking, gpt-oss), nothing is left to do. Where attention or shared experts are quantised too (DeepSeek-V3,
MiniMax-M2), transformers is led to a dequantised copy (weights/plain.py).

A few models are published under a model type of their own, with code beside the weights, though their architecture is
one that transformers has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import KtConfig
from ..weights.checkpoint import read_settings
from ..weights.formats import open_checkpoint
from ..weights.plain import passing_copy, plain_copy, quantised_matrices
from .fitting import require_fitting

# The checkpoint's architectures entry says so too: DeepseekV3ForCausalLM.
SAME_AS = {"kimi_k2": "deepseek_v3"}
_ROUTED = re.compile(r"(^|\.)experts\.")


def native_type(config: dict[str, Any]) -> str | None:
    """The model type of transformers' own class for this config.json; None if only remote code has one."""
    from transformers import CONFIG_MAPPING

    names = (config.get("model_type"), SAME_AS.get(config.get("model_type", "")))
    return next((name for name in names if name in CONFIG_MAPPING), None)


@contextmanager
def unquantised_configurations() -> Iterator[None]:
    """Inside, configurations are read without ``quantization_config``, and with transformers' own model type."""
    import transformers

    base: Any = transformers.PretrainedConfig
    stock = base.__dict__["get_config_dict"]

    def get_config_dict(cls: type, name: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if name is not None:
            read_settings(Path(name))  # transformers would stumble over what is no JSON object
        config, rest = stock.__func__(cls, name, *args, **kwargs)
        for owner in (config, config.get("text_config")):
            if isinstance(owner, dict):
                owner.pop("quantization_config", None)
                owner.pop("compression_config", None)
        if config.get("model_type") in SAME_AS and native_type(config) is not None:
            config["model_type"] = native_type(config)
            config.pop("auto_map", None)
        return config, rest

    base.get_config_dict = classmethod(get_config_dict)
    try:
        yield
    finally:
        base.get_config_dict = stock


@contextmanager
def readable_weights(name: Any, local: Callable[[Any], str], config: KtConfig) -> Iterator[Any]:
    """The folder that transformers shall read the weights of ``name`` from: its own, or that of a dequantised copy.

    ``local`` gives the folder of a model's name.

    Raises:
        ValueError: config.json and the tensors are not of one model, or something beside the experts is quantised in
            a way that cannot be read.
        OSError: the copy cannot be written.
    """

    def is_expert(tensor: str) -> bool:
        return bool(_ROUTED.search(tensor)) or any(rule.owns(tensor) for rule in config.family_rules)

    folder = None if name is None else local(name)
    if folder is None or not Path(folder).is_dir():
        yield name
        return
    checkpoint = open_checkpoint(folder)
    require_fitting(checkpoint)
    if not checkpoint.quantization_config or not quantised_matrices(checkpoint, is_expert):
        yield name
    elif config.cache_folder is None:
        with passing_copy(folder, is_expert) as path:
            yield str(path)
    else:
        yield str(plain_copy(folder, config.cache_folder, is_expert))
