"""Settings of kt_sft: one validated object, from YAML mappings, KTransformers' keys or the environment.

Precedence does not exist on purpose: a setting given twice with two values is an error, wherever the two come from.
Keys may carry KTransformers' prefix (``kt_num_threads`` is ``num_threads``); keys of KTransformers that this package
has no use for are named in one log line. This is also the one place that reads the environment variables of settings:
KT_SFT_CONFIG (JSON, how a launcher hands the settings to its workers), ACCELERATE_KT_* and KT_SFT_CACHE.
Standard library only.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from .rules import FamilyRule, parse_rules

logger = logging.getLogger(__name__)

WeightFormat = Literal["auto", "bf16", "int8", "int4", "fp8", "mxfp4", "gguf"]
ActivationPolicy = Literal["retain", "recompute"]
ComputeType = Literal["bf16", "int8"]
ExpertParallel = Literal["host", "world", "none"]

WEIGHT_FORMATS: tuple[str, ...] = get_args(WeightFormat)
ACTIVATION_POLICIES: tuple[str, ...] = get_args(ActivationPolicy)
COMPUTE_TYPES: tuple[str, ...] = get_args(ComputeType)
EXPERT_PARALLEL: tuple[str, ...] = get_args(ExpertParallel)
GROUP_SIZES = (0, 32, 64, 128)

ENV_CONFIG = "KT_SFT_CONFIG"
ENV_CACHE = "KT_SFT_CACHE"
ENV_PREFIX = "ACCELERATE_KT_"

# KTransformers' names, without their prefix, for our fields.
_SYNONYMS = {
    "expert_weight_format": "weight_format",
    "backend": "weight_format",
    "cpu_activation": "activation_policy",
    "cpuinfer": "num_threads",
    "threadpool_count": "numa_nodes",
}
_BACKENDS = {"amxbf16": "bf16", "amxint8": "int8", "amxint4": "int4", "rawint4": "int4", "llamafile": "gguf"}

# Settings of KTransformers without a counterpart: their subject does not exist here, or LLaMA-Factory's key decides.
_WITHOUT_MEANING = frozenset(
    {
        "force_fused_expert_lora",
        "lora_alpha",
        "lora_dropout",
        "lora_expert_intermediate_size",
        "lora_expert_num",
        "lora_rank",
        "max_cache_depth",
        "model_max_length",
        "share_backward_bb",
        "share_cache_pool",
        "skip_expert_loading",
        "tp_enabled",
        "weight_lifecycle",
    }
)
# Settings that are honoured at one value only: name -> (that value, why).
_ONLY = {
    "num_gpu_experts": (0, "all routed experts run on the CPU"),
    "use_lora_experts": (False, "extra GPU-side experts do not exist here"),
    "full_weight_grad": (False, "routed experts are frozen"),
    "train_mode": ("lora", "routed experts are frozen"),
}
_TRUE, _FALSE = ("1", "true", "yes", "y", "on"), ("0", "false", "no", "n", "off")


@dataclass(frozen=True, kw_only=True)
class KtConfig:
    """How the routed experts are stored and run.

    Attributes:
        enabled: False in a ``kt_config`` block means that the caller must leave the model alone.
        weight_format: auto keeps what the checkpoint quantised as it is and packs the rest as int8; bf16, int8 and int4
            are made from any checkpoint; fp8 and mxfp4 need one whose experts are stored so or not quantised; gguf
            needs a GGUF file.
        group_size: input features per scale: 32, 64, 128, or 0 for one scale per output channel; None: the format's.
        activation_policy: retain keeps the layer's activations for backward, recompute only its inputs.
        compute_type: of the forward products: bf16, or int8 (needs int8 weights and a CPU with int8 dot products; the
            layer's input and its hidden values are quantised too).
        gradient_compute_type: of the gradients of the layer's input and routing weights: bf16, or int8 (needs
            compute_type int8; faster and less accurate). Adapters and their gradients are computed in bf16 anyway.
        num_threads: threads of the kernels; None: the physical cores this process may use.
        numa_nodes: split the columns of every expert over at most this many NUMA nodes; None: all that this process
            may use, one: no split.
        expert_parallel: what several processes share. host: the ranks of a host compute the experts for each other;
            world: each host also holds its share of the experts only; none: every rank computes its own tokens.
        cache_dir: folder of packed experts, or "none" to keep none on disk; None: $KT_SFT_CACHE or ~/.cache/kt_sft.
        weight_path: folder with experts packed beforehand, used instead of the cache.
        expert_checkpoint_path: safetensors or GGUF folder, or GGUF file, of the experts, if not the model's own.
        non_expert_weight_path: folder with the weights of everything but the experts, if not the model's own.
        family_rules: where the experts of models are that kt_sft does not know (rules.py).
    """

    enabled: bool = True
    weight_format: WeightFormat = "auto"
    group_size: int | None = None
    activation_policy: ActivationPolicy = "retain"
    compute_type: ComputeType = "bf16"
    gradient_compute_type: ComputeType = "bf16"
    num_threads: int | None = None
    numa_nodes: int | None = None
    expert_parallel: ExpertParallel = "host"
    cache_dir: str | None = None
    weight_path: str | None = None
    expert_checkpoint_path: str | None = None
    non_expert_weight_path: str | None = None
    family_rules: tuple[FamilyRule, ...] = ()

    def __post_init__(self) -> None:
        _one_of("weight_format", self.weight_format, WEIGHT_FORMATS)
        _one_of("activation_policy", self.activation_policy, ACTIVATION_POLICIES)
        _one_of("compute_type", self.compute_type, COMPUTE_TYPES)
        _one_of("gradient_compute_type", self.gradient_compute_type, COMPUTE_TYPES)
        _one_of("expert_parallel", self.expert_parallel, EXPERT_PARALLEL)
        if self.compute_type == "int8" and (self.weight_format not in ("auto", "int8") or self.group_size == 32):
            raise ValueError(
                "compute_type: int8 products need weight_format int8 with group_size 0, 64 or 128; "
                f"got {self.weight_format} with group_size {self.group_size}; choose compute_type bf16 or these"
            )
        if self.gradient_compute_type == "int8" and self.compute_type != "int8":
            raise ValueError(
                "gradient_compute_type: int8 goes with compute_type int8 only, "
                f"got compute_type {self.compute_type}; set both to int8, or gradient_compute_type to bf16"
            )
        if self.compute_type == "int8":
            object.__setattr__(self, "weight_format", "int8")  # what auto means then, whatever the checkpoint has
        if not isinstance(self.enabled, bool):
            raise ValueError(f"enabled: expected true or false, got {self.enabled!r}")
        if self.group_size is not None:
            if isinstance(self.group_size, bool) or self.group_size not in GROUP_SIZES:
                raise ValueError(
                    f"group_size: expected 32, 64, 128, 0 (one scale per output channel) or nothing (the format's), "
                    f"got {self.group_size!r}"
                )
            if self.weight_format not in ("auto", "int8", "int4") and self.group_size:
                raise ValueError(
                    f"group_size: expected nothing, since {self.weight_format} leaves no choice; got {self.group_size};"
                    " leave it out or choose weight_format int8 or int4"
                )
        for name in ("num_threads", "numa_nodes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}; leave it out for all")
        if self.family_rules != ():
            try:
                object.__setattr__(self, "family_rules", parse_rules(self.family_rules))
            except ValueError as error:
                raise ValueError(f"family_rules: {error}") from None
        for name in _PATHS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str | os.PathLike) or not os.fspath(value)):
                raise ValueError(f"{name}: expected a path, got {value!r}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], source: str = "kt_config") -> KtConfig:
        """Validate ``settings`` (our keys or KTransformers'; values may be strings). ``source`` names their origin.

        Raises:
            ValueError: an unknown key (with the nearest valid one), a value that is not possible or not supported yet,
                or two keys that say different things about one setting.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"{source}: expected a mapping of settings, got {settings!r}")
        values: dict[str, Any] = {}
        origin: dict[str, str] = {}
        unused = []
        for key, raw in settings.items():
            name = _strip(key, source)
            if name in _WITHOUT_MEANING:
                unused.append(key)
                continue
            if name in _ONLY:
                _check_only(key, name, raw, source)
                continue
            field = _SYNONYMS.get(name, name)
            if field not in _FIELDS:
                raise ValueError(_unknown(key, source))
            value = _parse(key, name, field, raw, source)
            if value is None:
                continue
            if field in values and values[field] != value:
                raise ValueError(
                    f"{source}: {key}: {raw!r} and {origin[field]}: {settings[origin[field]]!r} contradict each other "
                    f"about {field}; keep one of them"
                )
            values[field], origin[field] = value, key
        if unused:
            logger.info("%s: %s have no meaning in kt_sft and change nothing.", source, ", ".join(sorted(unused)))
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def env_settings(cls, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The environment's settings, for ``from_dict``: KT_SFT_CONFIG's, and ACCELERATE_KT_* under their names."""
        environ = os.environ if environ is None else environ
        settings: dict[str, Any] = {}
        if text := environ.get(ENV_CONFIG, ""):
            try:
                settings = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{ENV_CONFIG}: expected a JSON object, got {text!r} ({error})") from None
            if not isinstance(settings, dict):
                raise ValueError(f"{ENV_CONFIG}: expected a JSON object, got {text!r}")
        settings.update({k: v for k, v in environ.items() if k.startswith(ENV_PREFIX) and v})
        return settings

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> KtConfig:
        """The settings that ``to_env`` or KTransformers' launcher left in the environment, else the defaults."""
        return cls.from_dict(cls.env_settings(environ), source="the environment")

    def to_env(self) -> dict[str, str]:
        """Environment variables that give ``from_env`` of a worker these settings."""
        changed = {k: v for k, v in asdict(self).items() if v != _FIELDS[k].default}
        return {ENV_CONFIG: json.dumps({k: os.fspath(v) if k in _PATHS else v for k, v in changed.items()})}

    @property
    def cache_folder(self) -> Path | None:
        """The folder of packed experts; None if nothing shall be kept on disk."""
        chosen = os.fspath(self.cache_dir or os.environ.get(ENV_CACHE, "") or "~/.cache/kt_sft")
        return None if chosen.lower() == "none" else Path(chosen).expanduser()


_FIELDS = {f.name: f for f in fields(KtConfig)}
_PATHS = ("cache_dir", "weight_path", "expert_checkpoint_path", "non_expert_weight_path")
_NUMBERS = ("group_size", "num_threads", "numa_nodes")


def _strip(key: Any, source: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{source}: expected the names of settings, got {key!r}")
    if key.startswith(ENV_PREFIX):
        return key[len(ENV_PREFIX) :].lower()
    return key.removeprefix("kt_")


def _nearest(word: str, choices: Any) -> str:
    near = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _unknown(key: str, source: str) -> str:
    prefix = "kt_" if key.startswith("kt_") else ""
    names = [*_FIELDS, *_SYNONYMS, *_WITHOUT_MEANING, *_ONLY]
    hint = (
        _nearest(key, [prefix + n for n in names]) or f"; valid are {', '.join(_FIELDS)} and KTransformers' kt_* keys"
    )
    return f"{source}: unknown setting {key!r}{hint}"


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}{_nearest(str(value), choices)}")


def _boolean(where: str, raw: Any) -> bool:
    text = str(raw).strip().lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(f"{where}: expected true or false, got {raw!r}")
    return text in _TRUE


def _integer(where: str, raw: Any) -> int:
    try:
        if isinstance(raw, bool) or (isinstance(raw, float) and not raw.is_integer()):
            raise ValueError
        return int(raw)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected a whole number, got {raw!r}") from None


def _check_only(key: str, name: str, raw: Any, source: str) -> None:
    if raw is None:
        return
    only, why = _ONLY[name]
    where = f"{source}: {key}"
    if isinstance(only, bool):
        value: Any = _boolean(where, raw)
    elif isinstance(only, int):
        value = _integer(where, raw)
    else:
        value = str(raw).lower()
    if value != only:
        raise ValueError(f"{where}: expected {only!r} ({why}), got {raw!r}; set it to {only!r} or leave it out")


def _weight_format(where: str, raw: Any) -> str:
    """The format that a name of ours or a backend of KTransformers stands for."""
    text = str(raw).strip().lower()
    value = _BACKENDS.get(text, text)
    if value not in WEIGHT_FORMATS:
        hint = _nearest(text, (*WEIGHT_FORMATS, *_BACKENDS))
        choices = ", ".join((*WEIGHT_FORMATS, *(b.upper() for b in _BACKENDS)))
        raise ValueError(f"{where}: expected one of {choices}; got {raw!r}{hint}")
    return value


def _activation_policy(where: str, raw: Any) -> Any:
    """``retain``, or KTransformers' {"cpu": ..., "gpu": ...}, whose second half gradient checkpointing decides."""
    if isinstance(raw, str) and raw.lstrip().startswith("{"):
        try:
            raw = json.loads(raw)
        except ValueError:
            raise ValueError(f"{where}: expected retain, recompute or a JSON object, got {raw!r}") from None
    if isinstance(raw, Mapping):
        if unknown := set(raw) - {"cpu", "gpu"}:
            raise ValueError(f"{where}: expected the keys cpu and gpu, got {sorted(map(str, unknown))}")
        if "gpu" in raw:
            logger.info("%s.gpu changes nothing here: disable_gradient_checkpointing decides.", where)
        return raw.get("cpu")
    return raw


def _parse(key: str, name: str, field: str, raw: Any, source: str) -> Any:
    where = f"{source}: {key}"
    if raw is None or (field in _NUMBERS and str(raw).strip().lower() in ("auto", "none", "")):
        return None
    if field == "enabled":
        return _boolean(where, raw)
    if field == "weight_format":
        return _weight_format(where, raw)
    if field == "activation_policy":
        return _activation_policy(where, raw)
    if field in _NUMBERS:
        return _integer(where, raw)
    if field == "family_rules":
        return tuple(raw) if isinstance(raw, list) else raw
    return raw
