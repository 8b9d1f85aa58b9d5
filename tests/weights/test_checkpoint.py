"""Reads are bitwise; every way in which a checkpoint can be wrong is a ValueError that names file and tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kt_sft.weights.checkpoint import INDEX, Checkpoint, ExpertTensors, read_header

from .checkpoints import D, E, F, fused_tensors, layer_name, separate_tensors, weights, write

SHARD_2 = "model-00002-of-00003.safetensors"
GATE_0 = f"{layer_name(0)}.0.gate_proj.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write(tmp_path / "model", separate_tensors(weights()), shards=3)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reads_are_bitwise(tmp_path, dtype, shards):
    tensors = separate_tensors(weights(dtype))
    checkpoint = Checkpoint(write(tmp_path, tensors, shards))
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        read = checkpoint.read(name)
        assert read.dtype == dtype and torch.equal(read, tensor)


def test_slices_of_a_fused_tensor(tmp_path):
    tensors = fused_tensors(weights())
    checkpoint = Checkpoint(write(tmp_path, tensors))
    for name, tensor in tensors.items():
        for expert in range(E):
            assert torch.equal(checkpoint.read_slice(name, expert), tensor[expert])
        with pytest.raises(ValueError, match=f"no slice {E}"):
            checkpoint.read_slice(name, E)


def test_links_of_the_hub_cache(tmp_path):
    blobs = write(tmp_path / "blobs", separate_tensors(weights()))
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blobs / "model.safetensors")
    assert GATE_0 in Checkpoint(snapshot)


def header_length(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


@pytest.mark.parametrize("where", ["empty", "length", "header", "data", "last byte"])
def test_a_file_that_is_cut_off(sharded, where):
    file = sharded / SHARD_2
    data, header = file.read_bytes(), header_length(file)
    cut = {"empty": 0, "length": 5, "header": header // 2, "data": header + 10, "last byte": len(data) - 1}[where]
    file.write_bytes(data[:cut])
    with pytest.raises(ValueError, match=rf"{SHARD_2}.*cut off"):
        Checkpoint(sharded)


def rewrite_header(file: Path, change) -> None:
    data, header = file.read_bytes(), header_length(file)
    table = json.loads(data[8:header])
    change(table)
    text = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[header:])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "BF17", "expected a safetensors dtype, got 'BF17'"),
        ("dtype", None, "expected a safetensors dtype"),
        ("dtype", "F64", "needs"),
        ("shape", [1, -1], "expected a shape"),
        ("shape", [1 << 60, 1 << 60], "expected a shape"),
        ("shape", "x", "expected a shape"),
        ("data_offsets", [4, 0], "data_offsets"),
        ("data_offsets", [0], "data_offsets"),
        ("data_offsets", [True, 2], "data_offsets"),
    ],
)
def test_a_malformed_entry(tmp_path, field, value, message):
    folder = write(tmp_path, separate_tensors(weights()))
    rewrite_header(folder / "model.safetensors", lambda t: t[GATE_0].update({field: value}))
    with pytest.raises(ValueError, match=message) as error:
        Checkpoint(folder)
    assert "model.safetensors" in str(error.value) and GATE_0 in str(error.value)


@pytest.mark.parametrize("begin", [1 << 40, 2])
def test_data_with_a_hole_or_an_overlap(tmp_path, begin):
    folder = write(tmp_path, separate_tensors(weights()))
    rewrite_header(folder / "model.safetensors", lambda t: t[GATE_0].update(data_offsets=[begin, begin + 2 * F * D]))
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor '.*': expected its data at byte"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"PK\3\4" + b"\0" * 100,
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 0) + b"x",
    ],
)
def test_not_safetensors(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected"):
        Checkpoint(tmp_path)


def test_a_huge_header_length_allocates_nothing(tmp_path):
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", 1 << 62))
        f.truncate(200 << 20)  # sparse: longer than the largest header
    with pytest.raises(ValueError, match="100 MiB"):
        read_header(file)


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 3000),
)
def test_mutated_headers_are_refused_or_read(tmp_path, edits, cut):
    folder = tmp_path / "model"
    file = folder / "model.safetensors"
    if not folder.exists():
        write(folder, {"a": torch.ones(8, 8), "b": torch.ones(4, dtype=torch.bfloat16)})
        (folder / "original").write_bytes(file.read_bytes())
    data = bytearray((folder / "original").read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    if cut < len(data) // 4:
        del data[cut:]
    file.write_bytes(data)
    try:
        checkpoint = Checkpoint(folder)
        for name in checkpoint.names():
            assert checkpoint.entry(name).nbytes <= len(data)
            checkpoint.sample(name)
    except ValueError as error:
        assert "model.safetensors" in str(error)


def test_a_missing_tensor_names_the_nearest(sharded):
    with pytest.raises(ValueError, match=rf"expected tensor .*gate_prj.* nearest are .*{GATE_0}"):
        Checkpoint(sharded).read(f"{layer_name(0)}.0.gate_prj.weight")


def test_a_tensor_that_the_shard_lacks(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["extra"] = SHARD_2
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{SHARD_2}: .*'extra'"):
        Checkpoint(sharded)


def test_a_missing_shard(sharded):
    (sharded / SHARD_2).unlink()
    with pytest.raises(ValueError, match=rf"{SHARD_2}.* is not there"):
        Checkpoint(sharded)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b", "x\0y"])
def test_shards_outside_the_folder(sharded, file):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][GATE_0] = file
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="own folder"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100000])
def test_a_malformed_index(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        Checkpoint(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_only_other_weights(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"found only {name}.*safetensors"):
        Checkpoint(tmp_path)


def test_no_folder_and_no_weights(tmp_path):
    with pytest.raises(ValueError, match="expected a folder"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="no weights"):
        Checkpoint(tmp_path)


def test_the_same_tensor_in_two_files(tmp_path):
    write(tmp_path, {"a": torch.ones(2)})
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"'a' is also in x\.safetensors"):
        Checkpoint(tmp_path)


def test_a_tensor_that_another_shard_has_too(sharded):
    shards = {file.name: load_file(file) for file in sharded.glob("*.safetensors")}
    other = next(name for name, tensors in shards.items() if GATE_0 not in tensors)
    place = next(name for name, tensors in shards.items() if GATE_0 in tensors)
    save_file(shards[other] | {GATE_0: shards[place][GATE_0]}, sharded / other)
    with pytest.raises(ValueError, match=rf"{other}: tensor '{GATE_0}': expected in {place} only, .* got it here"):
        Checkpoint(sharded)


def test_a_tensor_that_the_index_does_not_list(sharded):
    save_file(load_file(sharded / SHARD_2) | {"other": torch.ones(2)}, sharded / SHARD_2)
    assert "other" not in Checkpoint(sharded)


@pytest.mark.parametrize("text", ["[]", "3", "", "[" * 100000, '{"text_config": 3}', '{"text_config": []}'])
def test_a_malformed_config(sharded, text):
    (sharded / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: (text_config: )?expected a JSON object, got"):
        _ = Checkpoint(sharded).settings


@pytest.mark.parametrize(
    "names",
    [
        {"down": "d"},
        {"gate": "g", "up": "u", "gate_up": "x", "down": "d"},
        {"gate": "g{expert}", "up": "u", "down": "d"},
    ],
)
def test_expert_tensors_are_one_layout(names):
    with pytest.raises(ValueError, match="ExpertTensors: expected"):
        ExpertTensors(**names)
