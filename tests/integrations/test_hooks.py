"""The torch.backends entry point and the post-import hook, each case in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join([*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def output(code: str, *path: Path, **env: str) -> str:
    result = python(code, *path, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_torch_finds_the_entry_point():
    found = entry_points(group="torch.backends")
    assert "kt_sft.integrations.hooks:autoload" in {point.value for point in found}


def test_import_torch_installs_one_finder():
    code = "import torch, sys; print(sum(type(f).__name__ == 'PatchFinder' for f in sys.meta_path))"
    assert output(code) == "1"
    assert output(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "0"


def test_hooks_need_the_standard_library_only():
    code = """
import sys
before = set(sys.modules)
from kt_sft.integrations import hooks
hooks.autoload(); hooks.autoload()
new = {name.partition('.')[0] for name in set(sys.modules) - before} - {'kt_sft'}
print(sorted(name for name in new if name not in sys.stdlib_module_names))
"""
    assert output(code) == "[]"


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A package ``llamafactory`` whose launcher is a plain module."""
    package = tmp_path / "llamafactory"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launcher.py").write_text("def launch(): raise KeyboardInterrupt\n")
    return tmp_path


def test_a_module_is_patched_once_its_body_ran(fake: Path):
    code = """
from kt_sft.integrations import hooks
hooks.install(); hooks.install()
import llamafactory.launcher as launcher
print(launcher.launch.__wrapped__.__name__, hasattr(launcher.launch.__wrapped__, '__wrapped__'), launcher.__spec__.name)
"""
    assert output(code, fake) == "launch False llamafactory.launcher"


def test_an_imported_module_is_patched_by_install(fake: Path):
    code = """
import llamafactory.launcher as launcher
from kt_sft.integrations import hooks
hooks.install()
print(hasattr(launcher.launch, '__wrapped__'))
"""
    assert output(code, fake) == "True"


def test_a_module_whose_body_imports_torch_is_patched_at_its_end(fake: Path):
    (fake / "llamafactory/launcher.py").write_text("import torch\ndef launch(): pass\n")
    code = """
from llamafactory.launcher import launch
print(hasattr(launch, '__wrapped__'))
"""
    assert output(code, fake) == "True"


def test_install_after_llamafactory_has_copied_the_loader(fake: Path):
    code = """
import sys, types
sys.modules['llamafactory.model.loader'] = types.ModuleType('llamafactory.model.loader')
from kt_sft.integrations import hooks
try:
    hooks.install()
except RuntimeError as error:
    print(error)
"""
    assert "before llamafactory is imported" in output(code, fake)


def test_a_patch_that_does_not_fit_is_reported_when_kt_sft_is_wanted(fake: Path):
    (fake / "llamafactory/launcher.py").write_text("x = 1\n")
    code = """
from kt_sft.integrations import hooks
hooks.install()
import llamafactory.launcher
try:
    hooks.check_usable()
except RuntimeError as error:
    print(error)
"""
    message = output(code, fake)
    assert "does not fit the installed llamafactory" in message
    assert "launch" in message


def test_forks_are_refused(tmp_path: Path):
    package = tmp_path / "transformers" / "integrations"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py", package / "kt.py"):
        file.touch()
    code = """
from kt_sft.integrations import hooks
try:
    hooks.check_usable()
except RuntimeError as error:
    print(error)
"""
    message = output(code, tmp_path)
    assert "pip uninstall -y transformers-kt accelerate-kt" in message


def test_autoload_never_raises():
    code = """
import sys
from kt_sft.integrations import hooks
hooks.install = lambda: 1 / 0
hooks.autoload()
print('alive')
"""
    assert output(code) == "alive"
