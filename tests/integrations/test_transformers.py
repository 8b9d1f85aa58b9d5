"""The entry points of a plain script: no other call is needed before stock PEFT."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.families import save_checkpoint, tiny_model

SCRIPT = """
    import sys
    import torch
    from kt_sft.integrations.transformers import convert_model, from_pretrained
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if sys.argv[2] == "load":
        model = from_pretrained(sys.argv[1], weight_format="int8", cache_dir="none")
    else:
        model = convert_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), weight_format="int8")
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.arange(3, 35).view(2, 16)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    moved = [n for n, p in model.named_parameters() if ".experts." in n and "lora_B" in n and p.abs().sum() > 0]
    assert len(moved) == 6, moved
    assert losses[-1] < 0.7 * losses[0], losses
"""


@pytest.mark.parametrize("entry", ["load", "convert"])
def test_plain_script_trains_the_experts(entry: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tiny_model("qwen3_moe"), tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(checkpoint), entry]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
