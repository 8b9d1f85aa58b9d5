"""From checkpoint to packed experts: the same bits as packing directly, through the cache and without it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from kt_sft import native
from kt_sft.config import KtConfig
from kt_sft.ops.packed import pack_experts
from kt_sft.weights import loader, saving
from kt_sft.weights.loader import load_experts

from . import published
from .checkpoints import (
    SIZES,
    D,
    F,
    fused_layers,
    fused_tensors,
    layer_name,
    separate_layers,
    separate_tensors,
    weights,
    write,
)

LAYOUTS = {"separate": (separate_tensors, separate_layers), "fused": (fused_tensors, fused_layers)}
FORMATS = [("bf16", None), ("int8", None), ("int8", 32), ("int4", None), ("int4", 0)]


def load(folder: Path, layers=None, **settings):
    return load_experts(folder, layers or separate_layers(), config=KtConfig(**settings), progress=False, **SIZES)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("weight_format", "group_size"), FORMATS)
def test_same_bits_as_packing_directly(tmp_path, weight_format, group_size, layout, cached):
    make_tensors, make_layers = LAYOUTS[layout]
    source = weights()
    folder = write(tmp_path / "model", make_tensors(source), shards=2)
    settings = {"weight_format": weight_format, "group_size": group_size}
    cache_dir = str(tmp_path / "cache") if cached else "none"
    for _ in range(2):  # built, then mapped
        packed = load(folder, make_layers(), cache_dir=cache_dir, **settings)
        assert list(packed) == list(source)
        for name, matrices in source.items():
            direct = pack_experts(*matrices, **settings)
            assert packed[name].weight_format == weight_format
            for got, expected in zip(packed[name].dequantize(), direct.dequantize(), strict=True):
                assert torch.equal(got, expected)
    assert (tmp_path / "cache").exists() == cached


def test_mapped_experts_are_copied_to_several_nodes_only(tmp_path):
    folder, cache = write(tmp_path / "model", separate_tensors(weights())), str(tmp_path / "cache")
    files, before = [], native.nodes()
    try:
        for nodes in (1, 2):
            native.set_nodes([[]] * nodes)
            packed = load(folder, cache_dir=cache)
            saving.finish()
            files.append({file_of(p.storage) for p in packed.values()})
            for name, matrices in weights().items():
                assert torch.equal(packed[name].storage, pack_experts(*matrices).storage)
    finally:
        native.set_nodes(before)
    mapped, copied = files
    assert len(mapped) == 1 and mapped.pop().endswith(loader.SUFFIX)
    assert not any(file.endswith(loader.SUFFIX) for file in copied)


def file_of(tensor: torch.Tensor) -> str:
    """What is mapped where ``tensor`` lies; empty for anonymous memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5) if len(line.split(maxsplit=5)) == 6 else (*line.split(), "")
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= tensor.data_ptr() < end:
            return name
    raise AssertionError("the tensor lies nowhere")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_types(tmp_path, dtype):
    source = weights(dtype)
    packed = load(write(tmp_path / "model", separate_tensors(source)), weight_format="bf16", cache_dir="none")
    assert torch.equal(packed[layer_name(1)].dequantize()[2], source[layer_name(1)][2].bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("cached", [True, False])
def test_not_finite(tmp_path, value, weight_format, cached):
    tensors = separate_tensors(weights())
    name = f"{layer_name(1)}.2.up_proj.weight"
    tensors[name][F - 1, D - 1] = value
    folder = write(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{name}', expert 2: expected finite"):
        load(folder, weight_format=weight_format, cache_dir=str(tmp_path / "c") if cached else "none")
    assert not [p for p in tmp_path.glob("c/*") if p.suffix != ".lock"]


def test_not_finite_fused(tmp_path):
    tensors = fused_tensors(weights())
    name = f"{layer_name(0)}.down_proj"
    tensors[name][1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"tensor '{name}', expert 1: expected finite values, got NaN"):
        load(write(tmp_path, tensors), fused_layers(), cache_dir="none")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_or_misshapen_tensor_is_found_before_packing(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(loader, "_pack_all", lambda *a: pytest.fail("packing began"))
    make_tensors, make_layers = LAYOUTS[layout]
    tensors = make_tensors(weights())
    name = [n for n in tensors if "down" in n][-1]
    tensors[name] = tensors[name].transpose(-1, -2).contiguous()
    with pytest.raises(ValueError, match=f"'{name}': expected shape"):
        load(write(tmp_path / "shape", tensors), make_layers(), cache_dir="none")
    del tensors[name]
    with pytest.raises(ValueError, match=f"expected tensor '{name}'"):
        load(write(tmp_path / "missing", tensors), make_layers(), cache_dir="none")


def test_expert_checkpoint_path_is_where_experts_are_read(tmp_path):
    other = write(tmp_path / "other", separate_tensors(weights(seed=1)))
    folder = write(tmp_path / "model", separate_tensors(weights(seed=0)))
    packed = load(folder, weight_format="bf16", cache_dir="none", expert_checkpoint_path=str(other))
    assert torch.equal(packed[layer_name(0)].dequantize()[0], weights(seed=1)[layer_name(0)][0])


def test_weight_path_travels_with_its_file(tmp_path, caplog):
    """Packed on one machine, used with a copy of the model whose files have other times."""
    tensors = separate_tensors(weights())
    first, copy = write(tmp_path / "a", tensors), write(tmp_path / "b", tensors)
    folder = tmp_path / "packed"
    load(first, weight_path=str(folder))
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.ktpack")}
    with caplog.at_level(logging.INFO, "kt_sft"):
        load(copy, weight_path=str(folder))
    assert not caplog.records and len(before) == 1
    load(write(tmp_path / "c", separate_tensors(weights(seed=9))), weight_path=str(folder))
    assert {n: (folder / n).stat().st_mtime_ns for n in before} == before  # another model's is beside it
    assert len(list(folder.glob("*.ktpack"))) == 2


def test_weight_path_of_ktransformers(tmp_path):
    folder = write(tmp_path / "model", separate_tensors(weights()))
    (tmp_path / "kt").mkdir()
    (tmp_path / "kt" / "_layer_0.kt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weight_path .*found '_layer_0\.kt'; leave weight_path"):
        load(folder, weight_path=str(tmp_path / "kt"))


def test_ctrl_c_leaves_no_file_under_its_name(tmp_path, monkeypatch):
    folder = write(tmp_path / "model", separate_tensors(weights()))
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = loader._read
    monkeypatch.setattr(loader, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder, cache_dir=str(tmp_path / "c"))
    assert {p.suffix for p in (tmp_path / "c").iterdir()} == {".lock", ".tmp", ".journal"}


def test_biases_are_read_beside_packed_experts_every_time(tmp_path):
    layer = layer_name(0)
    made = published.mxfp4_gpt_oss({layer: weights()[layer]})
    gate_up, down = (made.tensors[f"{layer}.{name}_bias"] for name in ("gate_up_proj", "down_proj"))
    folder = made.write(tmp_path / "model")
    for cache in ("none", str(tmp_path / "c"), str(tmp_path / "c")):
        biases = load(folder, made.layers, cache_dir=cache)[layer].biases
        assert torch.equal(biases.gate, gate_up[:, 0::2].float())
        assert torch.equal(biases.up, gate_up[:, 1::2].float())
        assert torch.equal(biases.down, down.float())
    one = load_experts(
        folder, made.layers, config=KtConfig(cache_dir="none"), held=range(1, 2), progress=False, **SIZES
    )
    assert torch.equal(one[layer].biases.down, down[1:2].float())
