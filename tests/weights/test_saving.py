"""A first start does not wait for its file: that is written behind it and then takes the place of the memory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from kt_sft import native
from kt_sft.config import KtConfig
from kt_sft.ops.memory import zeros_for_matrices
from kt_sft.weights import loader, saving
from kt_sft.weights.cache import PackedWriter
from kt_sft.weights.loader import load_experts

from .checkpoints import SIZES, search_path, separate_layers, separate_tensors, weights, write
from .test_loader import file_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model", separate_tensors(weights()))


def load(model: Path, cache: str | None = None, **settings):
    config = KtConfig(cache_dir=cache or str(model.parent / "cache"), **settings)
    return load_experts(model, separate_layers(), config=config, progress=False, **SIZES)


def files(model: Path) -> list[str]:
    return sorted(p.suffix for p in (model.parent / "cache").iterdir())


@pytest.fixture
def gate(monkeypatch):
    """Writes wait for it."""
    event, put = threading.Event(), PackedWriter.put

    def waiting(*args):
        assert event.wait(60)
        put(*args)

    monkeypatch.setattr(PackedWriter, "put", waiting)
    yield event
    event.set()
    saving.finish()


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_experts_are_there_before_their_file(model, gate, weight_format):
    expected = load(model, "none", weight_format=weight_format)
    packed = load(model, weight_format=weight_format)
    assert files(model) == [".journal", ".lock", ".tmp"]
    for name, layer in expected.items():
        assert torch.equal(packed[name].storage, layer.storage)
        assert file_of(packed[name].storage) == ""
    gate.set()
    saving.finish()
    assert files(model) == [".ktpack", ".lock"]
    for name, layer in expected.items():
        assert file_of(packed[name].storage).endswith(loader.SUFFIX)
        assert torch.equal(packed[name].storage, layer.storage)
    again = load(model, weight_format=weight_format)
    assert all(torch.equal(again[name].storage, layer.storage) for name, layer in expected.items())


def test_memory_on_several_nodes_stays(model):
    before = native.nodes()
    try:
        native.set_nodes([[], []])
        packed = load(model)
        saving.finish()
    finally:
        native.set_nodes(before)
    assert files(model) == [".ktpack", ".lock"]
    assert {file_of(p.storage) for p in packed.values()} == {""}


@pytest.mark.parametrize("why", ["little memory", "ranks that share nothing else", "weight_path"])
def test_where_the_file_comes_first(model, monkeypatch, why):
    monkeypatch.setattr(loader, "Saver", lambda *args, **options: pytest.fail("written behind the run"))
    settings = {}
    if why == "little memory":
        monkeypatch.setattr(loader, "_SPARE_MEMORY", 1 << 60)
    elif why == "weight_path":
        settings = {"weight_path": str(model.parent / "cache")}
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    packed = load(model, **settings)
    assert files(model) == [".ktpack", ".lock"]
    assert all(file_of(p.storage).endswith(loader.SUFFIX) for p in packed.values())


def test_a_failure_to_map_the_file_costs_nothing(model, monkeypatch, caplog):
    def refused(*args):
        raise RuntimeError("mapping packed experts: no")

    monkeypatch.setattr(native, "map_file_over", refused)
    packed = load(model)
    saving.finish()
    assert "keeps its own copy" in caplog.text and files(model) == [".ktpack", ".lock"]
    for name, layer in load(model, "none").items():
        assert torch.equal(packed[name].storage, layer.storage)


SHORT = """
    import logging, sys
    from kt_sft.config import KtConfig
    from kt_sft.weights.cache import PackedWriter
    from kt_sft.weights.loader import load_experts
    from tests.weights.checkpoints import SIZES, separate_layers
    from time import sleep

    put = PackedWriter.put
    PackedWriter.put = lambda *args: (sleep(0.2), put(*args))
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    load_experts(sys.argv[1], separate_layers(), config=KtConfig(cache_dir=sys.argv[2]), progress=False, **SIZES)
    print("loaded", flush=True)
"""


def test_a_short_process_ends_with_its_file(model):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(SHORT), str(model), str(model.parent / "cache")]
    env = {**os.environ, "PYTHONPATH": search_path(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    after = done.stdout.partition("loaded")[2]
    assert after.count("The process ends when") == 1 and "is written (" in after
    assert files(model) == [".ktpack", ".lock"]


def test_readers_see_no_change_while_memory_is_exchanged(tmp_path):
    """Threads sum up the memory all the time; a page that is missing for a moment would end the process."""
    values = torch.randint(256, (96 << 20,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(bytes(4096) + values.numpy().tobytes())
    memory = zeros_for_matrices(len(values), 1)
    memory.copy_(values)
    expected, sums, stop = values.sum().item(), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            sums.append(memory.sum().item())

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with open(tmp_path / "file", "rb") as file:
        for _ in range(3):
            native.map_file_over(memory, file.fileno(), 4096)
    stop.set()
    for reader in readers:
        reader.join()
    assert sums and set(sums) == {expected} and memory.sum().item() == expected
    assert file_of(memory) == file_of(memory[80 << 20 :]) == str(tmp_path / "file")
    memory[5] += 1  # private
    assert (tmp_path / "file").read_bytes()[4096 + 5] == values[5]


def test_only_whole_pages_are_exchanged(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8192))
    memory = zeros_for_matrices(8192, 1)
    with open(tmp_path / "file", "rb") as file:
        for tensor, offset in ((memory[64:], 0), (memory, 64)):
            with pytest.raises(ValueError, match="at the beginning of a page"):
                native.map_file_over(tensor, file.fileno(), offset)
    with pytest.raises(RuntimeError, match="mapping packed experts: Bad file descriptor"):
        native.map_file_over(memory, 10**6, 0)
    assert not memory.any()


def test_the_lock_is_free_afterwards(model, caplog):
    with caplog.at_level(logging.INFO, "kt_sft"):
        for _ in range(2):
            load(model)
            saving.finish()
    assert "Waiting for another process" not in caplog.text
