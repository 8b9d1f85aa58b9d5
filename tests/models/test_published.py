"""Families in the layouts that their publishers ship: quantised beside the experts, more layers than are trained.

Everything is compared with unmodified transformers on a twin checkpoint that holds the dequantised weights in BF16.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kt_sft.models.convert import from_pretrained
from kt_sft.nn.experts import KtExperts
from tests.families import FAMILIES, lora_errors, rms_ratio, save_checkpoint, stock_model, tiny_model, token_ids
from tests.weights.published import blocks_of, spread
from tests.weights.published import int4_group32 as published_int4

BF16: dict[str, Any] = {"weight_format": "bf16", "dtype": torch.float32}
KEPT = r"embed_tokens|lm_head|norm|mlp\.gate\.|block_sparse_moe\.gate\.|shared_expert_gate|visual|conv1d|weights_proj"
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
SCHEME = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": SCHEME, "input_activations": None}},
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*self_attn.*"]}
INT4["config_groups"] = {
    "group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}}
}
KIMI = {"model_type": "kimi_k2", "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}


def fp8_block(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Companions by suffix, and what they stand for."""
    scale = blocks_of(w, 128, 128) / 448
    grid = spread(scale, 128, 128, w.shape)
    codes = (w / grid).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * grid


def fp8_channel(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (w.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (w / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def int4_group32(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    made = published_int4({"x.experts": (w[None], w[None], w[None])}).tensors
    parts = {name.rpartition(".")[2]: value for name, value in made.items() if ".gate_proj." in name}
    scale = parts["weight_scale"].float().repeat_interleave(32, 1)
    return parts, torch.clamp((w / scale).round(), -8, 7) * scale


@dataclass(frozen=True)
class Layout:
    """What a publisher makes of a family's checkpoint."""

    family: str
    quantization: dict[str, Any] = field(default_factory=lambda: FP8)
    quantise: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]] = fp8_block
    config: dict[str, Any] = field(default_factory=dict)
    more_layers: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    kept: str = KEPT  # what is not quantised


SIZES = {"hidden_size": 160, "moe_intermediate_size": 136}  # no multiples of a block
STACKS = {"hidden_size": 384, "moe_intermediate_size": 128}  # gate and up share a stack: whole blocks, as published
LAYOUTS = {
    "deepseek_v3": Layout("deepseek_v3", more_layers=1, sizes=SIZES),
    "kimi_k2": Layout("deepseek_v3", config=KIMI, sizes=SIZES),
    "minimax_m2": Layout("minimax_m2", sizes={"hidden_size": 160, "intermediate_size": 136}),
    "glm_moe_dsa": Layout("glm_moe_dsa", more_layers=1, sizes=SIZES),
    "glm4_moe": Layout("glm4_moe", CHANNEL, fp8_channel, more_layers=1, sizes=SIZES),
    "qwen3_next": Layout("qwen3_next", sizes=SIZES),
    "qwen3_vl_moe": Layout("qwen3_vl_moe", sizes=STACKS),
    "qwen3_5_moe": Layout("qwen3_5_moe", sizes={**STACKS, "hidden_size": 256}),
}
THINKING = Layout(
    "deepseek_v3",
    INT4,
    int4_group32,
    config=KIMI,
    sizes={"hidden_size": 160, "moe_intermediate_size": 96},
    kept=r"^(?!.*\.experts\.)",
)
QUICK = ("deepseek_v3", "glm4_moe", "minimax_m2", "qwen3_vl_moe")
HERE = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name, layout in LAYOUTS.items()
    if layout.family in FAMILIES
]


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def checkpoints(layout: Layout, tmp_path: Path, **sizes: int) -> tuple[Path, Path]:
    """The published checkpoint and its dequantised twin."""
    plain = save_checkpoint(tiny_model(layout.family, **layout.sizes, **sizes), tmp_path / "plain")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(plain.glob("*.safetensors")):
        tensors |= {k: v.bfloat16() if v.ndim > 1 else v for k, v in load_file(shard).items()}
    config = json.loads((plain / "config.json").read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    twin = dict(tensors)
    published = tensors | next_token_prediction(tensors, config["num_hidden_layers"]) if layout.more_layers else tensors
    out: dict[str, Tensor] = {}
    for name, value in published.items():
        if value.ndim < 2 or re.search(layout.kept, name):
            out[name] = value
            continue
        stack = value.float() if value.ndim == 3 else value.float()[None]
        parts, values = zip(*map(layout.quantise, stack), strict=True)
        stem = name.removesuffix("weight")
        for suffix in parts[0]:
            whole = torch.stack([part[suffix].view(torch.uint8) for part in parts]).view(parts[0][suffix].dtype)
            key = stem + suffix if value.ndim == 2 else name + suffix.removeprefix("weight")
            out[key] = whole[0] if value.ndim == 2 else whole
        if name in twin:
            twin[name] = torch.stack(values).view(value.shape).bfloat16()
    extra = {"num_nextn_predict_layers": layout.more_layers} if layout.more_layers else {}
    settings = {**config, **extra, **layout.config, "quantization_config": layout.quantization}
    return write(tmp_path / "published", out, settings), write(tmp_path / "twin", twin, config)


def next_token_prediction(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """DeepSeek-V3's multi-token-prediction layer: a decoder layer, an embedding, a head and a projection."""
    layer = f"model.layers.{index}"
    out = {k.replace("model.layers.1", layer): v.clone() for k, v in tensors.items() if "model.layers.1." in k}
    out[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    out[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    out[f"{layer}.shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    hidden = len(tensors["model.norm.weight"])
    out[f"{layer}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
    return out


@pytest.fixture(scope="module", params=HERE)
def published(request: Any, tmp_path_factory: Any) -> tuple[Path, Path, Path]:
    """The published checkpoint, its twin, and an empty cache folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return *checkpoints(LAYOUTS[request.param], folder), folder / "cache"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(token_ids()).logits


def test_logits_and_lora_gradients(published: Any) -> None:
    folder, twin, cache = published
    model = from_pretrained(folder, cache_dir=str(cache), **BF16)
    reference = stock_model(twin)
    layers = [m for m in model.modules() if isinstance(m, KtExperts)]
    error, errors = lora_errors(model, reference)
    assert error < 1e-2
    assert sum(".experts." in name for name in errors) == 6 * len(layers)
    assert {name: e for name, e in errors.items() if e > 2e-2} == {}


def test_everything_but_the_experts_is_the_twins_bit_for_bit(published: Any) -> None:
    folder, twin, cache = published
    model = from_pretrained(folder, cache_dir=str(cache), weight_format="bf16")
    ours, theirs = model.state_dict(), stock_model(twin, torch.bfloat16).state_dict()
    assert {k: v.dtype for k, v in ours.items() if v.dtype != torch.bfloat16 and v.ndim > 1} == {}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name].to(ours[name].dtype))] == []


def test_the_model_goes_by_its_own_name(published: Any, caplog: Any, capsys: Any) -> None:
    folder, _, cache = published
    model = from_pretrained(folder, cache_dir=str(cache), **BF16)
    assert model.name_or_path == model.config._name_or_path == str(folder)
    assert getattr(model.config, "quantization_config", None) is None
    assert "UNEXPECTED" not in caplog.text + capsys.readouterr().err


def test_the_copy_is_made_once(published: Any, caplog: Any) -> None:
    folder, _, cache = published
    with caplog.at_level(logging.INFO, "kt_sft"):
        from_pretrained(folder, cache_dir=str(cache), **BF16)
        caplog.clear()
        from_pretrained(folder, cache_dir=str(cache), **BF16)
    assert "as BF16 into" not in caplog.text
    (copy,) = (path for path in cache.iterdir() if path.is_dir())
    names = {name for shard in copy.glob("*.safetensors") for name in load_file(shard)}
    assert not any(re.search(r"\.experts\.|scale", name) for name in names)
    assert not any("layers.2." in name for name in names)  # the multi-token-prediction layer


def test_nothing_stays_on_disk_without_a_cache(published: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, twin, _ = published
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = from_pretrained(folder, cache_dir="none", **BF16)
    assert list(tmp_path.iterdir()) == []
    assert rms_ratio(logits(model), logits(stock_model(twin))) < 1e-2


def test_where_only_experts_are_quantised_no_copy_is_made(tmp_path: Path) -> None:
    folder, twin = checkpoints(THINKING, tmp_path)
    model = from_pretrained(folder, cache_dir=str(tmp_path / "cache"), trust_remote_code=True, **BF16)
    assert type(model).__name__ == "DeepseekV3ForCausalLM" and type(model).__module__.startswith("transformers.")
    error, errors = lora_errors(model, stock_model(twin))
    assert error < 1e-2 and max(errors.values()) < 2e-2
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    kept = from_pretrained(folder, cache_dir="none", weight_format="int4")
    assert rms_ratio(logits(kept), logits(stock_model(twin, torch.bfloat16))) < 5e-2


def test_quantised_experts_stay_what_they_are(published: Any) -> None:
    folder, twin, _ = published
    model = from_pretrained(folder, cache_dir="none", dtype=torch.float32)
    kinds = {m.packed.weight_format for m in model.modules() if isinstance(m, KtExperts)}
    assert kinds <= {"fp8", "fp8_channel"}
    assert rms_ratio(logits(model), logits(stock_model(twin))) < 1e-2
