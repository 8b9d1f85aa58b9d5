"""Every checkpoint format, read expert by expert: the values are the public reference dequantiser's, bit for bit.

References: transformers (FP8 block, MXFP4), compressed-tensors, the gguf package; GPTQ and AWQ have none that runs
without a GPU: a slow one is written here from the formats' documentation.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from unittest.mock import MagicMock

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from kt_sft.weights.checkpoint import Checkpoint, ExpertTensors
from kt_sft.weights.formats import ExpertReader, ExpertWeights, open_checkpoint
from kt_sft.weights.quantized import QuantizedWeight

from . import published
from .published import PROJECTIONS, Published, Weights

E, D, F = 2, 512, 256  # whole blocks of 128 and of 256 both ways
LAYER = "model.layers.0.mlp.experts"


def weights(experts: int = E, hidden: int = D, intermediate: int = F) -> Weights:
    g = torch.Generator().manual_seed(0)
    shapes = ((experts, intermediate, hidden), (experts, intermediate, hidden), (experts, hidden, intermediate))
    return {LAYER: tuple(0.02 * torch.randn(*s, generator=g) for s in shapes)}


def reader(checkpoint: Checkpoint, tensors: ExpertTensors, hidden: int = D, intermediate: int = F) -> ExpertReader:
    made = ExpertReader(checkpoint, tensors, E, hidden, intermediate)
    made.require()
    return made


def expert(folder: Path, made: Published, index: int = 1, **sizes: int) -> ExpertWeights:
    return reader(open_checkpoint(made.write(folder, shards=2)), made.layers[LAYER], **sizes).read(index)


def companions(made: Published, index: int = 1) -> list[dict[str, Tensor]]:
    """The tensors of gate, up and down of one expert, by suffix."""
    prefixes = [f"{LAYER}.{index}.{name}." for name in PROJECTIONS]
    return [{k.removeprefix(p): v for k, v in made.tensors.items() if k.startswith(p)} for p in prefixes]


def matrices(weight: ExpertWeights) -> list[QuantizedWeight]:
    return [weight.gate, weight.up, weight.down]


def assert_close_to(weight: ExpertWeights, original: tuple[Tensor, ...], rms: float, index: int = 1) -> None:
    """The right matrix in the right place: a permutation would leave nothing of it."""
    for got, expected in zip(weight.dequantize(), original, strict=True):
        error = (got - expected[index].float()).square().mean() / expected[index].float().square().mean()
        assert error.sqrt() < rms


RMS = {"fp8": 0.03, "int4": 0.13, "mxfp": 0.13, "gptq": 0.13, "awq": 0.13}


@pytest.mark.parametrize("kind", published.SAFETENSORS)
def test_the_right_matrix_in_the_right_place(tmp_path, kind):
    source = weights()
    weight = expert(tmp_path, published.SAFETENSORS[kind](source))
    assert_close_to(weight, source[LAYER], RMS[kind[:4].rstrip("_")])


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_block_bf16_scales", "fp8_block_ue8m0"])
def test_fp8_block_is_transformers(tmp_path, kind, monkeypatch):
    from transformers import FineGrainedFP8Config

    name = "transformers.integrations.finegrained_fp8"
    if importlib.util.find_spec("triton") is None:  # its module imports triton, which the dequantiser does not need
        monkeypatch.setitem(sys.modules, "triton", MagicMock())
        monkeypatch.setitem(sys.modules, "triton.language", MagicMock())
        sys.modules.pop(name, None)
        module = importlib.import_module(name)
        del sys.modules[name]
    else:
        module = importlib.import_module(name)

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=(128, 128))

    made = published.SAFETENSORS[kind](weights())
    for got, stored in zip(matrices(expert(tmp_path, made)), companions(made), strict=True):
        inputs = {"weight$": [stored["weight"]], "weight_scale_inv": [stored["weight_scale_inv"]]}
        expected = module.Fp8Dequantize(Quantizer()).convert(inputs, full_layer_name="w")["w"]
        assert got.kind == "fp8_e4m3" and got.block == (128, 128)
        assert torch.equal(got.dequantize(expected.dtype), expected)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_at_the_edge(tmp_path, scale_dtype):
    """Matrices that end inside a block, by DeepSeek-V3's rule: element [n, k] takes scale [n // 128, k // 128]."""
    hidden, intermediate = 320, 200
    ue8m0 = scale_dtype == torch.float8_e8m0fnu
    source = weights(hidden=hidden, intermediate=intermediate)
    made = published.fp8_block(source, torch.float32 if ue8m0 else scale_dtype, ue8m0)
    for name in [n for n in made.tensors if n.endswith("scale_inv")]:
        made.tensors[name] = made.tensors[name].to(scale_dtype)
    weight = expert(tmp_path, made, hidden=hidden, intermediate=intermediate)
    assert_close_to(weight, source[LAYER], 0.03)
    for got, stored in zip(matrices(weight), companions(made), strict=True):
        code, scale = stored["weight"].double(), stored["weight_scale_inv"].double()
        rows, columns = torch.arange(code.shape[0]) // 128, torch.arange(code.shape[1]) // 128
        assert torch.equal(got.dequantize(), (code * scale[rows][:, columns]).float())


@pytest.mark.parametrize("shape", ["tensor", "vector", "column"])
def test_fp8_scales_per_channel_and_per_tensor(tmp_path, shape):
    made = published.fp8_channel(weights(), torch.float32)
    for name in [n for n in made.tensors if n.endswith("weight_scale")]:
        scale = made.tensors[name]
        made.tensors[name] = {"tensor": scale.max(), "vector": scale.flatten(), "column": scale}[shape]
    for got, stored in zip(matrices(expert(tmp_path, made)), companions(made), strict=True):
        scale = stored["weight_scale"].double()
        expected = stored["weight"].double() * (scale if scale.ndim == 0 else scale.view(-1, 1))
        assert torch.equal(got.dequantize(), expected.float())


@pytest.mark.parametrize("kind", ["fp8_channel", "int4_group32", "int4_group32_zeros"])
def test_compressed_tensors(tmp_path, kind):
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    made = published.SAFETENSORS[kind](weights())
    assert made.quantization_config is not None
    scheme = QuantizationScheme.model_validate(made.quantization_config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(made.quantization_config["format"])
    for got, stored in zip(matrices(expert(tmp_path, made)), companions(made), strict=True):
        expected = compressor.decompress(dict(stored), scheme)["weight"]
        assert torch.equal(got.dequantize(expected.dtype), expected)


def test_int4_without_compressed_tensors(tmp_path):
    """Value k of a row is nibble k % 8 of word k // 8, less 8."""
    made = published.int4_group32(weights())
    weight = expert(tmp_path, made)
    for got, stored in zip(matrices(weight), companions(made), strict=True):
        words, scales = stored["weight_packed"].numpy().view(np.uint32), stored["weight_scale"].float().numpy()
        for n, k in [(0, 0), (1, 1), (7, 33), (200, 255), (255, 128)]:
            code = int(words[n, k // 8] >> np.uint32(4 * (k % 8))) & 15
            assert got.dequantize()[n, k].item() == np.float32(code - 8) * scales[n, k // 32]
    assert weight.gate.kind == "int4" and weight.gate.zeros is None
    assert weight.gate.nbytes == F * D / 2 + F * D / 32 * 2


def transformers_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """(N, K / 2) and (N, K / 32) -> bf16 (N, K)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(codes.view(1, len(codes), -1, 16), scales[None])[0].T


def test_mxfp4_of_gpt_oss_is_transformers(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = published.mxfp4_gpt_oss(weights())
    experts = reader(open_checkpoint(made.write(tmp_path)), made.layers[LAYER])
    weight = experts.read(1)
    stack = {k.removeprefix(f"{LAYER}."): v for k, v in made.tensors.items()}
    gate_up, down = (
        convert_moe_packed_tensors(stack[f"{name}_blocks"], stack[f"{name}_scales"])[1]  # (inputs, outputs)
        for name in ("gate_up_proj", "down_proj")
    )
    for got, expected in zip(matrices(weight), (gate_up[:, 0::2].T, gate_up[:, 1::2].T, down.T), strict=True):
        assert torch.equal(got.dequantize(torch.bfloat16), expected)
        assert torch.equal(got.dequantize(), expected.float())
    biases = experts.biases(range(1, 2))
    assert torch.equal(biases.gate, stack["gate_up_proj_bias"][1:2, 0::2])
    assert torch.equal(biases.up, stack["gate_up_proj_bias"][1:2, 1::2])
    assert torch.equal(biases.down, stack["down_proj_bias"][1:2])


def test_mxfp4_of_deepseek_v4(tmp_path):
    made = published.mxfp4_deepseek_v4(weights())
    weight = expert(tmp_path, made)
    for got, name in zip(matrices(weight), ("w1", "w3", "w2"), strict=True):
        codes, scales = (made.tensors[f"layers.0.ffn.experts.1.{name}.{part}"] for part in ("weight", "scale"))
        expected = transformers_mxfp4(codes.view(torch.uint8), scales.view(torch.uint8))
        assert torch.equal(got.dequantize(torch.bfloat16), expected)
    assert weight.gate.nbytes == F * D / 2 + F * D / 32


def test_every_e2m1_code_and_every_scale():
    """All 256 bytes of codes with each scale that the reader lets pass; the smallest products are subnormal."""
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 16)
    for exponent in (0, 1, 2, 127, 200, 252):
        scales = torch.full((16, 1), exponent, dtype=torch.uint8)
        weight = QuantizedWeight(kind="e2m1", shape=(16, 32), codes=codes, scales=scales, block=(1, 32))
        assert torch.equal(weight.dequantize(torch.bfloat16), transformers_mxfp4(codes, scales))
        assert weight.dequantize().isfinite().all()


def slow_gptq(stored: dict[str, Tensor], n: int, k: int, offset: int) -> np.float32:
    """AutoGPTQ's layout, one weight: eight input features to a word of qweight, eight outputs to one of qzeros."""
    qweight, qzeros = (stored[name].numpy().view(np.uint32) for name in ("qweight", "qzeros"))
    group = int(stored["g_idx"][k])
    code = (int(qweight[k // 8, n]) >> 4 * (k % 8)) & 15
    zero = (((int(qzeros[group, n // 8]) >> 4 * (n % 8)) & 15) + offset) & 15
    return np.float32(code - zero) * np.float32(stored["scales"][group, n].item())


def slow_awq(stored: dict[str, Tensor], n: int, k: int, group_size: int) -> np.float32:
    """AutoAWQ's gemm layout, one weight: eight outputs to a word; the nibble of output j is [0 4 1 5 2 6 3 7][j]."""
    qweight, qzeros = (stored[name].numpy().view(np.uint32) for name in ("qweight", "qzeros"))
    shift = 4 * (0, 4, 1, 5, 2, 6, 3, 7)[n % 8]
    code = (int(qweight[k, n // 8]) >> shift) & 15
    zero = (int(qzeros[k // group_size, n // 8]) >> shift) & 15
    return np.float32(code - zero) * np.float32(stored["scales"][k // group_size, n].item())


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "gptq_act_order", "awq"])
def test_gptq_and_awq(tmp_path, kind):
    made = published.SAFETENSORS[kind](weights())
    rng = np.random.default_rng(0)
    for got, stored in zip(matrices(expert(tmp_path, made)), companions(made), strict=True):
        assert got.kind == "int4" and got.block == (1, 128)
        assert (got.column_groups is not None) == (kind == "gptq_act_order")
        values = got.dequantize()
        for n, k in zip(rng.integers(0, got.shape[0], 500), rng.integers(0, got.shape[1], 500), strict=True):
            if kind == "awq":
                expected = slow_awq(stored, int(n), int(k), 128)
            else:
                expected = slow_gptq(stored, int(n), int(k), offset=kind != "gptq_v2")
            assert values[n, k].item() == expected


def test_gptq_zeros_wrap_as_in_autogptq(tmp_path):
    made = published.gptq(weights())
    made.tensors[f"{LAYER}.1.gate_proj.qzeros"].fill_(-1)  # all nibbles 15
    assert (expert(tmp_path, made).gate.zeros == 0).all()


@pytest.mark.parametrize("kind", published.GGUF_KINDS)
def test_gguf_is_the_gguf_package(tmp_path, kind):
    source = weights()
    file = published.write_gguf(tmp_path / "model.gguf", source, kind)
    expected = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type)
        if kind != "BF16"
        else np.asarray(t.data).view(np.uint16).astype(np.uint32).__lshift__(16).view(np.float32)
        for t in gguf.GGUFReader(file).tensors
    }
    made = reader(open_checkpoint(tmp_path), published.gguf_layers(source)[LAYER])
    for index in range(E):
        got = matrices(made.read(index))
        for matrix, name in zip(got, ("gate", "up", "down"), strict=True):
            reference = expected[f"blk.0.ffn_{name}_exps.weight"][index].reshape(matrix.shape)
            assert torch.equal(matrix.dequantize(), torch.from_numpy(reference.copy()))
        raw = sum(t.n_bytes for t in gguf.GGUFReader(file).tensors) / E
        assert sum(m.nbytes for m in got) == raw  # not a byte more than in the file


def test_projections_of_different_types(tmp_path):
    """llama.cpp's Q4_K_M keeps half of the down projections in Q6_K."""
    source = weights()
    file = published.write_gguf(tmp_path / "m.gguf", source, {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"})
    weight = reader(open_checkpoint(file), published.gguf_layers(source)[LAYER]).read(0)
    assert [m.kind for m in matrices(weight)] == ["q4_k", "q4_k", "q6_k"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fused", [False, True])
def test_floats_pass_through(tmp_path, dtype, fused):
    source = weights()
    gate, up, down = (m.to(dtype) for m in source[LAYER])
    if fused:
        tensors = {f"{LAYER}.gate_up_proj": torch.cat([gate, up], 1), f"{LAYER}.down_proj": down}
        made = Published(tensors, {LAYER: ExpertTensors(gate_up=f"{LAYER}.gate_up_proj", down=f"{LAYER}.down_proj")})
    else:
        named = zip(PROJECTIONS, (gate, up, down), strict=True)
        tensors = {f"{LAYER}.{e}.{n}.weight": m[e].clone() for n, m in named for e in range(E)}
        made = Published(tensors, {LAYER: published.separate(LAYER)})
    weight = expert(tmp_path, made)
    for got, expected in zip(matrices(weight), (gate, up, down), strict=True):
        assert got.kind == "float" and got.codes.dtype == dtype and torch.equal(got.codes, expected[1])


def test_layers_of_different_formats(tmp_path):
    """Checkpoints leave some layers unquantised; the tensors decide, not a list of exceptions."""
    made = published.fp8_block(weights())
    for name in PROJECTIONS:
        stem = f"{LAYER}.0.{name}.weight"
        made.tensors[stem] = made.tensors[stem].to(torch.bfloat16)
        del made.tensors[f"{stem}_scale_inv"]
    experts = reader(open_checkpoint(made.write(tmp_path)), made.layers[LAYER])
    assert experts.read(0).gate.kind == "float" and experts.read(1).gate.kind == "fp8_e4m3"
    for e in range(E):  # formats alone
        seen = experts.read(e, values=False)
        assert [(m.kind, m.shape) for m in matrices(seen)] == [(m.kind, m.shape) for m in matrices(experts.read(e))]
    assert experts.read(0, values=False).gate.codes.is_meta and not seen.gate.codes.is_meta


def test_fused_fp8(tmp_path):
    """Stacks of all experts with a stack of scales beside them."""
    made = published.fp8_block(weights())
    tensors = {}
    for fused, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        for ours, theirs in (("", "weight"), ("_scale_inv", "weight_scale_inv")):
            rows = [torch.cat([made.tensors[f"{LAYER}.{e}.{p}.{theirs}"].float() for p in parts]) for e in range(E)]
            stack = torch.stack(rows)
            tensors[f"{LAYER}.{fused}{ours}"] = stack.to(torch.float8_e4m3fn) if ours == "" else stack
    layout = ExpertTensors(gate_up=f"{LAYER}.gate_up_proj", down=f"{LAYER}.down_proj")
    stacked = expert(tmp_path / "a", Published(tensors, {LAYER: layout}, made.quantization_config))
    separate = expert(tmp_path / "b", made)
    for got, expected in zip(stacked.dequantize(), separate.dequantize(), strict=True):
        assert torch.equal(got, expected)


def test_only_the_expert_is_read(tmp_path, monkeypatch):
    """Ranged reads: the bytes of one expert, not of its stack or shard."""
    from kt_sft.weights import checkpoint as module

    made = published.mxfp4_gpt_oss(weights())
    experts = reader(open_checkpoint(made.write(tmp_path)), made.layers[LAYER])
    sizes = []
    original = module._read
    monkeypatch.setattr(module, "_read", lambda *a: sizes.append(a[3]) or original(*a))
    weight = experts.read(0)
    assert sum(sizes) == sum(m.nbytes for m in matrices(weight))
    sizes.clear()
    experts.biases(range(1, 2))
    assert sum(sizes) == 2 * (2 * F + D)


def test_rows_inside_a_block_of_scales():
    codes, scales = torch.zeros(256, 128, dtype=torch.uint8), torch.ones(2, 1)
    weight = QuantizedWeight(kind="fp8_e4m3", shape=(256, 128), codes=codes, scales=scales, block=(128, 128))
    assert weight.rows(slice(128, 256)).scales.shape == (1, 1)
    for part in (slice(0, 100), slice(100, 256), slice(0, 256, 2)):
        with pytest.raises(ValueError, match="expected whole blocks of 128 rows"):
            weight.rows(part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 33, dtype=torch.uint8)}, "codes: expected"),
        ({"codes": torch.zeros(4, 32)}, "codes: expected"),
        ({"scales": torch.ones(4, 1)}, "scales: expected"),
        ({"scales": torch.ones(4, 2, dtype=torch.int32)}, "scales: expected"),
        ({"scales": None}, "scales: int4 expected scales"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.uint8)}, "zeros: expected"),
        ({"kind": "e2m1", "zeros": torch.zeros(4, 2, dtype=torch.uint8)}, "zeros: expected none for e2m1"),
        ({"column_groups": torch.zeros(3, dtype=torch.int64)}, "column_groups: expected"),
        ({"kind": "q4_k"}, "expected a multiple of 256 columns"),
        ({"kind": "q9"}, "kind: expected one of float, .*; got 'q9'"),
    ],
)
def test_a_weight_checks_its_parts(change, message):
    parts = {"codes": torch.zeros(4, 32, dtype=torch.uint8), "scales": torch.ones(4, 2), "block": (1, 32)}
    QuantizedWeight(**{"kind": "int4", "shape": (4, 64), **parts})
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**{"kind": "int4", "shape": (4, 64), **parts, **change})
