"""Packing with error-compensated rounding on a text: what the file holds, resuming, and that the layer loses less."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kt_sft.config import KtConfig
from kt_sft.models import calibrate
from kt_sft.models.calibrate import SEQUENCE, pack_calibrated, sequences
from kt_sft.models.convert import from_pretrained
from kt_sft.models.pack import build_empty, pack_checkpoint
from kt_sft.nn.experts import KtExperts
from kt_sft.ops.layout import uniform
from kt_sft.weights.loader import Job
from tests.integrations.tiny import EXPERTS, LAYERS, SENTENCES, write_checkpoint

TEXT = " ".join(SENTENCES * 100)
TOKENS = 2 * SEQUENCE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("calibrate") / "model")


def settings(folder: Path, **changes: Any) -> KtConfig:
    return KtConfig(**{"weight_format": "int4", "weight_path": str(folder), **changes})


def experts(model: Any) -> list[KtExperts]:
    return [m for m in model.modules() if isinstance(m, KtExperts)]


def first_layer(model: Path, config: KtConfig, text: str) -> tuple[Any, torch.Tensor]:
    """Inputs of the first layer's experts while the model reads the text, and their output."""
    from transformers import AutoTokenizer

    loaded = from_pretrained(model, config=config, dtype=torch.float32)
    calls: list[Any] = []
    experts(loaded)[0].register_forward_hook(lambda _, args, out: calls.append((args, out)))
    with torch.no_grad():
        loaded(input_ids=sequences(AutoTokenizer.from_pretrained(model), text, TOKENS))
    return calls[0]


def test_the_file_is_used_and_the_layer_loses_less(model, tmp_path, caplog):
    config = settings(tmp_path / "gptq")
    packed = pack_calibrated(model, config, TEXT, tokens=TOKENS)
    assert packed.layers == LAYERS
    assert packed.files == sorted((tmp_path / "gptq").glob("*.ktpack"))
    pack_checkpoint(model, settings(tmp_path / "near"))
    caplog.clear()
    with caplog.at_level(logging.INFO, "kt_sft"):
        _, rounded = first_layer(model, config, TEXT)
    assert "Packing" not in caplog.text
    _, near = first_layer(model, settings(tmp_path / "near"), TEXT)
    _, exact = first_layer(model, settings(tmp_path / "bf16", weight_format="bf16"), TEXT)
    assert (rounded - exact).norm() < 0.8 * (near - exact).norm()


def test_interrupted_and_continued(model, tmp_path, monkeypatch):
    calls = []
    original, stop_at = calibrate.round_int4, 10**9

    def counted(*args):
        calls.append(args)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(calibrate, "round_int4", counted)
    pack_calibrated(model, settings(tmp_path / "whole"), TEXT, tokens=TOKENS)
    whole = len(calls)  # two matrices per expert that saw enough rows
    assert whole > 2 * EXPERTS
    stop_at = whole + whole // 2 + 5  # in the second layer
    with pytest.raises(KeyboardInterrupt):
        pack_calibrated(model, settings(tmp_path / "parts"), TEXT, tokens=TOKENS)
    stop_at = 10**9
    packed = pack_calibrated(model, settings(tmp_path / "parts"), TEXT, tokens=TOKENS)
    assert len(calls) <= 2 * whole + 2  # one expert at most was begun twice
    assert packed.files[0].read_bytes() == next((tmp_path / "whole").glob("*.ktpack")).read_bytes()
    assert not list((tmp_path / "parts").glob("*.journal"))
    done = len(calls)
    pack_calibrated(model, settings(tmp_path / "parts"), TEXT, tokens=TOKENS)
    assert len(calls) == done  # there already


def test_another_text_is_packed_anew(model, tmp_path, caplog):
    pack_checkpoint(model, settings(tmp_path))
    with caplog.at_level(logging.INFO, "kt_sft"):
        pack_calibrated(model, settings(tmp_path), TEXT, tokens=TOKENS)
    assert "rounding is 'nearest', wanted 'gptq-" in caplog.text


def test_experts_with_few_rows_are_rounded_to_the_nearest(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(calibrate, "MIN_ROWS", 10**9)
    with caplog.at_level(logging.INFO, "kt_sft"):
        (file,) = pack_calibrated(model, settings(tmp_path / "few"), TEXT, tokens=TOKENS).files
    message = f"{EXPERTS} of {EXPERTS} experts saw fewer than {10**9} rows of the text and were rounded to the nearest"
    assert caplog.text.count(message) == LAYERS
    (near,) = pack_checkpoint(model, settings(tmp_path / "near")).files
    data = slice(4096, 4096 + 1000)
    assert file.read_bytes()[data] == near.read_bytes()[data]


def test_int4_of_the_checkpoint_is_not_rounded_again(model, tmp_path, monkeypatch):
    """No test model is stored so: the layout says it."""
    kept = uniform("int4_sym")
    monkeypatch.setattr(Job, "with_layouts", lambda job: replace(job, spec=replace(job.spec, layouts=(kept,) * LAYERS)))
    with pytest.raises(ValueError, match="calibration: expected experts that are not INT4 already, got int4_sym"):
        pack_calibrated(model, settings(tmp_path), TEXT, tokens=TOKENS)


def test_refused(model, tmp_path):
    with pytest.raises(ValueError, match="calibration: expected int4, whose rounding it improves, got int8"):
        pack_calibrated(model, settings(tmp_path, weight_format="int8"), TEXT)
    with pytest.raises(ValueError, match=f"expected a text of at least {SEQUENCE} tokens, got "):
        pack_calibrated(model, settings(tmp_path), SENTENCES[0])
    assert not list(tmp_path.iterdir())


def test_experts_with_biases_are_refused(model, tmp_path):
    config = settings(tmp_path)
    empty = build_empty(str(model), config)
    experts(empty)[1].has_bias = True
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: expected SiLU-gated experts without biases, got"):
        list(calibrate.jobs_of(empty, str(model), config))
