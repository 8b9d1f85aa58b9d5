"""Downloads are checked before use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from scripts.demo import fetch
from scripts.demo.fetch import Package


def package(content: bytes, name: str = "thing-1.0.whl") -> Package:
    return Package(
        requirement="thing==1.0", filename=name, size=len(content), sha256=hashlib.sha256(content).hexdigest()
    )


def test_a_good_file_is_kept(tmp_path: Path):
    (tmp_path / "thing-1.0.whl").write_bytes(b"content")
    assert fetch.download(package(b"content"), tmp_path).read_bytes() == b"content"


@pytest.mark.parametrize("found, expected", [(b"conten", "size is 6 bytes, expected 7"), (b"Content", "sha256 is")])
def test_a_wrong_file_is_refused(tmp_path: Path, found: bytes, expected: str):
    (tmp_path / "thing-1.0.whl").write_bytes(found)
    with pytest.raises(ValueError, match=expected):
        fetch.download(package(b"content"), tmp_path)


def test_a_missing_package_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: type("R", (), {"returncode": 1, "stderr": "gone"})())
    with pytest.raises(RuntimeError, match=r"thing==1\.0: pip could not fetch .*gone.*place a copy"):
        fetch.download(package(b"content"), tmp_path)


def test_an_interrupted_write_leaves_no_file(tmp_path: Path):
    class Broken:
        def read(self, *_):
            raise OSError("interrupted")

    with pytest.raises(OSError, match="interrupted"):
        fetch._write_whole(tmp_path / "model", Broken())
    assert not (tmp_path / "model").exists()
