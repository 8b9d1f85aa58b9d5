"""What a model consists of, counted from its configuration without a weight.

Where transformers has the model's class (by ``architectures``, else by ``model_type``; remote code is never run) the
model is built on the meta device and its parameters are counted. Elsewhere ``arithmetic`` counts from the
configuration's own numbers, by a rule that it states.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..models.spec import describe_fused, describe_list, is_fused

logger = logging.getLogger(__name__)

TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk")


@dataclass(frozen=True, kw_only=True)
class ExpertLayers:
    """``layers`` MoE layers of the same sizes; ``biases``: elements of the experts' biases in each of them."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    biases: int = 0

    @property
    def weights(self) -> int:
        """Elements of the expert matrices of all these layers."""
        return self.layers * self.experts * 3 * self.hidden * self.intermediate


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Parameter counts. ``rest``: everything but the routed experts, by part.

    adapted: sum of inputs + outputs over the Linear layers that ``lora_target: all`` adapts besides the experts.
    widest: the largest such sum within one decoder layer.
    obstacle: why the kernels cannot run these experts, or None.
    """

    counted: str
    experts: tuple[ExpertLayers, ...]
    top_k: int
    rest: dict[str, int]
    hidden: int
    layers: int
    vocabulary: int
    adapted: int
    widest: int
    obstacle: str | None
    notes: tuple[str, ...] = ()

    @property
    def expert_parameters(self) -> int:
        return sum(group.weights + group.layers * group.biases for group in self.experts)

    @property
    def active_parameters(self) -> int:
        """What one token is multiplied with: the routed experts it chooses and the rest, but the embedding table."""
        chosen = sum(g.weights * min(self.top_k, g.experts) // g.experts for g in self.experts)
        return chosen + self.multiplied_parameters

    @property
    def multiplied_parameters(self) -> int:
        """The rest without the embedding table, which is looked up; a tied one also is the head."""
        table = self.vocabulary * self.hidden
        return self.rest_parameters - (table if self.rest.get("embeddings and head", 0) >= 2 * table else 0)

    @property
    def rest_parameters(self) -> int:
        return sum(self.rest.values())

    @property
    def total_parameters(self) -> int:
        return self.expert_parameters + self.rest_parameters


def describe(config: dict[str, Any]) -> ModelParts:
    """Count a model from the content of its config.json.

    Raises:
        ValueError: it is not a MoE model, or too little is known about it; the message names what is missing.
    """
    found = _model_class(config)
    if found is None:
        from .arithmetic import count

        return count(config)
    model_class, settings = found
    model = _build(model_class, settings)
    text = settings.get_text_config()
    return _count(model, text, _notes(config))


def _model_class(config: dict[str, Any]) -> tuple[Any, Any] | None:
    """(class, configuration object) of transformers for this config.json; None if it has none."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    for name in config.get("architectures") or []:
        model_class = getattr(transformers, str(name), None)
        config_class: Any = getattr(model_class, "config_class", None)
        if config_class is not None:
            return model_class, config_class.from_dict({**config, "model_type": config_class.model_type})
    if config.get("model_type") in CONFIG_MAPPING:
        settings = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        if type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)], settings
    return None


def _build(model_class: Any, settings: Any) -> Any:
    try:
        with torch.device("meta"):
            return model_class._from_config(settings)
    except Exception as error:  # whatever a model's constructor makes of an incomplete configuration
        raise ValueError(
            f"config.json: expected a configuration that {model_class.__name__} can be built from, got "
            f"{type(error).__name__}: {error}; check that the file is complete and of this model"
        ) from error


def _notes(config: dict[str, Any]) -> tuple[str, ...]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    notes = []
    model_type, names = config.get("model_type"), config.get("architectures")
    if model_type not in CONFIG_MAPPING:
        notes.append(f"transformers has no model_type {model_type!r}; counted as architectures says, {names}")
    extra = config.get("num_nextn_predict_layers") or config.get("num_mtp_modules")
    if extra and config.get("use_mtp", True):
        notes.append(f"the multi-token-prediction layers of the checkpoint ({extra}) are neither loaded nor counted")
    return tuple(notes)


def _count(model: Any, text: Any, notes: tuple[str, ...]) -> ModelParts:
    groups: Counter[ExpertLayers] = Counter()
    obstacle, expert_paths = None, []
    for path, module in model.named_modules():
        in_list = isinstance(module, nn.ModuleList) and path.endswith("experts") and len(module) > 1
        if not is_fused(module) and not in_list:
            continue
        expert_paths.append(f"{path}.")
        try:
            describe_list(module, path) if isinstance(module, nn.ModuleList) else describe_fused(module, path)
        except ValueError as error:
            obstacle = obstacle or str(error)
        groups[_expert_layer(module, path, text.hidden_size)] += 1
    if not groups:
        similar = sorted({type(m).__name__ for m in model.modules() if "expert" in type(m).__name__.lower()})
        found = f"experts of a kind that is not known ({', '.join(similar)})" if similar else "one without"
        raise ValueError(
            f"{type(model).__name__}: expected a model with routed experts, got {found}; "
            "kt_sft can do nothing for it: train it with stock LLaMA-Factory"
        )
    rest: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(expert_paths)):
            rest[_part(name)] += parameter.numel()
    adapted = _adapted(model, tuple(expert_paths))
    return ModelParts(
        counted=f"{type(model).__name__} of transformers, built without weights",
        experts=tuple(replace(group, layers=layers) for group, layers in groups.items()),
        top_k=_top_k(text),
        rest=dict(rest),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        adapted=sum(adapted.values()),
        widest=max((size for path, size in adapted.items() if path), default=0),
        obstacle=obstacle,
        notes=notes,
    )


def _expert_layer(module: nn.Module, path: str, hidden: int) -> ExpertLayers:
    """The sizes of one layer's experts, whatever their layout: matrices of D * F elements, three of them an expert."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    biases = sum(p.numel() for name, p in module.named_parameters() if name.endswith("bias"))
    if isinstance(module, nn.ModuleList):
        experts, size = len(module), sum(p.numel() for p in module.parameters()) - biases
    else:
        matrices = [shape for name, shape in shapes.items() if len(shape) == 3]
        experts, size = matrices[0][0], sum(e * rows * columns for e, rows, columns in matrices)
    intermediate, remainder = divmod(size, experts * 3 * hidden)
    if remainder:
        raise ValueError(f"{path}: expected gate, up and down matrices of hidden size {hidden}, got {shapes}")
    return ExpertLayers(layers=1, experts=experts, hidden=hidden, intermediate=intermediate, biases=biases)


def _part(name: str) -> str:
    words = name.split(".")
    if any(word.startswith(("vis", "audio", "image", "multi_modal")) for word in words):
        return "vision and audio"
    if "embed" in name or "lm_head" in words:
        return "embeddings and head"
    if any("norm" in word for word in words[-2:]):
        return "norms"
    if any("shared" in word for word in words):
        return "shared experts"
    if any("attn" in word or "attention" in word or "mixer" in word for word in words):
        return "attention"
    if any(word in ("gate", "router") or "correction_bias" in word for word in words):
        return "routers"
    if any(word in ("mlp", "feed_forward", "block_sparse_moe") for word in words):
        return "dense MLPs"
    return "other"


def _adapted(model: Any, expert_paths: tuple[str, ...]) -> Counter[str]:
    """Inputs + outputs of the Linear layers outside experts, head and vision tower, by decoder layer ("" for none)."""
    sizes: Counter[str] = Counter()
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head or path.startswith(expert_paths):
            continue
        if _part(path) != "vision and audio":
            sizes[_layer(path.split("."))] += module.in_features + module.out_features
    return sizes


def _layer(words: Iterable[str]) -> str:
    return next((word for word in words if word.isdigit()), "")


def _top_k(text: Any) -> int:
    for key in TOP_K_KEYS:
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 0:
            return value
    raise ValueError(
        f"config.json: expected the experts per token in one of {', '.join(TOP_K_KEYS)}, found none of them; "
        "add it to the file"
    )
