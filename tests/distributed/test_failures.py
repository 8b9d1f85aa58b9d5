"""A rank that fails: the others end with an error that names the cause, and nothing of them is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from .launch import start_ranks

LIMIT_S = 10.0


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        ("killed", "rank 1 (process"),
        ("raising", "rank 1 failed: KeyError: 'the data of rank 1'"),
        ("nan", "got NaN or Inf on rank 1"),
        ("stuck", "rank 1 failed: KeyError: 'the data of rank 1'"),
    ],
)
def test_the_others_end_with_the_cause(case: str, cause: str, tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    survivor, culprit = start_ranks(case, tmp_path)
    assert culprit.code != 0 and survivor.code == 1
    assert cause in survivor.text
    assert survivor.seconds < LIMIT_S
    assert set(Path("/dev/shm").iterdir()) - before == set()
