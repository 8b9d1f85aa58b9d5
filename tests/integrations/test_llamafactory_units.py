"""Pieces of the LLaMA-Factory integration that need no run: version check, remote code, threads, the report."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from torch import nn

from kt_sft import native
from kt_sft.config import KtConfig
from kt_sft.integrations import llamafactory
from kt_sft.models import convert
from kt_sft.nn.experts import KtExperts


def test_the_forks_need_not_be_installed():
    asked = []
    check = llamafactory._without_forks(lambda requirement, mandatory=False: asked.append((requirement, mandatory)))
    for fork in ("kt-kernel", "transformers-kt", "accelerate-kt"):
        check(fork, mandatory=True)
    check("peft>=0.18", mandatory=True)
    assert asked == [("peft>=0.18", True)]


@pytest.mark.parametrize(
    ("auto_map", "model_type", "stays"),
    [
        ({"AutoConfig": "c.C"}, "deepseek_v2", False),
        ({"AutoConfig": "c.C"}, "unheard_of", True),
        (None, "mixtral", True),
    ],
)
def test_native_classes_are_preferred_to_remote_code(tmp_path, auto_map, model_type, stays):
    config = {"model_type": model_type} | ({"auto_map": auto_map} if auto_map else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    model_args = SimpleNamespace(trust_remote_code=True, model_name_or_path=str(tmp_path), model_revision="main")
    llamafactory._prefer_native_classes(model_args)
    assert model_args.trust_remote_code is stays


@pytest.fixture
def threads():
    before = native.num_threads()
    yield before
    native.set_num_threads(before)


def test_threads_come_from_the_setting(threads, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    convert.set_threads(KtConfig(num_threads=3))
    assert native.num_threads() == 3


def test_threads_are_shared_by_the_processes_of_a_host(threads, monkeypatch):
    native.set_num_threads(8)
    convert._cores.cache_clear()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    convert.set_threads(KtConfig())
    assert native.num_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    convert.set_threads(KtConfig())
    assert native.num_threads() == 2


def test_report_counts_layers_experts_and_bytes(monkeypatch):
    model = nn.ModuleList(KtExperts(num_experts=4, hidden_size=64, intermediate_size=32) for _ in range(3))
    for experts in model:
        experts._shared.packed = SimpleNamespace(
            num_experts=4, hidden_size=1000, intermediate_size=1000, nbytes=2**30, weight_format="int4"
        )
    line = llamafactory.describe(model)
    assert "3 layers x 4 experts (0.036B parameters, not in the counts above) packed as int4, 3.00 GiB" in line
    assert native.info()["isa"] in line
    assert "no routed experts" in llamafactory.describe(nn.Linear(2, 2))


def test_log_lines_go_where_llamafactory_logs(monkeypatch):
    ours, theirs = logging.getLogger("kt_sft"), logging.getLogger("llamafactory")
    handler = logging.NullHandler()
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    monkeypatch.setattr(theirs, "handlers", [handler])
    monkeypatch.setenv("LOCAL_RANK", "1")
    level = ours.level
    try:
        llamafactory._share_log_handlers()
        assert ours.handlers == [handler]
        assert ours.level == logging.WARNING
    finally:
        ours.setLevel(level)


@pytest.fixture
def loader(monkeypatch):
    """A stand-in for llamafactory.model.loader that records what it is asked to load."""
    from kt_sft.integrations import peft

    calls: list[tuple[str, str, bool]] = []
    experts: list[str] = []

    @contextmanager
    def experts_on_cpu(model_dir, config):
        experts.append(model_dir)
        yield

    def load_model(tokenizer, model_args, finetuning_args, is_trainable=False, add_valuehead=False):
        calls.append((experts[-1] if experts else "", model_args.model_name_or_path, model_args.use_kt))
        return nn.Linear(2, 2)

    monkeypatch.setattr(convert, "experts_on_cpu", experts_on_cpu)
    monkeypatch.setattr(peft, "install", lambda: None)
    module = SimpleNamespace(
        load_model=load_model,
        configure_kt_loading=lambda: pytest.fail("a hook of the forks was called"),
        try_download_model_from_other_hub=lambda model_args: model_args.model_name_or_path,
    )
    llamafactory.patch_loader(module)
    return SimpleNamespace(module=module, calls=calls)


def load(loader, tmp_path, use_kt=True):
    arguments = SimpleNamespace(model_name_or_path=str(tmp_path), use_kt=use_kt, trust_remote_code=False)
    loader.module.load_model(None, arguments, None)
    return arguments


def test_load_model_hands_over_the_paths(loader, monkeypatch, tmp_path):
    monkeypatch.setattr(llamafactory, "_active", KtConfig())
    arguments = load(loader, tmp_path)
    assert loader.calls == [(str(tmp_path), str(tmp_path), True)]
    assert arguments.use_kt is False  # run_sft would refuse predict_with_generate
    monkeypatch.setattr(llamafactory, "_active", KtConfig(expert_checkpoint_path="e", non_expert_weight_path="n"))
    arguments = load(loader, tmp_path)
    assert loader.calls[1] == ("e", "n", True)
    assert arguments.model_name_or_path == str(tmp_path)


def test_load_model_without_kt_is_stock(loader, monkeypatch, tmp_path):
    monkeypatch.setattr(llamafactory, "_active", None)
    load(loader, tmp_path, use_kt=False)
    assert loader.calls == [("", str(tmp_path), False)]


def test_hooks_of_the_forks_do_nothing(loader):
    assert loader.module.configure_kt_loading("anything", key=1) is None
