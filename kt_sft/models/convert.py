"""Put the routed experts of a Hugging Face model on the CPU kernels, while it loads or after.

While it loads (``experts_on_cpu``): transformers builds every model on the meta device and calls ``post_init`` at the
end of its constructor. There the experts modules are exchanged for parameter-free ``KtExperts``, so that transformers
neither allocates nor reads an expert tensor; when ``from_pretrained`` returns, they are filled from the shards. One
mechanism serves every family and transformers 4 and 5. Routers, shared experts, dense layers and multi-token-prediction
layers stay what they are.

After it has loaded (``convert_model``): the same exchange, packing the weights that are there.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from types import MethodType
from typing import Any, NoReturn

from packaging.version import Version
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import distributed, native
from ..config import KtConfig
from ..distributed.place import threads_of_rank
from ..nn.experts import KtExperts
from ..ops import PackedExperts
from ..weights.checkpoint import Checkpoint, ExpertTensors
from ..weights.formats import ExpertReader, open_checkpoint
from ..weights.loader import load_experts
from . import blocks_fused, blocks_v4, ruled
from .names import hub_names, locate
from .source import readable_weights, unquantised_configurations
from .spec import MoeSpec, describe_fused, describe_list, fused_biases, fused_expert, is_fused
from .summary import formats_in_words

logger = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]
Found = list[tuple[str, nn.Module, MoeSpec]]
Methods = list[tuple[nn.Module, str, MethodType]]


def from_pretrained(path: StrPath, *, config: KtConfig | dict[str, Any] | None = None, **options: Any) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` with the routed experts packed on the CPU.

    Vision-language models are loaded by ``AutoModelForImageTextToText``, as LLaMA-Factory does.

    ``options`` that are fields of ``KtConfig`` (``weight_format="int4"``, ``activation_policy="recompute"`` ...)
    override ``config``; the others go to transformers (``device_map``, ``dtype``; dtype defaults to the checkpoint's).
    """
    own = {f.name for f in fields(KtConfig)}
    settings = as_config(config, **{k: options.pop(k) for k in list(options) if k in own})
    options.setdefault("dtype", "auto")
    path = os.fspath(path)
    set_threads(settings)
    source = settings.non_expert_weight_path or path
    with experts_on_cpu(path, settings, revision=options.get("revision")):
        return _auto_class(source, options).from_pretrained(source, **options)


def _auto_class(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    named = {k: options[k] for k in ("revision", "trust_remote_code", "token", "cache_dir") if k in options}
    config = options.get("config") or AutoConfig.from_pretrained(source, **named)
    pictures = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if pictures else AutoModelForCausalLM


def as_config(config: KtConfig | dict[str, Any] | None, **overrides: Any) -> KtConfig:
    settings = config if isinstance(config, KtConfig) else KtConfig.from_dict(config or {}, source="config")
    return replace(settings, **overrides)


@contextmanager
def experts_on_cpu(
    model_dir: StrPath, config: KtConfig, *, revision: str | None = None, fill: Callable[..., None] | None = None
) -> Iterator[None]:
    """Inside, ``AutoModel*.from_pretrained`` builds and fills packed experts from the checkpoint ``model_dir``.

    ``fill`` takes the place of ``fill_experts``.

    A model without supported experts raises ValueError. The context patches ``PreTrainedModel`` and is meant for one
    loading call at a time.
    """
    import transformers

    base: Any = transformers.PreTrainedModel
    post_init, load = base.post_init, base.__dict__["from_pretrained"]
    loading: list[type] = []

    def post_init_with_swap(self: Any) -> None:
        # A rule names paths in the whole model; the decoder inside it comes by here before.
        if not (config.family_rules and loading and type(self) is not loading[-1]):
            swap_experts(self, config, ruled_tensors(model_dir, config, revision))
            _ignore_expert_keys(self, config)
            if loading and type(self) is loading[-1]:
                _require_sizes(self, model_dir, config, revision)
        post_init(self)

    def from_pretrained_and_fill(cls: type, name: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = kwargs.pop("pretrained_model_name_or_path", name)
        loading.append(cls)
        try:
            with readable_weights(name, lambda name: local_path(name, revision), config) as folder:
                result = load.__func__(cls, folder, *args, **kwargs)
        finally:
            loading.pop()
        model = result[0] if isinstance(result, tuple) else result
        if folder != name:
            model.name_or_path = model.config._name_or_path = str(name)
        (fill or fill_experts)(model, model_dir, config, revision=revision)
        return result

    base.post_init, base.from_pretrained = post_init_with_swap, classmethod(from_pretrained_and_fill)
    try:
        with unquantised_configurations():
            yield
    finally:
        base.post_init, base.from_pretrained = post_init, load


def convert_model(model: Any, config: KtConfig | dict[str, Any] | None = None, **options: Any) -> Any:
    """Pack the routed experts of a loaded model in place, freeing the originals layer by layer; returns the model.

    ``options`` are fields of ``KtConfig`` and override ``config``.
    """
    settings = as_config(config, **options)
    if settings.weight_format == "auto":
        settings = replace(settings, weight_format="int8")
    if settings.weight_format not in ("bf16", "int8", "int4"):
        raise ValueError(
            "weight_format: expected bf16, int8, int4 or auto for a model that is loaded already, got "
            f"{settings.weight_format}; use kt_sft.from_pretrained, which keeps what the checkpoint holds"
        )
    set_threads(settings)
    swapped = swap_experts(model, settings, ruled.OfModel(model))
    if not swapped:
        raise _no_experts(model)
    sharing = distributed.start(settings.expert_parallel)
    for path, original, experts in tqdm(swapped, desc="packing experts", unit="layer"):
        held = sharing.place.experts(experts.num_experts) if sharing else range(experts.num_experts)
        packed = _pack(path, original, experts, settings, held)
        experts.set_packed(packed, sharing.layer(packed, experts.num_experts) if sharing else None)
        original.to("meta")
    _finish(model)
    return model


def swap_experts(
    model: nn.Module, config: KtConfig, ruled_tensors: ruled.Source | None = None
) -> list[tuple[str, nn.Module, KtExperts]]:
    """Exchange every routed-experts module for an empty ``KtExperts``: (path, original, replacement) per layer.

    All of them are checked before the first is exchanged. The tensors that ``config.family_rules`` name are looked up
    in ``ruled_tensors``.
    """
    found, methods = _find_experts(model, config, ruled_tensors)
    for block, name, method in methods:
        setattr(block, name, method)
    swapped = []
    for path, module, spec in found:
        experts = KtExperts(
            num_experts=spec.num_experts,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            names=spec.names,
            block_name=spec.block_name,
            fused=spec.fused,
            activation=spec.activation,
            has_bias=spec.has_bias,
            activation_policy=config.activation_policy,
            compute_type=config.compute_type,
            gradient_compute_type=config.gradient_compute_type,
            dtype=spec.dtype,
        )
        model.set_submodule(path, experts)
        swapped.append((path, module, experts))
    return swapped


def _find_experts(model: nn.Module, config: KtConfig, ruled_tensors: ruled.Source | None) -> tuple[Found, Methods]:
    found: Found = []
    methods: Methods = []
    inside = ""
    for path, module in model.named_modules():
        parent_path, _, leaf = path.rpartition(".")
        if inside and path.startswith(inside):
            continue
        rule = ruled.rule_for(path, config.family_rules)
        if rule is not None and ruled_tensors is not None:
            found.append((path, module, ruled.describe_ruled(module, path, rule, ruled_tensors)))
            methods += ruled.caller(model, module, path, rule)
            inside = f"{path}."
        elif is_fused(module):
            spec = describe_fused(module, path)
            methods += blocks_fused.adapted_method(model.get_submodule(parent_path))
            names, block_name = hub_names(model, path)
            found.append((path, module, replace(spec, names=names, block_name=block_name)))
        elif isinstance(module, nn.ModuleList) and leaf == "experts" and len(module):
            block = model.get_submodule(parent_path)
            methods.append((block, *blocks_v4.adapted_method(block, parent_path)))
            spec = describe_list(module, path)
            found.append((path, module, replace(spec, block_name=parent_path.rpartition(".")[2])))
    ruled.require_used(config.family_rules, [path for path, *_ in found], model)
    return found, methods


def fill_experts(model: Any, model_dir: StrPath, config: KtConfig, *, revision: str | None = None) -> None:
    """Load and pack the experts of every empty ``KtExperts`` in the model from the checkpoint."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, KtExperts)}
    if not layers:
        raise _no_experts(model)
    directory = local_path(config.expert_checkpoint_path or model_dir, revision)
    checkpoint = open_checkpoint(directory)
    empty = {path: m for path, m in layers.items() if not m.is_loaded}
    sharing = distributed.start(config.expert_parallel)
    for (num_experts, hidden, intermediate), group in by_size(empty).items():
        packed = load_experts(
            directory,
            {path: expert_tensors(path, m, model, checkpoint, config) for path, m in group.items()},
            num_experts=num_experts,
            hidden_size=hidden,
            intermediate_size=intermediate,
            config=config,
            held=sharing.place.experts(num_experts) if sharing else None,
            peers=sharing.host_peers if sharing else None,
        )
        for path, m in group.items():
            ready = packed[path].with_(activation=m.activation)
            m.set_packed(ready, sharing.layer(ready, num_experts) if sharing else None)
    _finish(model)


def by_size(layers: dict[str, KtExperts]) -> dict[tuple[int, int, int], dict[str, KtExperts]]:
    """The layers of each (experts, hidden, intermediate): what one packed file holds."""
    groups: dict[tuple[int, int, int], dict[str, KtExperts]] = {}
    for path, m in layers.items():
        groups.setdefault((m.num_experts, m.hidden_size, m.intermediate_size), {})[path] = m
    return groups


def set_threads(config: KtConfig) -> None:
    """Let the kernels use ``num_threads``, or this process's part of the cores where a launcher started several, and
    split the experts over at most ``numa_nodes``."""
    if config.numa_nodes is not None:
        native.use_nodes(config.numa_nodes)
    if config.num_threads is not None:
        native.set_num_threads(config.num_threads)
    elif int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        native.set_num_threads(threads_of_rank(_cores()))


@cache
def _cores() -> int:
    """The kernels' own choice, asked before it is changed."""
    return native.num_threads()


def _finish(model: Any) -> None:
    experts = [m for m in model.modules() if isinstance(m, KtExperts)]
    size = sum(m.packed.nbytes for m in experts) / 2**30
    logger.info("%d layers of experts packed as %s: %.2f GiB", len(experts), formats_in_words(model), size)
    model.save_pretrained = MethodType(_refuse_save, model)
    _warn_of_attention(model.config)


def _warn_of_attention(config: Any) -> None:
    """Found with 5.6.0, where GLM-5's attention through sdpa looks ahead; 5.23.0 is right."""
    import transformers

    release = Version(transformers.__version__)
    if config.model_type == "glm_moe_dsa" and release < Version("5.23") and config._attn_implementation != "eager":
        logger.warning(
            "glm_moe_dsa in transformers %s: attention through %s may miss its causal mask; use transformers 5.23 or "
            "newer, or attn_implementation='eager' (LLaMA-Factory: flash_attn: disabled).",
            *(release, config._attn_implementation),
        )


def _refuse_save(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "save_pretrained: expected a model with all of its weights, got one whose experts are packed; "
        "save the adapter (save_pretrained of the PEFT model): the base checkpoint has not changed"
    )


def expert_tensors(
    path: str, experts: KtExperts, model: Any, checkpoint: Checkpoint, config: KtConfig
) -> ExpertTensors:
    rule = ruled.rule_for(path, config.family_rules)
    tensors = ruled.tensors_of(path, rule) if rule else locate(path, experts, model.base_model_prefix, checkpoint)
    if tensors.has_biases != experts.has_bias:
        found = "biases that this model's experts do not have" if tensors.has_biases else "none"
        raise ValueError(
            f"{checkpoint.folder}: experts of {path}: expected {'biases beside' if experts.has_bias else 'only'} "
            f"{', '.join(tensors.names())}, got {found}; use a checkpoint of this model"
        )
    return tensors


def _require_sizes(model: Any, model_dir: StrPath, config: KtConfig, revision: str | None) -> None:
    """Raise ValueError, before transformers allocates anything, unless every layer's experts have config.json's sizes.

    Only the first expert of each is looked at.
    """
    checkpoint = open_checkpoint(local_path(config.expert_checkpoint_path or model_dir, revision))
    for path, m in model.named_modules():
        if isinstance(m, KtExperts):
            tensors = expert_tensors(path, m, model, checkpoint, config)
            count = m.num_experts if tensors.stacked else 1
            ExpertReader(checkpoint, tensors, count, m.hidden_size, m.intermediate_size).require()


def ruled_tensors(model_dir: StrPath, config: KtConfig, revision: str | None) -> ruled.Source | None:
    if not config.family_rules:
        return None
    return ruled.OfCheckpoint(open_checkpoint(local_path(config.expert_checkpoint_path or model_dir, revision)))


def _ignore_expert_keys(model: Any, config: KtConfig) -> None:
    """Tell transformers that the expert tensors of the exchanged layers are left out on purpose."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or [])
    patterns += [rf"(?:^|\.){pattern}$" for rule in config.family_rules for pattern in rule.patterns()]
    for path, module in model.named_modules():
        if isinstance(module, KtExperts):
            before, _, leaf = path.rsplit(".", 2)
            patterns.append(rf"(?:^|\.){re.escape(before)}\.\w+\.{re.escape(leaf)}\.")
    model._keys_to_ignore_on_load_unexpected = patterns


def _pack(path: str, original: nn.Module, experts: KtExperts, config: KtConfig, held: range) -> PackedExperts:
    rule = ruled.rule_for(path, config.family_rules)
    D, F = experts.hidden_size, experts.intermediate_size
    packed = PackedExperts.empty(len(held), D, F, config.weight_format, config.group_size)
    for index, expert in enumerate(held):
        matrices = ruled.ruled_expert(original, path, rule, expert) if rule else _expert(original, experts, expert)
        if any(m.is_meta for m in matrices):
            raise ValueError("convert_model: expected loaded weights, got a meta model; use kt_sft.from_pretrained")
        packed.pack_expert_(index, *(m.cpu() for m in matrices))
    biases = fused_biases(original, experts.fused, held) if experts.has_bias else None
    return packed.with_(activation=experts.activation, biases=biases)


def _expert(original: nn.Module, experts: KtExperts, index: int) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(original, nn.ModuleList):
        gate, up, down = (original[index].get_parameter(f"{name}.weight").data for name in experts.names)
    else:
        gate, up, down = fused_expert(original, experts.fused, index)
    return gate, up, down


def _no_experts(model: Any) -> ValueError:
    classes = {type(module).__name__ for module in model.modules()}
    similar = sorted(name for name in classes if re.search("(?i)expert|moe$", name))
    found = f"experts of an unsupported kind ({', '.join(similar)})" if similar else "a model without routed experts"
    return ValueError(
        f"{type(model).__name__}: expected experts with the common interface of transformers 5, got {found}; "
        "name them with family_rules (docs/formats.md), or load it without kt_sft (use_kt: false)"
    )


def local_path(model_dir: StrPath, revision: str | None) -> str:
    """The local folder (or GGUF file) of a checkpoint; a hub id is resolved through the hub's cache."""
    if os.path.exists(model_dir):
        return os.fspath(model_dir)
    from huggingface_hub import snapshot_download

    return snapshot_download(os.fspath(model_dir), revision=revision, allow_patterns=["*.safetensors", "*.json"])
