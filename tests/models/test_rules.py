"""Models that kt_sft does not know, with the user's rule: remote code against itself."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kt_sft.models.convert import convert_model, from_pretrained
from kt_sft.nn.experts import KtExperts
from kt_sft.weights.formats import ExpertReader, open_checkpoint
from tests.families import lora_errors, rms_ratio, tiny_model, token_ids, with_lora
from tests.models import remote_model
from tests.models.layouts import fp8_ue8m0
from tests.weights import published

LIST = {
    "module": r"model\.streets\.(?P<street>\d+)\.market\.stalls",
    "gate": "model.streets.{street}.market.stalls.{expert}.w_gate.weight",
    "up": "{module}.{expert}.w_up.weight",
    "down": "{module}.{expert}.w_down.weight",
}
BANK = {"module": r"model\..*\.stalls", "gate_up": "{module}.w_in", "down": "{module}.w_out"}
RULES = {"bank": BANK, "loop": LIST, "method": {**LIST, "method": "trade"}}
BF16: dict[str, Any] = {"weight_format": "bf16", "cache_dir": "none", "dtype": torch.float32}
REMOTE = {"trust_remote_code": True}


@pytest.fixture(autouse=True)
def _modules_cache(tmp_path_factory: Any, monkeypatch: Any) -> None:
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


def write_remote(folder: Path, kind: str, **sizes: int) -> Path:
    torch.manual_seed(0)
    model = remote_model.BazaarForCausalLM(remote_model.BazaarConfig(kind=kind, **sizes))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
            if "stalls" in name:
                parameter.data = parameter.bfloat16().float()
    model.save_pretrained(folder)
    shutil.copy(remote_model.__file__, folder / "remote_model.py")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "BazaarConfig", "AutoModelForCausalLM": "BazaarForCausalLM"}
    config["auto_map"] = {auto: f"remote_model.{name}" for auto, name in classes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=list(RULES))
def kind(request: Any) -> str:
    return request.param


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **REMOTE).eval()


def ours(folder: Path, *rules: Any, **options: Any) -> Any:
    return from_pretrained(folder, family_rules=rules, **{**BF16, **REMOTE, **options}).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(token_ids()).logits


def test_logits_and_lora_gradients(kind: str, tmp_path: Path, caplog: Any, capsys: Any) -> None:
    folder = write_remote(tmp_path, kind)
    model, reference = ours(folder, RULES[kind]), stock(folder)
    assert "UNEXPECTED" not in caplog.text + capsys.readouterr().err
    assert "transformers_modules" in type(model).__module__
    assert len([m for m in model.modules() if isinstance(m, KtExperts)]) == 2
    assert not any("stalls" in name for name in model.state_dict())
    error, errors = lora_errors(model, reference)
    assert error < 1e-2
    assert sum(".stalls." in name for name in errors) == 12
    assert {name: e for name, e in errors.items() if e > 2e-2} == {}


def test_convert_model_takes_the_same_rule(kind: str, tmp_path: Path) -> None:
    folder = write_remote(tmp_path, kind)
    converted = convert_model(stock(folder), weight_format="bf16", family_rules=[RULES[kind]])
    assert torch.equal(logits(converted), logits(ours(folder, RULES[kind])))


def test_how_often_the_kernels_are_called(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = ours(write_remote(tmp_path, kind), RULES[kind])
    made = []
    forward = KtExperts.forward
    monkeypatch.setattr(KtExperts, "forward", lambda *args, **kwargs: made.append(1) or forward(*args, **kwargs))
    logits(model)
    if kind == "loop":  # expert by expert: those of 2 x 8 that a token chose
        assert 2 < len(made) <= 16
    else:
        assert len(made) == 2


def test_adapters_are_saved_expert_by_expert_and_load_again(kind: str, tmp_path: Path) -> None:
    folder = write_remote(tmp_path / "model", kind)
    tuned = with_lora(ours(folder, RULES[kind])).eval()
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    names = ("gate_proj", "up_proj", "down_proj") if kind == "bank" else ("w_gate", "w_up", "w_down")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for expert, name in itertools.product(range(8), names):
        assert f"base_model.model.model.streets.1.market.stalls.{expert}.{name}.lora_A.weight" in keys
    again = PeftModel.from_pretrained(ours(folder, RULES[kind]), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)


def test_quantised_experts_and_a_quantised_rest(tmp_path: Path) -> None:
    folder = write_remote(tmp_path / "model", "loop")
    tensors = load_file(folder / "model.safetensors")
    twin = dict(tensors)
    for name, value in list(tensors.items()):
        if "q_proj" in name or ".stalls." in name:
            made = published.fp8_block({"x.experts": (value[None], value[None], value[None])}).tensors
            codes, scale = (made[f"x.experts.0.gate_proj.weight{s}"] for s in ("", "_scale_inv"))
            twin[name] = (codes.float() * published.spread(scale, 128, 128, value.shape)).bfloat16()
            tensors |= {name: codes, f"{name}_scale_inv": scale}
    reference = shutil.copytree(folder, tmp_path / "twin")
    save_file(twin, reference / "model.safetensors", {"format": "pt"})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    model = ours(folder, LIST, cache_dir=str(tmp_path / "cache"))
    assert rms_ratio(logits(model), logits(stock(reference))) < 1e-2
    (copy,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert not any("stalls" in name for shard in copy.glob("*.safetensors") for name in load_file(shard))


def test_experts_named_and_stored_as_deepseek_v4_flash_has_them(tmp_path: Path, caplog: Any, capsys: Any) -> None:
    """MXFP4 under names that are not the model's own; FP8 with ue8m0 scales elsewhere."""
    folder = write_remote(tmp_path / "model", "loop", inner=96)
    tensors = load_file(folder / "model.safetensors")
    weights = {
        f"layers.{i}.experts": tuple(
            torch.stack([tensors.pop(f"model.streets.{i}.market.stalls.{e}.{name}.weight") for e in range(8)])
            for name in ("w_gate", "w_up", "w_down")
        )
        for i in range(2)
    }
    made = published.mxfp4_deepseek_v4(weights)
    published_folder, twin = (shutil.copytree(folder, tmp_path / name) for name in ("published", "twin"))
    elsewhere = {}
    for name in [name for name in tensors if "q_proj" in name]:
        parts, values = fp8_ue8m0(tensors[name])
        scale = parts["weight_scale_inv"].to(torch.float8_e8m0fnu)
        elsewhere |= {name: parts["weight"], name.replace("weight", "scale"): scale}
        tensors[name] = values.bfloat16()
    save_file(tensors | elsewhere | made.tensors, published_folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | made.config
    config["quantization_config"] = made.quantization_config
    (published_folder / "config.json").write_text(json.dumps(config))
    for i, layer in enumerate(weights):
        reader = ExpertReader(open_checkpoint(published_folder), made.layers[layer], 8, 64, 96)
        for e in range(8):
            named = zip(("w_gate", "w_up", "w_down"), reader.read(e).dequantize(torch.bfloat16), strict=True)
            tensors |= {f"model.streets.{i}.market.stalls.{e}.{name}.weight": value for name, value in named}
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    names = dict(zip(("gate", "up", "down"), ("w1", "w3", "w2"), strict=True))
    rule = {key: f"layers.{{street}}.ffn.experts.{{expert}}.{name}.weight" for key, name in names.items()}
    model = ours(published_folder, {"module": LIST["module"], **rule}, weight_format="auto")
    assert {m.packed.weight_format for m in model.modules() if isinstance(m, KtExperts)} == {"mxfp4"}
    assert "UNEXPECTED" not in caplog.text + capsys.readouterr().err
    error, errors = lora_errors(model, stock(twin))
    assert error < 1e-2 and sum(".stalls." in name for name in errors) == 12
    assert {name: e for name, e in errors.items() if not e < 2e-2} == {}


def test_transposed_and_interleaved_stacks(tmp_path: Path) -> None:
    folder = write_remote(tmp_path / "model", "bank")
    expected = logits(stock(folder))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".stalls." in name]:
        if name.endswith("w_in"):
            tensors[name] = torch.stack(tensors[name].chunk(2, dim=1), dim=2).flatten(1, 2)
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = {"cache_dir": str(tmp_path / "cache")}
    right = ours(folder, {**BANK, "transposed": True, "interleaved": True}, **options)
    assert rms_ratio(logits(right), expected) < 1e-2
    wrong = ours(folder, {**BANK, "transposed": True}, **options)  # not the packed file of the rule before
    assert rms_ratio(logits(wrong), expected) > 0.1


BLOCK = {"module": r"model\.streets\.(?P<street>\d+)\.market"}
BLOCK |= {name: LIST[name].replace("{module}", "{module}.stalls") for name in ("up", "down")}
WRONG = {
    "no such module": (
        {**LIST, "module": r"model\.lanes\.(?P<street>.*)"},
        "loop",
        r"path matches .*lanes.*stalls",
    ),
    "no such tensor": ({**LIST, "up": "{module}.{expert}.w_upp.weight"}, "loop", r"stalls\.0\.w_upp\.weight'.*no such"),
    "stack instead of matrices": ({**LIST, "down": "{module}.{expert}.w_out"}, "bank", "no such tensor"),
    "inputs before outputs": ({**BANK, "transposed": True}, "bank", "check gate, up, down and transposed"),
    "gate for down": ({**LIST, "gate": LIST["down"]}, "loop", r"expected '.*w_down.weight' of shape \(40, 64\)"),
    "no such method": ({**LIST, "method": "barter"}, "loop", "method 'barter' of Market .* got none"),
    "another method": ({**LIST, "method": "forward"}, "loop", r"topk_weights\), got forward\(self, x\)"),
    "the block": ({**LIST, **BLOCK}, "loop", r"of Market, got forward"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rules_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    rule, kind, message = WRONG[case]
    with pytest.raises(ValueError, match=f"family_rules: .*{message}"):
        ours(write_remote(tmp_path, kind), rule)


def test_a_rule_for_a_model_without_such_modules(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"family_rules: expected a module of MixtralForCausalLM.*stalls.*got none"):
        convert_model(tiny_model("mixtral"), weight_format="bf16", family_rules=[LIST])


def test_without_a_rule_the_refusal_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family_rules"):
        ours(write_remote(tmp_path, "bank"))


def test_a_rule_may_describe_a_known_model_too(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    expected = logits(model)
    rule = {"module": r".*\.mlp\.experts", "gate_up": "{module}.gate_up_proj", "down": "{module}.down_proj"}
    if isinstance(model.model.layers[0].mlp.experts, torch.nn.ModuleList):
        pytest.skip("transformers 4 keeps a list")
    converted = convert_model(model, weight_format="bf16", family_rules=[rule])
    assert rms_ratio(logits(converted), expected) < 1e-2
