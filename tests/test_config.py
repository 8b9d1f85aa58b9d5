"""KtConfig: our keys, KTransformers' keys, the environment; every refusal names the key, its value and a remedy."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from kt_sft.config import KtConfig


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("weight_format", "int4", "weight_format", "int4"),
        ("kt_backend", "AMXBF16", "weight_format", "bf16"),
        ("kt_backend", "AMXINT8", "weight_format", "int8"),
        ("kt_backend", "amxint4", "weight_format", "int4"),
        ("kt_backend", "auto", "weight_format", "auto"),
        ("kt_backend", "FP8", "weight_format", "fp8"),
        ("kt_backend", "MXFP4", "weight_format", "mxfp4"),
        ("kt_backend", "LLAMAFILE", "weight_format", "gguf"),
        ("kt_expert_weight_format", "bf16", "weight_format", "bf16"),
        ("kt_cpu_activation", "recompute", "activation_policy", "recompute"),
        ("kt_compute_type", "int8", "compute_type", "int8"),
        ("activation_policy", {"cpu": "recompute", "gpu": "recompute"}, "activation_policy", "recompute"),
        ("kt_activation_policy", '{"cpu":"recompute","gpu":"retain"}', "activation_policy", "recompute"),
        ("kt_num_threads", 3, "num_threads", 3),
        ("kt_num_threads", "3", "num_threads", 3),
        ("kt_threadpool_count", "2", "numa_nodes", 2),
        ("numa_nodes", 1, "numa_nodes", 1),
        ("group_size", "64", "group_size", 64),
        ("kt_weight_path", "/w", "weight_path", "/w"),
        ("kt_expert_checkpoint_path", "/e", "expert_checkpoint_path", "/e"),
        ("kt_non_expert_weight_path", "/n", "non_expert_weight_path", "/n"),
        ("kt_weight_path", None, "weight_path", None),
        ("enabled", "true", "enabled", True),
        ("enabled", False, "enabled", False),
        ("ACCELERATE_KT_NUM_THREADS", "5", "num_threads", 5),
    ],
)
def test_keys(key, value, field, expected):
    assert getattr(KtConfig.from_dict({key: value}), field) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kt_num_thread": 2}, "f.yaml: unknown setting 'kt_num_thread'; did you mean 'kt_num_threads'"),
        ({"weight_formt": "int8"}, "unknown setting 'weight_formt'; did you mean 'weight_format'"),
        ({"zzzz": 1}, "unknown setting 'zzzz'; valid are .*weight_format"),
        ({3: 1}, "expected the names of settings, got 3"),
        ({"weight_format": "int9"}, "weight_format: expected one of auto, bf16, int8, int4, fp8.*'int9'; did you mean"),
        ({"kt_backend": "AMXINT9"}, "f.yaml: kt_backend: .*did you mean 'amxint"),
        ({"group_size": 32, "weight_format": "fp8"}, "fp8 leaves no choice; got 32"),
        ({"kt_cpu_activation": "retian"}, "activation_policy: .*'retian'; did you mean 'retain'"),
        ({"activation_policy": {"cpuu": "retain"}}, "expected the keys cpu and gpu"),
        ({"kt_num_threads": 0}, "num_threads: expected a whole number of at least 1, got 0"),
        ({"kt_numa_nodes": 0}, "numa_nodes: expected a whole number of at least 1, got 0"),
        ({"kt_threadpool_count": 2, "numa_nodes": 1}, "contradict each other about numa_nodes"),
        ({"kt_num_threads": "two"}, "kt_num_threads: expected a whole number, got 'two'"),
        ({"kt_num_threads": True}, "expected a whole number, got True"),
        ({"kt_num_threads": 1.5}, "expected a whole number, got 1.5"),
        ({"group_size": 48}, "group_size: expected 32, 64, 128, 0"),
        ({"group_size": 32, "weight_format": "bf16"}, "bf16 leaves no choice; got 32"),
        ({"kt_weight_path": 3}, "weight_path: expected a path, got 3"),
        ({"enabled": "perhaps"}, "expected true or false, got 'perhaps'"),
        ({"kt_num_gpu_experts": 4}, "kt_num_gpu_experts: expected 0 .*got 4"),
        ({"kt_use_lora_experts": True}, "kt_use_lora_experts: expected False"),
        ({"kt_train_mode": "full"}, "kt_train_mode: expected 'lora'"),
        (
            {"kt_backend": "AMXINT8", "weight_format": "int4"},
            "weight_format: 'int4' and kt_backend: 'AMXINT8' contradict",
        ),
        ([1], "expected a mapping"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        KtConfig.from_dict(settings, source="f.yaml")
    assert str(error.value).startswith("f.yaml")


def test_two_names_that_agree():
    config = KtConfig.from_dict({"kt_backend": "AMXINT4", "kt_expert_weight_format": "int4", "weight_format": "int4"})
    assert config.weight_format == "int4"


def test_keys_without_meaning_are_named_in_one_line(caplog):
    settings = {
        **dict.fromkeys(["kt_tp_enabled", "kt_max_cache_depth", "kt_share_backward_bb", "kt_weight_lifecycle"], 1),
        **{"lora_rank": 8, "lora_alpha": 16, "kt_model_max_length": 64, "kt_num_gpu_experts": 0},
    }
    with caplog.at_level(logging.INFO, "kt_sft"):
        assert KtConfig.from_dict(settings) == KtConfig()
    (line,) = caplog.messages
    assert all(key in line for key in settings if key != "kt_num_gpu_experts")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_format": "fp9"}, "weight_format"),
        ({"activation_policy": "x"}, "activation_policy"),
        ({"num_threads": -1}, "num_threads"),
        ({"num_threads": "2"}, "num_threads"),
        ({"group_size": True}, "group_size"),
        ({"enabled": "no"}, "enabled"),
        ({"cache_dir": ""}, "cache_dir"),
    ],
)
def test_the_constructor_checks_too(arguments, message):
    with pytest.raises(ValueError, match=f"{message}: expected"):
        KtConfig(**arguments)


def test_int8_products_need_int8_weights_whatever_the_checkpoint_has():
    assert KtConfig(compute_type="int8").weight_format == "int8"
    assert KtConfig().weight_format == "auto"
    with pytest.raises(ValueError, match="compute_type: int8 products need weight_format int8"):
        KtConfig(compute_type="int8", weight_format="fp8")


def test_int8_gradients_go_with_int8_products():
    settings = {"kt_compute_type": "int8", "kt_gradient_compute_type": "int8"}
    assert KtConfig.from_dict(settings).gradient_compute_type == "int8"
    with pytest.raises(ValueError, match=r"gradient_compute_type: int8 goes with compute_type int8 only.*set both"):
        KtConfig(gradient_compute_type="int8")
    with pytest.raises(ValueError, match=r"gradient_compute_type: expected one of bf16, int8; got 'int4'"):
        KtConfig(compute_type="int8", gradient_compute_type="int4")


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KtConfig().num_threads = 2
    with pytest.raises(TypeError):
        KtConfig("int8")


def test_workers_get_the_same_settings():
    config = KtConfig(
        weight_format="int4",
        group_size=64,
        num_threads=3,
        weight_path="/w",
        activation_policy="recompute",
        enabled=False,
    )
    assert KtConfig.from_env(config.to_env()) == config
    assert KtConfig.from_env({}) == KtConfig.from_env(KtConfig().to_env()) == KtConfig()
    assert KtConfig.from_env(KtConfig(cache_dir=Path("/c")).to_env()).cache_dir == "/c"


def test_environment_of_ktransformers():
    environ = {
        "ACCELERATE_USE_KT": "true",
        "ACCELERATE_KT_WEIGHT_PATH": "/w",
        "ACCELERATE_KT_LORA_RANK": "8",
        "ACCELERATE_KT_BACKEND": "AMXINT4",
        "ACCELERATE_KT_NUM_THREADS": "",
    }
    assert KtConfig.from_env(environ) == KtConfig(weight_path="/w", weight_format="int4")
    environ |= KtConfig(weight_format="bf16").to_env()
    with pytest.raises(ValueError, match="ACCELERATE_KT_BACKEND: 'AMXINT4' and weight_format: 'bf16' contradict"):
        KtConfig.from_env(environ)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_broken_environment(text):
    with pytest.raises(ValueError, match="KT_SFT_CONFIG: expected a JSON object"):
        KtConfig.from_env({"KT_SFT_CONFIG": text})


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("KT_SFT_CACHE", raising=False)
    assert KtConfig().cache_folder == Path.home() / ".cache" / "kt_sft"
    monkeypatch.setenv("KT_SFT_CACHE", str(tmp_path))
    assert KtConfig().cache_folder == tmp_path
    assert KtConfig(cache_dir="/c").cache_folder == Path("/c")
    assert KtConfig(cache_dir="none").cache_folder is None
    monkeypatch.setenv("KT_SFT_CACHE", "none")
    assert KtConfig().cache_folder is None


def test_importing_the_settings_does_not_import_torch():
    code = "import sys, kt_sft.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


def test_expert_parallel_is_known_by_both_names():
    assert KtConfig().expert_parallel == "host"
    assert KtConfig.from_dict({"kt_expert_parallel": "world"}).expert_parallel == "world"
    with pytest.raises(ValueError, match="expert_parallel: expected one of host, world, none"):
        KtConfig.from_dict({"kt_expert_parallel": "hosts"})
