"""A workspace with a tiny checkpoint, and runs of the real commands in their own processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny import write_checkpoint, write_dataset

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DRIVER = Path(__file__).with_name("driver.py")


class Workspace:
    """Checkpoint, data and packed cache that the runs of one test session share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_checkpoint(folder / "model")
        self.data = write_dataset(folder / "data")
        self.overlay: Path | None = None  # a folder with other package versions

    def base(self) -> dict[str, Any]:
        return {
            "model_name_or_path": str(self.model),
            "template": "qwen",
            "finetuning_type": "lora",
            "use_kt": True,
            "kt_config": {"kt_expert_weight_format": "int8"},
        }

    def training(self, output: str, **changes: Any) -> dict[str, Any]:
        """Arguments of a four-step SFT run; a change to None removes a key."""
        args = self.base() | {
            "stage": "sft",
            "do_train": True,
            "lora_rank": 4,
            "lora_target": "all",
            "lora_dropout": 0.1,
            "dataset": "tiny",
            "dataset_dir": str(self.data),
            "cutoff_len": 64,
            "output_dir": str(self.folder / output),
            "logging_steps": 1,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1.0e-2,
            "bf16": True,
            "use_cpu": True,
            "report_to": "none",
        }
        return {key: value for key, value in (args | changes).items() if value is not None}

    def env(self, **changes: str) -> dict[str, str]:
        path = [str(self.overlay)] if self.overlay else []
        path += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("KT_", "USE_KT", "ACCELERATE_", "FORCE_"))}
        return env | {
            "PYTHONPATH": os.pathsep.join(path),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "KT_SFT_CACHE": str(self.folder / "cache"),
            **changes,
        }

    def write(self, name: str, content: dict[str, Any]) -> str:
        path = self.folder / name
        path.write_text(yaml.safe_dump(content))
        return str(path)

    def run(
        self, *command: str, ok: bool = True, stdin: str = "", timeout: int = 300, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of this interpreter's environment, or ``python``; check that it succeeded (or failed).

        One that takes too long is ended with all its processes, each of which writes where it is (PYTHONFAULTHANDLER).
        """
        program = [sys.executable] if command[0] == "python" else [sys.executable, str(BIN / command[0])]
        process = subprocess.Popen(
            [*program, *command[1:]],
            env=self.env(PYTHONFAULTHANDLER="1", **env),
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            parent = psutil.Process(process.pid)
            for each in (*parent.children(recursive=True)[::-1], parent):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGABRT)
            out, err = process.communicate()
            pytest.fail(f"{command} did not end within {timeout} s\n{out[-2000:]}\n{err[-20000:]}")
        if (process.returncode == 0) != ok:
            pytest.fail(f"{command} returned {process.returncode}\n{out[-2000:]}\n{err[-6000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def train(self, output: str, ok: bool = True, **changes: Any) -> subprocess.CompletedProcess[str]:
        return self.run(
            "llamafactory-cli", "train", self.write(f"{output}.yaml", self.training(output, **changes)), ok=ok
        )

    def drive(self, *jobs: dict[str, Any]) -> list[Any]:
        """Run several LLaMA-Factory jobs in one process; see driver.py."""
        path = self.folder / "jobs.json"
        path.write_text(json.dumps(jobs))
        self.run("python", str(DRIVER), str(path))
        return json.loads(path.with_suffix(".results.json").read_text())

    def losses(self, output: str) -> dict[int, float]:
        """Logged training loss by step."""
        return {e["current_steps"]: e["loss"] for e in self.log(output) if "loss" in e}

    def log(self, output: str) -> list[dict[str, Any]]:
        lines = (self.folder / output / "trainer_log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def adapter(self, output: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(str(self.folder / output / "adapter_model.safetensors"))


@pytest.fixture(scope="session")
def make_workspace(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workspace]:
    return lambda name: Workspace(tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session")
def workspace(make_workspace: Callable[[str], Workspace]) -> Workspace:
    pytest.importorskip("llamafactory")
    return make_workspace("llamafactory")


@pytest.fixture(scope="session")
def trained(workspace: Workspace) -> subprocess.CompletedProcess[str]:
    """The uninterrupted run ``full``: four steps, checkpoints at two and four."""
    return workspace.train("full")
