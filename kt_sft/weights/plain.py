"""A copy of a checkpoint without its routed experts and without quantisation, for transformers to load.

    quantised matrix (FP8, INT4, ... see formats.py) -> bf16(value(code) * scale)      every other tensor -> itself

Checkpoints such as DeepSeek-V3's quantise attention and shared experts as well. transformers would need a GPU of the
right kind, or another package, to read them; the copy is read like any BF16 model. It is made once, in the cache folder
beside the packed experts, a few tensors at a time: into a folder with another name, synced and renamed. A copy whose
checkpoint has changed since (the shards' names, sizes and times, config.json) is made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .cache import build_lock
from .checkpoint import INDEX, Checkpoint
from .formats import MAIN, format_of, open_checkpoint
from .stored import Stored, matrix_of, partner

logger = logging.getLogger(__name__)

IDENTITY = "kt_sft.json"  # what the copy was made from
_VERSION = 1
_SHARD = 1 << 30  # bytes gathered before they are written
_LAYER = re.compile(r"(.*?\blayers)\.(\d+)\.")
_FLOATS = ("BF16", "F16", "F32", "F64")
_UNUSED = (".input_scale",)  # of quantised activations


def quantised_matrices(checkpoint: Checkpoint, is_expert: Callable[[str], bool]) -> dict[str, list[str]]:
    """Quantised matrices that are no routed experts -> the tensors that hold them.

    Raises ValueError if one is in a format that cannot be read.
    """
    found = {}
    for name in checkpoint.names():
        matrix = next(filter(None, (matrix_of(name, suffix) for suffix in MAIN)), None)
        unquantised = checkpoint.dtype(name) in _FLOATS or len(checkpoint.shape(name)) < 2
        if matrix is None or unquantised or is_expert(name):
            continue
        stored = Stored(checkpoint, matrix)
        found[matrix] = [partner(matrix, suffix) for suffix in format_of(stored).tensors(stored)]
    return found


def plain_copy(folder: str | os.PathLike[str], cache: Path, is_expert: Callable[[str], bool]) -> Path:
    """The folder of the copy of the checkpoint ``folder`` below ``cache``, made if there is none yet.

    ``is_expert`` tells routed experts' tensors by their names.

    Raises:
        ValueError: the checkpoint is damaged or in a format that cannot be read.
        OSError: the copy cannot be written.
    """
    checkpoint = open_checkpoint(folder)
    where = checkpoint.folder.resolve()
    path = cache / f"{where.name}-dequantised-{_digest(str(where))[:12]}"
    identity = _identity(checkpoint)
    with build_lock(path):
        why = _unusable(path, identity)
        if why is not None:
            logger.info("Writing everything but the experts of %s as BF16 into %s: %s.", folder, path, why)
            _make(path, checkpoint, identity, is_expert)
    return path


@contextlib.contextmanager
def passing_copy(folder: str | os.PathLike[str], is_expert: Callable[[str], bool]) -> Iterator[Path]:
    """A copy in the system's folder of temporary files, removed at the end: for ``cache_dir: none``."""
    with tempfile.TemporaryDirectory(prefix="kt_sft-") as name:
        path = Path(name) / "model"
        _make(path, open_checkpoint(folder), {}, is_expert)
        yield path


def _unusable(path: Path, identity: dict[str, Any]) -> str | None:
    try:
        if json.loads((path / IDENTITY).read_text()) != identity:
            return "the checkpoint's files have changed"
        Checkpoint(path)
    except FileNotFoundError:
        return "there is no copy yet"
    except ValueError as error:
        return f"the copy there is damaged ({error})"
    return None


def _digest(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.folder / "config.json"
    return {
        "version": _VERSION,
        "shards": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.shards],
        "headers": _digest([hashlib.blake2b(checkpoint.headers[file]).hexdigest() for file in checkpoint.shards]),
        "config": hashlib.blake2b(config.read_bytes()).hexdigest() if config.is_file() else "",
    }


def _make(path: Path, checkpoint: Checkpoint, identity: dict[str, Any], is_expert: Callable[[str], bool]) -> None:
    matrices = quantised_matrices(checkpoint, is_expert)
    taken = {name for names in matrices.values() for name in names}
    skip = _unused_layers(checkpoint, is_expert)
    rest = [n for n in checkpoint.names() if n not in taken and not is_expert(n) and not n.endswith(_UNUSED)]
    jobs = [name for name in [*matrices, *rest] if not skip(name)]
    first = {name: checkpoint.entry(matrices.get(name, [name])[0]) for name in jobs}
    jobs.sort(key=lambda name: (first[name].file.name, first[name].start))

    def nbytes(name: str) -> int:
        if name not in matrices:
            return checkpoint.entry(name).nbytes
        stored = Stored(checkpoint, name)
        rows, columns = format_of(stored).shape(stored)
        return 2 * rows * columns

    sizes = {name: nbytes(name) for name in jobs}
    temporary = path.with_name(f"{path.name}.tmp")
    with _explained(path, sum(sizes.values())):
        _remove(temporary)
        temporary.mkdir(parents=True)
        try:
            _write(temporary, checkpoint, sizes, matrices)
            _write_settings(temporary, checkpoint.folder, identity)
            _remove(path)
            os.replace(temporary, path)
        finally:
            _remove(temporary)


def _unused_layers(checkpoint: Checkpoint, is_expert: Callable[[str], bool]) -> Callable[[str], bool]:
    """Tells the tensors of multi-token-prediction layers: those of the decoder beyond its ``num_hidden_layers``."""
    config = checkpoint.folder / "config.json"
    settings = json.loads(config.read_bytes()) if config.is_file() else {}
    count = (settings.get("text_config") or settings).get("num_hidden_layers")
    decoders = {m[1] for m in map(_LAYER.match, filter(is_expert, checkpoint.names())) if m}

    def unused(name: str) -> bool:
        match = _LAYER.match(name)
        return bool(match and isinstance(count, int) and match[1] in decoders and int(match[2]) >= count)

    return unused


def _write(folder: Path, checkpoint: Checkpoint, sizes: dict[str, int], matrices: dict[str, list[str]]) -> None:
    groups: list[list[str]] = [[]]
    gathered = 0
    for name, size in sizes.items():
        if groups[-1] and gathered + size > _SHARD:
            groups.append([])
            gathered = 0
        groups[-1].append(name)
        gathered += size
    weight_map: dict[str, str] = {}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="dequantising", disable=None) as bar:
        for i, names in enumerate(groups, start=1):
            shard = f"model-{i:05}-of-{len(groups):05}.safetensors"
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors[name] = _dequantised(checkpoint, name) if name in matrices else checkpoint.read(name)
                bar.update(sizes[name])
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            _sync(folder / shard)
            weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def _dequantised(checkpoint: Checkpoint, name: str) -> Tensor:
    stored = Stored(checkpoint, name)
    chosen = format_of(stored)
    rows, columns = chosen.shape(stored)
    chosen.require(stored, (rows, columns))
    return chosen.read(stored, (rows, columns)).dequantize(torch.bfloat16)


def _write_settings(folder: Path, source: Path, identity: dict[str, Any]) -> None:
    """config.json without its quantisation, the generation settings, and last what the copy was made from."""
    config = json.loads((source / "config.json").read_bytes()) if (source / "config.json").is_file() else {}
    for owner in (config, config.get("text_config")):
        if isinstance(owner, dict):
            owner.pop("quantization_config", None)
            owner.pop("compression_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    (folder / IDENTITY).write_text(json.dumps(identity))
    _sync(folder / IDENTITY)
    _sync(folder)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def _explained(path: Path, nbytes: int) -> Iterator[None]:
    remedy = "free some space, or choose another folder (cache_dir, KT_SFT_CACHE, TMPDIR for cache_dir: none)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < nbytes:
            raise OSError(errno.ENOSPC, f"{free / 2**30:.2f} GiB are free")
        yield
    except (OSError, SafetensorError) as error:  # safetensors gives the number in words only
        number = getattr(error, "errno", None) or (errno.ENOSPC if "No space left" in str(error) else errno.EIO)
        message = f"{path}: writing {nbytes / 2**30:.2f} GiB of dequantised weights failed: {error}; {remedy}"
        raise OSError(number, message) from error
