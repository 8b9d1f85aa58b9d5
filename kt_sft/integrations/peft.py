"""Stock PEFT (0.18.1 and later) on packed experts: targets, layers, files.

``install()`` (idempotent) wraps these PEFT functions; models without packed experts go through unchanged:

- ``LoraModel._create_new_module``: a placeholder projection of ``KtExperts`` gets an ``ExpertsLinearLora``, a router
  that is not a Linear a ``RouterLora``;
- ``LoraModel.inject_adapter``: understands ``target_modules="all-linear"``, the name ``experts``, and adapters that
  were trained with ``target_parameters``. Names such as ``gate_proj`` (Mixtral: ``w1``) need no help: they are the
  names of the placeholders, so PEFT matches routed experts, shared experts and dense MLPs alike;
- ``get_peft_model_state_dict`` / ``set_peft_model_state_dict``: files hold portable per-expert keys, and any layout of
  ``adapter_keys`` loads;
- ``PeftModel.load_adapter``: an adapter of packed experts is read from safetensors only, never from a pickle;
- PEFT >= 0.19 rewrites per-expert targets for transformers 5's fused parameters: not where experts are packed.

Everything else is stock: optimizers, clipping, ``disable_adapter``, several adapters, ``rank_pattern``, rsLoRA, LoRA+.

What a written adapter needs elsewhere: on transformers 4, stock PEFT loads it as it is (each expert is a Linear there).
On transformers 5 the experts are fused 3-D parameters: stock PEFT 0.18 finds no Linear of these names and silently
applies the attention part only, so use kt_sft there; PEFT 0.19 and later convert per-expert adapters (0.21 checked).
"""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from functools import wraps
from typing import Any

from torch import nn

from ..nn.experts import KtExpertsLinear
from .adapter_keys import experts_modules, from_files, to_portable
from .peft_targets import expand_targets, expert_target_names, routers

_MARK = "_kt_sft_wrapped"
_routers: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # of models with packed experts, where not a Linear


def install() -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraModel
    from peft.utils import save_and_load

    if getattr(LoraModel.inject_adapter, _MARK, False):
        return
    lora_model: Any = LoraModel
    peft_model: Any = PeftModel
    lora_model._create_new_module = staticmethod(_wrap_create(lora_model._create_new_module))
    lora_model.inject_adapter = _wrap_inject(lora_model.inject_adapter)
    peft_model.load_adapter = _wrap_load(peft_model.load_adapter)
    _replace_everywhere(save_and_load.get_peft_model_state_dict, _wrap_get(save_and_load.get_peft_model_state_dict))
    _replace_everywhere(save_and_load.set_peft_model_state_dict, _wrap_set(save_and_load.set_peft_model_state_dict))
    _leave_names_alone()


def _replace_everywhere(original: Any, wrapped: Any) -> None:
    """Functions are imported by name: replace the reference in every loaded module that has it."""
    setattr(wrapped, _MARK, True)
    name: str = original.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, wrapped)


def _leave_names_alone() -> None:
    try:
        conversion = importlib.import_module("peft.utils.transformers_weight_conversion")
    except ImportError:  # PEFT 0.18 has none; later ones import it with transformers 5 only
        return
    convert_config: Any = conversion.convert_peft_config_for_transformers
    convert_state: Any = conversion.convert_peft_adapter_state_dict_for_transformers

    @wraps(convert_config)
    def config_unless_packed(peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return None if experts_modules(model) else convert_config(peft_config, model, *args, **kwargs)

    @wraps(convert_state)
    def state_unless_packed(model: nn.Module, peft_config: Any, adapter_state_dict: Any, *args: Any, **kw: Any) -> Any:
        if experts_modules(model):
            return adapter_state_dict
        return convert_state(model, peft_config, adapter_state_dict, *args, **kw)

    setattr(conversion, convert_config.__name__, config_unless_packed)
    setattr(conversion, convert_state.__name__, state_unless_packed)


def _wrap_create(original: Any) -> Any:
    @wraps(original)
    def create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        from ..nn.lora import ExpertsLinearLora

        if isinstance(target, KtExpertsLinear):
            return ExpertsLinearLora(target, adapter_name, kwargs["r"], kwargs["lora_alpha"], lora_config)
        if target in _routers:
            from ..nn.router import RouterLora

            return RouterLora(target, adapter_name, kwargs["r"], kwargs["lora_alpha"], lora_config)
        return original(lora_config, adapter_name, target, **kwargs)

    return create_new_module


def _wrap_inject(original: Any) -> Any:
    @wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        names = expert_target_names(model)
        if names:
            expand_targets(self.peft_config[adapter_name], model, names)
            _routers.update(routers(model).values())
        original(self, model, adapter_name, *args, **kwargs)

    setattr(inject_adapter, _MARK, True)
    return inject_adapter


def _wrap_get(original: Any) -> Any:
    @wraps(original)
    def get_peft_model_state_dict(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return to_portable(original(model, *args, **kwargs), model)

    return get_peft_model_state_dict


def _wrap_set(original: Any) -> Any:
    @wraps(original)
    def set_peft_model_state_dict(
        model: nn.Module, peft_model_state_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        result = original(model, from_files(peft_model_state_dict, model), *args, **kwargs)
        paths = tuple(f"{path}." for path in experts_modules(model))
        unused = [key for key in result.unexpected_keys if paths and key.startswith(paths)]
        if unused:
            raise ValueError(
                f"adapter: expected factors for the targeted experts only, got {unused[0]} and {len(unused) - 1} more "
                "without a layer; add these projections to target_modules in adapter_config.json"
            )
        return result

    return set_peft_model_state_dict


def _wrap_load(original: Any) -> Any:
    @wraps(original)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        folder = os.path.join(os.fspath(model_id), kwargs.get("subfolder") or "")
        files = sorted(os.listdir(folder)) if os.path.isdir(folder) else ["adapter_model.safetensors"]
        if "adapter_model.safetensors" not in files and experts_modules(self):
            raise ValueError(
                f"adapter {folder}: expected adapter_model.safetensors, got {files[:5]}; "
                "pickled adapters are not loaded, convert the file to safetensors"
            )
        return original(self, model_id, *args, **kwargs)

    return load_adapter
