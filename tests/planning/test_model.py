"""Counts from config.json: the sizes that are published for known models, and the parameters of real tiny ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from kt_sft.planning import arithmetic, source
from kt_sft.planning.model import describe
from kt_sft.planning.storage import storage
from tests.families import FAMILIES, tiny_config, tiny_model

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Published:
    """What the model's authors state: total and active parameters in units of 10^9, checkpoint in GB (10^9 bytes)."""

    total: float
    active: float
    checkpoint: float
    source: str


KNOWN = {
    "deepseek_v3": Published(
        671,
        37,
        688.6 - 14 * 1.0,
        "README of deepseek-ai/DeepSeek-V3: 671B of main model weights, 37B active, and 14B of multi-token prediction, "
        "which is not loaded; 688.6 GB by the checkpoint's index, FP8",
    ),
    "kimi_k2_thinking": Published(
        1040, 32, 594, "arXiv 2507.20534 and model card: 1.04 trillion total, 32B active; 594 GB of INT4 files"
    ),
    "qwen3_235b_a22b": Published(235, 22, 470, "arXiv 2505.09388 and model card: 235B total, 22B active; BF16"),
    "glm_4_5": Published(
        355, 32, 717 - 7, "arXiv 2508.06471, table 1: 355B total, 32B active; 717 GB with its MTP layer"
    ),
    "minimax_m2": Published(230, 10, 230, "model card: 230B total, 10B active; FP8"),
    "gpt_oss_120b": Published(
        116.83, 5.13, 60.8 * 2**30 / 1e9, "arXiv 2508.10925, table 1: 116.83B, 5.13B active, checkpoint 60.8 GiB"
    ),
}


def config(name: str) -> dict:
    return source.find(CONFIGS / f"{name}.json").config


@pytest.mark.parametrize("name", KNOWN)
def test_published_sizes(name):
    parts, known = describe(config(name)), KNOWN[name]
    assert parts.total_parameters / 1e9 == pytest.approx(known.total, rel=0.03), known.source
    assert parts.active_parameters / 1e9 == pytest.approx(known.active, rel=0.05), known.source  # two digits are given
    checkpoint = storage(config(name)).nbytes(parts) / 1e9
    assert checkpoint == pytest.approx(known.checkpoint, rel=0.03), known.source


def test_published_expert_sizes():
    parts = describe(config("gpt_oss_120b"))  # the card's "MLP" line: experts with their biases, and routers
    assert (parts.expert_parameters + parts.rest["routers"]) / 1e9 == pytest.approx(114.71, rel=1e-3)
    assert parts.rest["attention"] / 1e9 == pytest.approx(0.96, rel=0.01)
    assert parts.rest["embeddings and head"] / 1e9 == pytest.approx(1.16, rel=0.01)
    deepseek = describe(
        config("deepseek_v3")
    )  # arXiv 2412.19437, section 4.2: 58 layers of 256 experts of 3 * 7168 * 2048
    assert deepseek.expert_parameters == 58 * 256 * 3 * 7168 * 2048


@pytest.mark.parametrize("name", KNOWN)
def test_arithmetic_agrees_with_the_built_model(name):
    counted, built = arithmetic.count(config(name)), describe(config(name))
    assert counted.total_parameters == pytest.approx(built.total_parameters, rel=1e-3)
    assert (counted.adapted, counted.widest, counted.top_k) == (built.adapted, built.widest, built.top_k)
    assert {g.weights for g in counted.experts} == {g.weights for g in built.experts}


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models(family):
    model = tiny_model(family)
    parts = describe({**tiny_config(family).to_dict(), "architectures": [type(model).__name__]})
    assert parts.total_parameters == sum(p.numel() for p in model.parameters())
    assert parts.expert_parameters == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert parts.obstacle is None


def test_tied_embeddings_count_once():
    tied, apart = (describe(tiny_config("qwen3_moe", tie_word_embeddings=t).to_dict()) for t in (True, False))
    assert apart.total_parameters - tied.total_parameters == 96 * 64
    assert apart.active_parameters == tied.active_parameters


def test_experts_that_cannot_run_are_named():
    assert describe(config("gpt_oss_120b")).obstacle is None
    unknown = describe({**config("qwen3_235b_a22b"), "hidden_act": "gelu"})
    assert "Qwen3MoeExperts with activation" in (unknown.obstacle or "")


def test_remote_code_is_not_needed_for_a_class_that_transformers_has():
    parts = describe(config("kimi_k2_thinking"))
    assert "DeepseekV3ForCausalLM" in parts.counted and "no model_type 'kimi_k2'" in parts.notes[0]


def test_an_unknown_architecture_is_counted_by_its_numbers():
    renamed = {**config("qwen3_235b_a22b"), "architectures": ["NewForCausalLM"], "model_type": "new"}
    parts = describe(renamed)
    assert parts.total_parameters / 1e9 == pytest.approx(235, rel=0.03)
    assert "arithmetic" in parts.counted and "NewForCausalLM" in (parts.obstacle or "")


def test_an_unknown_architecture_without_numbers_says_which():
    with pytest.raises(ValueError, match=r"NewForCausalLM.*hidden_size; .*n_routed_experts or num_experts"):
        describe({"architectures": ["NewForCausalLM"], "model_type": "new", "vocab_size": 10})


def test_a_dense_model_is_refused():
    dense = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    dense |= {"num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 96}
    with pytest.raises(ValueError, match="expected a model with routed experts"):
        describe(dense)


def test_a_configuration_that_builds_nothing_is_refused():
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM can be built from"):
        describe({**tiny_config("qwen3_moe").to_dict(), "architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "none"})


@pytest.mark.parametrize(
    ("quantization", "experts"),
    [
        (None, 2.0),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1 + 4 / 128**2),
        ({"quant_method": "mxfp4"}, 0.5 + 1 / 32),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
            },
            0.5 + 2 / 32,
        ),
    ],
)
def test_bytes_per_stored_weight(quantization, experts):
    assert storage({"torch_dtype": "bfloat16", "quantization_config": quantization}).experts == pytest.approx(experts)


def test_an_unknown_quantisation_is_named():
    with pytest.raises(ValueError, match="got 'spqr'"):
        storage({"quantization_config": {"quant_method": "spqr"}})


def test_the_index_gives_the_size(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    (tmp_path / source.INDEX).write_text(json.dumps({"metadata": {"total_size": 123}, "weight_map": {}}))
    assert source.find(tmp_path).nbytes == 123
    (tmp_path / source.INDEX).unlink()
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    found = source.find(tmp_path / "config.json")
    assert (found.nbytes, found.nbytes_from) == (5, "1 safetensors files")


@pytest.mark.parametrize("text", ["{", "[1]", "\x80"])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object"):
        source.find(tmp_path)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"config.json, found no such file"):
        source.find(tmp_path)


@pytest.mark.parametrize("name", ["no/such-model", "no such thing at all/x/y"])
def test_neither_folder_nor_hub_name(name):
    with pytest.raises(ValueError, match=r"give a folder or a config\.json"):
        source.find(name)
