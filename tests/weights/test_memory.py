"""Peak memory while loading stays below the packed size plus 1 GB.

A process of its own loads a synthetic checkpoint; measured is the growth of VmHWM (/proc/self/status: the peak of the
resident set, mapped pages of the cache file included) from just before the load to after every packed byte was read.
Two processes that map the same file share its pages: their proportional set sizes (PSS) add up to one copy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.loading import write_checkpoint

from . import published
from .checkpoints import search_path

MEASURE = """
    import sys
    from kt_sft.config import KtConfig
    from kt_sft.weights import saving
    from kt_sft.weights.loader import load_experts
    from benchmarks.loading import D, E, F, layers_of

    def peak():
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

    model, layers, cache = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    before = peak()
    packed = load_experts(
        model, layers_of(layers), num_experts=E, hidden_size=D, intermediate_size=F,
        config=KtConfig(cache_dir=cache), progress=False,
    )
    touched = [p.storage.max() for p in packed.values()]  # sum() would make an int64 copy
    saving.finish()
    touched = [p.storage.max() for p in packed.values()]
    print(sum(p.nbytes for p in packed.values()), peak() - before)
"""


@pytest.mark.parametrize("layers", [7, pytest.param(27, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cached", [True, False])
def test_peak_while_loading(tmp_path, layers, cached):
    size = write_checkpoint(tmp_path, layers)
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
        env={**os.environ, "PYTHONPATH": search_path(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    packed, grown = map(int, done.stdout.split())
    assert 0.4 * size < packed < 0.6 * size
    assert 0.9 * packed < grown < packed + 0.4e9, f"{grown / 1e9:.2f} GB for {packed / 1e9:.2f}"


HELD = """
    import json, re, sys
    from kt_sft.config import KtConfig
    from kt_sft.weights.checkpoint import ExpertTensors
    from kt_sft.weights.loader import load_experts

    folder = sys.argv[1]
    layers = {name: ExpertTensors(**names) for name, names in json.load(open(folder + "/layers.json")).items()}
    sizes = json.load(open(folder + "/sizes.json"))
    packed = load_experts(folder, layers, config=KtConfig(cache_dir="none"), progress=False, **sizes)
    places, held, counts = {p.storage.data_ptr() for p in packed.values()}, 0, False
    for line in open("/proc/self/smaps"):
        mapping = re.match("([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            begin, end = (int(address, 16) for address in mapping.groups())
            counts = any(begin <= place < end for place in places)
        elif counts and line.startswith("Rss:"):
            held += int(line.split()[1]) << 10
    print(held, *{p.weight_format for p in packed.values()})
"""


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("fp8_block", "fp8"), ("int4_group32", "int4_sym"), ("mxfp4_deepseek_v4", "mxfp4")],
)
def test_experts_kept_as_stored_take_their_bytes(tmp_path, kind, kept):
    """Resident memory of the mappings that hold the experts against the bytes that the checkpoint has for them."""
    F = 4096
    stacks = {"model.layers.0.mlp.experts": [torch.randn(2, F, 2048), torch.randn(2, F, 2048), torch.randn(2, 2048, F)]}
    made = published.SAFETENSORS[kind](stacks)
    folder = made.write(tmp_path / "model")
    (folder / "layers.json").write_text(json.dumps({layer: asdict(at) for layer, at in made.layers.items()}))
    (folder / "sizes.json").write_text(json.dumps({"num_experts": 2, "hidden_size": 2048, "intermediate_size": F}))
    stored = sum(tensor.nbytes for tensor in made.tensors.values())
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(HELD), str(folder)]
    env = {**os.environ, "PYTHONPATH": search_path(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    held, found = done.stdout.split()
    assert found == kept
    assert 0.99 * stored < int(held) <= 1.03 * stored


SHARER = """
    import sys
    from pathlib import Path
    from benchmarks.loading import load
    from kt_sft.weights import saving

    packed = load(Path(sys.argv[1]), Path(sys.argv[2]), 1)
    saving.finish()
    for layer in packed.values():
        layer.storage.max()
    print(flush=True)  # every page is there
    sys.stdin.readline()  # until the other process has them too
    pss, inside = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            inside = line.rstrip().endswith(".ktpack")
        elif inside and line.startswith("Pss:"):
            pss += int(line.split()[1]) * 1024
    print(pss, sum(layer.nbytes for layer in packed.values()), flush=True)
    sys.stdin.readline()  # until the other process has measured
"""


def test_two_processes_share_one_copy(tmp_path):
    write_checkpoint(tmp_path, 1)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(SHARER), str(tmp_path), str(tmp_path / "cache")]
    env = {**os.environ, "PYTHONPATH": search_path(root)}
    pipe = subprocess.PIPE
    sharers = [subprocess.Popen(command, cwd=root, env=env, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]

    def next_line(sharer: subprocess.Popen[str]) -> str:
        assert sharer.stdout is not None
        return sharer.stdout.readline()

    def go_on() -> None:
        for sharer in sharers:
            assert sharer.stdin is not None
            sharer.stdin.write("\n")
            sharer.stdin.flush()

    assert [next_line(sharer) for sharer in sharers] == ["\n", "\n"]
    go_on()
    rows = [[int(word) for word in next_line(sharer).split()] for sharer in sharers]
    go_on()
    assert [sharer.wait(timeout=60) for sharer in sharers] == [0, 0]
    (pss, packed), (other, _) = rows
    assert 0.98 * packed < pss + other < 1.02 * packed
    assert 0.45 * packed < pss < 0.55 * packed
