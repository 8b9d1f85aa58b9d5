"""kt-sft verify: whole checkpoints pass, one damaged value anywhere does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kt_sft.cli import verify as command
from kt_sft.cli.errors import CommandError
from kt_sft.config import KtConfig
from kt_sft.weights.loader import load_experts
from kt_sft.weights.verify import verify

from . import published
from .checkpoints import SIZES, separate_layers, separate_tensors, write
from .checkpoints import weights as float_weights

E, D, F = 2, 256, 256
LAYER = "model.layers.0.mlp.experts"


def weights() -> published.Weights:
    g = torch.Generator().manual_seed(0)
    return {LAYER: tuple(0.02 * torch.randn(E, D, F, generator=g) for _ in range(3))}


def checkpoint(folder: Path, kind: str) -> Path:
    made = published.SAFETENSORS[kind](weights())
    made.tensors |= {"model.norm.weight": torch.ones(D), "model.ids": torch.arange(4)}
    return made.write(folder)


@pytest.mark.parametrize("kind", published.SAFETENSORS)
def test_whole(tmp_path, kind):
    (found,) = verify(checkpoint(tmp_path, kind), progress=False)
    stacked = kind == "mxfp4_gpt_oss"
    floats = 3 if stacked else 1  # the norm, and the biases
    assert sum(found.formats.values()) == (2 if stacked else 3 * E) + floats + 1
    assert found.nbytes == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert found.formats["i64"] == 1 and len(found.formats) in (3, 4)


@pytest.mark.parametrize("kind", ["fp8_block", "int4_group32", "mxfp4_gpt_oss", "gptq", "awq"])
def test_one_damaged_value(tmp_path, kind):
    """The last scale of each matrix in turn, then the norm."""
    checkpoint(tmp_path, kind)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if "scale" in n] + ["model.norm.weight"]:
        damaged = tensors[name].clone()
        damaged.view(-1)[-1] = 255 if damaged.dtype == torch.uint8 else float("nan")
        save_file({**tensors, name: damaged}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{name}'.* expected finite"):
            verify(tmp_path, progress=False)


def test_gguf(tmp_path):
    file = published.write_gguf(tmp_path / "m.gguf", weights(), "Q4_K")
    (found,) = verify(file, progress=False)
    assert found.formats == {"gguf": 3}
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut off or damaged"):
        verify(tmp_path, progress=False)


def test_packed_experts(tmp_path):
    model = write(tmp_path / "model", separate_tensors(float_weights()))
    config = KtConfig(weight_path=str(tmp_path / "packed"))
    load_experts(model, separate_layers(), config=config, progress=False, **SIZES)
    (found,) = verify(tmp_path / "packed", progress=False)
    assert found.formats == {"packed layers, int8": 2}
    (file,) = (tmp_path / "packed").glob("*.ktpack")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for path in (file, file.parent):
        with pytest.raises(ValueError, match=r"ktpack: it is torn \(checksum of .*delete it"):
            verify(path, progress=False)


def test_the_command(tmp_path, capsys):
    command.run(checkpoint(tmp_path / "a", "gptq"))
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'a'}: whole" in printed and "6 x int4 (GPTQ)" in printed and "GB/s" in printed
    with pytest.raises(CommandError, match=r"expected \*\.safetensors, found no weights|expected a folder") as error:
        command.run(tmp_path / "absent")
    assert "\n" not in str(error.value)
