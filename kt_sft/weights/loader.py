"""Experts of a checkpoint, packed: from the cache file if it fits, else built from the shards, whatever their format.

Tensors are read in the order of the files, one expert at a time and some ahead, and packed where they stay. The cache
file is written behind the run (saving.py): a first start takes as long as with ``cache_dir: none``. Where memory would
not hold the experts, and for a file that is made to be kept (``weight_path``), they are packed in a buffer for one
expert, written, and mapped at the end. Either way memory beyond the packed experts is a few experts' tensors.

Codes and scales of a checkpoint are kept as they are if they fit the format asked for; otherwise experts are
dequantised one by one and quantised anew. A log line per layer says what packing kept of the signal, by its expert 0:

    SQNR = 10 log10(sum w^2 / sum (w - packed w)^2) dB

A cache file belongs to the checkpoint that it came from: the shards' names, sizes and times, config.json, and the
expert tensors' names, shapes, dtypes and samples of their bytes. With ``weight_path`` the times do not count, so that a
copy on another machine stays usable. A file that does not fit is rebuilt, and one log line says why. What a killed
process has packed of it is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, repeat
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.linalg import vector_norm as norm
from tqdm import tqdm

from kt_sft import native

from ..config import KtConfig
from ..distributed.memory import filled_once
from ..distributed.peers import Peers
from ..machine import facts
from ..ops import memory
from ..ops.layout import QUANTISED, Layout, MatrixFormat, name_of
from ..ops.packed import PackedExperts
from . import packed_form
from .cache import NEAREST, CacheMiss, CacheSpec, PackedWriter, build_lock, open_packed
from .checkpoint import Checkpoint, ExpertTensors
from .formats import ExpertReader, open_checkpoint
from .packed_form import choose_layout, format_of, report_requantised, requantised, wanted
from .placement import on_nodes
from .quantized import QuantizedWeight
from .saving import Saver

logger = logging.getLogger(__name__)

SUFFIX = ".ktpack"
READERS = max(2, min(4, len(os.sched_getaffinity(0)) // 4))  # threads; each holds one expert
_READ_AHEAD = READERS + 1  # experts
_SAMPLERS = 16  # threads that read a few KB here and there, and wait for the disk
_SPARE_MEMORY = 2 << 30  # what must be left beside the experts to pack them in memory

Matrix = Tensor | QuantizedWeight  # values, or codes that are packed as they are
Matrices = tuple[Matrix, Matrix, Matrix]
Readers = dict[str, ExpertReader]
Put = Callable[[str, int, Matrices], None]
_T = TypeVar("_T")


def load_experts(
    model_dir: str | os.PathLike[str],
    layers: dict[str, ExpertTensors],
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    config: KtConfig,
    progress: bool = True,
    held: range | None = None,
    peers: Peers | None = None,
) -> dict[str, PackedExperts]:
    """The packed experts of every layer, by the names of ``layers``; all layers have the same sizes.

    ``held``: of the ``num_experts`` of the checkpoint, those to pack; None: all. ``peers``: the processes of this host
    that call this together; they get one copy in memory, packed or checked by the first of them.

    Raises:
        ValueError: a file or tensor of the checkpoint is missing, malformed, of a wrong shape or dtype, or not finite.
        OSError: the cache file cannot be written.
    """
    job = make_job(
        model_dir,
        layers,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        config=config,
        progress=progress,
        held=held,
    )
    packed = _packed(job, peers)
    memory.release_freed()  # buffers of the readers
    return {layer: _with_biases(experts, job.readers[layer], job.held) for layer, experts in packed.items()}


def _with_biases(packed: PackedExperts, reader: ExpertReader, held: range) -> PackedExperts:
    """Biases are small and not part of the packed file: they are read every time."""
    biases = reader.biases(held)
    return packed if biases is None else packed.with_(biases=biases)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be packed: ``held`` experts of the layers of ``readers``. ``path``: into which file, if into one."""

    checkpoint: Checkpoint
    readers: Readers
    spec: CacheSpec
    held: range
    config: KtConfig
    path: Path | None
    progress: bool

    def with_layouts(self) -> Job:
        """The same with the format of every matrix, which the first expert of every layer decides."""
        layouts, lost = [], []
        for name, reader in self.readers.items():
            first = reader.read(self.held.start, values=False)
            layouts.append(choose_layout(name, first, self.config))
            lost.append(requantised(first, self.config))
        report_requantised(lost)
        return replace(self, spec=replace(self.spec, layouts=tuple(layouts), rounding=self.spec.rounding or NEAREST))

    def layout(self, layer: str) -> Layout:
        return self.spec.sizes(self.spec.layers.index(layer))[-1]


def make_job(
    model_dir: str | os.PathLike[str],
    layers: dict[str, ExpertTensors],
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    config: KtConfig,
    progress: bool = True,
    held: range | None = None,
) -> Job:
    """Open the checkpoint, check what it says of its experts, and find the file's place; arguments as above."""
    checkpoint = open_checkpoint(config.expert_checkpoint_path or model_dir)
    sizes = (num_experts, hidden_size, intermediate_size)
    readers = {name: ExpertReader(checkpoint, tensors, *sizes) for name, tensors in layers.items()}
    for reader in readers.values():
        reader.require()
    held = range(num_experts) if held is None else held
    content = _content(checkpoint, readers, num_experts, held)
    spec = CacheSpec(
        wanted=wanted(config),
        num_experts=len(held),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        layers=tuple(layers),
        packing=_packing(),
        content=content,
        source="" if config.weight_path else _source(checkpoint, content),
        rounding=None if config.weight_path else NEAREST,
    )
    path = _path(checkpoint, spec, held, config)
    return Job(
        checkpoint=checkpoint, readers=readers, spec=spec, held=held, config=config, path=path, progress=progress
    )


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A file that is to be written, and what is to be closed then: its writer and its lock."""

    job: Job
    writer: PackedWriter
    owned: ExitStack


def _packed(job: Job, peers: Peers | None) -> dict[str, PackedExperts]:
    if job.path is None:
        return _pack_in_memory(job.with_layouts(), peers)
    path, behind = job.path, job.config.weight_path is None and (peers is not None or _is_alone())
    found = _by_the_first(peers, lambda: _open_or_begin(path, job, behind=behind))
    if not _said_by_the_first(peers, isinstance(found, _Begun)):
        assert not isinstance(found, _Begun)
        return on_nodes(found or open_packed(path, job.spec, check=False), peers)
    if not isinstance(found, _Begun):  # another process writes the file
        return _pack_in_memory(job.with_layouts(), peers)
    with found.owned as owned:
        layers = _pack_in_memory(found.job, peers, found.writer)
        exchange = peers is None and len(native.nodes()) == 1
        Saver(layers, found.writer, owned.pop_all(), exchange=exchange).start()
    return layers


def _is_alone() -> bool:
    """False for one of several ranks of a host that share nothing but the file: those who wait for it train together
    with the one who makes it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1


def _open_or_begin(path: Path, job: Job, *, behind: bool) -> dict[str, PackedExperts] | _Begun:
    """The file, mapped; or, with ``behind`` and enough memory, what it takes to write it behind the run."""
    try:
        return open_packed(path, job.spec)
    except CacheMiss:
        pass
    with ExitStack() as owned:
        owned.enter_context(build_lock(path))
        try:
            return open_packed(path, job.spec)  # built by another process meanwhile
        except CacheMiss as miss:
            logger.info("Packing the experts of %s into %s: %s.", job.checkpoint.folder, path, miss)
        job = job.with_layouts()
        if behind and facts.memory().available >= job.spec.offsets[-1] + _SPARE_MEMORY:
            writer = owned.enter_context(PackedWriter(path, job.spec, durable=False))
            return _Begun(job=job, writer=writer, owned=owned.pop_all())
        _build(path, job)
        return open_built(path, job.spec)


def open_built(path: Path, spec: CacheSpec) -> dict[str, PackedExperts]:
    """Check and map a file that was just written."""
    try:
        return open_packed(path, spec)
    except CacheMiss as miss:
        raise OSError(f"packed experts {path}: unusable right after writing: {miss}; check the disk") from miss


def _by_the_first(peers: Peers | None, work: Callable[[], _T]) -> _T | None:
    """What the first process gets from ``work``; None on the others, which raise its error too."""
    if peers is None:
        return work()
    error: Exception | None = None
    result: _T | None = None
    if peers.index == 0:
        try:
            result = work()
        except Exception as failure:
            error = failure
    peers.raise_any(error, "loading the experts")
    return result


def _said_by_the_first(peers: Peers | None, yes: bool) -> bool:
    return yes if peers is None else bool(peers.numbers([yes])[0][0])


def _read(reader: ExpertReader, expert: int, layout: Layout, buffers: dict[str, Tensor]) -> Matrices:
    """One expert's matrices; what is quantised anew is dequantised into ``buffers``, whose pages are there already."""
    weights = reader.read(expert)

    def matrix(name: str, part: QuantizedWeight, target: MatrixFormat) -> Matrix:
        if part.kind == "float":
            return part.codes
        if format_of(part) == target:
            return part
        if target.name not in QUANTISED:
            raise ValueError(
                f"expert {expert}: {name}: expected {target} as in the layer's first expert, got {part.kind}"
            )
        if name not in buffers:
            buffers[name] = torch.empty(part.shape)
        return part.dequantize(out=buffers[name])

    gate, up, down = layout
    return matrix("gate", weights.gate, gate), matrix("up", weights.up, up), matrix("down", weights.down, down)


def _in_file_order(job: Job) -> list[tuple[str, int]]:
    def place(item: tuple[str, int]) -> tuple[str, int, int]:
        entry = job.checkpoint.entry(job.readers[item[0]].names_of(item[1])[0])
        return entry.file.name, entry.start, item[1]

    return sorted(((layer, expert) for layer in job.readers for expert in job.held), key=place)


def _pack_all(job: Job, put: Put, is_done: Callable[[str, int], bool] = lambda layer, expert: False) -> None:
    """Read every expert ahead on other threads and hand it to ``put``, unless ``is_done``.

    Both get numbers that count from the first expert that is held.
    """
    order = _in_file_order(job)
    todo = [(layer, expert) for layer, expert in order if not is_done(layer, expert - job.held.start)]
    nbytes = {layer: reader.nbytes(job.held.start) for layer, reader in job.readers.items()}
    total, left = (sum(nbytes[layer] for layer, _ in experts) for experts in (order, todo))
    if len(todo) < len(order):
        logger.info("%d of %d experts were packed before an interruption.", len(order) - len(todo), len(order))
    names = sorted({name_of(layout) for layout in job.spec.layouts or ()})
    bar = tqdm(
        total=total,
        initial=total - left,
        unit="B",
        unit_scale=True,
        desc=f"packing experts ({', '.join(names)})",
        disable=None if job.progress else True,
    )
    with bar:
        for layer, expert, matrices in _read_ahead(job, todo):
            try:
                put(layer, expert - job.held.start, matrices)
            except ValueError as error:
                raise _named(error, job.checkpoint, job.readers[layer], expert, matrices) from None
            bar.update(nbytes[layer])


def _read_ahead(job: Job, experts: list[tuple[str, int]]) -> Iterator[tuple[str, int, Matrices]]:
    pending: deque[tuple[str, int, Future[Matrices]]] = deque()
    buffers: cycle[dict[str, Tensor]] = cycle([{} for _ in range(_READ_AHEAD + 1)])
    with ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="kt_sft-read") as pool:
        try:
            for layer, expert in experts:
                future = pool.submit(_read, job.readers[layer], expert, job.layout(layer), next(buffers))
                pending.append((layer, expert, future))
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
    error: ValueError, checkpoint: Checkpoint, reader: ExpertReader, expert: int, matrices: Matrices
) -> ValueError:
    """The error with the file and tensor that caused it."""
    names = reader.matrix_names(expert)
    for name, matrix in zip(names, matrices, strict=True):
        if name in checkpoint and isinstance(matrix, Tensor) and not torch.isfinite(matrix.to(torch.bfloat16)).all():
            kind = "NaN" if torch.isnan(matrix).any() else "Inf, or a value beyond bf16"
            return ValueError(
                f"{checkpoint.entry(name).file}: tensor {name!r}, expert {expert}: expected finite values, got {kind}; "
                "the checkpoint is damaged: download it again"
            )
    return ValueError(f"{checkpoint.folder}: tensors {', '.join(names)}, expert {expert}: {error}")


def _pack(packed: PackedExperts, index: int, matrices: Matrices) -> None:
    for projection, matrix in enumerate(matrices):
        packed_form.pack(packed, index, projection, matrix)


def _report(layer: str, packed: PackedExperts, matrices: Matrices) -> None:
    """Log what packing kept of one expert; ``packed`` holds only that one."""
    kept = sorted({str(m) for m, source in zip(packed.layout, matrices, strict=True) if not isinstance(source, Tensor)})
    if kept:
        logger.info("%s: %s kept as stored", layer, ", ".join(kept))
    sources = [(projection, source) for projection, source in enumerate(matrices) if isinstance(source, Tensor)]
    if not sources or packed.weight_format == "bf16":
        return
    with _on_one_thread():
        signal = sum(norm(source.float()).item() ** 2 for _, source in sources)
        noise = sum(norm(packed.matrix(0, projection).sub_(source)).item() ** 2 for projection, source in sources)
    sqnr = 10 * math.log10(signal / noise) if signal and noise else math.inf
    logger.info("%s packed as %s: SQNR %.1f dB (expert 0)", layer, packed.weight_format, sqnr)


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """torch's own threads left alone: after every operation they spin, on cores that the load has better uses for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _build(path: Path, job: Job) -> None:
    """Pack into one buffer while another thread writes the one before."""
    buffers: dict[Layout, Iterator[PackedExperts]] = {}  # two of one expert, in turn
    writes: deque[Future[None]] = deque()
    durable = job.config.weight_path is not None
    with (
        PackedWriter(path, job.spec, durable=durable) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="kt_sft-write") as pool,
    ):

        def put(layer: str, expert: int, matrices: Matrices) -> None:
            if len(writes) == 2:
                writes.popleft().result()
            layout = job.layout(layer)
            if layout not in buffers:
                sizes = (1, job.spec.hidden_size, job.spec.intermediate_size, layout)
                buffers[layout] = cycle([PackedExperts.empty(*sizes) for _ in range(2)])
            one = next(buffers[layout])
            one.storage.numpy().fill(0)  # padding bytes are part of the checksums
            _pack(one, 0, matrices)
            if expert == 0:
                _report(layer, one, matrices)
            writes.append(pool.submit(writer.put, layer, expert, one.storage))

        _pack_all(job, put, writer.holds)
        for write in writes:
            write.result()
        writer.commit()


def _pack_in_memory(job: Job, peers: Peers | None, writer: PackedWriter | None = None) -> dict[str, PackedExperts]:
    """Layers that lie in one stretch of memory as in a file. What ``writer`` holds is taken from there."""
    spec = job.spec

    def layers_in(stretch: Tensor) -> dict[str, PackedExperts]:
        return {
            name: PackedExperts(stretch[spec.offsets[i] :][: spec.layer_bytes[i]], *spec.sizes(i))
            for i, name in enumerate(spec.layers)
        }

    def pack_into(stretch: Tensor) -> None:
        layers = layers_in(stretch)

        def put(layer: str, expert: int, matrices: Matrices) -> None:
            _pack(layers[layer], expert, matrices)
            if expert == 0:
                _report(layer, layers[layer].one(0), matrices)

        with memory.populated_ahead(stretch):
            if writer is None:
                _pack_all(job, put)
                return
            for name, experts in layers.items():
                for e in range(spec.num_experts):
                    if writer.holds(name, e):
                        one = experts.one(e)
                        one.copy_(one.in_memory(writer.get(name, e)))
            _pack_all(job, put, writer.holds)

    if peers is not None:
        return layers_in(filled_once(peers, spec.offsets[-1], pack_into))
    stretch = memory.zeros_for_matrices(spec.offsets[-1], 3 * spec.num_experts * len(spec.layers))
    pack_into(stretch)
    return layers_in(stretch)


def _digest(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _content(checkpoint: Checkpoint, readers: Readers, E: int, held: range) -> str:
    def row(layer: str, name: str) -> tuple[object, ...]:
        sample = hashlib.blake2b(checkpoint.sample(name), digest_size=16).hexdigest()
        return layer, name, checkpoint.dtype(name), checkpoint.shape(name), sample

    rows: list[tuple[object, ...]] = []
    with ThreadPoolExecutor(_SAMPLERS, thread_name_prefix="kt_sft-sample") as pool:
        names = {layer: dict.fromkeys([*r.names_of(0), *r.names_of(E - 1)]) for layer, r in readers.items()}
        sampled = {layer: pool.map(row, repeat(layer), names[layer]) for layer in readers}
        for layer, reader in readers.items():
            rows += [*reader.arrangement(layer), *sampled[layer]]
    return _digest(rows) if held == range(E) else _digest(rows, held.start, held.stop, E)


def _source(checkpoint: Checkpoint, content: str) -> str:
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.shards]
    config_file = checkpoint.folder / "config.json"
    config = hashlib.blake2b(config_file.read_bytes()).hexdigest() if config_file.is_file() else ""
    headers = [hashlib.blake2b(checkpoint.headers[file]).hexdigest() for file in checkpoint.shards]
    return _digest(stats, config, headers, content)


def _packing() -> str:
    """Changes when quantiser or layout do: the packed bytes of fixed matrices."""
    D, F = 96, 80
    weight = (torch.arange(F * D) * 37 % 255 - 127).float()
    digest = hashlib.blake2b(digest_size=16)
    for name in QUANTISED:
        probe = PackedExperts.empty(1, D, F, name)
        probe.storage.zero_()
        probe.pack_expert_(0, weight.view(F, D), -weight.view(F, D), 2 * weight.view(D, F))
        digest.update(probe.storage.numpy().tobytes())
    return digest.hexdigest()


def _path(checkpoint: Checkpoint, spec: CacheSpec, held: range, config: KtConfig) -> Path | None:
    sizes = "x".join(str(n) for n in (len(spec.layers), spec.num_experts, spec.hidden_size, spec.intermediate_size))
    kind = f"{spec.wanted}-{sizes}" + (f"-from{held.start}" if held.start else "")
    if config.weight_path:
        folder = Path(config.weight_path).expanduser()
        _refuse_foreign(folder)
        return folder / f"experts-{kind}-{spec.content[:12]}{SUFFIX}"
    if config.cache_folder is None:
        return None
    where, shards = checkpoint.folder.resolve(), [shard.name for shard in checkpoint.shards]
    return config.cache_folder / f"{where.name}-{kind}-{_digest(str(where), shards, spec.layers)[:12]}{SUFFIX}"


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
