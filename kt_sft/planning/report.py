"""The whole plan of a run: one row per weight format, the account of one of them, and whether this machine suffices."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..ops.layout import QUANTISED, uniform
from . import memory, speed
from .job import Host, Job
from .memory import Line
from .model import ModelParts, describe
from .source import Source
from .speed import Span
from .storage import Storage, storage

FORMATS = ("auto", *QUANTISED)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One weight format: its account in bytes and seconds. ``short``: what this machine lacks; empty: it fits.

    ``cache``: on disk, ``packed`` experts and a dequantised copy of the rest where that is quantised.

    ``kept``: the experts stay as the checkpoint stores them.
    """

    weight_format: str
    kept: bool
    packed: int
    cache: int
    ram: list[Line]
    gpu: list[Line]
    first_load: list[Span]
    next_load: list[Span]
    step: list[Span]
    short: list[str]

    @property
    def fits(self) -> bool:
        return not self.short


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str
    parts: ModelParts
    stored: Storage
    checkpoint: int
    checkpoint_from: str
    job: Job
    host: Host
    options: list[Option]

    def option(self, weight_format: str) -> Option:
        return next(o for o in self.options if o.weight_format == weight_format)

    @property
    def best(self) -> Option:
        """The checkpoint's own format if it fits, else the widest that does, else the smallest."""
        fitting = [o for o in self.options if o.fits]
        if not fitting:
            return min(self.options, key=lambda o: o.packed)
        return next((o for o in fitting if o.kept), max(fitting, key=lambda o: o.packed))


def check_formats(formats: tuple[str, ...]) -> None:
    """Raises ValueError unless all are formats that are made from any checkpoint, or auto."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}; got {name!r}")


def make(source: Source, job: Job, host: Host, formats: tuple[str, ...] = ()) -> Plan:
    """``formats``: none means all that apply: auto only where the experts are quantised already.

    Raises ValueError for a model or a format that cannot be planned; the message says what is missing.
    """
    check_formats(formats)
    parts, stored = describe(source.config), storage(source.config)
    formats = formats or (FORMATS if stored.kept else QUANTISED)
    checkpoint = source.nbytes or stored.nbytes(parts)
    return Plan(
        name=source.name,
        parts=parts,
        stored=stored,
        checkpoint=checkpoint,
        checkpoint_from=source.nbytes_from or f"computed from the {stored.name} weights",
        job=job,
        host=host,
        options=[_option(parts, job, host, name, stored, checkpoint) for name in formats],
    )


def _option(parts: ModelParts, job: Job, host: Host, wanted: str, stored: Storage, checkpoint: int) -> Option:
    kept = stored.kept if wanted == "auto" else None
    made = "int8" if wanted == "auto" else wanted  # unless it is kept
    name = (kept, kept, kept) if kept else uniform(made)
    ram = memory.host_lines(parts, job, name)
    gpu = memory.model_lines(parts, job) if job.gpus else []
    packed = memory.packed_bytes(parts, name)
    return Option(
        weight_format=f"auto ({kept})" if kept else made,
        kept=kept is not None,
        packed=packed,
        ram=ram,
        gpu=gpu,
        first_load=speed.first_load_spans(parts, host, name, stored, checkpoint),
        next_load=speed.next_load_spans(parts, host, name, stored),
        step=speed.step_spans(parts, job, host, name),
        cache=packed + stored.copy_bytes(parts),
        short=_short(host, memory.total(ram), memory.total(gpu), packed + stored.copy_bytes(parts)),
    )


def _short(host: Host, ram: int, gpu: int, cache: int) -> list[str]:
    found = []
    if ram > host.ram:
        found.append(f"{_gb(ram - host.ram)} more RAM")
    elif ram > host.ram_free:
        found.append(f"{_gb(ram - host.ram_free)} of RAM to be freed")
    if gpu > host.gpu_memory:
        found.append(f"{_gb(gpu - host.gpu_memory)} more memory per GPU")
    if host.cache_folder is not None and cache > host.cache_free:
        found.append(f"{_gb(cache - host.cache_free)} more disk for the cache (or cache_dir: none)")
    return found


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything, for JSON: bytes, seconds, rates per second."""
    parts, host = asdict(plan.parts), asdict(plan.host)
    host["cache_folder"] = str(plan.host.cache_folder) if plan.host.cache_folder else None
    options = []
    for option in plan.options:
        row = asdict(option) | {"fits": option.fits}
        row["total"] = {
            "ram_bytes": memory.total(option.ram),
            "gpu_bytes": memory.total(option.gpu),
            "cache_bytes": option.cache,
            "first_load_seconds": speed.seconds(option.first_load),
            "next_load_seconds": speed.seconds(option.next_load),
            "step_seconds": speed.seconds(option.step),
            "tokens_per_second": plan.job.processes * plan.job.tokens / speed.seconds(option.step),
        }
        options.append(row)
    return {
        "model": plan.name,
        "parts": parts
        | {
            "total_parameters": plan.parts.total_parameters,
            "expert_parameters": plan.parts.expert_parameters,
            "active_parameters": plan.parts.active_parameters,
        },
        "checkpoint": {"format": plan.stored.name, "bytes": plan.checkpoint, "from": plan.checkpoint_from},
        "job": asdict(plan.job),
        "host": host,
        "options": options,
        "best": plan.best.weight_format,
    }


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB"
