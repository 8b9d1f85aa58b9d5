"""The whole demonstration with 4 experts and two steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(sys.executable).with_name("llamafactory-cli").exists(), reason="LLaMA-Factory is not installed"
)
def test_two_steps_from_download_to_answers(gguf_path: Path, texts: Path, tmp_path: Path):
    output = tmp_path / "output"
    command = [sys.executable, "-m", "scripts.demo.run", "--quick", f"output_dir={output}"]
    environment = {**os.environ, "COLUMNS": "150"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (output / "adapter_model.safetensors").stat().st_size > 1e6
    assert (output / "training_loss.png").exists()
    targets = json.loads((output / "adapter_config.json").read_text())["target_modules"]
    assert {"q_proj", "w1", "w2", "w3"} <= set(targets), "lora_target: all must include the routed experts"
    for text in ("Who are you?", "identity_heldout (11 texts)", "tok/s", "adapter_model.safetensors"):
        assert text in result.stdout


@pytest.mark.slow
def test_a_failed_training_is_reported(gguf_path: Path, texts: Path, tmp_path: Path):
    if shutil.which(str(Path(sys.executable).with_name("llamafactory-cli"))) is None:
        pytest.skip("LLaMA-Factory is not installed")
    command = [sys.executable, "-m", "scripts.demo.run", "--quick", "dataset=absent", f"output_dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    assert "demo: llamafactory-cli train ended with exit code" in result.stderr
