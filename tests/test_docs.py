"""Documentation names what exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from kt_sft.config import KtConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("name", [f.name for f in fields(KtConfig)])
def test_every_setting_is_documented(name: str):
    assert f"| `{name}` |" in (ROOT / "docs" / "configuration.md").read_text()


def test_documented_settings_exist():
    table = (ROOT / "docs" / "configuration.md").read_text().split("## The settings")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == {f.name for f in fields(KtConfig)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_exist(page: Path):
    text = page.read_text()
    links = [page.parent / target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = re.findall(r"\b(?:examples|configs|scripts|kt_sft|csrc|tests)/[\w./-]*\w\.(?:yaml|py|h|inc)\b", text)
    missing = [str(p) for p in [*links, *(ROOT / name for name in named)] if not p.exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_that_a_page_names_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z][a-z-]+)\b(?:`|  )", page.read_text())) <= targets
