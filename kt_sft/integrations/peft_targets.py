"""What ``target_modules`` and its relatives mean for packed experts and their routers.

Names such as ``gate_proj`` match the placeholders of ``KtExperts`` without help. Rewritten are "all-linear", the name
``experts`` (alone or as a part of a path) and PEFT's ``target_parameters``; refused is what could train nothing.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from .adapter_keys import experts_modules


def expert_target_names(model: nn.Module) -> list[str]:
    """Module names that target the routed experts of this model: what "all linear layers" must include."""
    names = [name for experts in experts_modules(model).values() for name in experts.names]
    return list(dict.fromkeys(names))


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Routers of packed experts that do more than a Linear, by path: modules beside the experts, weight (E, D)."""
    return {path: module for path, module, _ in _all_routers(model) if not _is_linear(module)}


def uncalled_routers(model: nn.Module) -> list[str]:
    """Paths of Linear routers whose block multiplies with their weight itself: a LoRA layer around them never runs."""
    return [
        path
        for path, module, block in _all_routers(model)
        if isinstance(module, nn.Linear) and f"self.{path.rpartition('.')[2]}.weight" in _source(block)
    ]


def _is_linear(module: nn.Module) -> bool:
    """Llama 4's router is a subclass that returns scores."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _all_routers(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(path, router, block) per router."""
    found = []
    for path, experts in experts_modules(model).items():
        parent = path.rpartition(".")[0]
        block = model.get_submodule(parent)
        for name, module in block.named_children():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.shape == (experts.num_experts, experts.hidden_size):
                found.append((f"{parent}.{name}", module, block))
    return found


def _source(block: nn.Module) -> str:
    try:
        return inspect.getsource(type(block).forward)
    except (OSError, TypeError):  # no source file
        return ""


def _refuse_uncalled_routers(config: Any, model: nn.Module) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    for path in uncalled_routers(model):
        if config.target_modules and check_target_module_exists(config, path):
            raise ValueError(
                f"target_modules: {path} cannot be adapted with this transformers release, its block uses the weight "
                "without calling the router; leave it out, or install a newer transformers"
            )


def _refuse_saving_experts(config: Any, model: nn.Module) -> None:
    """``modules_to_save`` (LLaMA-Factory: additional_target) trains whole copies; packed experts have none."""
    for name in config.modules_to_save or ():
        for path in experts_modules(model):
            if re.search(rf"(?:^|\.){re.escape(name)}(?:\.|$)", path):
                raise ValueError(
                    f"modules_to_save (additional_target): expected modules without routed experts, got {name!r}, "
                    f"which holds {path}; packed experts are frozen: adapt them by target_modules (lora_target)"
                )


def expand_targets(config: Any, model: nn.Module, names: list[str]) -> None:
    """Rewrite the settings that name routed experts so that they mean the same here and on transformers 4."""
    from peft.tuners import tuners_utils

    _refuse_saving_experts(config, model)
    _translate_parameters(config, model)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        tuners_utils._maybe_include_all_linear_layers(config, model)
        experts = {f"{path}.{name}" for path, m in experts_modules(model).items() for name in m.names}
        config.target_modules = (set(config.target_modules) - experts - set(uncalled_routers(model))) | set(names)
    config.target_modules = _rewrite_list(config.target_modules, names)
    config.exclude_modules = _rewrite_list(config.exclude_modules, names)
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for key in list(patterns):
            pattern = _experts_pattern(key, names)
            if pattern:
                patterns[pattern] = patterns.pop(key)
    _refuse_uncalled_routers(config, model)


def _rewrite_list(targets: Any, names: list[str]) -> Any:
    """A list with entries such as ``experts`` or ``experts.gate_proj`` -> one regular expression; others unchanged."""
    if not isinstance(targets, (list, set, tuple)):
        return targets
    patterns = {target: _experts_pattern(target, names) for target in targets}
    if not any(patterns.values()):
        return targets
    return rf"(?:.*\.)?(?:{'|'.join(sorted(pattern or re.escape(target) for target, pattern in patterns.items()))})"


def _experts_pattern(target: str, names: list[str]) -> str | None:
    """``[...mlp.]experts[.3][.gate_proj]`` -> a pattern for the placeholders and for per-expert Linears; else None.

    The parent block may be named otherwise in transformers 4 (Mixtral), so its name is left open.
    """
    match = re.fullmatch(r"(?:(?:(?P<head>.*)\.)?\w+\.)?experts(?:\.\d+)?(?:\.(?P<name>\w+))?", target)
    if match is None or match["name"] not in (None, *names):
        return None
    head = re.escape(match["head"]) + r"\.\w+\." if match["head"] else ""
    return rf"{head}experts(?:\.\d+)?\.(?:{match['name'] or '|'.join(names)})"


def _translate_parameters(config: Any, model: nn.Module) -> None:
    """``target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]`` -> the same experts as modules."""
    roles = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
    parameters = set(config.target_parameters or ())
    fused = {p for p in parameters if re.fullmatch(r"(.*\.)?experts\.(gate_up_proj|down_proj)", p)}
    if not fused:
        return
    names = next(iter(experts_modules(model).values())).names
    experts = [f"experts.{getattr(names, role)}" for p in sorted(fused) for role in roles[p.rpartition(".")[2]]]
    config.target_parameters = sorted(parameters - fused) or None
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for key in [key for key in patterns if key.endswith("gate_up_proj")]:
            patterns[f"{key.removesuffix('gate_up_proj')}(?:{names.gate}|{names.up})"] = patterns.pop(key)
    if isinstance(config.target_modules, str):
        config.target_modules = rf"(?:{config.target_modules})|{_rewrite_list(experts, list(names))}"
    else:
        config.target_modules = {*(config.target_modules or ()), *experts}
