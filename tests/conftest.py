"""Shared fixtures: NaN in every torch.empty, deterministic seeds, and each instruction set that this CPU can run."""

from __future__ import annotations

import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from kt_sft import native

with torch.device("meta"):  # torch lists the functions that this redirects at its first use: before empty is replaced
    torch.empty(0)

ALL_ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "amx_model")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    """Whatever is read before it was written becomes NaN: in torch.empty and in the kernels' workspace."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type != "meta":
            tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    native.set_workspace_poison(True)
    yield
    native.set_workspace_poison(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads():
    """What a test sets is its own."""
    before = native.num_threads()
    yield
    if native.num_threads() != before:
        native.set_num_threads(before)


@pytest.fixture(params=ALL_ISAS)
def isa(request: pytest.FixtureRequest):
    """Every ISA in turn; skipped, with the reason, where the CPU lacks it."""
    if request.param not in native.isas():
        pytest.skip(f"this CPU cannot run {request.param}; it runs {', '.join(native.isas())}")
    before = native.isa()
    native.select_isa(request.param)
    yield request.param
    native.select_isa(before)


def exact_rows(isa: str, forward: bool) -> int:
    """Up to so many rows an ISA multiplies codes as they are, and scales sums; of more, weights are rounded to bf16."""
    if isa != "avx512_bf16" or not forward:
        return 4
    cpu = Path("/proc/cpuinfo").read_text()
    zen4 = re.search(r"vendor_id\s*: AuthenticAMD\ncpu family\s*: 25\n", cpu)
    return 8 if zen4 else 64


def rms_ratio(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected|| / ||expected||; NaN where anything is NaN, so that a comparison with it fails."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
