"""From LLaMA-Factory's arguments to a KtConfig.

LLaMA-Factory 0.9.5 knows ``use_kt`` and a few ``kt_*`` fields; every other ``kt_*`` key and the ``kt_config`` block
would be refused by its parser. :func:`take_settings` lifts them out of the arguments (a dict from YAML or JSON, or a
list from the command line), :func:`resolve` decides whether kt_sft is on and validates them, and
:func:`refuse_unsupported` names options that frozen packed experts cannot honour.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from kt_sft.config import KtConfig

from .llamafactory_adapters import adapters_below

logger = logging.getLogger(__name__)

Args = dict[str, Any] | list[str]

SWITCH = "use_kt"
BLOCK = "kt_config"


def _is_ours(key: str) -> bool:
    return key == SWITCH or key.startswith("kt_")


def take_settings(args: Args, known: Collection[str]) -> tuple[Args, dict[str, Any]]:
    """Split ``args`` into what LLaMA-Factory may see and our settings (``use_kt`` included, ``kt_config`` flattened).

    Keys in ``known`` (fields of LLaMA-Factory's dataclasses) stay in the arguments as well.

    Raises:
        ValueError: ``kt_config`` is not a mapping, or a key has two different values.
    """
    if isinstance(args, dict):
        rest: Args = {k: v for k, v in args.items() if not _is_ours(k) or k in known}
        found = {k: v for k, v in args.items() if _is_ours(k)}
    else:
        rest, found = _split_command_line(args, known)

    block = found.pop(BLOCK, None) or {}
    if not isinstance(block, Mapping):
        raise ValueError(f"{BLOCK}: expected a mapping of kt_* keys, got {block!r}.")
    for key in block.keys() & found.keys():
        if block[key] != found[key]:
            raise ValueError(f"{key}: {found[key]!r} beside {BLOCK} but {block[key]!r} inside it; keep one of them.")
    return rest, {k: v for k, v in {**block, **found}.items() if v is not None}


def _split_command_line(args: list[str], known: Collection[str]) -> tuple[list[str], dict[str, Any]]:
    import yaml

    rest: list[str] = []
    found: dict[str, Any] = {}
    i = 0
    while i < len(args):
        name, equals, value = args[i].partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        has_next = not equals and i + 1 < len(args) and not args[i + 1].startswith("--")
        tokens = args[i : i + 2] if has_next else args[i : i + 1]
        if _is_ours(key):
            found[key] = yaml.safe_load(value or tokens[-1]) if equals or has_next else True
        if not _is_ours(key) or key in known:
            rest += tokens
        i += len(tokens)
    return rest, found


def resolve(args: Args, settings: dict[str, Any]) -> tuple[Args, KtConfig | None]:
    """Decide whether kt_sft is on; return the arguments with ``use_kt`` set accordingly and the validated config.

    An explicit ``use_kt`` decides. Without it, ``USE_KT=1`` or an accelerate file with an enabled ``kt_config``
    turn kt_sft on, and a log line says so.

    Raises:
        ValueError: an unknown key or value, or ``kt_*`` keys while nothing turns kt_sft on.
    """
    settings = dict(settings)
    switch = settings.pop(SWITCH, None)
    if switch is None:
        reason = _environment_switch()
        if reason is not None:
            logger.info("%s is set and %s is not: kt_sft turns %s on.", reason, SWITCH, SWITCH)
            switch = True
            args = {**args, SWITCH: True} if isinstance(args, dict) else [*args, f"--{SWITCH}", "true"]
        elif settings:
            raise ValueError(f"{sorted(settings)[0]} is given but {SWITCH} is not: add `{SWITCH}: true`.")
    if not switch:
        if settings:
            logger.warning("%s is false: %s not used.", SWITCH, ", ".join(sorted(settings)))
        return args, None
    return args, _validated(settings)


def _validated(settings: dict[str, Any]) -> KtConfig:
    """The settings of the arguments together with those that accelerate launch left in the environment."""
    inherited, source = KtConfig.env_settings(), _source()
    for key in inherited.keys() & settings.keys():
        if inherited[key] != settings[key]:
            raise ValueError(
                f"{source}: {key}: {settings[key]!r} contradicts {inherited[key]!r} in the accelerate file; keep one."
            )
    if inherited:
        source += " with the accelerate file"
    config = KtConfig.from_dict({**inherited, **settings}, source=source)
    if not config.enabled:
        raise ValueError(f"{source}: {SWITCH} is on but kt_config says enabled: false; keep one of them.")
    return config


def _environment_switch() -> str | None:
    for name in ("USE_KT", "ACCELERATE_USE_KT"):
        if os.environ.get(name, "0").lower() in ("true", "y", "1"):
            return name
    return None


def _source() -> str:
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    return first if first.endswith((".yaml", ".yml", ".json")) else "the arguments"


class _Refusal(NamedTuple):
    owner: str  # model, finetuning or training arguments
    name: str
    bad: Callable[[Any], bool]
    reason: str
    remedy: str
    training_only: bool = False


def _set(value: Any) -> bool:
    return value not in (None, False)


_REFUSALS = (
    _Refusal(
        "finetuning",
        "finetuning_type",
        lambda v: v != "lora",
        "routed experts are frozen",
        "finetuning_type: lora",
        True,
    ),
    _Refusal(
        "finetuning",
        "stage",
        lambda v: v == "ppo",
        "PPO of LLaMA-Factory 0.9.5 needs trl 0.9.6 or older, everything else of it a newer one",
        "stage: dpo or kto",
    ),
    _Refusal(
        "finetuning", "use_dora", _set, "DoRA needs the norm of merged dense experts", "plain LoRA or use_rslora: true"
    ),
    _Refusal("finetuning", "pissa_init", _set, "PiSSA rewrites the base weights", "the default LoRA initialisation"),
    _Refusal("finetuning", "use_mca", _set, "Megatron has its own experts", "USE_MCA unset"),
    _Refusal("finetuning", "use_hyper_parallel", _set, "it has its own model loading", "use_hyper_parallel: false"),
    _Refusal(
        "model",
        "quantization_bit",
        _set,
        "routed experts are kept in their own packed format",
        "kt_config: {kt_expert_weight_format: int8} (or int4) without quantization_bit",
    ),
    _Refusal("model", "use_unsloth", _set, "unsloth replaces the model classes", "use_unsloth: false"),
    _Refusal("model", "enable_liger_kernel", _set, "Liger replaces experts classes", "enable_liger_kernel: false"),
    _Refusal("model", "use_v1_kernels", _set, "they replace experts classes", "use_v1_kernels: false"),
    _Refusal("model", "mixture_of_depths", _set, "it rewrites the decoder layers", "mixture_of_depths unset"),
    _Refusal("model", "train_from_scratch", _set, "packed experts come from a checkpoint", "train_from_scratch: false"),
    _Refusal(
        "model",
        "infer_backend",
        lambda v: getattr(v, "value", v) not in (None, "huggingface"),
        "kt_sft serves through transformers",
        "infer_backend: huggingface, or this backend without use_kt",
    ),
    _Refusal("training", "fp8", _set, "FP8 training replaces the linear layers", "bf16: true"),
)


def refuse_unsupported(model_args: Any, finetuning_args: Any, training_args: Any = None) -> None:
    """Raise for the first option that cannot work with packed experts (``training_args`` is None for inference).

    Raises:
        ValueError: with the option, its value, the reason and the nearest thing that works.
    """
    owners = {"model": model_args, "finetuning": finetuning_args, "training": training_args}
    training = training_args is not None and training_args.do_train
    for owner, name, bad, reason, remedy, training_only in _REFUSALS:
        value = getattr(owners[owner], name, None)
        if value is None or (training_only and not training) or not bad(value):
            continue
        raise ValueError(f"{name}: {value!r} cannot be used with {SWITCH}: {reason}. Use {remedy}.")
    if training:
        _refuse_combinations(model_args, finetuning_args, training_args)
    if training_args is not None and _zero3():
        raise ValueError(
            f"DeepSpeed ZeRO-3 cannot be used with {SWITCH}: it partitions every module's parameters on its own. "
            "Use ZeRO-2, or FSDP2 with configs/accelerate/fsdp2_kt_int8.yaml."
        )
    if training_args is not None and _fsdp1(training_args):
        raise ValueError(
            f"FSDP version 1 cannot be used with {SWITCH}: it flattens the experts' LoRA factors one by one, outside "
            "of the layer that computes with them. Use fsdp_version: 2, as in configs/accelerate/fsdp2_kt_int8.yaml."
        )


def _refuse_combinations(model_args: Any, finetuning_args: Any, training_args: Any) -> None:
    below = adapters_below(model_args.adapter_name_or_path or [], finetuning_args.create_new_adapter)
    if below and finetuning_args.lora_dropout > 0:
        raise ValueError(
            f"lora_dropout: {finetuning_args.lora_dropout} cannot be used with {SWITCH} while a frozen adapter "
            f"({below[0]}) stays below the trained one: the experts take one dropout for all. Use lora_dropout: 0."
        )
    if finetuning_args.stage == "rm" and _fsdp(training_args):
        raise ValueError(
            "stage: 'rm' cannot be used with FSDP2: trl's value-head model hides all other weights from the state "
            "dict that Accelerate shards. Use DDP (torchrun, configs/accelerate/ddp_cpu.yaml) or DeepSpeed ZeRO-2 "
            "(deepspeed: configs/deepspeed/zero2.json)."
        )
    if _fsdp(training_args):
        _keep_state_dicts_whole()
    if model_args.moe_aux_loss_coef:
        _refuse_ineffective_router_loss(model_args, finetuning_args, training_args)


def _refuse_ineffective_router_loss(model_args: Any, finetuning_args: Any, training_args: Any) -> None:
    import transformers

    said = f"moe_aux_loss_coef: {model_args.moe_aux_loss_coef} would change nothing"
    if finetuning_args.stage not in ("pt", "sft"):
        raise ValueError(
            f"{said} in stage {finetuning_args.stage}: LLaMA-Factory computes this stage's loss from the logits alone. "
            "Remove moe_aux_loss_coef, or use stage: sft or pt."
        )
    reentrant = model_args.use_reentrant_gc and not model_args.disable_gradient_checkpointing
    if reentrant and not _fsdp(training_args) and int(transformers.__version__.split(".")[0]) >= 5:
        raise ValueError(
            f"{said} with use_reentrant_gc: true: transformers 5 records the router's logits where reentrant "
            "checkpointing has gradients off. Use use_reentrant_gc: false (or disable_gradient_checkpointing: true)."
        )


def _zero3() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def _fsdp(training_args: Any) -> bool:
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return by_launcher or bool(training_args.fsdp)


def _keep_state_dicts_whole() -> None:
    """Accelerate divides FSDP2's state dicts unless told otherwise (its own launcher tells it)."""
    kind = os.environ.setdefault("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    if kind.upper() not in ("FULL_STATE_DICT", "1"):
        raise ValueError(
            f"fsdp_state_dict_type: {kind} cannot be used with {SWITCH}: the Trainer then writes no adapter, and an "
            "optimizer that Accelerate does not read again. Use fsdp_state_dict_type: FULL_STATE_DICT."
        )


def _fsdp1(training_args: Any) -> bool:
    """FSDP1, asked for through accelerate launch (environment) or through the Trainer's own ``fsdp`` option."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        return os.environ.get("FSDP_VERSION", "1") == "1"
    return bool(training_args.fsdp) and int(training_args.fsdp_config.get("version", 1)) == 1
