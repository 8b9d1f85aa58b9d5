"""Experts of a checkpoint, packed: from the cache file if it fits, else built from the safetensors shards.

Tensors are read in the order of the files, one expert at a time and two ahead, packed in a buffer for one expert and
written to the cache file, which is mapped at the end. Memory beyond the mapped file is thus a few experts' tensors;
with ``cache_dir: none`` it is the packed experts themselves and these few tensors.

A cache file belongs to the checkpoint that it came from: the shards' names, sizes and times, config.json, and the
expert tensors' names, shapes, dtypes and samples of their bytes. With ``weight_path`` the times do not count, so that a
copy on another machine stays usable. A file that does not fit is rebuilt, and one log line says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import KtConfig
from ..ops.packed import PackedExperts
from ..ops.quantize import resolve_group_size
from .cache import CacheMiss, CacheSpec, PackedWriter, build_lock, open_packed
from .checkpoint import Checkpoint, ExpertTensors

logger = logging.getLogger(__name__)

SUFFIX = ".ktpack"
_READ_AHEAD = 2  # experts

Matrices = tuple[Tensor, Tensor, Tensor]
Put = Callable[[str, int, Matrices], None]


def load_experts(
    model_dir: str | os.PathLike[str],
    layers: dict[str, ExpertTensors],
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    config: KtConfig,
    progress: bool = True,
) -> dict[str, PackedExperts]:
    """The packed experts of every layer, by the names of ``layers``; all layers have the same sizes.

    Raises:
        ValueError: a file or tensor of the checkpoint is missing, malformed, of a wrong shape or dtype, or not finite.
        OSError: the cache file cannot be written.
    """
    checkpoint = Checkpoint(config.expert_checkpoint_path or model_dir)
    for tensors in layers.values():
        _require(checkpoint, tensors, num_experts, hidden_size, intermediate_size)
    content = _content(checkpoint, layers, num_experts)
    spec = CacheSpec(
        weight_format=config.weight_format,
        group_size=resolve_group_size(config.weight_format, config.group_size),
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        layers=tuple(layers),
        packing=_packing(config),
        content=content,
        source="" if config.weight_path else _source(checkpoint, content),
    )
    path = _path(checkpoint, spec, config)
    if path is None:
        return _pack_in_memory(checkpoint, layers, spec, progress)
    try:
        return open_packed(path, spec)
    except CacheMiss:
        pass
    with build_lock(path):
        try:
            return open_packed(path, spec)  # built by another process meanwhile
        except CacheMiss as miss:
            logger.info("Packing the experts of %s into %s: %s.", checkpoint.folder, path, miss)
        _build(path, checkpoint, layers, spec, progress)
        try:
            return open_packed(path, spec)
        except CacheMiss as miss:
            raise OSError(f"packed experts {path}: unusable right after writing: {miss}; check the disk") from miss


def _require(checkpoint: Checkpoint, tensors: ExpertTensors, E: int, D: int, F: int) -> None:
    if tensors.fused:
        shapes: list[tuple[int, ...]] = [(E, 2 * F, D), (E, D, F)]
        for name, shape in zip(tensors.names(), shapes, strict=True):
            checkpoint.require(name, shape)
        return
    for expert in range(E):
        for name, shape in zip(tensors.names_of(expert), [(F, D), (F, D), (D, F)], strict=True):
            checkpoint.require(name, shape)


def _read(checkpoint: Checkpoint, tensors: ExpertTensors, expert: int) -> Matrices:
    names = tensors.names_of(expert)
    if tensors.fused:
        gate, up = checkpoint.read_slice(names[0], expert).chunk(2)
        return gate, up, checkpoint.read_slice(names[1], expert)
    gate, up, down = (checkpoint.read(name) for name in names)
    return gate, up, down


def _in_file_order(checkpoint: Checkpoint, layers: dict[str, ExpertTensors], E: int) -> list[tuple[str, int]]:
    def place(job: tuple[str, int]) -> tuple[str, int, int]:
        entry = checkpoint.entry(layers[job[0]].names_of(job[1])[0])
        return entry.file.name, entry.start, job[1]

    return sorted(((layer, expert) for layer in layers for expert in range(E)), key=place)


def _pack_all(
    checkpoint: Checkpoint, layers: dict[str, ExpertTensors], spec: CacheSpec, progress: bool, put: Put
) -> None:
    """Read every expert ahead on a second thread and hand it to ``put``."""
    matrix_elements = 3 * spec.hidden_size * spec.intermediate_size
    bar = tqdm(
        total=len(layers) * spec.num_experts * matrix_elements,
        unit="param",
        unit_scale=True,
        desc=f"packing experts ({spec.weight_format})",
        disable=None if progress else True,
    )
    with bar:
        for layer, expert, matrices in _read_ahead(checkpoint, layers, spec.num_experts):
            try:
                put(layer, expert, matrices)
            except ValueError as error:
                raise _named(error, checkpoint, layers[layer], expert, matrices) from None
            bar.update(matrix_elements)


def _read_ahead(
    checkpoint: Checkpoint, layers: dict[str, ExpertTensors], E: int
) -> Iterator[tuple[str, int, Matrices]]:
    pending: deque[tuple[str, int, Future[Matrices]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kt_sft-read") as pool:
        try:
            for layer, expert in _in_file_order(checkpoint, layers, E):
                pending.append((layer, expert, pool.submit(_read, checkpoint, layers[layer], expert)))
                if len(pending) > _READ_AHEAD:
                    layer, expert, future = pending.popleft()
                    yield layer, expert, future.result()
            while pending:
                layer, expert, future = pending.popleft()
                yield layer, expert, future.result()
        finally:
            for *_, future in pending:
                future.cancel()


def _named(
    error: ValueError, checkpoint: Checkpoint, tensors: ExpertTensors, expert: int, matrices: Matrices
) -> ValueError:
    """The error with the file and tensor that caused it."""
    names = tensors.names_of(expert)
    per_matrix = [names[0], names[0], names[1]] if tensors.fused else names
    for name, matrix in zip(per_matrix, matrices, strict=True):
        if not torch.isfinite(matrix.to(torch.bfloat16)).all():
            kind = "NaN" if torch.isnan(matrix).any() else "Inf, or a value beyond bf16"
            return ValueError(
                f"{checkpoint.entry(name).file}: tensor {name!r}, expert {expert}: expected finite values, got {kind}; "
                "the checkpoint is damaged: download it again"
            )
    return ValueError(f"{checkpoint.folder}: tensors {', '.join(names)}, expert {expert}: {error}")


def _build(
    path: Path, checkpoint: Checkpoint, layers: dict[str, ExpertTensors], spec: CacheSpec, progress: bool
) -> None:
    one = PackedExperts.empty(1, *spec.sizes()[1:])
    with PackedWriter(path, spec) as writer:

        def put(layer: str, expert: int, matrices: Matrices) -> None:
            one.storage.zero_()  # padding bytes are part of the checksums
            one.pack_expert_(0, *matrices)
            writer.put(layer, expert, one.storage)

        _pack_all(checkpoint, layers, spec, progress, put)
        writer.commit()


def _pack_in_memory(
    checkpoint: Checkpoint, layers: dict[str, ExpertTensors], spec: CacheSpec, progress: bool
) -> dict[str, PackedExperts]:
    packed = {name: PackedExperts.empty(*spec.sizes()) for name in layers}
    _pack_all(checkpoint, layers, spec, progress, lambda layer, expert, m: packed[layer].pack_expert_(expert, *m))
    return packed


def _digest(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _content(checkpoint: Checkpoint, layers: dict[str, ExpertTensors], E: int) -> str:
    rows = []
    for layer, tensors in layers.items():
        for name in dict.fromkeys([*tensors.names_of(0), *tensors.names_of(E - 1)]):
            sample = hashlib.blake2b(checkpoint.sample(name), digest_size=16).hexdigest()
            rows.append((layer, name, checkpoint.dtype(name), checkpoint.shape(name), sample))
    return _digest(rows)


def _source(checkpoint: Checkpoint, content: str) -> str:
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.shards]
    config_file = checkpoint.folder / "config.json"
    config = hashlib.blake2b(config_file.read_bytes()).hexdigest() if config_file.is_file() else ""
    headers = [hashlib.blake2b(checkpoint.headers[file]).hexdigest() for file in checkpoint.shards]
    return _digest(stats, config, headers, content)


def _packing(config: KtConfig) -> str:
    """Changes when quantiser or layout do: the packed bytes of a matrix whose int4 codes are exact, so free of ties."""
    D, F = 96, 80
    probe = PackedExperts.empty(1, D, F, config.weight_format, config.group_size)
    probe.storage.zero_()
    weight = (torch.arange(F * D) % 15 - 7).float()
    probe.pack_expert_(0, weight.view(F, D), -weight.view(F, D), 2 * weight.view(D, F))
    return hashlib.blake2b(probe.storage.numpy().tobytes(), digest_size=16).hexdigest()


def _path(checkpoint: Checkpoint, spec: CacheSpec, config: KtConfig) -> Path | None:
    sizes = "x".join(str(n) for n in (len(spec.layers), spec.num_experts, spec.hidden_size, spec.intermediate_size))
    kind = f"{spec.weight_format}-g{spec.group_size}-{sizes}"
    if config.weight_path:
        folder = Path(config.weight_path).expanduser()
        _refuse_foreign(folder)
        return folder / f"experts-{kind}-{spec.content[:12]}{SUFFIX}"
    if config.cache_folder is None:
        return None
    where = checkpoint.folder.resolve()
    return config.cache_folder / f"{where.name}-{kind}-{_digest(str(where), spec.layers)[:12]}{SUFFIX}"


def _refuse_foreign(folder: Path) -> None:
    """Folders of KTransformers' own packed weights, or of a model, are not ours to read or to fill."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"weight_path: expected a folder, got the file {folder}")
    found = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    if found and not any(SUFFIX in name for name in found):
        raise ValueError(
            f"weight_path {folder}: expected a folder with experts packed by kt_sft ({SUFFIX}) or an empty one, "
            f"found {found[0]!r}; leave weight_path (kt_weight_path) out: the experts are packed once from the model"
        )
