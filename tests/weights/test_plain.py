"""The dequantised copy of everything but the experts: its content, when it is made again, what is refused."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kt_sft.weights import plain
from kt_sft.weights.plain import passing_copy, plain_copy
from tests.weights import published

Usage = namedtuple("Usage", "total used free")
ATTENTION = "model.layers.0.self_attn.q_proj"


def is_expert(name: str) -> bool:
    return ".experts." in name


def fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    made = published.fp8_block({"x.experts": (w[None], w[None], w[None])}).tensors
    return made["x.experts.0.gate_proj.weight"], made["x.experts.0.gate_proj.weight_scale_inv"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors")
    config = {"num_hidden_layers": 1, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"top_k": 7}')
    return folder


def tensors(scale: float = 1.0) -> dict[str, Tensor]:
    codes, scales = fp8(torch.randn(200, 72, generator=torch.Generator().manual_seed(0)))
    return {
        f"{ATTENTION}.weight": codes,
        f"{ATTENTION}.weight_scale_inv": scale * scales,
        f"{ATTENTION}.input_scale": torch.ones(1),
        "model.layers.0.mlp.experts.0.up_proj.weight": codes.clone(),
        "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv": scales.clone(),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.arange(4.0),
        "model.layers.0.input_layernorm.weight": torch.ones(72, dtype=torch.float16),
        "model.layers.1.eh_proj.weight": torch.ones(4, 4),
        "vision.layers.1.proj.weight": torch.ones(4, 4),
    }


def content(copy: Path) -> dict[str, Tensor]:
    return {name: value.clone() for shard in copy.glob("*.safetensors") for name, value in load_file(shard).items()}


def test_what_is_in_it(source: Path, tmp_path: Path) -> None:
    copy = plain_copy(source, tmp_path / "cache", is_expert)
    kept = ["model.layers.0.mlp.gate.e_score_correction_bias", "model.layers.0.input_layernorm.weight"]
    found, original = content(copy), tensors()
    assert set(found) == {f"{ATTENTION}.weight", *kept, "vision.layers.1.proj.weight"}
    assert all(torch.equal(found[name], original[name]) for name in kept)
    scales = published.spread(original[f"{ATTENTION}.weight_scale_inv"], 128, 128, (200, 72))
    expected = (original[f"{ATTENTION}.weight"].float() * scales).bfloat16()
    assert torch.equal(found[f"{ATTENTION}.weight"], expected)
    assert json.loads((copy / "config.json").read_text()) == {"num_hidden_layers": 1}
    assert json.loads((copy / "generation_config.json").read_text()) == {"top_k": 7}


def test_shards_are_small_and_the_index_names_them(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = content(plain_copy(source, tmp_path / "one", is_expert))
    monkeypatch.setattr(plain, "_SHARD", 200)
    copy = plain_copy(source, tmp_path / "several", is_expert)
    assert len(list(copy.glob("*.safetensors"))) == 3
    assert all(torch.equal(value, whole[name]) for name, value in content(copy).items())
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(whole) and all((copy / file).is_file() for file in index.values())


def test_it_is_made_again_when_the_checkpoint_changes(source: Path, tmp_path: Path) -> None:
    first = plain_copy(source, tmp_path / "cache", is_expert)
    written = (first / plain.IDENTITY).stat().st_mtime_ns
    assert plain_copy(source, tmp_path / "cache", is_expert) == first
    assert (first / plain.IDENTITY).stat().st_mtime_ns == written
    before = content(first)[f"{ATTENTION}.weight"]
    save_file(tensors(scale=2.0), source / "model.safetensors")
    os.utime(source / "model.safetensors", ns=(1, 1))
    again = plain_copy(source, tmp_path / "cache", is_expert)
    assert again == first and torch.equal(content(again)[f"{ATTENTION}.weight"], 2 * before)


def test_a_damaged_copy_and_the_rest_of_a_killed_process_are_replaced(source: Path, tmp_path: Path) -> None:
    copy = plain_copy(source, tmp_path / "cache", is_expert)
    expected = content(copy)
    (shard,) = copy.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    leftover = copy.with_name(f"{copy.name}.tmp")
    leftover.mkdir()
    (leftover / "model-00001-of-00001.safetensors").write_bytes(b"half")
    got = content(plain_copy(source, tmp_path / "cache", is_expert))
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)
    assert not leftover.exists()


def test_a_full_disk_is_said_before_the_first_byte(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(plain.shutil, "disk_usage", lambda path: Usage(1000, 999, 1))
    with pytest.raises(OSError, match=r"model-dequantised.*GiB of dequantised weights failed.*are free.*cache_dir"):
        plain_copy(source, tmp_path / "cache", is_expert)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise plain.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(plain, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*free some space") as caught:
        plain_copy(source, tmp_path / "cache", is_expert)
    assert caught.value.errno == errno.ENOSPC
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_damaged_weights_are_named(source: Path, tmp_path: Path) -> None:
    bad = tensors()
    bad[f"{ATTENTION}.weight_scale_inv"][0, 0] = float("nan")
    save_file(bad, source / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{ATTENTION}\.weight_scale_inv.*expected finite scales, got NaN"):
        plain_copy(source, tmp_path / "cache", is_expert)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_what_cannot_be_read_is_refused(source: Path, tmp_path: Path) -> None:
    unknown = {"a.q_proj.weight": torch.zeros(8, 4, dtype=torch.int8), "a.q_proj.SCB": torch.ones(8)}
    save_file(unknown, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected 'a.q_proj.weight' in a supported format .*SCB"):
        plain_copy(source, tmp_path / "cache", is_expert)


def test_two_at_once_make_one(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    made = []
    write = plain._write
    monkeypatch.setattr(plain, "_write", lambda *args: (made.append(args[0]), write(*args)))
    threads = [threading.Thread(target=plain_copy, args=(source, tmp_path / "cache", is_expert)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_passing_copy_is_gone_afterwards(source: Path) -> None:
    with passing_copy(source, is_expert) as copy:
        assert f"{ATTENTION}.weight" in content(copy)
    assert not copy.exists()
