"""A cache file is used only if it is whole and of this checkpoint; otherwise it is rebuilt, and one line says why."""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from kt_sft.config import KtConfig
from kt_sft.weights import cache, loader, saving
from kt_sft.weights.loader import load_experts

from .checkpoints import SIZES, layer_name, search_path, separate_layers, separate_tensors, weights, write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model", separate_tensors(weights()))


def load(model: Path, **settings):
    """Returns when the file is written too."""
    settings.setdefault("cache_dir", str(model.parent / "cache"))
    packed = load_experts(model, separate_layers(), config=KtConfig(**settings), progress=False, **SIZES)
    saving.finish()
    return packed


def cache_file(model: Path) -> Path:
    (file,) = (model.parent / "cache").glob("*.ktpack")
    return file


def gate(packed) -> torch.Tensor:
    return packed[layer_name(1)].dequantize()[0]


def rebuilt_because(model: Path, caplog, **settings) -> str:
    """Load again; the one log line that says why the file was rebuilt, or nothing."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "kt_sft"):
        load(model, **settings)
    reasons = [message for message in caplog.messages if "SQNR" not in message and "is written" not in message]
    assert len(reasons) <= 1
    return reasons[0] if reasons else ""


def test_built_once(model, caplog):
    assert "there is none yet" in rebuilt_because(model, caplog)
    assert rebuilt_because(model, caplog) == ""
    assert sorted(p.suffix for p in (model.parent / "cache").iterdir()) == [".ktpack", ".lock"]


def test_a_stray_write_does_not_reach_the_file(model):
    packed = load(model)
    before = cache_file(model).read_bytes()
    packed[layer_name(0)].storage.zero_()
    assert cache_file(model).read_bytes() == before
    assert load(model)[layer_name(0)].storage.any()


def test_the_mapping_outlives_its_replacement(model):
    packed = load(model)
    before = gate(packed)
    write(model, separate_tensors(weights(seed=5)))
    assert not torch.equal(gate(load(model)), before)
    assert torch.equal(gate(packed), before)


def test_another_model_at_the_same_place(model, caplog):
    load(model)
    write(model, separate_tensors(weights(seed=1)))
    assert "another model" in rebuilt_because(model, caplog)
    assert torch.equal(gate(load(model, weight_format="bf16")), weights(seed=1)[layer_name(1)][0])


def test_touched_files(model, caplog):
    load(model)
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert "files have changed" in rebuilt_because(model, caplog)
    (model / "config.json").write_text("{}")
    assert "files have changed" in rebuilt_because(model, caplog)


def test_another_version(model, caplog, monkeypatch):
    load(model)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert f"it has version {cache.VERSION - 1}, this is version {cache.VERSION}" in rebuilt_because(model, caplog)


def test_another_packing(model, caplog, monkeypatch):
    load(model)
    monkeypatch.setattr(loader, "_packing", lambda: "new layout")
    assert "packing is" in rebuilt_because(model, caplog)


def test_another_format_in_its_place(model, caplog):
    load(model, weight_format="int4")
    old = cache_file(model)
    load(model)
    (new,) = set((model.parent / "cache").glob("*.ktpack")) - {old}
    new.write_bytes(old.read_bytes())
    assert "wanted is 'int4-g32', wanted 'auto'" in rebuilt_because(model, caplog)


def places(file: Path) -> dict[str, int]:
    size = file.stat().st_size
    return {"magic": 0, "head": 20, "first": 4096, "middle": size // 2, "index": size - 40, "last": size - 1}


@pytest.mark.parametrize("place", ["magic", "head", "first", "middle", "index", "last"])
def test_a_flipped_byte(model, caplog, place):
    expected = gate(load(model))
    file = cache_file(model)
    data = bytearray(file.read_bytes())
    data[places(file)[place]] ^= 0x10
    times = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "torn" in rebuilt_because(model, caplog)
    assert torch.equal(gate(load(model)), expected)


@pytest.mark.parametrize("length", [0, 10, 4096, 20000, -1])
def test_a_file_cut_off(model, caplog, length):
    load(model)
    file = cache_file(model)
    data = file.read_bytes()
    file.write_bytes(data[:length])
    assert "torn" in rebuilt_because(model, caplog)
    assert file.read_bytes() == data


@pytest.mark.parametrize("behind", [True, False])
def test_no_space_in_the_middle(model, monkeypatch, caplog, behind):
    """Behind the run it costs the file only; where the run waits for the file, it is an error."""
    expected = gate(load(model))
    before = cache_file(model).read_bytes()
    os.utime(model / "model.safetensors", ns=(1, 1))
    if not behind:
        monkeypatch.setattr(loader, "_SPARE_MEMORY", 1 << 60)
    real, calls = os.pwrite, []

    def full(fd, data, offset):
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[: max(1, len(data) // 2)], offset)  # short writes are legal too

    monkeypatch.setattr(os, "pwrite", full)
    message = r"packed experts .*No space left.*cache_dir"
    if behind:
        assert torch.equal(gate(load(model)), expected)
        (warning,) = (m for m in caplog.messages if re.search(message, m))
        assert "the run goes on" in warning
    else:
        with pytest.raises(OSError, match=message) as error:
            load(model)
        assert error.value.errno == errno.ENOSPC
    assert cache_file(model).read_bytes() == before
    assert not list((model.parent / "cache").glob("*.tmp"))
    monkeypatch.undo()
    assert torch.equal(gate(load(model)), expected)


def test_no_space_at_all(model):
    """A real limit of the kernel: found when the space is reserved, before anything is packed."""
    load(model)
    before = cache_file(model).read_bytes()
    os.utime(model / "model.safetensors", ns=(1, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match=r"packed experts .*File too large"):
            load(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache_file(model).read_bytes() == before
    assert not list((model.parent / "cache").glob("*.tmp"))


def test_a_folder_that_cannot_be_made(model):
    (model.parent / "cache").write_text("a file")
    with pytest.raises(OSError, match="the folder cannot be written"):
        load(model)


RACER = """
    import logging, sys
    from tests.weights.checkpoints import SIZES, separate_layers, layer_name
    from kt_sft.config import KtConfig
    from kt_sft.weights.loader import load_experts
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    config = KtConfig(cache_dir=sys.argv[2])
    packed = load_experts(sys.argv[1], separate_layers(), config=config, progress=False, **SIZES)
    print("sum", packed[layer_name(1)].storage.long().sum().item())
"""


def test_processes_that_race_build_once(model):
    """All start while the lock is held here, so all of them find no file; then exactly one builds."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(RACER), str(model), str(model.parent / "cache")]
    expected = load(model)[layer_name(1)].storage.long().sum().item()
    file = cache_file(model)
    with cache.build_lock(file):
        file.unlink()
        env = {**os.environ, "PYTHONPATH": search_path(root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        racers = [subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for racer in racers:
            assert racer.stdout is not None
            assert "Waiting for another process" in racer.stdout.readline()
    outputs = [racer.communicate(timeout=120)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sum("Packing the experts" in text for text in outputs) == 1
    assert all(f"sum {expected}" in text for text in outputs)
