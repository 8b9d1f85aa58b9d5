"""Two machines, as two network namespaces with an expert store each, train one model whose experts are divided."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES, ADDRESSES = ("kt_sft_test_a", "kt_sft_test_b"), ("10.213.77.1", "10.213.77.2")
LINKS = ("ktsft0", "ktsft1")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[None]:
    """Two namespaces that see each other and nothing else."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1])
        for name, link, address in zip(NAMES, LINKS, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for device in (link, "lo"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        _remove()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield
    _remove()


def _remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_as_one(workspace, namespaces):
    settings = {"kt_expert_weight_format": "int8", "kt_expert_parallel": "world"}
    common = {"max_steps": 4, "lora_dropout": 0.0}
    file = workspace.write("hosts.yaml", workspace.training("hosts", kt_config=settings, **common))
    processes = []
    for host, (name, link) in enumerate(zip(NAMES, LINKS, strict=True)):
        torchrun = ["torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(host)]
        torchrun += ["--master_addr", ADDRESSES[0], "--master_port", "29577", str(ROOT / "src/train.py"), file]
        env = workspace.env(GLOO_SOCKET_IFNAME=link, KT_SFT_CACHE=str(workspace.folder / f"store{host}"))
        log = open(workspace.folder / f"hosts{host}.log", "w")  # noqa: SIM115
        command = ["ip", "netns", "exec", name, sys.executable, "-m", *torchrun]
        processes.append(subprocess.Popen(command, env=env, cwd=workspace.folder, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = [(workspace.folder / f"hosts{host}.log").read_text() for host in range(2)]
    assert codes == [0, 0], logs[0][-4000:] + logs[1][-4000:]
    assert "sharded over the hosts" in logs[0]
    single = workspace.training("one_host", per_device_train_batch_size=4, **common)
    workspace.drive({"verb": "train", "args": single})
    assert workspace.losses("hosts") == pytest.approx(workspace.losses("one_host"), rel=1e-2)
    stores = [sum(f.stat().st_size for f in (workspace.folder / f"store{h}").glob("*.ktpack")) for h in range(2)]
    whole = sum(f.stat().st_size for f in (workspace.folder / "cache").glob("*.ktpack"))
    assert all(0 < size < 0.7 * whole for size in stores), (stores, whole)
