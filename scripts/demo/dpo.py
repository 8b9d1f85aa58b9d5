"""Preference training (DPO) on the demonstration's model with real pairs, and a check of what it learnt.

1 model     as in `make demo`
2 data      the shortest one-turn pairs of LLaMA-Factory's dpo_en_demo
3 training  USE_KT=1 llamafactory-cli train examples/demo_kt_lora_dpo.yaml
4 result    over the training pairs, with beta of the YAML and log p(answer) summed over its tokens:

    reward(answer) = beta * (log p_trained(answer) - log p_reference(answer))
    accuracy       = share of pairs with reward(chosen) > reward(rejected)            must exceed 0.7
    reference      = the trained model with its adapter switched off                  must equal the base bit for bit

    python -m scripts.demo.dpo [--pairs 24] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import kt_sft

from . import fetch, paths, run
from .evaluate import encode, load
from .make_moe import Build, make_moe

EXAMPLE = paths.ROOT / "examples" / "demo_kt_lora_dpo.yaml"
NAME = "preference_train"
ACCURACY = 0.7


def make_pairs(count: int, folder: Path = paths.DEMO / "preferences") -> Path:
    """Write the ``count`` shortest one-turn pairs and their dataset_info.json; return the folder."""
    source = fetch.fetch_texts()
    rows = json.loads((source / "dpo_en_demo.json").read_text())
    rows = [row for row in rows if len(row["conversations"]) == 1 and row["conversations"][0]["from"] == "human"]
    rows.sort(key=lambda row: len(json.dumps(row)))
    info = json.loads((source / "dataset_info.json").read_text())["dpo_en_demo"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(rows[:count], indent=1, ensure_ascii=False) + "\n")
    (folder / "dataset_info.json").write_text(json.dumps({NAME: {**info, "file_name": f"{NAME}.json"}}, indent=1))
    return folder


@torch.no_grad()
def log_probability(model, tokenizer, question: str, answer: str) -> float:
    """log p(answer | question), summed over the answer's tokens."""
    ids, labels = encode(tokenizer, {"instruction": question, "output": answer})
    logits = model(input_ids=ids).logits[:, :-1].float()
    targets = labels[:, 1:]
    chosen = torch.log_softmax(logits, -1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return float(chosen[targets != -100].sum())


def log_probabilities(model, tokenizer, pairs: list[dict], title: str) -> torch.Tensor:
    """(pairs, 2): chosen and rejected."""
    values = [
        [
            log_probability(model, tokenizer, row["conversations"][0]["value"], row[side]["value"])
            for side in ("chosen", "rejected")
        ]
        for row in tqdm(pairs, desc=title, unit="pair")
    ]
    return torch.tensor(values, dtype=torch.float64)


def check(model_dir: Path, values: dict, pairs: list[dict], console: Console) -> bool:
    """Print the result; True when both conditions hold."""
    model, tokenizer = load(model_dir, paths.ROOT / values["output_dir"], values["kt_config"])
    trained = log_probabilities(model, tokenizer, pairs, "trained model")
    with model.disable_adapter():
        reference = log_probabilities(model, tokenizer, pairs, "adapter off")
    base = kt_sft.from_pretrained(str(model_dir), config=values["kt_config"], dtype=torch.bfloat16).eval()
    untouched = log_probabilities(base, tokenizer, pairs, "base model")
    rewards = values["pref_beta"] * (trained - reference)
    accuracy = (rewards[:, 0] > rewards[:, 1]).double().mean().item()
    equal = torch.equal(reference, untouched)
    table = Table("over the training pairs", "value")
    table.add_row("rewards/accuracies", f"{accuracy:.3f} (must exceed {ACCURACY})")
    table.add_row("rewards/margins", f"{(rewards[:, 0] - rewards[:, 1]).mean().item():.3f}")
    table.add_row("reference equals the base model", "bit for bit" if equal else "NO")
    console.print(table)
    return equal and accuracy > ACCURACY


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="  %(message)s")
    console, start = Console(), time.monotonic()
    model_dir, data_dir = make_moe(Build()), make_pairs(options.pairs)
    overrides = [f"model_name_or_path={model_dir}", f"dataset_dir={data_dir}", *options.overrides]
    values = run.settings(overrides, EXAMPLE)
    seconds = run.train(overrides, EXAMPLE)
    pairs = json.loads((data_dir / f"{NAME}.json").read_text())
    ok = check(model_dir, values, pairs, console)
    console.print(f"adapter {os.path.relpath(paths.ROOT / values['output_dir'])}, training {seconds:.0f} s")
    console.print(f"time    {time.monotonic() - start:.0f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ValueError) as error:
        sys.exit(f"dpo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
