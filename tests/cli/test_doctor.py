"""``kt-sft doctor``: each check on machines made of files and numbers, and the command on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kt_sft.cli import app, doctor, doctor_machine, doctor_packages
from kt_sft.cli.findings import Finding, ok, problem, warning
from kt_sft.machine import facts, probes
from kt_sft.machine.probes import Rate


def write(root: Path, **files: str) -> Path:
    """Files below ``root``; double underscores stand for slashes."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def node(number: int, total_kb: int, free_kb: int) -> str:
    return f"Node {number} MemTotal: {total_kb} kB\nNode {number} MemFree: {free_kb} kB\n"


# ---- facts


def test_cgroup_limits_version_2(tmp_path):
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    write(tmp_path, proc__self__cgroup="0::/a/b\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text(f"{2 << 30}\n")
    (group.parent / "memory.current").write_text(f"{1 << 30}\n")
    (group.parent / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 28}\n")
    (group / "cpu.max").write_text("150000 100000\n")
    memory = facts.memory(tmp_path)
    assert (memory.total, memory.limit) == (2 << 30, 2 << 30)
    assert memory.available == (2 << 30) - (1 << 30) + (1 << 28)
    assert facts.cpus(tmp_path).quota == 1.5


def test_cgroup_limits_version_1(tmp_path):
    memory, cpu = tmp_path / "sys/fs/cgroup/memory/job", tmp_path / "sys/fs/cgroup/cpu/job"
    memory.mkdir(parents=True)
    cpu.mkdir(parents=True)
    write(tmp_path, proc__self__cgroup="4:memory:/job\n1:cpu:/job\n")
    (memory / "memory.limit_in_bytes").write_text(f"{1 << 30}\n")
    (memory / "memory.usage_in_bytes").write_text("0\n")
    (cpu / "cpu.cfs_quota_us").write_text("200000\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    assert facts.memory(tmp_path).limit == 1 << 30
    assert facts.cpus(tmp_path).quota == 2


def test_no_limits(tmp_path):
    memory = facts.memory(tmp_path)
    assert memory.limit is None and memory.total >= memory.available > 0
    assert facts.cpus(tmp_path).quota is None


def test_numa_nodes_without_memory_do_not_count(tmp_path):
    folder = "sys__devices__system__node__"
    write(tmp_path, **{f"{folder}node{n}__meminfo": node(n, kb, kb // 2) for n, kb in ((0, 1000), (1, 0), (10, 500))})
    assert [(n.number, n.total, n.free) for n in facts.numa_nodes(tmp_path)] == [
        (0, 1000 << 10, 500 << 10),
        (10, 500 << 10, 250 << 10),
    ]


def test_cpu_flags_and_huge_pages(tmp_path):
    write(
        tmp_path,
        proc__cpuinfo="model name\t: A CPU\nflags\t\t: fpu amx_tile avx2\n",
        sys__kernel__mm__transparent_hugepage__enabled="always [madvise] never\n",
        proc__sys__kernel__numa_balancing="1\n",
    )
    assert facts.cpu_model(tmp_path) == "A CPU"
    assert facts.cpu_flags(tmp_path) == {"fpu", "amx_tile", "avx2"}
    assert facts.transparent_huge_pages(tmp_path) == "madvise"
    assert facts.automatic_numa_balancing(tmp_path)
    assert facts.transparent_huge_pages(tmp_path / "none") == ""


# ---- probes


def test_probes_measure_something():
    assert probes.memory_bandwidth().value > 1e8
    assert probes.peak_flops().value > 1e8
    assert probes.pack_rate("int8").value > 1e6


def test_reading_a_file(tmp_path):
    small = tmp_path / "small"
    small.write_bytes(b"x" * 1000)
    assert probes.read_rate(small) is None
    big = tmp_path / "big"
    big.write_bytes(bytes(64 << 20))
    rate = probes.read_rate(big)
    assert rate is not None and rate.value > 1e6 and "64 MiB of big" in rate.source


# ---- checks of the machine

GB = 10**9
AMX = {"amx_tile", "amx_bf16", "amx_int8"}


def cpus(**changes) -> facts.Cpus:
    return facts.Cpus(**{"physical": 8, "logical": 16, "allowed": 16, "quota": None, **changes})


def memory(**changes) -> facts.Memory:
    plain = {"total": 64 * GB, "available": 32 * GB, "limit": None, "swap_total": 0, "swap_used": 0}
    return facts.Memory(**{**plain, **changes})


def nodes(*sizes: tuple[int, int]) -> list[facts.NumaNode]:
    return [facts.NumaNode(number=i, total=t * GB, free=f * GB) for i, (t, f) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("finding", "status", "text"),
    [
        (lambda: doctor_machine.amx(set(), ["avx2"]), "ok", "this CPU has none"),
        (lambda: doctor_machine.amx(AMX, ["amx", "avx2"]), "ok", "permitted"),
        (lambda: doctor_machine.amx(AMX, ["avx2"]), "warning", "may not use it"),
        (lambda: doctor_machine.amx({"amx_tile"}, ["avx2"]), "warning", "only amx_tile"),
        (lambda: doctor_machine.cores(cpus(), 8), "ok", "8 cores"),
        (lambda: doctor_machine.cores(cpus(quota=2.0), 8), "warning", "quota 2 CPUs"),
        (lambda: doctor_machine.cores(cpus(quota=8.0), 8), "ok", "quota 8 CPUs"),
        (lambda: doctor_machine.cores(cpus(allowed=4), 4), "warning", "4 allowed"),
        (lambda: doctor_machine.openmp({}), "ok", "no OMP_"),
        (lambda: doctor_machine.openmp({"OMP_NUM_THREADS": "4"}), "ok", "OMP_NUM_THREADS=4"),
        (lambda: doctor_machine.openmp({"OMP_WAIT_POLICY": "ACTIVE"}), "warning", "ACTIVE"),
        (lambda: doctor_machine.openmp({"GOMP_SPINCOUNT": "infinity"}), "warning", "infinity"),
        (lambda: doctor_machine.openmp({"OMP_PROC_BIND": "close"}), "warning", "close"),
        (lambda: doctor_machine.ram(memory()), "ok", "32.0 GB of 64.0 GB"),
        (lambda: doctor_machine.ram(memory(available=GB)), "warning", "1.00 GB of"),
        (lambda: doctor_machine.ram(memory(limit=8 * GB, total=8 * GB, available=GB)), "warning", "control group"),
        (lambda: doctor_machine.swap(memory()), "ok", "none"),
        (lambda: doctor_machine.swap(memory(swap_total=8 * GB)), "ok", "0.000 GB of 8.00 GB"),
        (lambda: doctor_machine.swap(memory(swap_total=8 * GB, swap_used=4 * GB)), "warning", "4.00 GB of"),
        (lambda: doctor_machine.numa(nodes((64, 32)), True), "ok", "one node"),
        (lambda: doctor_machine.numa(nodes((64, 32), (64, 30)), False), "ok", "node 1"),
        (lambda: doctor_machine.numa(nodes((64, 32), (64, 30)), False, "2 (CPUs 0; 1)"), "ok", "over 2 (CPUs 0; 1)"),
        (lambda: doctor_machine.numa(nodes((64, 32)), False, "2 (made up)"), "ok", "one node; experts are split"),
        (lambda: doctor_machine.numa(nodes((64, 32), (32, 30)), False), "warning", "node 1: 32.0 GB"),
        (lambda: doctor_machine.numa(nodes((64, 60), (64, 3)), False), "warning", "3.00 GB free"),
        (lambda: doctor_machine.numa(nodes((64, 32), (64, 30)), True), "warning", "automatic balancing"),
        (lambda: doctor_machine.huge_pages("madvise"), "ok", "madvise"),
        (lambda: doctor_machine.huge_pages("never"), "warning", "never"),
        (lambda: doctor_machine.huge_pages(""), "warning", "not in this kernel"),
        (lambda: doctor_machine.gpus([], False), "ok", "none"),
        (lambda: doctor_machine.gpus([], True), "warning", "torch sees no GPU"),
        (lambda: doctor_machine.gpus([facts.Gpu(name="A", total=9 * GB, free=GB)], True), "ok", "A (1.00 GB of 9.00"),
        (lambda: doctor_machine.cache_folder(None), "ok", "none"),
        (lambda: doctor_machine.cache_folder(Path("/proc/kt_sft")), "problem", "cannot be written"),
    ],
)
def test_machine_checks(finding, status, text):
    got = finding()
    assert got.status == status and text in got.found
    assert bool(got.remedy) == (status != "ok")


def test_a_slow_memory_is_a_warning(monkeypatch):
    for rate, status in ((1e9, "warning"), (100e9, "ok")):
        monkeypatch.setattr(probes, "memory_bandwidth", lambda rate=rate: Rate(rate, "measured: here"))
        assert doctor_machine.bandwidth().status == status


def test_a_full_disk_is_a_warning(monkeypatch, tmp_path):
    for free, status in ((GB, "warning"), (100 * GB, "ok")):
        monkeypatch.setattr(facts, "disk_free", lambda folder, free=free: free)
        assert doctor_machine.cache_folder(tmp_path / "not" / "there").status == status


def test_a_forced_instruction_set_is_named():
    from kt_sft import native

    (default,) = doctor_machine.kernels()
    assert native.isa() in default.found
    before = native.isa()
    if before == "avx2":
        pytest.skip("this CPU runs nothing better than avx2")
    native.select_isa("avx2")
    try:
        (forced,) = doctor_machine.kernels()
    finally:
        native.select_isa(before)
    assert forced.status == "warning" and before in forced.remedy


# ---- checks of the packages


@pytest.fixture
def releases(monkeypatch):
    """The installed releases as a dictionary that a test may change."""
    real, changed = metadata.version, {}

    def version(name: str) -> str:
        if changed.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    return changed


@pytest.mark.parametrize(
    ("name", "release", "status", "remedy"),
    [
        ("transformers", "5.6.0", "ok", ""),
        ("transformers", "4.40.0", "problem", "pip install 'transformers>=4.57.6'"),
        ("transformers", "7.0.0", "warning", "pip install transformers==5.6.0"),
        ("torch", "2.13.0+cu130", "ok", ""),
        ("torch", "2.4.0", "problem", "torch>=2.5"),
        ("torch", None, "problem", "pip install torch=="),
        ("llamafactory", None, "warning", "kt-sft[llamafactory]"),
        ("llamafactory", "0.9.6", "warning", "llamafactory==0.9.5"),
    ],
)
def test_releases(releases, name, release, status, remedy):
    releases[name] = release
    got = doctor_packages.version(name)
    assert got.status == status and remedy in got.remedy


def test_packages_that_conflict_are_named(releases):
    assert doctor_packages.requirements().status == "ok"
    releases["huggingface-hub"] = "0.1.0"
    got = doctor_packages.requirements()
    assert got.status == "warning"
    assert "transformers needs huggingface-hub" in got.found and "got 0.1.0" in got.found
    assert "pip install 'huggingface-hub" in got.remedy


def test_the_forks_are_a_problem(releases, monkeypatch):
    assert doctor_packages.forks().status == "ok"
    monkeypatch.setattr(doctor_packages, "_fork_module", lambda: True)
    assert "transformers.integrations.kt" in doctor_packages.forks().found
    releases["accelerate-kt"] = "1.0"
    got = doctor_packages.forks()
    assert got.status == "problem" and "accelerate-kt" in got.found and "pip uninstall" in got.remedy


def test_hooks_turned_off_are_a_warning():
    assert doctor_packages.autoload({}).status == "ok"
    got = doctor_packages.autoload({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert got.status == "warning" and "kt-sft train" in got.remedy


def test_hooks_that_are_not_there_are_a_problem(monkeypatch):
    finders = [f for f in sys.meta_path if type(f).__name__ != "PatchFinder"]
    monkeypatch.setattr(sys, "meta_path", finders)
    assert doctor_packages.autoload({}).status == "problem"


def test_a_torchaudio_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    got = doctor_packages.audio()
    assert got.status == "problem" and "torchaudio" in got.remedy


# ---- the command


def invoke(monkeypatch, found: list[Finding], *args: str):
    monkeypatch.setattr(doctor, "findings", lambda: found)
    return CliRunner().invoke(app, ["doctor", *args])


def test_exit_status_and_remedies(monkeypatch):
    fine = [ok("A", "good"), warning("B", "[not] so good", "do this")]
    done = invoke(monkeypatch, fine)
    assert done.exit_code == 0
    assert "[not] so good" in done.output and "do this" in done.output and "1 warning" in done.output
    assert invoke(monkeypatch, [*fine, problem("C", "bad", "do that")]).exit_code == 1


def test_json(monkeypatch):
    done = invoke(monkeypatch, [problem("C", "bad", "do that")], "--json")
    assert done.exit_code == 1
    assert json.loads(done.output) == [{"name": "C", "status": "problem", "found": "bad", "remedy": "do that"}]


def test_a_finding_without_a_remedy_is_a_mistake():
    with pytest.raises(ValueError, match="expected a remedy"):
        warning("B", "bad", "")


def test_on_this_machine_with_an_impossible_instruction_set():
    """The whole command in a process of its own: it reports that the kernels do not load, and goes on."""
    done = subprocess.run(
        [sys.executable, "-m", "kt_sft", "doctor", "--json"],
        env={**os.environ, "KT_SFT_ISA": "no_such_isa"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert found["kernels"]["status"] == "problem" and "no_such_isa" in found["kernels"]["found"]
    assert found["RAM"]["status"] in ("ok", "warning") and found["torch"]["status"] == "ok"
