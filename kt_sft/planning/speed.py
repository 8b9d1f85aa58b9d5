"""Seconds of loading and of a training step: work divided by rates that are measured or assumed (``Host`` says which).

    experts, one pass   2 * 3 D F K T / (peak * efficiency)  +  bytes of the active experts / memory bandwidth
    passes              forward, again in backward with gradient checkpointing, and backward (input gradients only: the
                        weights are frozen); activation policy recompute adds gate and up, two thirds of a forward
    adapters            2 * 3 R (D + F) K T forward and 2.5 times that backward, at the lower rate of thin products
    active experts      E (1 - (1 - K / E)^T): uniform routing

The sum agrees with the measured times of one BF16 layer of Qwen3-30B-A3B on two AVX512-BF16 cores (benchmarks/results)
within 15 % forward and 40 % backward for 1 to 2048 tokens.

Left out: attention scores (quadratic in the length), the optimizer, the data loader, waiting between processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.layout import QUANTISED, Layout
from .job import AS_STORED, Host, Job
from .memory import adapter_parameters, layer_bytes, packed_bytes
from .model import ExpertLayers, ModelParts
from .storage import Storage


@dataclass(frozen=True)
class Span:
    """One entry of a time: what, how many seconds, and the arithmetic."""

    name: str
    seconds: float
    how: str


def step_spans(parts: ModelParts, job: Job, host: Host, weight_format: str | Layout) -> list[Span]:
    """One step of all processes: each takes ``job.tokens`` tokens forward and backward."""
    forwards = 2 if job.gradient_checkpointing else 1
    passes = forwards + 1 + (2 / 3 if job.activation_policy == "recompute" else 0)
    n, rate = job.processes, host.cpu.value * host.efficiency
    compute = sum(g.layers * _flops(g, parts.top_k, job.tokens) for g in parts.experts) / rate
    read = sum(g.layers * _active_bytes(g, parts.top_k, job.tokens, weight_format) for g in parts.experts)
    stream = read / host.memory.value
    how = f"{n} x {passes:.3g} passes x (compute {compute:.3g} s + streaming {stream:.3g} s)"
    spans = [Span("routed experts (CPU)", n * passes * (compute + stream), how)]
    if job.expert_rank:
        units = forwards + 2.5
        flops = sum(g.layers * _lora_flops(g, parts.top_k, job) for g in parts.experts)
        seconds = n * units * flops / (host.cpu.value * host.lora_efficiency)
        spans.append(Span("their adapters (CPU)", seconds, f"{n} x {units} x {flops / 1e12:.3g} TFLOP"))
    return [*spans, *_rest_spans(parts, job, host, forwards)]


def _rest_spans(parts: ModelParts, job: Job, host: Host, forwards: int) -> list[Span]:
    used = parts.multiplied_parameters
    flops = 2 * used * job.tokens * (forwards + 1)
    where, rate = ("GPU", host.gpu.value) if job.gpus else ("CPU", host.cpu.value * host.efficiency)
    how = f"{used:,} x 2 x T x {forwards + 1} passes = {flops / 1e12:.3g} TFLOP"
    spans = [Span(f"everything else ({where})", flops / rate, how)]
    if job.gpus:
        experts, _ = adapter_parameters(parts, job)
        hidden = 4 * job.tokens * parts.hidden * (forwards + 1) * sum(g.layers for g in parts.experts)
        moved = hidden + 4 * experts * (forwards + 2)
        spans.append(
            Span("host to GPU and back", moved / host.link.value, f"{moved / 1e9:.3g} GB: hidden states and factors")
        )
    return spans


def first_load_spans(
    parts: ModelParts, host: Host, weight_format: str | Layout, stored: Storage, checkpoint: int
) -> list[Span]:
    """Read the checkpoint, pack its experts while reading, write the cache: them, and the rest if it is dequantised."""
    key = weight_format if isinstance(weight_format, str) else weight_format[0].name
    bf16 = 2 * parts.expert_parameters
    written = packed_bytes(parts, weight_format) + stored.copy_bytes(parts)
    disk = (checkpoint + written) / host.disk.value
    pack = bf16 / host.pack[key if key in QUANTISED else AS_STORED].value
    how = f"the longer of disk {disk:.3g} s ({checkpoint / 1e9:,.3g} GB read, {written / 1e9:,.3g} GB written) "
    how += f"and packing {pack:.3g} s ({bf16 / 1e9:,.3g} GB of BF16)"
    return [Span(f"read {stored.name}, pack, write", max(disk, pack), how)]


def next_load_spans(parts: ModelParts, host: Host, weight_format: str | Layout, stored: Storage) -> list[Span]:
    """Map the cache file after checking it (it is read once), and read the rest of the checkpoint."""
    packed, rest = packed_bytes(parts, weight_format), stored.copy_bytes(parts) or stored.rest_bytes(parts)
    how = f"{packed / 1e9:,.3g} GB of packed experts + {rest / 1e9:,.3g} GB of the rest"
    return [Span("check and map, read the rest", (packed + rest) / host.disk.value, how)]


def seconds(spans: list[Span]) -> float:
    return sum(span.seconds for span in spans)


def _flops(group: ExpertLayers, top_k: int, tokens: int) -> float:
    return 2 * 3 * group.hidden * group.intermediate * top_k * tokens


def _lora_flops(group: ExpertLayers, top_k: int, job: Job) -> float:
    return 2 * 3 * job.expert_rank * (group.hidden + group.intermediate) * top_k * job.tokens


def _active_bytes(group: ExpertLayers, top_k: int, tokens: int, weight_format: str | Layout) -> float:
    """Packed bytes of the experts of one layer that ``tokens`` tokens choose."""
    active = 1 - (1 - min(top_k / group.experts, 1)) ** tokens
    return active * layer_bytes(group, weight_format)
