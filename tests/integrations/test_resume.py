"""kill -9, resume, and the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
TIMES, STEPS = 10, 24


_running: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_goes_on_after_a_failed_test():
    yield
    for process in _running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _running.clear()


class Run:
    """A training in its own process group, started from the last complete checkpoint of ``output``."""

    def __init__(self, workspace: Any, output: str, command: list[str], **changes: Any) -> None:
        self.folder = workspace.folder / output
        checkpoint = last_checkpoint(self.folder)
        changes["resume_from_checkpoint"] = str(checkpoint) if checkpoint else None
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


def accelerate(workspace: Any, name: str, script: Path) -> list[str]:
    config = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text())
    config |= {"use_cpu": True, "main_process_port": 0}
    config["kt_config"] = {"enabled": True, "kt_backend": "AMXINT8", "kt_num_threads": 1}
    file = workspace.write(f"{name}.accelerate.yaml", config)
    return [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", file, str(script)]


def test_killed_after_a_checkpoint(workspace, trained):
    run = Run(workspace, "killed", CLI)
    while last_checkpoint(run.folder) is None and run.process.poll() is None:
        time.sleep(0.02)
    run.kill(None)
    assert not (run.folder / "adapter_model.safetensors").exists()  # really interrupted
    Run(workspace, "killed", CLI).finish()
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
        time.sleep(chance.random() * 0.2)
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


@pytest.mark.slow
def test_two_ranks_go_on_as_one_and_one_as_two(workspace):
    """The same global batch, 2 x 2 examples or 1 x 4, within an epoch: stock Trainer keeps one RNG file per rank, and
    shuffles the next epoch differently when there are more or fewer ranks than files.
    """
    ddp = accelerate(workspace, "ddp_cpu", ROOT / "src/train.py")
    common = {"max_steps": 4, "lora_dropout": 0.0, "save_steps": 2, "learning_rate": 1.0e-4, "bf16": None}
    two = common | {"use_kt": None, "kt_config": None, "per_device_train_batch_size": 2}
    one = common | {"per_device_train_batch_size": 4}
    Run(workspace, "two", ddp, **two).finish()
    Run(workspace, "one", CLI, **one).finish()
    assert workspace.losses("two") == pytest.approx(workspace.losses("one"), rel=1e-3)
    for name, start, command, changes in (("two_to_one", "two", CLI, one), ("one_to_two", "one", ddp, two)):
        target = workspace.folder / name / "checkpoint-2"
        target.parent.mkdir()
        target.symlink_to(workspace.folder / start / "checkpoint-2")
        Run(workspace, name, command, **changes).finish()
        expected = workspace.losses(start)
        assert workspace.losses(name) == pytest.approx({s: expected[s] for s in (3, 4)}, rel=1e-3)
        got, whole = workspace.adapter(name), workspace.adapter(start)
        for key in [key for key in whole if "lora_B" in key and "self_attn" in key]:  # grew from zero by Adam's signs
            assert (got[key] - whole[key]).norm() < 0.25 * whole[key].norm(), key
