"""The demonstration's inputs: fetched once into .cache/, skipped with the reason where no registry answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    from scripts.demo import fetch

    try:
        return fetch.fetch_model()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def texts() -> Path:
    from scripts.demo import fetch

    try:
        return fetch.fetch_texts()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def dense(gguf_path: Path):
    from scripts.demo.gguf_model import read_dense

    return read_dense(gguf_path)
