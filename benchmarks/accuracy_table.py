"""What each format costs on a real model, the demonstration's: writes docs/accuracy.md.

    python -m benchmarks.accuracy_table [--rows int8 int4 ...] [--keep]

Per row the experts are packed by what `kt-sft convert` calls (or written as GGUF and loaded back), then:

    size          packed bytes, and bits per weight of the experts
    layer error   mean over the layers of |y - y_ref| / |y_ref| (L2), on the reference's inputs, held-out text
    perplexity    exp of the mean loss per token of the held-out text, in sequences of 1024 tokens
    loss          of LoRA training (attention and every expert) in the last 5 of 30 steps, the same batches in every row

The reference is the row bf16. Calibration reads another part of the text. --keep continues an earlier run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import kt_sft
from benchmarks.gguf_experts import write_gguf
from kt_sft.config import KtConfig
from kt_sft.models.calibrate import pack_calibrated, sequences
from kt_sft.models.pack import pack_checkpoint
from kt_sft.nn.experts import KtExperts
from scripts import compare_with_peft
from scripts.demo import data, fetch, paths
from scripts.demo.make_moe import Build, make_moe

PAGE = paths.ROOT / "docs" / "accuracy.md"
WORK = paths.CACHE / "accuracy"
HELD_OUT_TOKENS, CALIBRATION_TOKENS = 4096, 16384
HELD_OUT_CHARACTERS = 100_000  # the calibration text begins behind them
LAYER_TOKENS = 1024
STEPS, LAST = 30, 5
LIMIT = 1.01  # perplexity over the reference's, for int8 and fp8


@dataclass(frozen=True, kw_only=True)
class Row:
    """``settings``: of KtConfig. ``calibrated``: rounded for a text. ``gguf``: a GGUF type that is loaded back."""

    settings: dict[str, Any]
    calibrated: bool = False
    gguf: tuple[str, str] | None = None
    note: str = ""


ROWS = {
    "bf16": Row(settings={"weight_format": "bf16"}),
    "int8": Row(settings={"weight_format": "int8"}),
    "fp8": Row(settings={"weight_format": "fp8"}, note="fp8, 128 x 128 blocks"),
    "int4": Row(settings={"weight_format": "int4"}, note="int4, groups of 32"),
    "int4, calibrated": Row(settings={"weight_format": "int4"}, calibrated=True, note="int4, groups of 32, calibrated"),
    "mxfp4": Row(settings={"weight_format": "mxfp4"}),
    "GGUF Q8_0": Row(settings={"weight_format": "gguf"}, gguf=("Q8_0", "Q8_0")),
    "GGUF Q4_K": Row(settings={"weight_format": "gguf"}, gguf=("Q4_K", "Q4_0"), note="GGUF Q4_K (gate and up Q4_0)"),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    nbytes: int
    bits: float
    layer_error: float
    perplexity: float
    seconds: float  # of packing
    loss: float | None = None  # of training, which comes after the rest of all rows


class Texts:
    """Held-out and calibration text, as different parts of one file."""

    def __init__(self, tokenizer: Any) -> None:
        text = (fetch.fetch_texts() / "wiki_demo.txt").read_text()
        self.held_out = sequences(tokenizer, text[:HELD_OUT_CHARACTERS], HELD_OUT_TOKENS)
        self.calibration = text[HELD_OUT_CHARACTERS:]


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    return math.exp(sum(losses) / len(losses))


Call = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden states, ids, weights, output


@torch.no_grad()
def record(model: Any, ids: Tensor) -> list[Call]:
    """What every layer's experts get and give."""
    calls: list[Call] = []
    hooks = [
        m.register_forward_hook(lambda _, args, out: calls.append((*args, out)))
        for m in model.modules()
        if isinstance(m, KtExperts)
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def layer_error(model: Any, calls: list[Call]) -> float:
    errors = []
    layers = [m for m in model.modules() if isinstance(m, KtExperts)]
    for layer, (*inputs, expected) in zip(layers, calls, strict=True):
        difference = layer(*inputs).float() - expected.float()
        errors.append((difference.norm() / expected.float().norm()).item())
    return sum(errors) / len(errors)


def config_of(name: str, folder: Path) -> KtConfig:
    row = ROWS[name]
    settings = row.settings | {"weight_path": str(folder / "packed")}
    if row.gguf is not None:
        settings["expert_checkpoint_path"] = str(folder / "experts.gguf")
    return KtConfig.from_dict(settings, source=name)


def load(model_dir: Path, name: str) -> Any:
    """The model with the packed experts of a row."""
    return kt_sft.from_pretrained(str(model_dir), config=config_of(name, folder_of(name)), dtype=torch.float32).eval()


def folder_of(name: str) -> Path:
    return WORK / name.replace(", ", "-").replace(" ", "-")


def measure(name: str, model_dir: Path, texts: Texts, calls: list[Call]) -> Figures:
    """One row, all but the training. ``calls`` is filled by the reference and used by the others."""
    row, folder = ROWS[name], folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    if row.gguf is not None:
        _write_gguf(model_dir, folder / "experts.gguf", row.gguf)
    config = config_of(name, folder)
    start = time.monotonic()
    if row.calibrated:
        packed = pack_calibrated(model_dir, config, texts.calibration, tokens=CALIBRATION_TOKENS)
    else:
        packed = pack_checkpoint(model_dir, config)
    seconds = time.monotonic() - start
    model = load(model_dir, name)
    layers = [m for m in model.modules() if isinstance(m, KtExperts)]
    weights = sum(3 * m.num_experts * m.hidden_size * m.intermediate_size for m in layers)
    if not calls:
        calls.extend(record(model, texts.held_out[:1, :LAYER_TOKENS]))
    return Figures(
        nbytes=packed.nbytes,
        bits=8 * packed.nbytes / weights,
        layer_error=layer_error(model, calls),
        perplexity=perplexity(model, texts.held_out),
        seconds=seconds,
    )


def loss_of_training(name: str, model_dir: Path, tokenizer: Any) -> float:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=compare_with_peft.TARGETS, task_type="CAUSAL_LM")
    tuned = get_peft_model(load(model_dir, name), settings)
    return sum(compare_with_peft.train(tuned, tokenizer, STEPS, name)["loss"][-LAST:]) / LAST


def _write_gguf(model_dir: Path, file: Path, kinds: tuple[str, str]) -> None:
    """The experts of the model in one GGUF file of these types."""
    from kt_sft.models.calibrate import jobs_of
    from kt_sft.models.pack import build_empty

    config = KtConfig(cache_dir="none", weight_format="int4")  # the reader of the experts is what counts
    (job,) = jobs_of(build_empty(str(model_dir), config), str(model_dir), config)
    write_gguf(file, job.readers, job.spec.num_experts, *kinds)


def page(figures: dict[str, Figures]) -> str:
    reference = figures["bf16"]
    lines = [
        "| experts | size | bits per weight | layer error | perplexity | over bf16 | loss after 30 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        cells = [
            ROWS[name].note or name,
            f"{row.nbytes / 1e6:.0f} MB",
            f"{row.bits:.2f}",
            f"{row.layer_error:.2%}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity / reference.perplexity - 1:+.2%}",
            "" if row.loss is None else f"{row.loss:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""# Accuracy of the weight formats

Written by `python -m benchmarks.accuracy_table`. The model is that of `make demo`: SmolLM2-135M-Instruct, upcycled to
8 experts per layer, 2 of them per token, hidden size 576, intermediate size 1536.

{table}

- **size**: the packed experts, scales included. The rest (attention, norms, embeddings) is the same in every row.
- **layer error**: |y - y_bf16| / |y_bf16| of a layer's experts on the inputs that the bf16 model has there; mean of all
  layers, {LAYER_TOKENS} tokens.
- **perplexity**: of {HELD_OUT_TOKENS} tokens of Wikipedia text, in sequences of 1024, fp32 outside the experts.
- **calibrated**: `kt-sft convert --calibration`, on {CALIBRATION_TOKENS} tokens of the same text file, none of them
  among those.
- **Q4_K** needs multiples of 256 columns, which gate and up (576) do not have; they are Q4_0. Its encoder is
  `benchmarks/gguf_experts.py`'s, simpler than llama.cpp's.
- **loss after {STEPS} steps**: mean of the last {LAST} of {STEPS} steps of LoRA training, rank 8, on attention and all
  experts, 2 examples a step; the same adapters and batches in every row.
"""


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--keep", action="store_true", help="continue an earlier run: its figures and packed files")
    options = parser.parse_args()
    console = Console(width=140)
    model_dir = make_moe(Build())
    data.make_data()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts, calls = Texts(tokenizer), list[Call]()
    if not options.keep:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    kept = WORK / "figures.json"
    found: dict[str, Figures] = {}
    if kept.exists():
        found = {name: Figures(**row) for name, row in json.loads(kept.read_text()).items()}

    def keep(name: str, figures: Figures) -> None:
        found[name] = figures
        gc.collect()
        console.print(name, asdict(figures))
        kept.write_text(json.dumps({n: asdict(row) for n, row in found.items()}, indent=1))
        PAGE.write_text(page({n: found[n] for n in ROWS if n in found}))

    rows = list(dict.fromkeys(["bf16", *options.rows]))
    missing = [name for name in rows if name not in found]
    for name in ["bf16", *missing] if missing and "bf16" in found else missing:  # the others need what it computes
        loss = found[name].loss if name in found else None
        keep(name, replace(measure(name, model_dir, texts, calls), loss=loss))
    for name in rows:
        if found[name].loss is None:
            keep(name, replace(found[name], loss=loss_of_training(name, model_dir, tokenizer)))
        shutil.rmtree(folder_of(name), ignore_errors=True)
    console.print(f"written: {PAGE.relative_to(paths.ROOT)}")
    over = {n: found[n].perplexity / found["bf16"].perplexity for n in ("int8", "fp8") if n in found}
    if any(ratio > LIMIT for ratio in over.values()):
        raise SystemExit(f"perplexity over bf16: expected at most {LIMIT - 1:.0%} more, got {over}")


if __name__ == "__main__":
    main()
