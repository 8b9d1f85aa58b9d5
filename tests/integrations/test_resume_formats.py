"""Optimizer state between the two ways in which launchers write it, and which checkpoints are another launcher's."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from kt_sft.integrations import resume
from kt_sft.nn.experts import KtExperts


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose optimizer has two groups, as the Trainer's has, and a parameter that got no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in parameters.items() if n.endswith(kind)], "weight_decay": decay}
        for kind, decay in (("weight", 0.1), ("bias", 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model[:2](torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


def test_names_as_torch_writes_them():
    model, optimizer = stepped()
    names = resume.names_by_group(model, optimizer)
    got = resume.by_name(optimizer.state_dict(), names)
    expected = get_optimizer_state_dict(model, optimizer)
    assert_same(
        {n: got["state"][n] for n in got["state"]}, {n: s for n, s in expected["state"].items() if n in got["state"]}
    )
    assert [group["params"] for group in got["param_groups"]] == [group["params"] for group in expected["param_groups"]]


def test_there_and_back():
    model, optimizer = stepped()
    names, written = resume.names_by_group(model, optimizer), copy.deepcopy(optimizer.state_dict())
    by_name = resume.by_name(written, names)
    by_name["param_groups"].reverse()  # the groups are found by what is in them
    again = resume.by_number(by_name, names)
    assert_same(again, written)
    optimizer.load_state_dict(again)


def test_other_parameters_are_refused():
    model, optimizer = stepped()
    names = resume.names_by_group(model, optimizer)
    fewer = [names[0][:-1], names[1]]
    with pytest.raises(ValueError, match="over the parameters that are trained now"):
        resume.by_name(optimizer.state_dict(), fewer)
    with pytest.raises(ValueError, match="over the parameters that are trained now"):
        resume.by_number(resume.by_name(optimizer.state_dict(), names), fewer)


def experts() -> nn.Module:
    return nn.Sequential(KtExperts(num_experts=2, hidden_size=8, intermediate_size=8))


@pytest.mark.parametrize(
    ("files", "fsdp", "expected"),
    [
        (["optimizer.pt"], False, None),
        (["optimizer.pt"], True, "plain"),
        (["optimizer.bin", "pytorch_model_fsdp.bin"], True, None),
        (["optimizer.bin", "pytorch_model_fsdp.bin"], False, "fsdp"),
        (["adapter_model.safetensors"], True, "plain"),  # save_only_model
        (["pytorch_model_fsdp_0/x"], True, None),
        (["pytorch_model_fsdp_0/x"], False, None),  # SHARDED_STATE_DICT: stock refuses it
    ],
)
def test_whose_checkpoint_it_is(tmp_path: Path, files, fsdp, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    trainer = SimpleNamespace(model=experts(), is_deepspeed_enabled=False, is_fsdp_enabled=fsdp)
    assert resume.written_by_another(trainer, str(tmp_path)) == expected
    trainer.model = nn.Linear(1, 1)
    assert resume.written_by_another(trainer, str(tmp_path)) is None


def test_deepspeed_s_checkpoints_stay_with_deepspeed(tmp_path: Path):
    (tmp_path / "global_step3").mkdir()
    trainer = SimpleNamespace(model=experts(), is_deepspeed_enabled=False, is_fsdp_enabled=False)
    with pytest.raises(ValueError, match="resume with DeepSpeed and the same number of ranks"):
        resume.written_by_another(trainer, str(tmp_path))
    trainer.is_deepspeed_enabled = True
    assert resume.written_by_another(trainer, str(tmp_path)) is None
