"""INT4 checkpoints whose codes and scales are those of the packed format reach memory without a rounding."""

import logging

import pytest
import torch

from kt_sft.config import KtConfig
from kt_sft.weights.formats import ExpertReader, open_checkpoint
from kt_sft.weights.loader import load_experts

from . import published
from .test_formats import LAYER, D, E, F, weights

SIZES = {"num_experts": E, "hidden_size": D, "intermediate_size": F}


@pytest.mark.parametrize("cached", [True, False])
def test_bit_for_bit(tmp_path, caplog, cached):
    made = published.int4_group32(weights())
    folder = made.write(tmp_path / "model")
    config = KtConfig.from_dict(
        {"kt_backend": "RAWINT4", "cache_dir": str(tmp_path / "cache") if cached else "none"}, "test"
    )
    with caplog.at_level(logging.INFO, logger="kt_sft"):
        packed = load_experts(folder, made.layers, config=config, progress=False, **SIZES)[LAYER]
    assert f"{LAYER}: int4 codes packed as they are" in caplog.messages
    reader = ExpertReader(open_checkpoint(folder), made.layers[LAYER], E, D, F)
    for expert in range(E):
        stored = reader.read(expert)
        for got, source in zip(packed.dequantize(), (stored.gate, stored.up, stored.down), strict=True):
            assert torch.equal(got[expert], source.dequantize(torch.bfloat16))
    assert packed.nbytes == E * sum(part.nbytes for part in (stored.gate, stored.up, stored.down))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("int4_group32", {"group_size": 64}), ("int4_group32", {"weight_format": "int8"}), ("int4_group32_zeros", {})],
)
def test_other_groups_formats_and_zero_points_are_requantised(tmp_path, caplog, kind, settings):
    made = published.SAFETENSORS[kind](weights())
    config = KtConfig(**{"weight_format": "int4", "cache_dir": "none", **settings})
    with caplog.at_level(logging.INFO, logger="kt_sft"):
        load_experts(made.write(tmp_path), made.layers, config=config, progress=False, **SIZES)
    assert any("SQNR" in message for message in caplog.messages)


def test_a_scale_that_is_not_finite_is_refused(tmp_path):
    made = published.int4_group32(weights())
    made.tensors[f"{LAYER}.1.up_proj.weight_scale"][3, 2] = float("nan")
    config = KtConfig(weight_format="int4", cache_dir="none")
    with pytest.raises(ValueError, match=r"up_proj.*finite"):
        load_experts(made.write(tmp_path), made.layers, config=config, progress=False, **SIZES)
