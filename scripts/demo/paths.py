"""Where the demonstration keeps what it downloads, builds and writes."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("KT_SFT_DEMO_CACHE", ROOT / ".cache"))
DOWNLOADS = CACHE / "downloads"
DEMO = CACHE / "demo"
GGUF = DOWNLOADS / "SmolLM2-135M-Instruct.Q4_1.gguf"
UPSTREAM_DATA = DOWNLOADS / "llamafactory-data"
DATA = DEMO / "data"
OUTPUT = ROOT / "demo_output"


def moe_dir(family: str, num_experts: int) -> Path:
    """Folder of one built model, in the layout of a model hub."""
    return DEMO / f"smollm2-{family.replace('_', '-')}-{num_experts}x135m"
