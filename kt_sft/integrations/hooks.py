"""Patch stock packages at the moment they are imported, without importing them ourselves.

torch calls :func:`autoload` at the end of ``import torch`` (entry point group ``torch.backends``, torch >= 2.5;
``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns that off). It puts one finder in front of ``sys.meta_path``; when a module
named in :data:`PATCHES` is imported, its body runs unchanged and then our patch function gets the module.

This file runs inside every ``import torch``: standard library only, no work before a module of interest appears,
and no exception may leave it. A patch that fails is logged and raised again by :func:`check_usable`, which the
patched code paths call once kt_sft is really asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)

#: module that is imported -> our module and the function in it that patches it
PATCHES: dict[str, tuple[str, str]] = {
    "llamafactory.launcher": ("kt_sft.integrations.interrupt", "patch_launcher"),
    "llamafactory.chat.chat_model": ("kt_sft.integrations.interrupt", "patch_chat_model"),
    "llamafactory.chat.hf_engine": ("kt_sft.integrations.interrupt", "patch_hf_engine"),
    "llamafactory.hparams.parser": ("kt_sft.integrations.llamafactory", "patch_parser"),
    "llamafactory.model.loader": ("kt_sft.integrations.llamafactory", "patch_loader"),
    "llamafactory.model.patcher": ("kt_sft.integrations.llamafactory_attention", "patch_patcher"),
    "llamafactory.model.adapter": ("kt_sft.integrations.llamafactory", "patch_adapter"),
    "llamafactory.train.callbacks": ("kt_sft.integrations.throughput", "patch_callbacks"),
    "llamafactory.train.tuner": ("kt_sft.integrations.llamafactory", "patch_tuner"),
    "accelerate.commands.config.config_args": ("kt_sft.integrations.accelerate", "patch_config_args"),
    "accelerate.utils.fsdp_utils": ("kt_sft.integrations.accelerate", "patch_fsdp_utils"),
    "transformers.trainer": ("kt_sft.integrations.resume", "patch_trainer"),
}

_failures: dict[str, Exception] = {}
_MARK = "_kt_sft_patched"


class PatchFinder(importlib.abc.MetaPathFinder):
    """Find the modules of :data:`PATCHES` through the other finders and run the patch after their body."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PATCHES:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None and finder is not self else None
            if spec is not None:
                _patch_after_exec(spec)
                return spec
        return None


def _patch_after_exec(spec: ModuleSpec) -> None:
    """Make ``spec.loader`` call our patch once it has executed the module."""
    loader = spec.loader
    exec_module = getattr(loader, "exec_module", None)
    if loader is None or exec_module is None:
        return

    def exec_and_patch(module: ModuleType) -> None:
        exec_module(module)
        _apply(module)

    loader.exec_module = exec_and_patch  # type: ignore[method-assign]


class _UnfinishedSpec(ModuleSpec):
    """The spec of a module whose body is running: it patches the module when importlib marks it as initialised.

    Needed when that very body is the first to import torch, as llamafactory.train.tuner's is in ``src/train.py``.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        module = sys.modules.get(self.name)
        if name == "_initializing" and not value and module is not None:
            _apply(module)


def _patch_imported(module: ModuleType) -> None:
    """Patch a module that was found in ``sys.modules``, now or as soon as its body has run."""
    spec = module.__spec__
    if spec is not None and getattr(spec, "_initializing", False):
        spec.__class__ = _UnfinishedSpec
    else:
        _apply(module)


def _apply(module: ModuleType) -> None:
    """Run the patch of ``module`` once; keep the error instead of breaking the import."""
    name = module.__name__
    if getattr(module, _MARK, False):
        return
    try:
        owner, function = PATCHES[name]
        getattr(importlib.import_module(owner), function)(module)
        setattr(module, _MARK, True)
    except Exception as error:
        _failures[name] = error
        logger.warning("kt_sft could not extend %s: %s: %s", name, type(error).__name__, error)


def install() -> None:
    """Install the hooks; a second call changes nothing.

    Modules of :data:`PATCHES` that are already there are patched in place. That reaches every use through the
    module itself; copies (``from .loader import load_model``) are reached only when this comes first.

    Raises:
        RuntimeError: llamafactory's loader was imported before the hooks were installed.
    """
    if any(isinstance(finder, PatchFinder) for finder in sys.meta_path):
        return
    if "llamafactory.model.loader" in sys.modules:
        raise RuntimeError("kt_sft must be installed before llamafactory is imported; call it first in your script.")
    sys.meta_path.insert(0, PatchFinder())
    for name in PATCHES:
        if name in sys.modules:
            _patch_imported(sys.modules[name])


def autoload() -> None:
    """Entry point of ``torch.backends``: :func:`install` that never raises."""
    try:
        install()
    except Exception as error:
        logger.warning("kt_sft is not active: %s", error)


def check_usable() -> None:
    """Raise when kt_sft is asked for but cannot work in this environment.

    Raises:
        RuntimeError: the forked packages of KTransformers are installed, or a hook did not fit its package.
    """
    if importlib.util.find_spec("transformers.integrations.kt") is not None:
        raise RuntimeError(
            "The forks transformers-kt / accelerate-kt are installed; kt_sft needs the stock packages. "
            "Run: pip uninstall -y transformers-kt accelerate-kt kt-kernel && "
            "pip install --force-reinstall transformers accelerate"
        )
    for name, error in _failures.items():
        raise RuntimeError(
            f"kt_sft does not fit the installed {name.partition('.')[0]} ({name}: {error}). "
            "Tested: llamafactory 0.9.5, transformers 4.57.6 and 5.6.0, accelerate 1.11.0 and 1.15.0."
        ) from error
