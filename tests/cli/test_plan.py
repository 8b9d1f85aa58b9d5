"""``kt-sft plan``: what is printed, the JSON, and the one line that bad input gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kt_sft.cli import app
from kt_sft.cli.errors import CommandError
from kt_sft.cli.sizes import duration, gb, parse_size
from kt_sft.machine import probes
from kt_sft.machine.probes import Rate
from tests.families import save_checkpoint, tiny_model

CONFIGS = Path(__file__).parents[1] / "planning" / "configs"


@pytest.fixture(autouse=True)
def _quick_probes(monkeypatch):
    monkeypatch.setattr(probes, "peak_flops", lambda: Rate(1e12, "measured: here"))
    monkeypatch.setattr(probes, "memory_bandwidth", lambda: Rate(50e9, "measured: here"))
    monkeypatch.setattr(probes, "pack_rate", lambda weight_format: Rate(2e9, "measured: here"))
    monkeypatch.setattr(probes, "repack_rate", lambda: Rate(2e9, "measured: here"))
    monkeypatch.setenv("COLUMNS", "200")


def invoke(*args: object):
    return CliRunner().invoke(app, ["plan", *map(str, args)])


def as_json(*args: object) -> dict:
    done = invoke(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_the_tables_show_every_format_and_the_arithmetic():
    done = invoke(CONFIGS / "deepseek_v3.json", "--gpus", 2, "--gpu-memory", "48GB", "--ram", "1TB")
    assert done.exit_code == 0, done.output
    for text in (
        "671 B parameters, 36.6 B active per token",
        "58 layers x 256 experts",
        "bf16",
        "int8",
        "int4",
        "packed experts",
        "measured: here",
    ):
        assert text in done.output
    assert "bf16: needs" in done.output and "more RAM" in done.output


def test_options_describe_another_machine():
    config = CONFIGS / "qwen3_235b_a22b.json"
    data = as_json(config, "--ram", "512GB", "--cpu-tflops", 20, "--disk-speed", "5GB/s", "--gpus", 0)
    host = data["host"]
    assert (host["ram"], host["cpu"]["value"], host["disk"]["value"]) == (512e9, 20e12, 5e9)
    assert host["cpu"]["source"] == "given" and host["memory"]["source"] == "measured: here"
    assert host["pack"]["int8"]["value"] == 20 * 2e9  # twenty times this machine's peak
    assert data["job"]["gpus"] == 0 and data["parts"]["total_parameters"] == 235093634560


def test_one_format():
    assert [o["weight_format"] for o in as_json(CONFIGS / "glm_4_5.json", "--format", "int4")["options"]] == ["int4"]


def test_a_longer_step_takes_more():
    config = CONFIGS / "minimax_m2.json"
    short, long = (as_json(config, "--cutoff-len", n, "--format", "int8")["options"][0]["total"] for n in (512, 4096))
    assert long["step_seconds"] > 4 * short["step_seconds"] and long["ram_bytes"] > short["ram_bytes"]


def test_experts_that_cannot_run_are_said(tmp_path):
    config = json.loads((CONFIGS / "qwen3_235b_a22b.json").read_text()) | {"hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "cannot run yet:" in invoke(tmp_path).output
    assert "cannot run yet:" not in invoke(CONFIGS / "gpt_oss_120b.json").output


def test_a_checkpoint_folder(tmp_path):
    folder = save_checkpoint(tiny_model("qwen3_moe"), tmp_path)
    checkpoint = as_json(folder)["checkpoint"]
    assert checkpoint["from"] == "total_size in model.safetensors.index.json" and checkpoint["bytes"] > 100_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--format", "int3"), "format: expected one of auto, bf16, int8, int4; got 'int3'"),
        (("--gpu-memory", "lots"), "--gpu-memory: expected a size such as 24GB or 1.5TiB, got 'lots'"),
        (("--cpu-tflops", "0"), "--cpu-tflops: expected TFLOP/s above 0"),
        (("--cutoff-len", "0"), "cutoff_len: expected a whole number of at least 1, got 0"),
        (("--activation-policy", "drop"), "activation_policy: expected retain or recompute, got 'drop'"),
    ],
)
def test_bad_options_are_one_line(args, message):
    done = invoke(CONFIGS / "glm_4_5.json", *args)
    assert isinstance(done.exception, CommandError)
    assert message in str(done.exception) and "\n" not in str(done.exception)


def test_kernels_that_do_not_load_are_one_line():
    """An impossible instruction set, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "kt_sft", "plan", str(CONFIGS / "glm_4_5.json")],
        env={**os.environ, "KT_SFT_ISA": "no_such_isa"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and done.stderr.startswith("kt-sft: KT_SFT_ISA: unknown 'no_such_isa'")


def test_a_dense_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["New"], "hidden_size": 8}))
    error = invoke(tmp_path).exception
    assert isinstance(error, CommandError) and "num_hidden_layers" in str(error)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("24", 24e9), ("24GB", 24e9), ("24 GiB", 24 * 2**30), ("1.5TB", 1.5e12), ("3GB/s", 3e9)]
)
def test_sizes(text, nbytes):
    assert parse_size("--ram", text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1XB", "1GB/h"])
def test_bad_sizes(text):
    with pytest.raises(CommandError, match=r"--ram: expected a size"):
        parse_size("--ram", text)


def test_how_numbers_read():
    assert [gb(n) for n in (5e5, 1.5e9, 12.3e9, 1234e9)] == ["0.001 GB", "1.50 GB", "12.3 GB", "1,234 GB"]
    assert [duration(s) for s in (0.5, 90, 600, 36000)] == ["0.5 s", "90 s", "10 min", "10 h"]
