"""Training and held-out texts of the demonstration, in LLaMA-Factory's layout.

LLaMA-Factory's sample "identity" teaches a model who it is; {{name}} and {{author}} are filled in here. Every ninth
example is kept out of training: identity_heldout shows what was learnt beyond the examples, alpaca_heldout what the
rest of the model's abilities look like afterwards. Some general examples are trained on too, against forgetting.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from . import fetch, paths

logger = logging.getLogger(__name__)

NAME = "Kestrel"
AUTHOR = "Ada"
HOLD_OUT_EVERY = 9
ALPACA_TRAIN, ALPACA_HELDOUT = 40, 24
ALPACA_MAX_CHARACTERS = 600


def fill(text: str) -> str:
    return text.replace("{{name}}", NAME).replace("{{author}}", AUTHOR)


def make_data(folder: Path = paths.DATA) -> Path:
    """Write the JSON files and dataset_info.json; return the folder."""
    source = fetch.fetch_texts()
    identity = json.loads(fill((source / "identity.json").read_text()))
    alpaca = json.loads((source / "alpaca_en_demo.json").read_text())
    short = [row for row in alpaca if len(row["instruction"] + row["input"] + row["output"]) < ALPACA_MAX_CHARACTERS]
    sets = {
        "identity_train": [row for i, row in enumerate(identity) if i % HOLD_OUT_EVERY],
        "identity_heldout": identity[::HOLD_OUT_EVERY],
        "alpaca_train": short[:ALPACA_TRAIN],
        "alpaca_heldout": short[-ALPACA_HELDOUT:],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1) + "\n")
    logger.info("data: %s", ", ".join(f"{name} {len(rows)}" for name, rows in sets.items()))
    return folder


def messages(row: dict) -> list[dict[str, str]]:
    """One alpaca-style row as a chat of user and assistant."""
    question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
