"""The kt-sft command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kt_sft.cli import llamafactory, planned, version
from kt_sft.cli.errors import CommandError


def kt_sft(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kt_sft", *args], capture_output=True, text=True, timeout=120)


def test_version_is_the_default():
    result = kt_sft()
    assert result.returncode == 0, result.stderr
    for name in ("kt_sft", "ISA", "weight formats", "threads", "NUMA nodes", "torch", "llamafactory"):
        assert any(line.startswith(name) for line in result.stdout.splitlines()), name


def test_version_names_a_missing_package(monkeypatch):
    monkeypatch.setattr(version, "PACKAGES", ("no-such-package",))
    assert ("no-such-package", "not installed") in version.rows()


def test_version_says_when_the_kernels_are_not_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "kt_sft.native", None)
    assert any("pip install" in value for _, value in version.rows())


@pytest.mark.parametrize("verb", sorted(planned.INSTEAD))
def test_a_planned_verb_is_refused_in_one_line(verb):
    command = planned._refusal(verb)
    with pytest.raises(CommandError, match=f"{verb} is not available yet: ") as error:
        command()
    assert "\n" not in str(error.value)


def test_an_error_is_one_line():
    result = kt_sft("quant", "--input-path", "x")
    assert result.returncode == 1
    assert result.stderr.startswith("kt-sft: quant is not available yet: kt-sft convert MODEL")
    assert result.stderr.count("\n") == 1


def test_an_unknown_verb_is_refused():
    result = kt_sft("trian")
    assert result.returncode == 2
    assert "train" in result.stderr


def test_torchrun_needs_the_entry_point(monkeypatch):
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setenv("USE_KT", "1")
    pytest.importorskip("llamafactory")
    with pytest.raises(CommandError, match="TORCH_DEVICE_BACKEND_AUTOLOAD unset"):
        llamafactory.run("train", ["x.yaml"])


def test_version_says_in_one_line_that_an_isa_cannot_run():
    env = {**os.environ, "KT_SFT_ISA": "avx51"}
    done = subprocess.run([sys.executable, "-m", "kt_sft", "version"], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("kt-sft: KT_SFT_ISA: unknown 'avx51'; expected auto or one of: amx")
    assert "Traceback" not in done.stderr
