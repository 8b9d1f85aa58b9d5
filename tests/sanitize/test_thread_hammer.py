"""The thread pool and the workspace under ThreadSanitizer, and, with forks, under UndefinedBehaviorSanitizer.

GCC 12's ThreadSanitizer cannot follow threads of a forked child, and AddressSanitizer's allocator may deadlock there.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("tests/sanitize/thread_hammer.cc", *(f"csrc/common/{n}.cc" for n in ("nodes", "thread_pool", "workspace")))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    """build(sanitizers) -> program; skips where the compiler lacks them."""
    built: dict[str, Path] = {}

    def compiled(sanitizers: str) -> Path:
        if sanitizers not in built:
            program = tmp_path_factory.mktemp("sanitize") / "thread_hammer"
            flags = ["-std=c++17", "-O1", "-g", "-pthread", "-Icsrc", f"-fsanitize={sanitizers}"]
            if shutil.which("g++") is None or not _links(f"-fsanitize={sanitizers}", program.with_name("probe")):
                pytest.skip(f"g++ cannot build with -fsanitize={sanitizers} here")
            command = ["g++", *flags, "-fno-sanitize-recover=all", *SOURCES, "-o", str(program)]
            subprocess.run(command, cwd=ROOT, check=True)
            built[sanitizers] = program
        return built[sanitizers]

    return compiled


def _links(flag: str, probe: Path) -> bool:
    source = subprocess.run(
        ["g++", flag, "-x", "c++", "-", "-o", str(probe)], input="int main() {}", text=True, capture_output=True
    )
    return source.returncode == 0 and subprocess.run([str(probe)], capture_output=True).returncode == 0


def _hammer(program: Path, *mode: str) -> subprocess.CompletedProcess[str]:
    options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(program), *mode], env=options, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("sanitizers", "mode"), [("thread", ()), ("undefined", ("fork",)), ("thread", ("nodes",))])
def test_many_callers_changing_thread_counts_nodes_and_forks(build, sanitizers: str, mode: tuple[str, ...]):
    done = _hammer(build(sanitizers), *mode)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]


def test_a_race_is_found(build):
    """The checks above must be able to fail."""
    done = _hammer(build("thread"), "race")
    assert done.returncode != 0 and "data race" in done.stderr
