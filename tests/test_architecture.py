"""Who may import or include whom (docs/architecture.md). Reads sources only; nothing is imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kt_sft"
CSRC = ROOT / "csrc"

# layer -> layers of kt_sft that it may import, besides itself and the package's __version__
ALLOWED = {
    "rules": set(),
    "config": {"rules"},
    "topology": set(),
    "native": {"config", "topology"},
    "ops": {"native"},
    "distributed": {"ops", "native", "config"},
    "weights": {"native", "config", "ops", "distributed", "machine"},
    "nn": {"ops", "native", "config", "distributed"},
    "machine": {"ops", "native", "config"},
    "planning": {"machine", "models", "ops", "native", "config"},
    "models": {"nn", "ops", "weights", "native", "config", "rules", "distributed"},
    "integrations": {"models", "nn", "ops", "weights", "native", "config", "distributed"},
    "cli": {
        *("integrations", "planning", "machine", "models", "nn", "ops", "weights", "native", "config", "distributed"),
        "topology",
    },
}
ENTRY_POINTS = {"__init__", "__main__"}
THIRD_PARTY_FREE = {"config", "rules"}  # standard library only
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 120
PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
CPP_FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cc", ".inc", ".cpp"})


def layer_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported(path: Path, root: Path = PACKAGE) -> set[tuple[str, ...]]:
    """Absolute dotted names that the file imports, anywhere in it; type-checking blocks included."""
    package = (root.name, *path.relative_to(root).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
    return found


def broken_imports(path: Path, root: Path = PACKAGE) -> list[str]:
    layer = layer_of(path.relative_to(root).parts)
    if layer in ENTRY_POINTS:
        return []
    problems = []
    for name in imported(path, root):
        dotted = ".".join(name)
        if name[0] != root.name:
            continue
        if "_C" in name and layer != "native":
            problems.append(f"{dotted}: only native.py imports the extension")
        elif len(name) > 1 and name[1] not in {"_C", "__version__", layer} and name[1] not in ALLOWED[layer]:
            problems.append(f"{layer} may not import {dotted}")
    return problems


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_imports_point_downwards(path: Path):
    assert broken_imports(path) == []


def test_every_layer_is_known():
    layers = {layer_of(p.relative_to(PACKAGE).parts) for p in PYTHON_FILES} - ENTRY_POINTS
    assert layers <= set(ALLOWED), (
        f"unknown parts {layers - set(ALLOWED)}: add them to ALLOWED and docs/architecture.md"
    )


@pytest.mark.parametrize("name", sorted(THIRD_PARTY_FREE))
def test_config_uses_the_standard_library_only(name: str):
    import sys

    roots = {n[0] for n in imported(PACKAGE / f"{name}.py")}
    assert roots - {"kt_sft"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_library_code_does_not_print(path: Path):
    if path.relative_to(PACKAGE).parts[0] == "cli":
        pytest.skip("the command line talks to people")
    calls = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and _is_print(n)]
    assert calls == []


def _is_print(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "print"


@pytest.mark.parametrize("path", PYTHON_FILES + CPP_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    if path.suffix == ".py":
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        long = [n.name for n in ast.walk(ast.parse(text)) if isinstance(n, kinds) and _lines(n) > MAX_FUNCTION_LINES]
        assert long == []


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


INTRINSIC = re.compile(r"\b(_mm\w*|_tile_\w+|__m(?:128|256|512)\w*)\b")
PORTABLE_HINTS = {"_mm_pause", "_mm_prefetch", "_mm_sfence"}


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def broken_includes(text: str, folder: str, name: str) -> list[str]:
    """Rules of one C++ file that lies in csrc/<folder>."""
    problems = []
    vector_code = set(INTRINSIC.findall(text)) - PORTABLE_HINTS
    if vector_code and not (folder == "kernels" and name.startswith(("tile_ops_", "vec_"))):
        problems.append(f"intrinsics {sorted(vector_code)}: only in kernels/tile_ops_*.h and kernels/vec_*.h")
    for header in includes(text):
        target = header.split("/")[0] if "/" in header else folder
        if header.startswith(("torch/", "ATen/", "c10/")):
            problems.append(f"{header}: no torch headers in csrc")
        if header.startswith("pybind11/") and folder != "binding":
            problems.append(f"{header}: pybind11 only in binding/")
        if folder == "moe" and target == "kernels" and header not in {"kernels/kernel_table.h", "kernels/panel.h"}:
            problems.append(f"{header}: moe/ reaches the kernels through kernel_table.h and panel.h only")
        if target in {"binding", "moe", "kernels", "common"} and target not in CPP_ALLOWED[folder]:
            problems.append(f"{folder}/ may not include {header}")
    return problems


CPP_ALLOWED = {
    "common": {"common"},
    "kernels": {"kernels", "common"},
    "moe": {"moe", "kernels", "common"},
    "binding": {"binding", "moe", "kernels", "common"},
}


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_cpp_includes_point_downwards(path: Path):
    assert broken_includes(path.read_text(), path.relative_to(CSRC).parts[0], path.name) == []


def test_the_extension_is_found():
    assert CPP_FILES and PYTHON_FILES


def test_the_rules_catch_offenders(tmp_path: Path):
    """The checks above must be able to fail."""
    root = tmp_path / "kt_sft"
    (root / "ops").mkdir(parents=True)
    offender = root / "ops" / "bad.py"
    offender.write_text("from ..models import convert\nfrom kt_sft import _C\nfrom .packed import PackedExperts\n")
    assert len(broken_imports(offender, root)) == 2
    bad = '#include <torch/torch.h>\n#include <pybind11/numpy.h>\n#include "binding/x.h"\n_mm512_setzero_ps();\n'
    assert len(broken_includes(bad, "common", "x.h")) == 4
    assert len(broken_includes('#include "kernels/gemm.h"\n', "moe", "x.h")) == 1
