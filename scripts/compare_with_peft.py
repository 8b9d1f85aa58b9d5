"""Train the same adapters on the same data with kt_sft and with stock transformers + PEFT; compare every step's loss.

    deviation(step) = |loss_kt - loss_stock| / loss_stock      limit: 1 % with bf16 experts, 2 % with int8 experts

The stock side runs on transformers 4.57, where every expert is an ordinary Linear that PEFT adapts one by one; it saves
the initial adapter, which the kt_sft side loads (the main environment's transformers). Both train LoRA on q, k, v, o
and all experts, in float32 outside the packed experts, with AdamW and the same order of batches. Each side is a
process of its own. Exit code 1 when a limit is exceeded.

    python -m scripts.compare_with_peft [--num-experts 8] [--steps 30] [--formats bf16 int8]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from scripts.demo import data, paths
from scripts.demo.evaluate import encode
from scripts.demo.make_moe import Build, make_moe

STOCK_TRANSFORMERS = paths.ROOT / ".cache" / "overlays" / "transformers-4.57.6"
LIMITS = {"bf16": 0.01, "int8": 0.02}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"]
BATCH, MAX_TOKENS, LEARNING_RATE = 2, 128, 3e-4


def batches(tokenizer, steps: int) -> list[dict[str, torch.Tensor]]:
    """``steps`` right-padded batches in a fixed order."""
    rows = json.loads((paths.DATA / "identity_train.json").read_text())
    result = []
    for step in range(steps):
        pairs = [encode(tokenizer, rows[(step * BATCH + i) % len(rows)]) for i in range(BATCH)]
        length = min(MAX_TOKENS, max(ids.shape[1] for ids, _ in pairs))
        batch = {
            "input_ids": torch.full((BATCH, length), tokenizer.pad_token_id),
            "labels": torch.full((BATCH, length), -100),
            "attention_mask": torch.zeros(BATCH, length, dtype=torch.long),
        }
        for i, (ids, labels) in enumerate(pairs):
            n = min(length, ids.shape[1])
            batch["input_ids"][i, :n], batch["labels"][i, :n] = ids[0, :n], labels[0, :n]
            batch["attention_mask"][i, :n] = 1
        result.append(batch)
    return result


def train(model, tokenizer, steps: int, title: str) -> dict[str, list[float]]:
    """Loss and seconds of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses, seconds = [], []
    model.train()
    for batch in tqdm(batches(tokenizer, steps), desc=title, unit="step"):
        start = time.monotonic()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.monotonic() - start)
    return {"loss": losses, "seconds": seconds}


def stock_side(model_dir: Path, work: Path, steps: int) -> dict[str, list[float]]:
    """Stock transformers and PEFT; leaves the initial adapter in ``work/initial``."""
    import transformers
    from peft import LoraConfig, get_peft_model

    if not transformers.__version__.startswith("4.57"):
        raise ValueError(f"transformers: expected 4.57.x for the stock side, got {transformers.__version__}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.save_pretrained(work / "initial")
    return train(model, transformers.AutoTokenizer.from_pretrained(model_dir), steps, "stock PEFT")


def kt_side(model_dir: Path, work: Path, steps: int, weight_format: str) -> dict[str, list[float]]:
    """kt_sft from the same initial adapter."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    import kt_sft
    from kt_sft.integrations.peft import install

    install()
    model = kt_sft.from_pretrained(str(model_dir), weight_format=weight_format, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(work / "initial"), is_trainable=True)
    return train(model, AutoTokenizer.from_pretrained(model_dir), steps, f"kt_sft {weight_format}")


def run_side(side: str, options: argparse.Namespace, work: Path) -> dict[str, list[float]]:
    """One side in its own process."""
    result = work / f"{side}.json"
    command = [sys.executable, "-m", "scripts.compare_with_peft", "--side", side, "--work", str(work)]
    command += ["--steps", str(options.steps), "--num-experts", str(options.num_experts)]
    search = [str(paths.ROOT), os.environ.get("PYTHONPATH", "")]
    if side == "stock":
        search.insert(0, str(STOCK_TRANSFORMERS))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, search))}
    subprocess.run(command, check=True, env=environment, cwd=paths.ROOT)
    return json.loads(result.read_text())


def report(curves: dict[str, dict[str, list[float]]], console: Console) -> bool:
    """Print the table; True when every deviation is within its limit."""
    formats = [side for side in curves if side != "stock"]
    table = Table("step", "stock loss", *(f"{f} loss" for f in formats), *(f"{f} deviation" for f in formats))
    stock = curves["stock"]["loss"]
    deviations = {f: [abs(a - b) / b for a, b in zip(curves[f]["loss"], stock, strict=True)] for f in formats}
    for step, loss in enumerate(stock):
        row = [f"{curves[f]['loss'][step]:.4f}" for f in formats]
        row += [f"{deviations[f][step]:.3%}" for f in formats]
        table.add_row(str(step + 1), f"{loss:.4f}", *row)
    console.print(table)
    for side, curve in curves.items():
        median = sorted(curve["seconds"])[len(curve["seconds"]) // 2]
        console.print(f"{side:6} {median:.2f} s/step (median)")
    for f in formats:
        console.print(f"{f:6} largest deviation {max(deviations[f]):.3%}, limit {LIMITS[f]:.0%}")
    return all(max(deviations[f]) <= LIMITS[f] for f in formats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8"], choices=sorted(LIMITS))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    build = Build(num_experts=options.num_experts)
    model_dir = make_moe(build)
    if options.side:
        work, steps = options.work, options.steps
        curve = stock_side(model_dir, work, steps) if options.side == "stock" else None
        curve = curve or kt_side(model_dir, work, steps, options.side)
        (work / f"{options.side}.json").write_text(json.dumps(curve))
        return 0
    if not STOCK_TRANSFORMERS.exists():
        sys.exit(f"{STOCK_TRANSFORMERS} is missing: python3 scripts/setup_env.py --overlays")
    data.make_data()
    with tempfile.TemporaryDirectory() as folder:
        curves = {side: run_side(side, options, Path(folder)) for side in ("stock", *options.formats)}
    return 0 if report(curves, Console()) else 1


if __name__ == "__main__":
    sys.exit(main())
