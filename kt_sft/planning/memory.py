"""Bytes of a run, part by part, in host memory and on each GPU. Letters: T tokens of a step and process, D hidden,
F intermediate, E experts, K top-k, R LoRA rank, L decoder layers, V vocabulary.

Exact: the packed experts (what the kernels themselves say). Counted: weights, adapters and optimizer states. Estimated:
the activations outside the experts, whose lines say by which rule. Without a GPU, everything is in host memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import native
from ..ops.layout import Layout
from ..ops.packed import PackedExperts
from .job import Job
from .model import ExpertLayers, ModelParts

WAVE_ROWS = 4096  # routed rows that the kernels' workspace holds at a time
OPTIMIZER = 16  # bytes per trained value: fp32 value, gradient, and the two averages of Adam
LOGITS = 12  # bytes per logit: bf16 and fp32 values, and the gradients of both
PROCESS = 600 << 20  # resident after the imports of LLaMA-Factory's trainer, measured with torch 2.13 (CPU)
ALLOCATOR = 2
GPU_CONTEXT = 700 << 20
GPU_PROCESS = 1500 << 20  # host memory that CUDA's libraries and pinned buffers take in a process


@dataclass(frozen=True)
class Line:
    """One entry of an account: what, how many bytes, and the arithmetic or the reason."""

    name: str
    nbytes: int
    how: str


def total(lines: list[Line]) -> int:
    return sum(line.nbytes for line in lines)


def packed_bytes(parts: ModelParts, weight_format: str | Layout) -> int:
    """Codes, scales and padding of all layers, and their biases in fp32."""
    return sum(group.layers * (layer_bytes(group, weight_format) + 4 * group.biases) for group in parts.experts)


def layer_bytes(group: ExpertLayers, weight_format: str | Layout) -> int:
    """Packed matrices of one layer of the group."""
    return PackedExperts.nbytes_for(group.experts, group.hidden, group.intermediate, weight_format)


def adapter_parameters(parts: ModelParts, job: Job) -> tuple[int, int]:
    """(routed experts, everything else): R (inputs + outputs) for each adapted matrix."""
    experts = sum(g.layers * g.experts * 3 * (g.hidden + g.intermediate) for g in parts.experts)
    return job.expert_rank * experts, job.lora_rank * parts.adapted


def host_lines(parts: ModelParts, job: Job, weight_format: str | Layout) -> list[Line]:
    """Host memory of all processes together."""
    packed, n = packed_bytes(parts, weight_format), job.processes
    libraries = PROCESS + (GPU_PROCESS if job.gpus else 0)
    how = f"{n} x {_gb(PROCESS)} after the imports of LLaMA-Factory" + (
        f", + {_gb(GPU_PROCESS)} for CUDA, assumed" if job.gpus else ""
    )
    lines = [
        Line("packed experts", packed, _packed_how(parts, weight_format) + ", one copy for all processes"),
        Line("workspace of the kernels", n * workspace_bytes(parts, job), f"{n} x {WAVE_ROWS:,} routed rows at a time"),
        Line("saved for the experts' backward", n * saved_bytes(parts, job), _saved_how(parts, job)),
        Line("buffers of one layer's call", n * _call_bytes(parts, job), f"{n} x hidden states and factors, fp32"),
        Line("Python and libraries", n * libraries, how),
    ]
    return lines if job.gpus else [*lines, *model_lines(parts, job)]


def model_lines(parts: ModelParts, job: Job) -> list[Line]:
    """Memory of each GPU; of the host where there is none."""
    activations = _activation_lines(parts, job)
    if job.gpus:
        last = Line("CUDA context", GPU_CONTEXT, "assumed")
    else:
        kept = ALLOCATOR * total(activations)
        last = Line("freed but kept by malloc", kept, f"{ALLOCATOR} x the activations: seen with `make demo`'s model")
    return [*_weight_lines(parts, job), *activations, last]


def _weight_lines(parts: ModelParts, job: Job) -> list[Line]:
    """Weights in bf16, adapters and their optimizer."""
    share = job.gpus if job.gpus > 1 and job.sharded else 1
    of_share = f" / {share} GPUs" if share > 1 else ""
    lines = [
        Line(part, 2 * count // share, f"{count:,} x 2 B{of_share}") for part, count in parts.rest.items() if count
    ]
    adapters = adapter_parameters(parts, job)
    for name, count in zip(("experts' adapters", "other adapters"), adapters, strict=True):
        if count:
            how = f"{count:,} x {OPTIMIZER} B{of_share}"
            lines.append(Line(f"{name} and optimizer", OPTIMIZER * count // share, how))
    if share > 1:
        gathered = (2 * parts.rest_parameters + 4 * adapters[0]) // parts.layers
        lines.append(Line("one gathered layer", gathered, "its weights in bf16 and adapters in fp32 (FSDP2)"))
    return lines


def _activation_lines(parts: ModelParts, job: Job) -> list[Line]:
    T, D, L = job.tokens, parts.hidden, parts.layers
    how = f"estimate: T {T:,} x {parts.widest:,} inputs and outputs x 2 B, and their gradients"
    layer = 2 * T * parts.widest * 2
    lines = [Line("logits", T * parts.vocabulary * LOGITS, f"T {T:,} x V {parts.vocabulary:,} x {LOGITS} B")]
    if not job.gradient_checkpointing:
        return [Line("activations of all layers", L * layer, f"{how}; L {L}"), *lines]
    inputs = Line("inputs of all layers", L * T * D * 2, f"L {L} x T {T:,} x D {D} x 2 B")
    return [inputs, Line("activations of one layer", layer, how), *lines]


def saved_bytes(parts: ModelParts, job: Job) -> int:
    """What the experts keep for backward: x (T, D) bf16, routing 12 B per routed row, and to retain G and U (2F bf16),
    with adapters X A^T of both (2R bf16).

    With gradient checkpointing one layer at a time is alive, else all are.
    """
    T, K = job.tokens, parts.top_k
    layers = []
    for g in parts.experts:
        kept = 2 * 2 * (g.intermediate + job.expert_rank) * T * K if job.activation_policy == "retain" else 0
        layers += [2 * T * g.hidden + 12 * T * K + kept] * g.layers
    return max(layers) if job.gradient_checkpointing else sum(layers)


def workspace_bytes(parts: ModelParts, job: Job) -> int:
    """The backward's buffers for one wave of rows (its larger half): within a few per cent of the kernels' own."""
    element = 2 if native.isa() in ("amx", "avx512_bf16", "amx_model") else 4
    R, recompute = job.expert_rank, job.activation_policy == "recompute"
    sizes = []
    for g in parts.experts:
        D, F = g.hidden, g.intermediate
        rows = min(WAVE_ROWS, job.tokens * parts.top_k + 15 * min(g.experts, job.tokens * parts.top_k))
        width = element * (D + 2 * F) + F // 8  # dO, dG, dU as tiles; partial sums of the routing gradient
        if len(native.nodes()) > 1:
            width += 4 * F  # sums of Z
        if recompute:
            width += element * D + 2 * 2 * F
        if R:
            width += element * F + 3 * 2 * F + R * (6 * 4 + 11 * element)
        sizes.append(rows * width)
    scratch = native.num_threads() * (4 * 512 * 128 * 4 + (64 << 10))
    return max(sizes) + scratch


def _call_bytes(parts: ModelParts, job: Job) -> int:
    """Output, gradients of output and input in fp32 or bf16; fp32 gradients of one layer's factors (and, beside a GPU,
    the factors' copies)."""
    factors = max(g.experts * 3 * (g.hidden + g.intermediate) for g in parts.experts) * job.expert_rank
    return job.tokens * parts.hidden * (4 + 2 + 4) + factors * 4 * (2 if job.gpus else 1)


def _packed_how(parts: ModelParts, weight_format: str | Layout) -> str:
    terms = [
        f"{g.layers} layers x {g.experts} x {layer_bytes(g, weight_format) / g.experts / 1e6:,.2f} MB"
        for g in parts.experts
    ]
    return " + ".join(terms)


def _saved_how(parts: ModelParts, job: Job) -> str:
    alive = "one layer" if job.gradient_checkpointing else f"{sum(g.layers for g in parts.experts)} layers"
    kept = "x, routing, gate and up" if job.activation_policy == "retain" else "x and routing"
    n = f"{job.processes} x " if job.processes > 1 else ""
    return f"{n}{alive}: {kept} of T {job.tokens:,} tokens, K {parts.top_k}"


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
