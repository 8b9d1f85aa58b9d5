"""Adapters below the one that is trained or served: what stock LLaMA-Factory merges, packed experts keep apart.

``adapter_name_or_path: a,b`` continues (or serves) b on the model with a merged into it; ``create_new_adapter: true``
merges all of them and trains a new one. An adapter cannot be merged into packed experts, and need not be: the frozen
ones stay active beside the adapter "default",

    y = x W^T + sum over the adapters of scaling * (x A^T) B^T

Only "default" is trained and saved. ``disable_adapter()``, the reference of DPO and KTO, switches off "default" alone,
because stock's reference is the merged model too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


def keeping_adapters_apart(stock_setup: Callable, is_active: Callable[[], bool]) -> Callable:
    """Wrap llamafactory.model.adapter's ``_setup_lora_tuning``, while ``is_active()``."""

    @functools.wraps(stock_setup)
    def setup(config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool, *rest: Any) -> Any:
        paths = model_args.adapter_name_or_path
        below = adapters_below(paths or [], is_trainable and finetuning_args.create_new_adapter)
        if not (below and is_active()):
            return stock_setup(config, model, model_args, finetuning_args, is_trainable, *rest)
        model_args.adapter_name_or_path = paths[len(below) :] or None
        try:
            model = stock_setup(config, model, model_args, finetuning_args, is_trainable, *rest)
        finally:
            model_args.adapter_name_or_path = paths
        put_below(
            model,
            below,
            subfolder=model_args.adapter_folder,
            cache_dir=model_args.cache_dir,
            token=model_args.hf_hub_token,
        )
        return model

    return setup


def adapters_below(paths: list[str], create_new: bool) -> list[str]:
    """The adapters that stay as they are: all of them under a new one, else all but the last."""
    return paths if create_new else paths[:-1]


def put_below(model: Any, paths: list[str], **options: Any) -> None:
    """Load ``paths`` as frozen adapters that are active together with "default".

    Raises:
        ValueError: an adapter that holds whole modules (modules_to_save): only one copy of a module can be active.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    names = []
    for number, path in enumerate(paths):
        names.append(f"below_{number}")
        model.load_adapter(path, names[-1], is_trainable=False, **options)
        if model.peft_config[names[-1]].modules_to_save:
            raise ValueError(
                f"adapter_name_or_path: expected adapters with LoRA factors only below another one, got {path} with "
                f"modules_to_save {list(model.peft_config[names[-1]].modules_to_save)}; give it alone"
            )
    for parameter in model.parameters():  # loading a frozen adapter freezes the layers that it shares
        parameter.requires_grad_(id(parameter) in trainable)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._active_adapter = ["default", *names]
        dropouts: Any = getattr(layer, "lora_dropout", {})
        for name in names:
            if name in dropouts:
                dropouts[name] = nn.Identity()  # as if merged
    model.disable_adapter = functools.partial(_without_default, model, names)
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=["default"])
    logger.info("Frozen below the adapter: %s. Give them together when you use it.", ", ".join(paths))


@contextmanager
def _without_default(model: Any, names: list[str]) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    copies = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    try:
        for layer in layers:
            layer._active_adapter = names
        for copy in copies:
            copy.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer._active_adapter = ["default", *names]
        for copy in copies:
            copy.enable_adapters(True)
