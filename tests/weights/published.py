"""Tiny checkpoints in the layouts that publishers use: names, dtypes, quantization_config.

Every writer takes ``weights``: {experts module path, e.g. "model.layers.0.mlp.experts": (gate (E, F, D), up (E, F, D),
down (E, D, F))} and returns a ``Published``: the tensors by name, what config.json says, and where a layer's experts
are. The quantisers are the simplest that write valid files; they are not what is tested.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kt_sft.weights.checkpoint import Checkpoint, ExpertTensors
from kt_sft.weights.formats import ExpertReader, open_checkpoint

from .checkpoints import write

Weights = dict[str, tuple[Tensor, ...]]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@dataclass
class Published:
    tensors: dict[str, Tensor]
    layers: dict[str, ExpertTensors]
    quantization_config: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)  # other keys of config.json

    def write(self, folder: Path, shards: int = 1) -> Path:
        write(folder, self.tensors, shards)
        config = {"model_type": "test", **self.config}
        if self.quantization_config is not None:
            config["quantization_config"] = self.quantization_config
        (folder / "config.json").write_text(json.dumps(config))
        return folder


def separate(layer: str) -> ExpertTensors:
    gate, up, down = (f"{layer}.{{expert}}.{name}.weight" for name in PROJECTIONS)
    return ExpertTensors(gate=gate, up=up, down=down)


def _per_matrix(weights: Weights, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """``make`` gives the companions of one matrix (N, K), by suffix."""
    return {
        f"{layer}.{e}.{name}.{suffix}": tensor.contiguous()
        for layer, matrices in weights.items()
        for name, stack in zip(PROJECTIONS, matrices, strict=True)
        for e in range(len(stack))
        for suffix, tensor in make(stack[e].float()).items()
    }


def _published(weights: Weights, make: Callable[[Tensor], dict[str, Tensor]], config: dict[str, Any]) -> Published:
    return Published(_per_matrix(weights, make), {layer: separate(layer) for layer in weights}, config)


def blocks_of(w: Tensor, height: int, width: int) -> Tensor:
    """max |w| of every block: (ceil(N / height), ceil(K / width))."""
    rows, columns = w.shape
    padded = torch.nn.functional.pad(w.abs(), (0, -columns % width, 0, -rows % height))
    return padded.view(-(-rows // height), height, -(-columns // width), width).amax((1, 3))


def spread(grid: Tensor, height: int, width: int, shape: tuple[int, ...]) -> Tensor:
    return grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def power_of_two(scale: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(scale)))


def fp8_block(weights: Weights, scale_dtype: torch.dtype = torch.float32, ue8m0: bool = False) -> Published:
    """DeepSeek-V3, Qwen3-FP8, MiniMax-M2; with ``ue8m0`` the rounded scales of DeepSeek-V3.1."""

    def make(w: Tensor) -> dict[str, Tensor]:
        scale = blocks_of(w, 128, 128) / 448
        scale = (power_of_two(scale) if ue8m0 else scale).to(scale_dtype)
        codes = (w / spread(scale.float(), 128, 128, w.shape)).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}

    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    return _published(weights, make, config | ({"scale_fmt": "ue8m0"} if ue8m0 else {}))


def _compressed(fmt: str, ignore: list[str] | None = None, **scheme: Any) -> dict[str, Any]:
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": scheme}
    return {
        "config_groups": {"group_0": group},
        "format": fmt,
        "ignore": ignore or ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def fp8_channel(weights: Weights, scale_dtype: torch.dtype = torch.bfloat16) -> Published:
    """GLM-4.5-FP8: compressed-tensors float-quantized, one scale per output channel."""

    def make(w: Tensor) -> dict[str, Tensor]:
        scale = (w.abs().amax(1, keepdim=True) / 448).to(scale_dtype)
        return {"weight": (w / scale.float()).to(torch.float8_e4m3fn), "weight_scale": scale}

    scheme = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    return _published(weights, make, _compressed("float-quantized", **scheme))


def words_along_columns(codes: Tensor) -> Tensor:
    """uint4 (R, C) -> int32 (R, C / 8), low nibble first."""
    parts = codes.numpy().astype(np.uint32).reshape(codes.shape[0], -1, 8)
    return torch.from_numpy((parts << (4 * np.arange(8, dtype=np.uint32))).sum(-1).astype(np.uint32).view(np.int32))


def int4_group32(weights: Weights, symmetric: bool = True) -> Published:
    """Kimi-K2-Thinking: compressed-tensors pack-quantized, experts only."""

    def make(w: Tensor) -> dict[str, Tensor]:
        rows, columns = w.shape
        grouped = w.view(rows, -1, 32)
        scale = (grouped.abs().amax(-1) / 7.5).to(torch.bfloat16)
        zero = torch.zeros_like(scale)
        if not symmetric:
            zero = (scale.float() * 1e6).round() % 5 - 2  # any whole number from -2 to 2
        codes = torch.clamp((grouped / scale.float()[..., None]).round() + zero[..., None] + 8, 0, 15)
        out = {
            "weight_packed": words_along_columns(codes.view(rows, columns).to(torch.uint8)),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns], dtype=torch.int32),
        }
        if not symmetric:
            out["weight_zero_point"] = words_along_columns((zero + 8).to(torch.uint8).T.contiguous()).T
        return out

    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric}
    return _published(weights, make, _compressed("pack-quantized", dynamic=False, **scheme))


def mxfp4_codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) -> codes uint8 (..., K), exponents uint8 (..., K / 32)."""
    grouped = w.float().unflatten(-1, (-1, 32))
    exponent = (torch.floor(torch.log2(grouped.abs().amax(-1))) - 2).clamp(-127, 127)
    scaled = grouped / torch.exp2(exponent)[..., None]
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    return codes.to(torch.uint8).flatten(-2), (exponent + 127).to(torch.uint8)


def _pairs(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def mxfp4_gpt_oss(weights: Weights, seed: int = 0) -> Published:
    """gpt-oss: stacks of all experts, gate and up rows interleaved, biases."""
    tensors, layers = {}, {}
    g = torch.Generator().manual_seed(seed)
    for layer, (gate, up, down) in weights.items():
        E, F, D = gate.shape
        gate_up = torch.stack([gate, up], dim=2).reshape(E, 2 * F, D)
        for name, stack in (("gate_up_proj", gate_up), ("down_proj", down)):
            codes, exponents = mxfp4_codes(stack)
            tensors[f"{layer}.{name}_blocks"] = _pairs(codes).unflatten(-1, (-1, 16)).contiguous()
            tensors[f"{layer}.{name}_scales"] = exponents
            tensors[f"{layer}.{name}_bias"] = torch.randn(stack.shape[:2], generator=g).bfloat16()
        layers[layer] = ExpertTensors(
            gate_up=f"{layer}.gate_up_proj",
            down=f"{layer}.down_proj",
            interleaved=True,
            gate_up_bias=f"{layer}.gate_up_proj_bias",
            down_bias=f"{layer}.down_proj_bias",
        )
    excluded = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return Published(tensors, layers, {"modules_to_not_convert": excluded, "quant_method": "mxfp4"})


def mxfp4_deepseek_v4(weights: Weights) -> Published:
    """DeepSeek-V4-Flash: int8 pairs of E2M1 and float8_e8m0fnu scales under bare names."""
    tensors, layers = {}, {}
    for layer, matrices in weights.items():
        base = f"layers.{re.findall(r'[0-9]+', layer)[0]}.ffn.experts"
        for name, stack in zip(("w1", "w3", "w2"), matrices, strict=True):
            codes, exponents = mxfp4_codes(stack)
            for e in range(len(stack)):
                tensors[f"{base}.{e}.{name}.weight"] = _pairs(codes[e]).view(torch.int8).contiguous()
                tensors[f"{base}.{e}.{name}.scale"] = exponents[e].view(torch.float8_e8m0fnu).contiguous()
        gate, up, down = (f"{base}.{{expert}}.{name}.weight" for name in ("w1", "w3", "w2"))
        layers[layer] = ExpertTensors(gate=gate, up=up, down=down)
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0"}
    return Published(tensors, layers, quantization | {"weight_block_size": [128, 128]}, {"expert_dtype": "fp4"})


def _affine(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes uint8 (N, K), zeros uint8 (N, G), scales fp16 (N, G)."""
    grouped = w.view(w.shape[0], -1, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).to(torch.float16)
    zero = (-low / scale.float()).round().clamp(1, 15)
    codes = ((grouped / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15)
    return codes.flatten(1).to(torch.uint8), zero.to(torch.uint8), scale


def gptq(weights: Weights, group: int = 128, act_order: bool = False, version: str = "gptq") -> Published:
    """AutoGPTQ and GPTQModel: qzeros hold zero - 1, unless the checkpoint_format is gptq_v2."""

    def make(w: Tensor) -> dict[str, Tensor]:
        columns = w.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns)) if act_order else None
        codes, zeros, scales = _affine(w if order is None else w[:, order], group)
        g_idx = torch.arange(columns, dtype=torch.int32) // group
        if order is not None:  # column order[j] was quantised j-th
            inverse = torch.argsort(order)
            codes, g_idx = codes[:, inverse], g_idx[inverse]
        stored = zeros if version == "gptq_v2" else zeros - 1
        return {
            "qweight": words_along_columns(codes).T,
            "qzeros": words_along_columns(stored.T.contiguous()),
            "scales": scales.T,
            "g_idx": g_idx,
        }

    config = {"bits": 4, "group_size": group, "desc_act": act_order, "sym": False, "quant_method": "gptq"}
    return _published(weights, make, config | {"checkpoint_format": version})


AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds this column of eight


def awq(weights: Weights, group: int = 128) -> Published:
    """AutoAWQ, gemm version."""

    def interleaved(codes: Tensor) -> Tensor:
        return words_along_columns(codes.unflatten(1, (-1, 8))[:, :, AWQ_COLUMNS].flatten(1).contiguous())

    def make(w: Tensor) -> dict[str, Tensor]:
        codes, zeros, scales = _affine(w, group)
        return {"qweight": interleaved(codes.T), "qzeros": interleaved(zeros.T), "scales": scales.T}

    config = {"bits": 4, "group_size": group, "version": "gemm", "zero_point": True, "quant_method": "awq"}
    return _published(weights, make, config)


# Where the fp16 factors of a block are, and how large they may be for weights of about 0.02.
_RANDOM_BLOCKS = {
    **{"IQ4_NL": ((0,), 5e-4), "IQ4_XS": ((0,), 2e-5), "Q2_K": ((80, 82), 1e-3), "Q3_K": ((108,), 5e-4)},
    **{"Q4_K": ((0, 2), 1e-4), "Q5_K": ((0, 2), 5e-5), "Q6_K": ((208,), 2e-5)},
}


def gguf_blocks(stack: Tensor, kind: str, seed: int = 0) -> np.ndarray:
    """Raw blocks, (..., bytes per row): quantised where the gguf package can, else random codes with sane scales."""
    qtype = gguf.GGMLQuantizationType[kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[qtype]
    try:
        return gguf.quants.quantize(stack.float().numpy(), qtype)
    except NotImplementedError:
        pass
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*stack.shape[:-1], stack.shape[-1] // size, nbytes), dtype=np.uint8)
    where, peak = _RANDOM_BLOCKS[kind]
    for start in where:
        d = rng.uniform(-peak, peak, blocks.shape[:-1]).astype(np.float16)
        blocks[..., start : start + 2] = d[..., None].view(np.uint8)
    return blocks.reshape(*stack.shape[:-1], -1)


def write_gguf(
    file: Path,
    weights: Weights,
    kinds: dict[str, str] | str,
    arch: str = "qwen3moe",
    biases: dict[str, tuple[Tensor, ...]] | None = None,
) -> Path:
    """``blk.N.ffn_{gate,up,down}_exps.weight``, ``.bias``; ``kinds`` by gate, up, down, or one for all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    for i, matrices in enumerate(weights.values()):
        for j, (name, stack) in enumerate(zip(("gate", "up", "down"), matrices, strict=True)):
            kind = kinds if isinstance(kinds, str) else kinds[name]
            data = gguf_blocks(stack, kind, seed=3 * i + j)
            writer.add_tensor(f"blk.{i}.ffn_{name}_exps.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
            if biases is not None:
                writer.add_tensor(f"blk.{i}.ffn_{name}_exps.bias", list(biases.values())[i][j].float().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_layers(weights: Weights) -> dict[str, ExpertTensors]:
    layers = {}
    for i, layer in enumerate(weights):
        gate, up, down = (f"blk.{i}.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
        layers[layer] = ExpertTensors(gate=gate, up=up, down=down)
    return layers


SAFETENSORS: dict[str, Callable[[Weights], Published]] = {
    "fp8_block": fp8_block,
    "fp8_block_bf16_scales": lambda w: fp8_block(w, torch.bfloat16),
    "fp8_block_ue8m0": lambda w: fp8_block(w, ue8m0=True),
    "fp8_channel": fp8_channel,
    "int4_group32": int4_group32,
    "int4_group32_zeros": lambda w: int4_group32(w, symmetric=False),
    "mxfp4_gpt_oss": mxfp4_gpt_oss,
    "mxfp4_deepseek_v4": mxfp4_deepseek_v4,
    "gptq": gptq,
    "gptq_v2": lambda w: gptq(w, version="gptq_v2"),
    "gptq_act_order": lambda w: gptq(w, act_order=True),
    "awq": awq,
}
GGUF_KINDS = (
    *("F32", "F16", "BF16", "Q4_0", "Q8_0", "IQ4_NL", "MXFP4"),
    *("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)


def weights_of(folder: Path, layers: list[str], experts: int) -> Weights:
    """The experts of an unquantised checkpoint with per-expert tensors."""
    checkpoint = Checkpoint(folder)
    return {
        layer: tuple(
            torch.stack([checkpoint.read(f"{layer}.{e}.{name}.weight") for e in range(experts)]) for name in PROJECTIONS
        )
        for layer in layers
    }


def with_experts(folder: Path, target: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A copy of a model's folder with other tensors for its routed experts, and more keys in config.json."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if not file.name.endswith((".safetensors", ".index.json")):
            shutil.copy(file, target)
    rest = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items() if ".experts." not in k}
    save_file({**rest, **tensors}, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, **config}))
    return target


def dequantised(path: Path, layers: dict[str, ExpertTensors], sizes: tuple[int, int, int]) -> dict[str, Tensor]:
    """Per-expert BF16 tensors of a quantised checkpoint; ``sizes`` are experts, hidden and intermediate."""
    tensors = {}
    for layer, layout in layers.items():
        reader = ExpertReader(open_checkpoint(path), layout, *sizes)
        for e in range(sizes[0]):
            named = zip(PROJECTIONS, reader.read(e).dequantize(torch.bfloat16), strict=True)
            tensors |= {f"{layer}.{e}.{name}.weight": matrix for name, matrix in named}
    return tensors
