"""Checks of the Python packages: versions, what they require of each other, forks, and kt_sft's hooks."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from .findings import Finding, ok, problem, warning

# Releases that the tests run with, the recommended one first.
TESTED = {
    "torch": ("2.13.0",),
    "transformers": ("5.6.0", "4.57.6", "5.23.0"),
    "peft": ("0.18.1",),
    "accelerate": ("1.11.0", "1.15.0"),
    "llamafactory": ("0.9.5",),
}
FORKS = ("transformers-kt", "accelerate-kt")
_LEAST = ("torch", "transformers", "peft", "accelerate")  # of kt_sft's own requirements: below them nothing works


def package_findings(environ: Mapping[str, str] | None = None) -> list[Finding]:
    environ = os.environ if environ is None else environ
    return [
        forks(),
        *(version(name) for name in TESTED),
        requirements(),
        audio(),
        autoload(environ),
    ]


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def forks() -> Finding:
    found = [name for name in FORKS if installed(name)]
    if not found and importlib.util.find_spec("transformers") and _fork_module():
        found = ["transformers.integrations.kt"]
    if found:
        remedy = (
            "pip uninstall -y transformers-kt accelerate-kt kt-kernel && "
            "pip install --force-reinstall --no-deps transformers accelerate"
        )
        return problem("forks", f"KTransformers' {' and '.join(found)} replace stock packages", remedy)
    return ok("forks", "none of KTransformers' forked packages")


def _fork_module() -> bool:
    return importlib.util.find_spec("transformers.integrations.kt") is not None


def version(name: str) -> Finding:
    """Whether the installed release was tested with kt_sft."""
    found, tested = installed(name), TESTED[name]
    recommended = tested[0]
    if found is None:
        if name == "torch":
            return problem(name, "not installed", f"pip install torch=={recommended}")
        return warning(name, "not installed", "needed for training: pip install 'kt-sft[llamafactory]'")
    text = f"{found} (tested: {', '.join(tested)})"
    least = _least(name)
    if least is not None and not least.specifier.contains(_public(found), prereleases=True):
        wanted = f"{name}{least.specifier}"
        return problem(name, f"{found}, needed is {wanted}", f"pip install '{wanted}'")
    if _public(found) in tested:
        return ok(name, text)
    return warning(name, text, f"if something fails: pip install {name}=={recommended}")


def _public(text: str) -> str:
    return Version(text).public


def _least(name: str) -> Requirement | None:
    """kt_sft's own requirement of a package, extras included."""
    for requirement in _requirements_of("kt-sft"):
        if requirement.name == name and requirement.specifier and name in _LEAST:
            return requirement
    return None


def _requirements_of(name: str) -> list[Requirement]:
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for text in texts:
        try:
            found.append(Requirement(text))
        except InvalidRequirement:
            continue
    return found


def requirements() -> Finding:
    """What the packages of the stack require of each other, as ``pip check`` sees it, optional extras left out."""
    broken = []
    for name in (*TESTED, "trl", "datasets", "tokenizers", "deepspeed"):
        for requirement in _requirements_of(name):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = installed(requirement.name)
            if found is not None and not requirement.specifier.contains(_public(found), prereleases=True):
                broken.append((f"{name} needs {requirement.name}{requirement.specifier}, got {found}", requirement))
    if not broken:
        return ok("requirements", "the packages' requirements of each other are met")
    wanted = " ".join(f"'{requirement.name}{requirement.specifier}'" for _, requirement in broken)
    return warning("requirements", "; ".join(text for text, _ in broken), f"pip install {wanted}")


def audio() -> Finding:
    """LLaMA-Factory imports torchaudio whatever the data; one for another torch fails there."""
    if installed("llamafactory") is None:
        return ok("torchaudio", "not needed without LLaMA-Factory")
    try:
        importlib.import_module("torchaudio")
    except Exception as error:  # a CUDA build beside CPU torch raises OSError, an absent one ImportError
        remedy = (
            f"pip install torchaudio for this torch ({installed('torch')}); on a CPU-only machine see scripts/stubs"
        )
        return problem("torchaudio", f"cannot be imported: {str(error).splitlines()[0]}", remedy)
    return ok("torchaudio", "can be imported")


def autoload(environ: Mapping[str, str]) -> Finding:
    """Whether ``import torch`` installs kt_sft's hooks, so that llamafactory-cli and accelerate need no change."""
    if environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        remedy = "unset TORCH_DEVICE_BACKEND_AUTOLOAD, or use kt-sft train instead of llamafactory-cli train"
        return warning("hooks", "TORCH_DEVICE_BACKEND_AUTOLOAD=0: torch does not load them", remedy)
    importlib.import_module("torch")
    from kt_sft.integrations.hooks import PatchFinder

    if any(isinstance(finder, PatchFinder) for finder in sys.meta_path):
        return ok("hooks", "loaded by import torch")
    entries = metadata.entry_points(group="torch.backends")
    if not any(entry.name == "kt_sft" for entry in entries):
        return problem("hooks", "kt_sft is not registered with torch", "reinstall the package: pip install .")
    return problem("hooks", "import torch did not load them", "torch 2.5 or newer is needed: pip install 'torch>=2.5'")
