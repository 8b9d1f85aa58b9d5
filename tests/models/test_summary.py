"""The words for which layers are packed as what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from kt_sft.models.summary import formats_in_words
from kt_sft.nn.experts import KtExperts


def model(formats: dict[int, str]) -> nn.Module:
    """``model.layers.{i}.mlp.experts`` for every i of ``formats``; other layers are dense."""
    layers = nn.ModuleList(nn.Module() for _ in range(max(formats) + 1))
    for i, name in formats.items():
        experts = KtExperts(num_experts=2, hidden_size=32, intermediate_size=32)
        experts._shared.packed = SimpleNamespace(weight_format=name)
        layers[i].mlp = nn.ModuleDict({"experts": experts})
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ({1: "int8", 2: "int8"}, "int8"),
        ({3: "fp8", 4: "fp8", 5: "bf16"}, "fp8 (layers 3-4), bf16 (layer 5)"),
        ({0: "q4_k", 1: "q6_k", 2: "q4_k", 3: "q4_k"}, "q4_k (layers 0, 2-3), q6_k (layer 1)"),
        ({9: "q4_k", 10: "q4_k", 11: "q6_k"}, "q4_k (layers 9-10), q6_k (layer 11)"),
    ],
)
def test_formats_in_words(formats: dict[int, str], words: str) -> None:
    assert formats_in_words(model(formats)) == words


def test_a_path_without_a_number() -> None:
    experts = KtExperts(num_experts=2, hidden_size=32, intermediate_size=32)
    experts._shared.packed = SimpleNamespace(weight_format="int4")
    other = model({0: "int8"})
    both = nn.ModuleDict({"a": nn.ModuleDict({"experts": experts}), "b": other})
    assert formats_in_words(both) == "int4 (layer a.experts), int8 (layer 0)"
