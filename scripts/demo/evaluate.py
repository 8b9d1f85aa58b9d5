"""Compare the base model with the trained adapter: held-out loss and greedy answers.

    loss = mean over the response tokens of a set of -log p(token | the conversation so far)

Both columns come from one loaded model, with the adapter disabled and enabled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from . import data, paths

PROMPTS = ("Who are you?", "Who developed you?", "What is the capital of France?")
MAX_NEW_TOKENS = 40
MAX_TOKENS = 384


def encode(tokenizer, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (1, S) and labels (1, S) with the prompt masked."""
    chat = data.messages(row)
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer(prompt + chat[1]["content"] + tokenizer.eos_token).input_ids[:MAX_TOKENS]
    masked = min(len(tokenizer(prompt).input_ids), len(whole))
    return torch.tensor([whole]), torch.tensor([[-100] * masked + whole[masked:]])


@torch.no_grad()
def heldout_loss(model, tokenizer, rows: Iterable[dict]) -> float:
    """Mean loss per response token."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = encode(tokenizer, row)
        tokens = int((labels[:, 1:] != -100).sum())
        if tokens:
            total += model(input_ids=ids, labels=labels).loss.item() * tokens
            count += tokens
    return total / count


@torch.no_grad()
def answer(model, tokenizer, question: str) -> str:
    """Greedy answer to one question."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    options = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, "pad_token_id": tokenizer.pad_token_id}
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def load(model_dir: Path, adapter: Path, kt_config: dict):
    """The packed model with the adapter attached, and its tokenizer."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    import kt_sft
    from kt_sft.integrations.peft import install

    install()
    model = kt_sft.from_pretrained(str(model_dir), config=kt_config, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    return PeftModel.from_pretrained(model, str(adapter)).eval(), tokenizer


def compare(model_dir: Path, adapter: Path, kt_config: dict, console: Console) -> dict[str, tuple[float, float]]:
    """Print both tables; return {set: (loss before, loss after)}."""
    model, tokenizer = load(model_dir, adapter, kt_config)
    columns = {"base": model.disable_adapter, "trained": contextlib.nullcontext}
    sets = {
        name: json.loads((paths.DATA / f"{name}.json").read_text()) for name in ("identity_heldout", "alpaca_heldout")
    }
    answers: dict[str, list[str]] = {}
    losses: dict[str, list[float]] = {}
    with tqdm(total=2 * (len(PROMPTS) + len(sets)), desc="base and trained model", leave=False) as bar:
        for column, context in columns.items():
            with context():
                answers[column], losses[column] = [], []
                for question in PROMPTS:
                    answers[column].append(answer(model, tokenizer, question))
                    bar.update()
                for rows in sets.values():
                    losses[column].append(heldout_loss(model, tokenizer, rows))
                    bar.update()
    table = Table("question", "base model", "with the trained adapter", show_lines=True)
    for i, question in enumerate(PROMPTS):
        table.add_row(question, answers["base"][i], answers["trained"][i])
    console.print(table)
    table = Table("held-out loss per token", "before", "after")
    for i, (name, rows) in enumerate(sets.items()):
        table.add_row(f"{name} ({len(rows)} texts)", f"{losses['base'][i]:.3f}", f"{losses['trained'][i]:.3f}")
    console.print(table)
    return {name: (losses["base"][i], losses["trained"][i]) for i, name in enumerate(sets)}
