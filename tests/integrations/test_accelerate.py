"""accelerate launch: kt_config in its file, two DDP processes, and FSDP2 with an exact resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("accelerate")

from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from kt_sft.integrations import hooks
from kt_sft.integrations.accelerate import accept_numbered_cpus, export_settings, patch_config_args
from kt_sft.integrations.llamafactory_args import resolve

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
PLAIN = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1}
# names and values that LLaMA-Factory 0.9.5 ships
KTRANSFORMERS_BLOCK = {
    "enabled": True,
    "kt_backend": "AMXINT4",
    "kt_num_threads": 96,
    "kt_tp_enabled": True,
    "kt_threadpool_count": 2,
    "kt_max_cache_depth": 2,
    "kt_share_backward_bb": True,
    "lora_rank": 8,
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks.install()
    for name in ("ACCELERATE_USE_KT", "KT_SFT_CONFIG"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_block_goes_to_the_environment(environment, tmp_path, suffix):
    path = tmp_path / f"config.{suffix}"
    content = PLAIN | {"kt_config": KTRANSFORMERS_BLOCK}
    path.write_text(json.dumps(content) if suffix == "json" else yaml.safe_dump(content))
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and not hasattr(config, "kt_config")
    assert os.environ["ACCELERATE_USE_KT"] == "true"
    _, received = resolve({}, {})
    assert received is not None
    assert (received.weight_format, received.num_threads) == ("int4", 96)


def test_both_files_add_up(environment):
    export_settings({"kt_num_threads": 3, "kt_backend": "AMXINT4"})
    _, config = resolve({}, {"use_kt": True, "kt_cpu_activation": "recompute", "kt_expert_weight_format": "int4"})
    assert config is not None
    assert (config.num_threads, config.activation_policy, config.weight_format) == (3, "recompute", "int4")


@pytest.mark.parametrize("key", ["kt_backend", "kt_expert_weight_format", "weight_format"])
def test_contradicting_files_are_refused(environment, key):
    export_settings({"kt_backend": "AMXINT8"})  # also the default
    with pytest.raises(ValueError, match="contradict"):
        resolve({}, {"use_kt": True, key: "int4"})


def test_disabled_block_changes_nothing(environment, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(PLAIN | {"kt_config": KTRANSFORMERS_BLOCK | {"enabled": False}}))
    load_config_from_file(str(path))
    assert "ACCELERATE_USE_KT" not in os.environ


def test_unknown_key_in_the_block(environment, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(PLAIN | {"kt_config": {"kt_num_treads": 4}}))
    with pytest.raises(ValueError, match="kt_num_threads"):
        load_config_from_file(str(path))


def test_other_unknown_keys_are_still_refused(environment, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(PLAIN | {"no_such_key": 4}))
    with pytest.raises(ValueError, match="no_such_key"):
        load_config_from_file(str(path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_are_accepted(environment, path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert ("fsdp2" in path.stem) == (config.fsdp_config.get("fsdp_version") == 2)


def test_patching_needs_process_config():
    with pytest.raises(AttributeError, match="process_config"):
        patch_config_args(SimpleNamespace(BaseConfig=object))


def test_a_numbered_cpu_is_a_location(tmp_path):
    accept_numbered_cpus()
    accept_numbered_cpus()
    torch.save({"a": torch.arange(3)}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", map_location=torch.device("cpu:1"))["a"]
    assert loaded.device.type == "cpu" and loaded.tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="don't know how to restore"):
        torch.load(tmp_path / "file.pt", map_location="nowhere:1")


def launch(workspace, config: dict, script: Path, output: str, **changes):
    file = workspace.write(f"{output}.accelerate.yaml", config)
    args = workspace.write(f"{output}.yaml", workspace.training(output, **changes))
    return workspace.run("accelerate", "launch", "--config_file", file, str(script), args, MASTER_PORT="0")


def test_two_ddp_processes(workspace):
    config = yaml.safe_load((ROOT / "configs/accelerate/ddp_cpu.yaml").read_text()) | {"main_process_port": 0}
    changes = dict(use_kt=None, kt_config=None, max_steps=2, lora_dropout=0.0)
    result = launch(workspace, config, ROOT / "src/train.py", "ddp", **changes)
    text = result.stdout + result.stderr
    assert "ACCELERATE_USE_KT is set" in text
    assert text.count("packed as int8, ") == 1  # rank 0 only
    assert "distributed training: True" in text
    single = workspace.training("single", max_steps=2, per_device_train_batch_size=4, lora_dropout=0.0)
    workspace.drive({"verb": "train", "args": single})
    assert workspace.losses("ddp") == pytest.approx(workspace.losses("single"), rel=1e-2)


@pytest.fixture(scope="module")
def fsdp(workspace):
    """Four steps of FSDP2, and the last two again from the checkpoint."""
    config = yaml.safe_load((ROOT / "configs/accelerate/fsdp2_kt_int8.yaml").read_text())
    config |= {"use_cpu": True, "main_process_port": 0}
    config["kt_config"] |= {"kt_num_threads": 1}
    script = Path(__file__).with_name("fsdp_on_cpu.py")
    same = dict(use_kt=None, kt_config=None, lora_dropout=0.0)
    first = launch(workspace, config, script, "fsdp", **same)
    checkpoint = str(workspace.folder / "fsdp/checkpoint-2")
    launch(workspace, config, script, "fsdp_resumed", resume_from_checkpoint=checkpoint, **same)
    return first


def test_fsdp2_shards_are_whole_in_the_adapter(fsdp, workspace):
    assert (workspace.folder / "fsdp/checkpoint-2/pytorch_model_fsdp.bin").exists()  # really FSDP, not DDP
    adapter = workspace.adapter("fsdp")
    for expert in range(8):
        assert f"base_model.model.model.layers.0.mlp.experts.{expert}.down_proj.lora_B.weight" in adapter


def test_fsdp2_resume_is_bit_equal(fsdp, workspace):
    losses, resumed = workspace.losses("fsdp"), workspace.losses("fsdp_resumed")
    assert resumed == {step: losses[step] for step in (3, 4)}
    expected, got = workspace.adapter("fsdp"), workspace.adapter("fsdp_resumed")
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_trains(workspace, path):
    config = yaml.safe_load(path.read_text()) | {"use_cpu": True, "main_process_port": 0}
    has_block = "kt_config" in config
    if has_block:
        config["kt_config"] |= {"kt_num_threads": 1}
    weight_format = next((name for name in ("bf16", "int4") if path.stem.endswith(name)), "int8")
    script = Path(__file__).with_name("fsdp_on_cpu.py")
    changes = dict(max_steps=1, save_strategy="no") | (dict(use_kt=None, kt_config=None) if has_block else {})
    result = launch(workspace, config, script, f"shipped_{path.stem}", **changes)
    assert f"packed as {weight_format}, " in result.stdout + result.stderr
    assert sorted(workspace.losses(f"shipped_{path.stem}")) == [1]
