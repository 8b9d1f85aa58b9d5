"""kill -9, resume, and the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TIMES, STEPS = 10, 100


_running: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_goes_on_after_a_failed_test():
    yield
    for process in _running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _running.clear()


class Run:
    """A training in its own process group; one that was killed goes on from the last complete checkpoint."""

    def __init__(self, workspace: Any, output: str, command: list[str], **changes: Any) -> None:
        self.folder = workspace.folder / output
        args = workspace.write(f"{output}.yaml", workspace.training(output, **changes))
        self._log = open(workspace.folder / f"{output}.log", "a+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *command, args],
            env=workspace.env(MASTER_PORT="0"),
            cwd=workspace.folder,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.append(self.process)

    def reached(self, step: int) -> bool:
        """Wait until the log has ``step``; False if the training ended before."""
        log = self.folder / "trainer_log.jsonl"
        while self.process.poll() is None:
            if log.exists() and f'"current_steps": {step},' in log.read_text():
                return True
            time.sleep(0.02)
        return False

    def kill(self, rank: int | None) -> None:
        """SIGKILL for everything, or for one rank: then its launcher and the other ranks must end by themselves."""
        if rank is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return
        processes = psutil.Process(self.process.pid).children(recursive=True)
        ranks = [p for p in processes if p.environ().get("RANK") == str(rank) and "LOCAL_RANK" in p.environ()]
        ranks[0].kill()
        assert self.process.wait(timeout=30) != 0
        psutil.wait_procs(processes, timeout=10)
        assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []

    def finish(self) -> None:
        code = self.process.wait(timeout=300)
        self._log.seek(0)
        assert code == 0, self._log.read()[-6000:]


def last_checkpoint(folder: Path) -> Path | None:
    """The Trainer writes trainer_state.json last."""
    complete = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


CLI = [str(Path(sys.executable).parent / "llamafactory-cli"), "train"]


def accelerate(workspace: Any, name: str, script: Path, **changes: Any) -> list[str]:
    config = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text())
    config |= {"use_cpu": True, "main_process_port": 0, **changes}
    config["kt_config"] = {"enabled": True, "kt_backend": "AMXINT8", "kt_num_threads": 1}
    file = workspace.write(f"{name}.accelerate.yaml", config)
    return [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", file, str(script)]


def test_killed_after_a_checkpoint(workspace, trained):
    run = Run(workspace, "killed", CLI)
    while last_checkpoint(run.folder) is None and run.process.poll() is None:
        time.sleep(0.02)
    run.kill(None)
    assert not (run.folder / "adapter_model.safetensors").exists()  # really interrupted
    half = shutil.copytree(last_checkpoint(run.folder), run.folder / "checkpoint-98")
    (half / "trainer_state.json").unlink()
    asked = Run(workspace, "killed", CLI, resume_from_checkpoint=str(half))
    assert asked.process.wait(timeout=300) != 0
    assert f"got {half} without a whole trainer_state.json" in (workspace.folder / "killed.log").read_text()
    Run(workspace, "killed", CLI).finish()
    assert f"{half} is passed over" in (workspace.folder / "killed.log").read_text()
    assert workspace.losses("killed") == workspace.losses("full")
    for name, tensor in workspace.adapter("full").items():
        assert torch.equal(workspace.adapter("killed")[name], tensor), name


def killed_again_and_again(workspace: Any, output: str, command: list[str], rank: int | None, **changes: Any) -> None:
    """Kill the run ``TIMES`` times, each time within three steps after it has gone on, then let it finish."""
    chance = random.Random(0)
    for _ in range(TIMES):
        checkpoint = last_checkpoint(workspace.folder / output)
        done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        (workspace.folder / output / "trainer_log.jsonl").unlink(missing_ok=True)
        run = Run(workspace, output, command, **changes)
        assert run.reached(min(done + chance.randint(1, 3), STEPS - 1)), f"ended early, see {output}.log"
        time.sleep(chance.random() * 0.2)  # also while a checkpoint is written
        run.kill(rank)
    Run(workspace, output, command, **changes).finish()


@pytest.mark.slow
def test_killed_ten_times_alone(workspace):
    changes = {"max_steps": STEPS}
    Run(workspace, "whole", CLI, **changes).finish()
    killed_again_and_again(workspace, "often", CLI, None, **changes)
    losses, whole = workspace.losses("often"), workspace.losses("whole")
    assert losses == {step: whole[step] for step in losses}
    for name, tensor in workspace.adapter("whole").items():
        assert torch.equal(workspace.adapter("often")[name], tensor), name


@pytest.mark.slow
def test_one_rank_killed_ten_times_with_fsdp2(workspace):
    before = set(Path("/dev/shm").iterdir())
    changes = {"max_steps": STEPS, "use_kt": None, "kt_config": None, "lora_dropout": 0.0}
    command = accelerate(workspace, "fsdp2_kt_int8", Path(__file__).with_name("fsdp_on_cpu.py"))
    Run(workspace, "whole_fsdp", command, **changes).finish()
    killed_again_and_again(workspace, "often_fsdp", command, 1, **changes)
    losses, whole = workspace.losses("often_fsdp"), workspace.losses("whole_fsdp")
    assert losses == pytest.approx({step: whole[step] for step in losses}, rel=1e-3)
    expected = workspace.adapter("whole_fsdp")
    for name, tensor in workspace.adapter("often_fsdp").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert set(Path("/dev/shm").iterdir()) - before == set()


# the number is that of the ranks; "one" is a process without a launcher
TWO_AND_ONE = [("fsdp2", "fsdp1"), ("fsdp2", "one"), ("ddp2", "one")]
PAIRS = [*TWO_AND_ONE, *(pair[::-1] for pair in TWO_AND_ONE), ("ddp2", "fsdp2"), ("fsdp2", "ddp2")]
GLOBAL_BATCH = 4


@pytest.fixture(scope="module")
def launched(workspace: Any) -> Callable[..., str]:
    """Train nine steps, over two ends of an epoch, under a launcher; from the checkpoint of another, ``start``."""
    checkpoint = str(write_checkpoint(workspace.folder / "model32", torch.float32, embedding_scale=16.0))
    common = {"max_steps": 9, "lora_dropout": 0.0, "save_steps": 3, "learning_rate": 1.0e-3, "bf16": None}
    fp32 = {"mixed_precision": "no"}
    done: set[str] = set()

    def launch(launcher: str, start: str = "") -> str:
        name = f"{start}_to_{launcher}" if start else f"whole_{launcher}"
        if name in done:
            return name
        if start:
            target = workspace.folder / name / "checkpoint-3"
            target.parent.mkdir()
            target.symlink_to(workspace.folder / launch(start) / "checkpoint-3")
        changes: dict[str, Any] = common | {"model_name_or_path": checkpoint}
        changes["per_device_train_batch_size"] = GLOBAL_BATCH // (2 if launcher.endswith("2") else 1)
        command = CLI
        if launcher == "ddp2":
            command = accelerate(workspace, "ddp_cpu", ROOT / "src/train.py", **fp32)
        elif launcher != "one":
            script = Path(__file__).with_name("fsdp_on_cpu.py")
            command = accelerate(workspace, "fsdp2_kt_int8", script, num_processes=int(launcher[-1]), **fp32)
        if launcher != "one":
            changes |= {"use_kt": None, "kt_config": None}
        Run(workspace, name, command, **changes).finish()
        done.add(name)
        return name

    return launch


@pytest.mark.slow
@pytest.mark.parametrize(("start", "launcher"), PAIRS)
def test_other_launchers_and_numbers_of_ranks_go_on(workspace, launched, start, launcher):
    """The same global batch; the losses are those of the run that wrote the checkpoint, as if it had not stopped."""
    got, whole = (workspace.losses(launched(*args)) for args in ((launcher, start), (start,)))
    assert got == pytest.approx({step: whole[step] for step in range(4, 10)}, rel=1e-3)
    after, adapter = workspace.adapter(launched(launcher, start)), workspace.adapter(launched(start))
    before = load_file(workspace.folder / launched(start) / "checkpoint-3" / "adapter_model.safetensors")
    assert matrix.change_ratio(after, adapter, before) < 0.1
