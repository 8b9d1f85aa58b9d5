"""gpt-oss as published (MXFP4 stacks, biases) and as GGUF: against transformers on the dequantised weights in BF16.

The weights are large enough for the clamps to act.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kt_sft.models.convert import convert_model, from_pretrained
from kt_sft.nn.experts import KtExperts
from kt_sft.weights.checkpoint import ExpertTensors
from kt_sft.weights.formats import ExpertReader, open_checkpoint
from tests.families import lora_errors, rms_ratio, save_checkpoint, stock_model, tiny_model, token_ids
from tests.weights import published

E, D, F = 8, 64, 96
LAYERS = [f"model.layers.{i}.mlp.experts" for i in range(2)]
SIZES: dict[str, Any] = dict(hidden_size=D, intermediate_size=F, num_local_experts=E)
BF16: dict[str, Any] = {"cache_dir": "none", "dtype": torch.float32, "weight_format": "bf16"}


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def fused(
    source: Path,
    layers: dict[str, ExpertTensors],
    biases: dict[str, Tensor],
    sizes: tuple[int, int, int] = (E, D, F),
) -> dict[str, Tensor]:
    """Dequantised experts as transformers has them: transposed, gate and up alternating."""
    tensors = dict(biases)
    for layer, layout in layers.items():
        reader = ExpertReader(open_checkpoint(source), layout, *sizes)
        experts = [reader.read(e).dequantize() for e in range(sizes[0])]
        gate, up, down = (torch.stack(part) for part in zip(*experts, strict=True))
        tensors[f"{layer}.gate_up_proj"] = torch.stack([gate, up], dim=2).flatten(1, 2).mT
        tensors[f"{layer}.down_proj"] = down.mT
    return {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> tuple[Path, published.Weights]:
    """A checkpoint in BF16, and its experts' weights: gate, up, down."""
    model = tiny_model("gpt_oss", seed=1, **SIZES)  # no routing near-tie that bf16 products would flip
    weights: published.Weights = {}
    with torch.no_grad():
        for path in LAYERS:
            experts = model.get_submodule(path)
            experts.gate_up_proj *= 2.5
            gate_up = experts.gate_up_proj.detach().mT
            weights[path] = (gate_up[:, 0::2], gate_up[:, 1::2], experts.down_proj.detach().mT)
    return save_checkpoint(model, tmp_path_factory.mktemp("gpt_oss")), weights


@pytest.fixture(scope="module")
def checkpoints(base: Any, tmp_path_factory: Any) -> tuple[Path, Path]:
    """The published checkpoint and its dequantised twin."""
    plain, weights = base
    folder = tmp_path_factory.mktemp("mxfp4")
    made = published.mxfp4_gpt_oss(weights)
    target = published.with_experts(
        plain, folder / "published", made.tensors, quantization_config=made.quantization_config
    )
    biases = {name: tensor for name, tensor in made.tensors.items() if name.endswith("bias")}
    twin = published.with_experts(plain, folder / "twin", fused(target, made.layers, biases))
    return target, twin


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(token_ids()).logits


def median_error(got: Tensor, expected: Tensor) -> float:
    """Over the tokens: one whose routing is a near-tie may go another way."""
    pairs = zip(got.flatten(0, 1), expected.flatten(0, 1), strict=True)
    return statistics.median(rms_ratio(*pair) for pair in pairs)


def test_the_clamps_act(checkpoints: Any) -> None:
    _, twin = checkpoints
    reference = stock_model(twin)
    expected = logits(reference)
    for path in LAYERS:
        reference.get_submodule(path).limit = 1e3
    assert rms_ratio(logits(reference), expected) > 5e-2


@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_logits_and_lora_gradients(checkpoints: Any, policy: str) -> None:
    folder, twin = checkpoints
    error, errors = lora_errors(from_pretrained(folder, activation_policy=policy, **BF16), stock_model(twin))
    assert error < 1e-2
    assert sum(".experts." in name for name in errors) == 12
    assert {name: e for name, e in errors.items() if e > 2e-2} == {}


def test_requantised_with_a_cache_that_holds_no_biases(checkpoints: Any, tmp_path: Path) -> None:
    """A packed file serves a checkpoint with the biases that this has."""
    folder, twin = checkpoints
    expected = logits(stock_model(twin))
    for _ in range(2):
        model = from_pretrained(folder, weight_format="int8", cache_dir=str(tmp_path), dtype=torch.float32)
        assert median_error(logits(model), expected) < 3e-2
    assert model.generate(token_ids(), max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 12)


def test_kept_as_stored(checkpoints: Any) -> None:
    """MXFP4 codes and scales as they are: what transformers dequantises them to is what enters products."""
    folder, twin = checkpoints
    model = from_pretrained(folder, cache_dir="none", dtype=torch.float32)
    packed = experts_of(model)[0].packed
    assert packed.weight_format == "mxfp4"
    gate_up = stock_model(twin).get_submodule(LAYERS[0]).gate_up_proj.detach().mT
    gate, up, _ = packed.dequantize()
    assert torch.equal(gate, gate_up[:, 0::2].bfloat16()) and torch.equal(up, gate_up[:, 1::2].bfloat16())
    assert median_error(logits(model), logits(stock_model(twin))) < 1e-2


def test_convert_model_equals_from_pretrained(checkpoints: Any) -> None:
    _, twin = checkpoints
    converted = convert_model(stock_model(twin), weight_format="bf16")
    loaded = from_pretrained(twin, **BF16)
    for ours, theirs in zip(experts_of(converted), experts_of(loaded), strict=True):
        assert torch.equal(ours.packed.storage, theirs.packed.storage)
        assert torch.equal(ours.packed.biases.gate, theirs.packed.biases.gate)
    assert torch.equal(logits(converted), logits(loaded))


def experts_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, KtExperts)]


def test_gguf(base: Any, checkpoints: Any, tmp_path: Path) -> None:
    plain, weights = base
    tensors = read_all(plain)
    biases = {path: gguf_biases(tensors, path) for path in LAYERS}
    file = published.write_gguf(tmp_path / "model.gguf", weights, "MXFP4", arch="gpt-oss", biases=biases)
    kept = {name: tensor for name, tensor in tensors.items() if name.endswith("proj_bias") and ".experts." in name}
    twin = published.with_experts(plain, tmp_path / "twin", fused(file, published.gguf_layers(weights), kept))
    model = from_pretrained(plain, expert_checkpoint_path=str(file), **BF16)
    assert median_error(logits(model), logits(stock_model(twin))) < 1e-2
    without = published.write_gguf(tmp_path / "without.gguf", weights, "MXFP4", arch="gpt-oss")
    with pytest.raises(ValueError, match=r"expected biases beside blk\.0\.ffn_gate_exps\.weight.*, got none"):
        from_pretrained(plain, expert_checkpoint_path=str(without), **BF16)


def gguf_biases(tensors: dict[str, Tensor], path: str) -> tuple[Tensor, ...]:
    gate_up, down = tensors[f"{path}.gate_up_proj_bias"], tensors[f"{path}.down_proj_bias"]
    return gate_up[:, 0::2], gate_up[:, 1::2], down


def test_a_checkpoint_without_its_biases_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    _, twin = checkpoints
    tensors = {
        name: tensor for name, tensor in read_all(twin).items() if "layers.1.mlp.experts.down_proj_b" not in name
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((twin / "config.json").read_text())
    with pytest.raises(ValueError, match="expected biases of all projections or of none"):
        from_pretrained(tmp_path, **BF16)


def test_another_limit_is_honoured(checkpoints: Any, tmp_path: Path) -> None:
    """Releases of transformers that read it from config.json."""
    _, twin = checkpoints
    tensors = read_all(twin)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((twin / "config.json").read_text()) | {"swiglu_limit": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference = stock_model(tmp_path)
    model = from_pretrained(tmp_path, **BF16)
    assert experts_of(model)[0].activation.limit == reference.get_submodule(LAYERS[0]).limit
    assert median_error(logits(model), logits(reference)) < 1e-2
