"""Whether a checkpoint, or a file of packed experts, is whole: everything is read once and checked.

A checkpoint: headers, codes and scales of every quantised matrix (as on loading), no NaN or Inf in any float tensor. A
file of packed experts: its checksums. One tensor, or one expert of a stacked one, is in memory at a time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from ..ops.layout import name_of
from .cache import CacheMiss, verify_packed
from .checkpoint import Checkpoint
from .formats import MAIN, format_of, open_checkpoint
from .gguf import GgufCheckpoint
from .loader import SUFFIX
from .stored import Stored, matrix_of, partner

_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass
class Verified:
    """What was found whole: how many matrices (or packed layers) of each format, how many bytes."""

    path: Path
    nbytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)


def verify(path: str | os.PathLike[str], *, progress: bool = True) -> list[Verified]:
    """One entry per checkpoint or packed file at ``path``.

    Raises:
        ValueError: it is damaged, or in a format that is not supported; the message says where.
    """
    path = Path(path)
    packed = [path] if path.suffix == SUFFIX else sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    if packed:
        return [_packed(file) for file in packed]
    return [_checkpoint(open_checkpoint(path), progress)]


def _packed(file: Path) -> Verified:
    try:
        spec = verify_packed(file)
    except CacheMiss as miss:
        raise ValueError(f"packed experts {file}: {miss}; delete it, the next start packs the experts again") from miss
    layers = Counter(f"packed layers, {name_of(layout)}" for layout in spec.layouts or ())
    return Verified(file, file.stat().st_size, layers)


def _checkpoint(checkpoint: Checkpoint, progress: bool) -> Verified:
    result = Verified(checkpoint.folder, sum(checkpoint.entry(name).nbytes for name in checkpoint.names()))
    done: set[str] = set()
    with tqdm(
        total=result.nbytes, unit="B", unit_scale=True, desc="verifying", disable=None if progress else True
    ) as bar:

        def passed(kind: str, names: list[str]) -> None:
            result.formats[kind] += 1
            done.update(names)
            bar.update(sum(checkpoint.entry(name).nbytes for name in names))

        for matrix in _quantised(checkpoint):
            passed(*_check_matrix(checkpoint, matrix))
        for name in checkpoint.names():
            if name not in done:
                passed(*_check_tensor(checkpoint, name))
    return result


def _quantised(checkpoint: Checkpoint) -> Iterator[str]:
    """The quantised matrices; of GGUF the experts only, since nothing else of it is used."""
    for name in checkpoint.names():
        dtype = checkpoint.dtype(name)
        if isinstance(checkpoint, GgufCheckpoint):
            if name.endswith("_exps.weight"):
                yield name
        elif dtype in _FLOATS or len(checkpoint.shape(name)) < 2:
            continue
        elif name.endswith(".weight") or dtype == "F8_E4M3":
            yield name
        else:
            yield from filter(None, (matrix_of(name, suffix) for suffix in MAIN if suffix != "weight"))


def _check_matrix(checkpoint: Checkpoint, matrix: str) -> tuple[str, list[str]]:
    whole = Stored(checkpoint, matrix)
    chosen = format_of(whole)
    names = [partner(matrix, suffix) for suffix in chosen.tensors(whole)]
    main = checkpoint.shape(names[0])
    stacked = len(main) > (3 if names[0].endswith("_blocks") else 2)
    for stored in [Stored(checkpoint, matrix, i) for i in range(main[0])] if stacked else [whole]:
        rows, columns = chosen.shape(stored)
        chosen.require(stored, (rows, columns))
        chosen.read(stored, (rows, columns))
    return chosen.name, names


def _check_tensor(checkpoint: Checkpoint, name: str) -> tuple[str, list[str]]:
    dtype = checkpoint.dtype(name)
    if dtype not in _FLOATS or isinstance(checkpoint, GgufCheckpoint):
        checkpoint.read_bytes(name)
        return dtype.lower(), [name]
    values = checkpoint.read(name)
    if not torch.isfinite(values).all():
        found = "NaN" if torch.isnan(values).any() else "Inf"
        raise ValueError(f"{checkpoint.entry(name).file}: tensor {name!r}: expected finite values, got {found}")
    return dtype.lower(), [name]
