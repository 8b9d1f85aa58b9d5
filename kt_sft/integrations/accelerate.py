"""Stock Accelerate: ``kt_config`` in its configuration files, and a resume that restores every adapter shard.

* ``accelerate launch --config_file F``: the ``kt_config:`` block of F is validated, taken out (stock Accelerate
  refuses unknown keys) and handed to the workers through the environment.
* accelerate < 1.15, FSDP2 + PEFT + FULL_STATE_DICT: stock code saves only rank 0's shard of every adapter tensor and
  loads it on rank 0 only. Both directions go through torch.distributed.checkpoint instead, which gathers and
  broadcasts whole tensors.
* Several processes on CPUs: Accelerate names their devices ``cpu:0``, ``cpu:1`` ..., a location that ``torch.load``
  refuses, so that the Trainer could not resume its optimizer.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from kt_sft.config import ENV_CONFIG, KtConfig


def patch_config_args(config_args: Any) -> None:
    """Accept ``kt_config`` wherever BaseConfig reads a file."""
    base = config_args.BaseConfig
    stock_process = base.process_config

    @functools.wraps(stock_process)
    def process_config(config_dict: dict[str, Any]) -> dict[str, Any]:
        block = config_dict.pop("kt_config", None)
        if block:
            export_settings(block)
        return stock_process(config_dict)

    base.process_config = staticmethod(process_config)


def export_settings(block: dict[str, Any]) -> None:
    """Validate a ``kt_config`` block and put it into this process's environment, which the workers inherit.

    It is handed over as it was written, so that a training YAML that contradicts it is noticed there.

    Raises:
        ValueError: an unknown key or value, with the nearest valid name.
    """
    if KtConfig.from_dict(block, source="kt_config of the accelerate file").enabled:
        os.environ[ENV_CONFIG] = json.dumps(block)
        os.environ["ACCELERATE_USE_KT"] = "true"


def patch_fsdp_utils(fsdp_utils: Any) -> None:
    """Save and load full adapter state dicts under FSDP2 (needed before accelerate 1.15)."""
    if _accelerate_version() >= (1, 15):
        return
    fsdp_utils._get_model_state_dict = _saving_all_shards(fsdp_utils._get_model_state_dict)
    fsdp_utils._set_model_state_dict = _loading_all_shards(fsdp_utils._set_model_state_dict)


@functools.cache
def accept_numbered_cpus() -> None:
    """Teach ``torch.load`` the map_location ``cpu:<n>``: it is the host's memory."""
    import torch

    def restore(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    torch.serialization.register_package(0, lambda storage: None, restore)


def _accelerate_version() -> tuple[int, ...]:
    return tuple(int(part) for part in version("accelerate").split(".")[:2])


def _is_ours(model: Any, adapter_only: bool, sd_options: Any) -> bool:
    """A full adapter state dict under FSDP2 of a model with packed experts; everything else stays stock."""
    if not adapter_only or sd_options is None or not sd_options.full_state_dict:
        return False
    from kt_sft.nn.experts import KtExperts

    return any(isinstance(module, KtExperts) for module in model.modules())


def _saving_all_shards(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def get(model: Any, adapter_only: bool = False, sd_options: Any = None) -> dict[str, Any]:
        if not _is_ours(model, adapter_only, sd_options):
            return stock(model, adapter_only=adapter_only, sd_options=sd_options)
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=sd_options.cpu_offload, ignore_frozen_params=True)
        return get_model_state_dict(model, options=options)

    return get


def _loading_all_shards(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def set_(model: Any, state_dict: dict[str, Any], adapter_only: bool = False, sd_options: Any = None) -> Any:
        if not _is_ours(model, adapter_only, sd_options):
            return stock(model, state_dict, adapter_only=adapter_only, sd_options=sd_options)
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        _check_names(model, state_dict)
        options = StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=sd_options.broadcast_from_rank0, strict=False
        )
        return set_model_state_dict(model, state_dict, options=options)

    return set_


def _check_names(model: Any, state_dict: dict[str, Any]) -> None:
    """``strict=False`` (frozen weights are not in the file) would also hide a file that holds nothing of this model."""
    missing = [n for n, p in model.named_parameters() if p.requires_grad and n not in state_dict]
    if state_dict and missing:
        raise ValueError(
            f"checkpoint: {len(missing)} trainable tensors of the model are missing, the first is {missing[0]!r}; the "
            f"file holds {next(iter(state_dict))!r}. Resume from a checkpoint that kt_sft wrote, or start from "
            "adapter_name_or_path."
        )
