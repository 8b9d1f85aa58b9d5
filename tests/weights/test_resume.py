"""An interrupted load is continued where it ended, and its file is that of a load that was left alone, bit for bit.

Interrupted is one that packs into its file, as it does where memory is short; it is continued so, and in memory.
"""

from __future__ import annotations

import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import loading
from kt_sft.config import KtConfig
from kt_sft.weights import cache, loader, saving
from kt_sft.weights.journal import Journal
from kt_sft.weights.loader import load_experts, make_job

from .checkpoints import LAYERS, SIZES, E, separate_layers, separate_tensors, weights, write

ALL = LAYERS * E
NO_MEMORY = 1 << 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model", separate_tensors(weights()))


def load(model: Path, folder: str = "cache", **settings) -> Path:
    """The packed file."""
    config = KtConfig(cache_dir=str(model.parent / folder), **settings)
    load_experts(model, separate_layers(), config=config, progress=False, **SIZES)
    saving.finish()
    (file,) = (model.parent / folder).glob("*.ktpack")
    return file


def interrupt(model: Path, monkeypatch, after: int, **settings) -> tuple[Path, Path]:
    """Ctrl-C while expert ``after`` (from 0) is packed: the temporary file and the journal."""
    calls = []
    original = loader._pack

    def interrupted(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loader, "_pack", interrupted)
        patch.setattr(loader, "_SPARE_MEMORY", NO_MEMORY)
        load(model, **settings)
    folder = model.parent / "cache"
    assert not list(folder.glob("*.ktpack"))
    return next(folder.glob("*.tmp")), next(folder.glob("*.journal"))


def packed_again(model: Path, monkeypatch, **settings) -> int:
    """How many experts the next load packs; its file must be the right one, and nothing else must be left."""
    calls = []
    original = loader._pack

    def counted(*args):
        calls.append(args)
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loader, "_pack", counted)
        file = load(model, **settings)
    assert sorted(p.suffix for p in file.parent.iterdir()) == [".ktpack", ".lock"]
    assert file.read_bytes() == load(model, "alone", **settings).read_bytes()
    shutil.rmtree(model.parent / "alone")
    return len(calls)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("after", [0, 1, ALL - 1])
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_the_next_start_packs_the_rest(model, monkeypatch, weight_format, after, in_memory):
    if not in_memory:
        monkeypatch.setattr(loader, "_SPARE_MEMORY", NO_MEMORY)
    interrupt(model, monkeypatch, after, weight_format=weight_format)
    assert packed_again(model, monkeypatch, weight_format=weight_format) == ALL - after


def test_interrupted_again_and_again(model, monkeypatch, caplog):
    for _ in range(3):
        interrupt(model, monkeypatch, 1)
    with caplog.at_level(logging.INFO, "kt_sft"):
        assert packed_again(model, monkeypatch) == ALL - 3
    assert f"3 of {ALL} experts were packed before an interruption." in caplog.text


def test_bytes_that_never_reached_the_disk_are_packed_again(model, monkeypatch):
    unfinished, _ = interrupt(model, monkeypatch, 4)
    data = bytearray(unfinished.read_bytes())
    data[4096 + 100] ^= 1
    unfinished.write_bytes(data)
    assert packed_again(model, monkeypatch) == ALL - 3


@pytest.mark.parametrize("length", [0, 5000])
def test_an_unfinished_file_cut_off(model, monkeypatch, length):
    unfinished, _ = interrupt(model, monkeypatch, 4)
    unfinished.write_bytes(unfinished.read_bytes()[:length])
    assert packed_again(model, monkeypatch) == ALL


def test_killed_while_the_index_was_written(model, monkeypatch):
    """Everything is there, and something of the index behind it."""
    unfinished, _ = interrupt(model, monkeypatch, ALL - 1)
    with open(unfinished, "ab") as f:
        f.write(b"x" * 100000)
    assert packed_again(model, monkeypatch) == 1


@pytest.mark.parametrize("cut", [-1, -5])
def test_a_torn_line_of_the_journal(model, monkeypatch, cut):
    _, journal = interrupt(model, monkeypatch, 3)
    journal.write_bytes(journal.read_bytes()[:cut])
    interrupt(model, monkeypatch, 1)
    assert packed_again(model, monkeypatch) == ALL - 3


def test_a_line_that_is_not_ours_ends_the_journal(model, monkeypatch):
    _, journal = interrupt(model, monkeypatch, 3)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    journal.write_bytes(lines[0] + lines[1] + b"00000000 [0, 1, 2]\n" + lines[3])
    assert packed_again(model, monkeypatch) == ALL - 1


def test_another_checkpoint_starts_over(model, monkeypatch):
    interrupt(model, monkeypatch, 4)
    write(model, separate_tensors(weights(seed=1)))
    assert packed_again(model, monkeypatch) == ALL


def test_what_was_packed_before_is_loaded_too(model, monkeypatch):
    expected = load_experts(model, separate_layers(), config=KtConfig(cache_dir="none"), progress=False, **SIZES)
    interrupt(model, monkeypatch, 4)
    config = KtConfig(cache_dir=str(model.parent / "cache"))
    resumed = load_experts(model, separate_layers(), config=config, progress=False, **SIZES)
    for name, packed in expected.items():
        assert torch.equal(resumed[name].storage, packed.storage)


def test_an_error_leaves_nothing(model, monkeypatch):
    def broken(*args):
        raise ValueError("broken")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="broken"):
        patch.setattr(loader, "_pack", broken)
        load(model)
    assert [p.suffix for p in (model.parent / "cache").iterdir()] == [".lock"]


def test_only_a_file_made_beforehand_may_have_any_rounding(tmp_path):
    folder = write(tmp_path / "model", separate_tensors(weights()))
    config = KtConfig(weight_path=str(tmp_path / "packed"), weight_format="int4")
    job = make_job(folder, separate_layers(), config=config, **SIZES)
    assert job.path is not None
    job.path.parent.mkdir()
    other = replace(job, spec=replace(job.spec, rounding="other")).with_layouts()
    loader._build(job.path, replace(other, progress=False))
    assert set(cache.open_packed(job.path, job.spec)) == set(job.spec.layers)
    assert set(cache.open_packed(job.path, other.spec)) == set(job.spec.layers)
    with pytest.raises(cache.CacheMiss, match="rounding is 'other', wanted 'nearest'"):
        cache.open_packed(job.path, replace(job.spec, rounding=cache.NEAREST))
    cached = make_job(folder, separate_layers(), config=KtConfig(weight_format="int4"), **SIZES)
    assert cached.spec.rounding == cached.with_layouts().spec.rounding == cache.NEAREST


@pytest.mark.parametrize("kept", [True, False])
def test_only_files_to_be_kept_wait_for_the_disk(tmp_path, monkeypatch, kept):
    folder = write(tmp_path / "model", separate_tensors(weights()))
    synced = []
    monkeypatch.setattr(cache.os, "fsync", synced.append)
    config = KtConfig(**{"weight_path" if kept else "cache_dir": str(tmp_path / "packed")})
    load_experts(folder, separate_layers(), config=config, progress=False, **SIZES)
    assert bool(synced) == kept


def test_a_journal_of_another_file(tmp_path):
    for spec, expected in (({"a": 1}, 0), ({"a": 1}, 1), ({"a": 2}, 0)):
        journal = Journal(tmp_path / "j", spec)
        assert len(journal.open()) == expected
        journal.add(0, expected, 7)
        journal.close()


@pytest.mark.parametrize("layers", [2, pytest.param(53, marks=pytest.mark.slow)])
def test_killed_ten_times(tmp_path, layers):
    """300 MB, or 8 GB: python -m benchmarks.loading does the same with its figures."""
    model, folder = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    loading.write_checkpoint(model, layers)
    starter = loading.Starter(model, folder, layers)
    seconds = starter.run().until_written
    file = starter.packed
    assert file is not None
    expected = loading.digest(file)
    file.unlink()
    assert loading.kill_and_resume(starter, 10, seconds, expected, random.Random(0)) >= 1


def test_a_difference_after_kills_is_noticed(tmp_path):
    model, folder = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    loading.write_checkpoint(model, 1)
    starter = loading.Starter(model, folder, 1)
    with pytest.raises(RuntimeError, match="differs from the file"):
        loading.kill_and_resume(starter, 0, 1.0, "another", random.Random(0))
