"""Peak memory while loading stays below the packed size plus 1 GB.

A process of its own loads a synthetic checkpoint; measured is the growth of VmHWM (/proc/self/status: the peak of the
resident set, mapped pages of the cache file included) from just before the load to after every packed byte was read.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from .checkpoints import separate_layers

D, F, E = 2048, 768, 16  # one layer: 151 MB in BF16

MEASURE = """
    import sys
    from kt_sft.config import KtConfig
    from kt_sft.weights.loader import load_experts
    from tests.weights.checkpoints import separate_layers
    from tests.weights.test_memory import D, F, E

    def peak():
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

    model, layers, cache = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    before = peak()
    packed = load_experts(
        model, separate_layers(layers), num_experts=E, hidden_size=D, intermediate_size=F,
        config=KtConfig(cache_dir=cache), progress=False,
    )
    touched = [p.storage.max() for p in packed.values()]  # sum() would make an int64 copy
    print(sum(p.nbytes for p in packed.values()), peak() - before)
"""


def write_big(folder: Path, layers: int) -> int:
    """A checkpoint of ``layers`` layers, written row of experts by row, never whole in memory. Its size in bytes."""
    names = [n for tensors in separate_layers(layers).values() for e in range(E) for n in tensors.names_of(e)]
    nbytes, table = 2 * D * F, {}
    for i, name in enumerate(names):
        shape = [D, F] if "down" in name else [F, D]
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [i * nbytes, (i + 1) * nbytes]}
    header = json.dumps(table).encode()
    data = torch.randn(D * F).bfloat16().view(torch.uint8).numpy().tobytes()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header)
        for _ in names:
            f.write(data)
    return len(names) * nbytes


@pytest.mark.parametrize("layers", [7, pytest.param(27, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cached", [True, False])
def test_peak_while_loading(tmp_path, layers, cached):
    size = write_big(tmp_path, layers)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(MEASURE),
            str(tmp_path),
            str(layers),
            str(tmp_path) if cached else "none",
        ],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    packed, grown = map(int, done.stdout.split())
    assert 0.4 * size < packed < 0.6 * size
    assert 0.9 * packed < grown < packed + 0.4e9, f"{grown / 1e9:.2f} GB for {packed / 1e9:.2f}"
