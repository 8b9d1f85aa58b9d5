"""The upcycled MoE: equal to the dense model without perturbation, close to it with the demonstration's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts.demo import make_moe
from scripts.demo.gguf_model import DenseModel, write_tokenizer
from scripts.demo.make_moe import Build, router_weight, write_model

LAYERS = 3
TEXT = "The river rises in the mountains and flows through two lakes before it reaches the sea. In 1923 a bridge"


@pytest.fixture(scope="module")
def short(dense: DenseModel) -> DenseModel:
    """The first layers of the dense model: the same arithmetic, a tenth of the time."""
    first = tuple(f"model.layers.{i}." for i in range(LAYERS))
    weights = {n: w for n, w in dense.weights.items() if n.startswith(first) or not n.startswith("model.layers.")}
    return DenseModel(config={**dense.config, "num_hidden_layers": LAYERS}, weights=weights)


def build_folder(short: DenseModel, gguf_path: Path, build: Build, folder: Path) -> Path:
    from transformers import AutoTokenizer

    write_tokenizer(gguf_path, folder)
    means = make_moe.mean_mlp_inputs(short, AutoTokenizer.from_pretrained(folder), TEXT)
    write_model(short, build, folder, means)
    return folder


def load(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", sorted(make_moe.FAMILIES))
@torch.no_grad()
def test_unperturbed_experts_equal_the_dense_model(family, short, gguf_path, tmp_path):
    model, tokenizer = load(build_folder(short, gguf_path, Build(family=family, num_experts=3, eps=0.0), tmp_path))
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    expected, got = make_moe.dense_hf(short)(ids).logits, model(ids).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def test_perturbed_experts_differ_from_each_other_and_stay_close(short, gguf_path, tmp_path):
    folder = build_folder(short, gguf_path, Build(num_experts=4), tmp_path)
    model, tokenizer = load(folder)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    expected, got = make_moe.dense_hf(short)(ids).logits, model(ids).logits
    assert 1e-4 < (got - expected).norm() / expected.norm() < 0.05
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert f"model.layers.{LAYERS - 1}.block_sparse_moe.experts.3.w2.weight" in names


@torch.no_grad()
def test_perplexity_of_the_whole_model(dense, texts):
    """The quick demonstration's own model, built into the cache if it is not there."""
    folder = make_moe.make_moe(Build(num_experts=4))
    written = (folder / "config.json").stat().st_mtime_ns
    assert make_moe.make_moe(Build(num_experts=4)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written, "the same request must reuse the folder"
    model, tokenizer = load(folder)
    ids = torch.tensor([tokenizer((texts / "wiki_demo.txt").read_text()[:4000]).input_ids[:256]])
    moe, base = (math.exp(m(ids, labels=ids).loss.item()) for m in (model, make_moe.dense_hf(dense)))
    assert base < 50
    assert abs(moe / base - 1) < 0.05


def test_router_is_orthogonal_to_the_mean_input():
    mean = torch.randn(64, generator=torch.Generator().manual_seed(0))
    weight = router_weight(Build(num_experts=8), 0, mean).float()
    assert (weight @ mean / mean.norm()).abs().max() < 1e-3
    assert 0.01 < weight.std() < 0.03
    assert not torch.equal(weight, router_weight(Build(num_experts=8), 1, mean).float())


@pytest.mark.parametrize("change, message", [({"family": "mixtrall"}, "family"), ({"top_k": 9}, "top_k")])
def test_impossible_requests_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_moe.make_moe(replace(Build(), **change), tmp_path / "model")
