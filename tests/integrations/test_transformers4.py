"""Train and resume under transformers 4.57, from a folder of other package versions.

``KT_SFT_OVERLAY_V4`` names the folder; ``make test`` creates it with
``pip install --target FOLDER --no-deps transformers==4.57.6 'huggingface_hub==0.36.*' 'tokenizers==0.22.*'``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def overlay() -> Path | None:
    named = os.environ.get("KT_SFT_OVERLAY_V4")
    folder = Path(named) if named else ROOT / ".cache/overlays/transformers-4.57.6"
    return folder if (folder / "transformers").is_dir() else None


@pytest.fixture(scope="module")
def old(make_workspace):
    pytest.importorskip("llamafactory")
    folder = overlay()
    if folder is None:
        pytest.skip("no transformers 4.57 folder")
    workspace = make_workspace("transformers4")
    workspace.overlay = folder
    return workspace


def test_train_and_resume(old):
    result = old.train("full")
    assert '"transformers_version": "4.57' in result.stdout + result.stderr
    assert "packed as int8, " in result.stdout + result.stderr
    old.train("resumed", resume_from_checkpoint=str(old.folder / "full/checkpoint-2"))
    full = old.losses("full")
    assert full[4] < full[1]
    assert old.losses("resumed") == {step: full[step] for step in (3, 4)}
    expected, got = old.adapter("full"), old.adapter("resumed")
    assert "base_model.model.model.layers.1.mlp.experts.7.down_proj.lora_B.weight" in expected
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_stock_reads_and_merges_the_adapter(old):
    """What ``export`` with use_kt recommends: the same adapter without use_kt."""
    base = {k: v for k, v in old.base().items() if k not in ("use_kt", "kt_config")}
    merged = old.folder / "merged"
    args = {**base, "adapter_name_or_path": str(old.folder / "full"), "export_dir": str(merged)}
    old.run("llamafactory-cli", "export", old.write("export.yaml", args))
    from safetensors.torch import load_file

    name = "model.layers.1.mlp.experts.7.down_proj.weight"
    before = load_file(str(old.model / "model.safetensors"))[name].float()
    after = load_file(str(merged / "model.safetensors"))[name].float()
    adapter = old.adapter("full")
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    scaling = 2.0  # lora_alpha defaults to twice the rank
    delta = scaling * adapter[f"{prefix}.lora_B.weight"].float() @ adapter[f"{prefix}.lora_A.weight"].float()
    torch.testing.assert_close(after, before + delta, atol=1e-2, rtol=1e-2)
    assert delta.abs().max() > 1e-3
