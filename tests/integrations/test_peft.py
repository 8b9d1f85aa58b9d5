"""Stock PEFT on packed experts: targets, switching adapters, files that stock PEFT reads, refusals."""

from __future__ import annotations

import copy
import json
import os
import pickle
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from kt_sft.config import KtConfig
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.adapter_keys import split_fused
from kt_sft.models.convert import from_pretrained
from kt_sft.nn.experts import KtExperts
from tests.families import dense_weights, rms_ratio, save_checkpoint, stock_model, tiny_model, token_ids

REPOSITORY = Path(__file__).parents[2]
OVERLAYS = Path(os.environ.get("KT_SFT_OVERLAYS", REPOSITORY / ".cache" / "overlays"))  # made by `make test`
OLD_TRANSFORMERS = OVERLAYS / "transformers-4.57.6"
FUSED = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "deepseek_v3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kt_peft.install()
    return save_checkpoint(tiny_model(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kt_peft.install()
    return save_checkpoint(tiny_model("qwen2_moe"), tmp_path_factory.mktemp("qwen2_moe"))


def load(checkpoint: Path) -> Any:
    return from_pretrained(
        checkpoint, config=KtConfig(weight_format="bf16", cache_dir="none"), dtype=torch.float32
    ).eval()


def lora(model: Any, **options: Any) -> LoraConfig:
    settings = dict(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM")
    targets = ["q_proj", *kt_peft.expert_target_names(model)]
    return LoraConfig(**{**settings, "target_modules": targets, **options})


def tune(checkpoint: Path, seed: int = 5, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    model = load(checkpoint)
    return get_peft_model(model, lora(model, **options)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(token_ids()).logits


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def projections(model: Any) -> set[str]:
    """Routed projections with an adapter, as layer.name."""
    names = [n.split("layers.")[1] for n in trainable(model) if ".experts." in n and "lora_A" in n]
    return {f"{n.split('.')[0]}.{n.split('.experts.')[1].split('.')[0]}" for n in names}


# Targets


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["gate_proj", "up_proj", "down_proj"], {"gate_proj", "up_proj", "down_proj"}),
        ("all-linear", {"gate_proj", "up_proj", "down_proj"}),
        (["experts"], {"gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "experts.down_proj"], {"down_proj"}),
        (r".*\.(q_proj|up_proj)", {"up_proj"}),
        (["q_proj"], set()),
    ],
)
def test_targets(qwen: Path, targets: Any, expected: set[str]) -> None:
    model = tune(qwen, target_modules=targets)
    assert projections(model) == {f"{layer}.{name}" for layer in (0, 1) for name in expected}
    shared = any("shared_expert." in name for name in trainable(model))
    assert shared == (targets not in (["experts"], ["q_proj", "experts.down_proj"], ["q_proj"]))
    assert any("q_proj" in name for name in trainable(model)) == (targets[0] == "q_proj" or isinstance(targets, str))


def test_one_layer_and_rank_pattern(qwen: Path) -> None:
    model = tune(
        qwen,
        target_modules=["model.layers.1.mlp.experts", "q_proj"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"up_proj": 3},
    )
    assert projections(model) == {"1.gate_proj", "1.up_proj", "1.down_proj"}
    experts = model.base_model.model.model.layers[1].mlp.experts
    assert (experts.down_proj.r["default"], experts.gate_proj.r["default"]) == (2, 4)
    assert experts.up_proj.scaling["default"] == 3 / 4
    terms = [logits(model)]
    experts.up_proj.scaling["default"] = 2.0
    terms.append(logits(model))
    assert not torch.equal(*terms)


def test_names_end_as_stock_peft_and_optimizers_expect(qwen: Path) -> None:
    names = [n for n in trainable(tune(qwen)) if ".experts." in n]
    assert names and all(n.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for n in names)


def test_default_init_is_a_no_op_with_pefts_distribution(qwen: Path) -> None:
    model = tune(qwen, init_lora_weights=True)
    assert torch.equal(logits(model), logits(load(qwen)))
    a = model.base_model.model.model.layers[0].mlp.experts.gate_proj.lora_A["default"].weight
    assert a.shape == (8, 4, 64) and 0.9 / 8 < a.abs().max() <= 1 / 8
    gaussian = tune(qwen, init_lora_weights="gaussian")
    a = gaussian.base_model.model.model.layers[0].mlp.experts.gate_proj.lora_A["default"].weight
    assert abs(a.std().item() - 1 / 4) < 0.02


def test_rslora_scaling(qwen: Path) -> None:
    model = tune(qwen, use_rslora=True)
    assert model.base_model.model.model.layers[0].mlp.experts.gate_proj.scaling["default"] == 8 / 4**0.5


# Switching


def test_disable_adapter_is_bit_equal_to_the_base(checkpoint: Path) -> None:
    base, model = logits(load(checkpoint)), tune(checkpoint)
    assert not torch.equal(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)


def test_several_adapters(qwen: Path) -> None:
    model = tune(qwen)
    first = logits(model)
    torch.manual_seed(6)
    model.add_adapter("second", lora(model, r=2, lora_alpha=6, target_modules=["down_proj", "up_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert all(".second." in name for name in trainable(model))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert min(rms_ratio(both, first), rms_ratio(both, second), rms_ratio(first, second)) > 1e-2
    term = model.base_model.model.model.layers[0].mlp.experts
    merged = term._lora()
    assert merged.down_a.shape[1] == 6 and merged.gate_a.shape[1] == 4 and merged.scaling == 1.0
    b = term.down_proj.lora_B["second"].weight
    assert torch.equal(merged.down_b[..., 4:], b * 3)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_dropout_only_in_training(qwen: Path) -> None:
    model = tune(qwen, lora_dropout=0.5)
    plain = tune(qwen)
    assert torch.equal(logits(model), logits(plain))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_copies_share_the_packed_weights_and_pickle_is_refused(qwen: Path) -> None:
    model = tune(qwen)
    twin = copy.deepcopy(model)
    storages = [m.packed.storage.data_ptr() for x in (model, twin) for m in x.modules() if isinstance(m, KtExperts)]
    assert len(storages) == 4 and len(set(storages)) == 2
    with torch.no_grad():
        for parameter in trainable(twin).values():
            parameter.mul_(2)
    assert not torch.equal(logits(model), logits(twin))
    with pytest.raises(ValueError, match="pickle"):
        pickle.dumps(model)


# Files


def test_saved_adapter_is_portable_and_loads_back(checkpoint: Path, tmp_path: Path) -> None:
    model = tune(checkpoint)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    mixtral = "mixtral" in str(checkpoint)
    block, gate = ("block_sparse_moe", "w1") if mixtral else ("mlp", "gate_proj")
    key = f"base_model.model.model.layers.1.{block}.experts.7.{gate}"
    assert tensors[f"{key}.lora_A.weight"].shape == (4, 64)
    assert tensors[f"{key}.lora_B.weight"].shape == (40, 4)
    assert all(t.ndim == 2 for t in tensors.values())
    again = PeftModel.from_pretrained(load(checkpoint), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    resumed = PeftModel.from_pretrained(load(checkpoint), tmp_path, is_trainable=True)
    assert trainable(resumed).keys() == trainable(model).keys()


STOCK = """
    import sys, torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, __version__
    assert __version__.startswith("4.57"), __version__
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[4])
    assert "kt_sft" not in sys.modules
"""


@pytest.mark.skipif(not OLD_TRANSFORMERS.is_dir(), reason=f"needs transformers 4.57.6 in {OLD_TRANSFORMERS}")
@pytest.mark.parametrize("targets", ["names", "experts", "all-linear"])
def test_stock_peft_on_transformers_4_loads_it(checkpoint: Path, targets: str, tmp_path: Path) -> None:
    if targets != "names" and "mixtral" not in str(checkpoint):
        pytest.skip("one family is enough for the rewritten targets")
    options = {} if targets == "names" else {"target_modules": "all-linear" if targets == "all-linear" else ["experts"]}
    model = tune(checkpoint, **options)
    model.save_pretrained(tmp_path)
    torch.save(token_ids(), tmp_path / "ids.pt")
    arguments = [str(checkpoint), str(tmp_path), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    environment = {**os.environ, "PYTHONPATH": str(OLD_TRANSFORMERS), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-W", "error:Found missing adapter keys", "-c", textwrap.dedent(STOCK), *arguments]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    stock = torch.load(tmp_path / "logits.pt")
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        dense = functional_call(reference, dense_weights(model, reference)[0], (token_ids(),)).logits
    assert rms_ratio(stock, dense) < 1e-5
    errors = [rms_ratio(*pair) for pair in zip(logits(model).flatten(0, 1), stock.flatten(0, 1), strict=True)]
    assert statistics.median(errors) < 1e-2  # a token whose routing is a near-tie may go another way


@pytest.mark.skipif(not FUSED, reason="target_parameters on fused experts need transformers 5")
@pytest.mark.parametrize("parts", [["gate_up_proj", "down_proj"], ["gate_up_proj"]])
def test_adapter_of_target_parameters_loads(checkpoint: Path, parts: list[str], tmp_path: Path) -> None:
    torch.manual_seed(5)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    options: dict[str, Any] = {"target_parameters": [f"mlp.experts.{part}" for part in parts]}
    if len(parts) == 1:
        options["rank_pattern"] = {r".*\.gate_up_proj": 6}
    config = lora(load(checkpoint), target_modules=["q_proj"], **options)
    stock = get_peft_model(stock, config).eval()
    stock.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(checkpoint), tmp_path).eval()
    assert rms_ratio(logits(model), logits(stock)) < 1e-2
    assert rms_ratio(logits(model), logits(load(checkpoint))) > 5e-2


@pytest.mark.skipif(not FUSED, reason="target_parameters on fused experts need transformers 5")
@pytest.mark.parametrize(("family", "block", "width"), [("gpt_oss", "mlp", 64), ("llama4", "feed_forward", 40)])
def test_adapter_of_transposed_parameters_loads(tmp_path: Path, family: str, block: str, width: int) -> None:
    """gpt-oss's gate and up alternate, and its down_proj is square."""
    kt_peft.install()
    folder = save_checkpoint(tiny_model(family, intermediate_size=width), tmp_path / "model")
    stock = stock_model(folder)
    parameters = [f"{block}.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    config = lora(load(folder), target_modules=["q_proj"], target_parameters=parameters)
    torch.manual_seed(5)
    stock = get_peft_model(stock, config).eval()
    stock.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert rms_ratio(logits(model), logits(stock)) < 1e-2
    assert rms_ratio(logits(model), logits(load(folder))) > 5e-2


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_per_expert_files_of_fused_families_load_back(tmp_path: Path, family: str) -> None:
    kt_peft.install()
    folder = save_checkpoint(tiny_model(family), tmp_path / "model")
    model = tune(folder)
    model.save_pretrained(tmp_path / "adapter")
    block = {"gpt_oss": "model.layers.1.mlp", "llama4": "language_model.model.layers.1.feed_forward"}[family]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{block}.experts.7.down_proj.lora_A.weight"].shape == (4, 40)
    assert tensors[f"base_model.model.{block}.experts.7.up_proj.lora_B.weight"].shape == (40, 4)
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()), logits(model))


def test_three_dimensional_names_load(qwen: Path, tmp_path: Path) -> None:
    model = tune(qwen)
    model.save_pretrained(tmp_path)
    own = {n.replace(".default", ""): p.detach().contiguous() for n, p in trainable(model).items()}
    save_file(own, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(PeftModel.from_pretrained(load(qwen), tmp_path).eval()), logits(model))


# Refusals


def broken(tmp_path: Path, model: PeftModel, change: Any) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_incomplete_or_foreign_adapter_is_refused(qwen: Path, tmp_path: Path) -> None:
    prefix = "base_model.model.model.layers.0.mlp.experts"
    model = tune(qwen)
    broken(tmp_path, model, lambda t: t.pop(f"{prefix}.3.up_proj.lora_B.weight"))
    with pytest.raises(ValueError, match=r"expected 8 experts.*3\.up_proj\.lora_B"):
        PeftModel.from_pretrained(load(qwen), tmp_path)
    broken(tmp_path, model, lambda t: t.update({f"{prefix}.8.up_proj.lora_B.weight": torch.zeros(40, 4)}))
    with pytest.raises(ValueError, match=r"expected experts 0\.\.7"):
        PeftModel.from_pretrained(load(qwen), tmp_path)


def test_untargeted_factors_and_pickles_are_refused(qwen: Path, tmp_path: Path) -> None:
    tune(qwen).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="add these projections to target_modules"):
        PeftModel.from_pretrained(load(qwen), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled adapters are not loaded"):
        PeftModel.from_pretrained(load(qwen), tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_variants_are_refused(qwen: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LoRA on packed experts.*{message}"):
        tune(qwen, target_modules=["experts"], **options)


def test_merge_and_base_save_are_refused(qwen: Path, tmp_path: Path) -> None:
    model = tune(qwen, target_modules=["experts"])
    with pytest.raises(ValueError, match="merge: expected adapters on unpacked weights"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="save_pretrained: expected a model with all of its weights"):
        load(qwen).save_pretrained(tmp_path)


def test_models_without_packed_experts_are_untouched(tmp_path: Path) -> None:
    kt_peft.install()
    kt_peft.install()
    model = get_peft_model(tiny_model("qwen3_moe"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight" for i in (0, 1) for x in "AB"
    }


def test_ambiguous_fused_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="ambiguous"):
        split_fused(torch.zeros(8, 16), torch.zeros(16, 8), 4, 16, 16, "experts.lora_A.weight")
    with pytest.raises(ValueError, match=r"expected factors of 3 experts of \(32, 16\), got"):
        split_fused(torch.zeros(8, 16), torch.zeros(32, 8), 3, 16, 32, "experts.lora_A.weight")
    split_fused(torch.zeros(8, 16), torch.zeros(16, 8), 4, 16, 16, "experts.lora_A.weight", transposed=True)
