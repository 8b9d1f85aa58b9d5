"""Create .venv with everything that the demonstration, the tests and the build need. Standard library only.

Steps, each skipped when its inputs have not changed since it last succeeded (stamp files in .venv/.stamps):

    venv       a virtual environment; works without Debian's python3-venv
    torch      the pinned PyTorch, before anything could pull another one
    audio      torchaudio and torchvision: the real ones beside CUDA, stand-ins on a CPU-only machine
    packages   requirements.txt
    kt_sft     this package, editable; compiles the C++ extension
    overlays   other transformers releases and DeepSpeed, each in a folder of its own (only with --overlays)

    python3 scripts/setup_env.py [--overlays]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("VENV", ROOT / ".venv")).resolve()
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
OVERLAYS = ROOT / ".cache" / "overlays"
MINIMUM_PYTHON = (3, 10)
TORCH = "torch==2.13.0"
# Folder of each with what it needs beyond the main environment's packages.
OVERLAY_PACKAGES = {
    "transformers-4.57.6": ["transformers==4.57.6", "huggingface-hub==0.36.0"],
    "transformers-5.23.0": ["transformers==5.23.0", "tokenizers>=0.23.1,<0.24"],
    "deepspeed": ["deepspeed==0.19.8", "hjson", "py-cpuinfo", "msgpack", "einops"],
}


class SetupError(Exception):
    """A step failed; the message says what to do."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(command: list[str], **environment: str) -> None:
    """Run quietly into the log; on failure raise with the last lines of its output."""
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        start = log.tell()
        code = subprocess.call(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}, cwd=ROOT
        )
    if code:
        output = LOG.read_text(errors="replace")[start:].strip().splitlines()
        errors = [line for line in output if "error" in line.lower()] or output
        raise SetupError("\n".join(errors[-12:]) + f"\n(full log: {LOG})")


def pip(*arguments: str, **environment: str) -> None:
    run([str(PYTHON), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], **environment)


def has_cuda() -> bool:
    """Whether an NVIDIA driver answers."""
    if not shutil.which("nvidia-smi"):
        return False
    return subprocess.call(["nvidia-smi", "-L"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def create_venv() -> None:
    """``python3 -m venv`` without ensurepip (absent on Debian without python3-venv), then pip by the system's pip."""
    for tool in ("gcc", "g++"):
        if not shutil.which(tool):
            raise SetupError(f"{tool} is missing: apt-get install g++ make")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise SetupError("Python.h is missing: apt-get install python3-dev")
    VENV.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", "--without-pip", str(VENV)])
    run([sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet", "pip", "setuptools", "wheel"])


def install_torch() -> None:
    pip("install", TORCH)


def install_audio() -> None:
    if has_cuda():
        pip("install", TORCH, "torchvision", "torchaudio")
    else:
        stubs = ROOT / "scripts" / "stubs"
        pip("install", "--no-deps", "--no-build-isolation", str(stubs / "torchaudio"), str(stubs / "torchvision"))
        for leftover in ("build", "torchaudio.egg-info", "torchvision.egg-info"):
            for stub in ("torchaudio", "torchvision"):
                shutil.rmtree(stubs / stub / leftover, ignore_errors=True)


def install_packages() -> None:
    pip("install", TORCH, "-r", "requirements.txt")
    pip("check")


def install_kt_sft() -> None:
    path = f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    pip("install", "--no-deps", "--no-build-isolation", "-e", ".", PATH=path)


def install_overlay(name: str) -> None:
    """DeepSpeed has no wheel: it is built without its CUDA operators, beside the torch that is there."""
    target = OVERLAYS / name
    shutil.rmtree(target, ignore_errors=True)
    options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    pip("install", *options, *OVERLAY_PACKAGES[name], DS_BUILD_OPS="0")


def digest(inputs: Iterable[Path | str]) -> str:
    """Hash of strings and of the content of files (a folder stands for every file below it)."""
    value = hashlib.sha256()
    for item in inputs:
        if isinstance(item, str):
            value.update(item.encode())
            continue
        files = sorted(p for p in item.rglob("*") if p.is_file()) if item.is_dir() else [item]
        for file in files:
            if "__pycache__" not in file.parts and file.exists():
                value.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return value.hexdigest()


def step(name: str, inputs: Iterable[Path | str], action: Callable[[], None]) -> None:
    """Run ``action`` unless it already succeeded with the same inputs."""
    stamp, wanted = VENV / ".stamps" / name, digest(inputs)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    start = time.monotonic()
    try:
        action()
    except SetupError as error:
        raise SetupError(f"set-up step '{name}' failed:\n{error}") from None
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(wanted)
    say(f"  {name:<24}{time.monotonic() - start:6.1f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--overlays",
        action="store_true",
        help="also what some tests need: other transformers releases, DeepSpeed",
    )
    options = parser.parse_args()
    if tuple(sys.version_info) < MINIMUM_PYTHON:
        sys.exit(f"Python: expected 3.10 or newer, got {sys.version.split()[0]}; choose one with make PYTHON=...")
    start, requirements = time.monotonic(), ROOT / "requirements.txt"
    cuda = "cuda" if has_cuda() else "cpu"
    sources = [ROOT / "csrc", ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    say(f"setting up {os.path.relpath(VENV)} ({cuda}, Python {sys.version.split()[0]})")
    try:
        step("venv", [sys.version], create_venv)
        step("torch", [TORCH, cuda], install_torch)
        step("audio", [TORCH, cuda, ROOT / "scripts" / "stubs"], install_audio)
        step("packages", [TORCH, requirements], install_packages)
        step("kt_sft", sources, install_kt_sft)
        for name, packages in OVERLAY_PACKAGES.items() if options.overlays else ():
            step(name, packages, lambda name=name: install_overlay(name))
    except SetupError as error:
        say(str(error))
        return 1
    say(f"ready in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
