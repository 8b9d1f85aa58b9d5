"""One training step of a decoder stack with Qwen3-30B-A3B's layer sizes, and where its time goes.

    python -m benchmarks.bench_train_step [--layers N] [--tokens 4096] [--sequence 2048] [--format int8] [--rank 16]

transformers' own decoder layers (hidden 2048, 32 heads over 4 key/value heads of 128, 128 experts, top-8, intermediate
768) under bf16 autocast, LoRA on attention and every expert, AdamW; random weights and hidden states, no embedding, no
head. On a GPU, if there is one: then as many layers as host memory holds, otherwise two. The experts' results are
compared with float32 first; what does not agree gets no time. Milliseconds are medians (20th to 80th percentile).

    experts forward, backward   inside the kernels
    copies                      to the host and back, with conversions; with a GPU, also the wait for what it computes
    optimizer                   AdamW over all factors
    the rest                    attention, norms, routers, autograd
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import check, machine
from benchmarks.ours import Ours
from benchmarks.shapes import SHAPES
from kt_sft import native
from kt_sft.config import KtConfig
from kt_sft.integrations import peft as packed_peft
from kt_sft.models.convert import swap_experts
from kt_sft.nn.experts import KtExperts
from kt_sft.ops import PackedExperts
from kt_sft.ops.kernels import LocalKernels
from kt_sft.ops.transfer import Transfer

SHAPE = SHAPES["A"]
LAYERS = 48  # of the published model
PHASES = {
    "experts forward": (LocalKernels, ["forward"]),
    "experts backward": (LocalKernels, ["backward"]),
    "copies": (Transfer, ["to_host", "wait", "to_device"]),
    "optimizer": (torch.optim.AdamW, ["step"]),
}


class Clock:
    """Seconds spent inside the functions of each phase, since the last :meth:`reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def _timed(self, phase: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - start

        return run

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as stack:
            for phase, (owner, names) in PHASES.items():
                for name in names:
                    stack.enter_context(mock.patch.object(owner, name, self._timed(phase, getattr(owner, name))))
            yield


def checked_experts(weight_format: str, rank: int) -> PackedExperts:
    """Packed experts whose output and gradients, with LoRA, agree with float32. Raises SystemExit otherwise."""
    row = Ours(SHAPE, f"{weight_format}+lora{rank}")
    try:
        check.check(row, SHAPE, check.evaluate(row, SHAPE), 3, "balanced")
    except check.WrongResult as wrong:
        raise SystemExit(f"refusing to report: {wrong}") from None
    return row.packed


def layers_that_fit(packed: PackedExperts, tokens: int) -> int:
    """Three quarters of the available memory: packed experts and what their backward keeps, layer by layer."""
    layer = packed.nbytes + 2 * tokens * (SHAPE.D + 2 * SHAPE.K * SHAPE.F)
    return max(1, min(LAYERS, int(0.75 * psutil.virtual_memory().available / layer)))


def make_stack(packed: PackedExperts, args: argparse.Namespace) -> nn.Module:
    """The decoder layers with LoRA, ready to train. Every layer holds its own copy of the experts."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModel

    sizes = dict(hidden_size=SHAPE.D, moe_intermediate_size=SHAPE.F, num_experts=SHAPE.E, num_experts_per_tok=SHAPE.K)
    heads = dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    more = dict(num_hidden_layers=args.layers, vocab_size=8, norm_topk_prob=True, use_cache=False)
    config = AutoConfig.for_model("qwen3_moe", **sizes, **heads, **more, max_position_embeddings=args.sequence)
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config, dtype=torch.bfloat16)
    swap_experts(model, KtConfig(weight_format=args.format, activation_policy=args.policy))
    model.to_empty(device=args.device)
    model.rotary_emb = type(model.rotary_emb)(config).to(args.device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    for index, module in enumerate(m for m in model.modules() if isinstance(m, KtExperts)):
        storage = packed.storage.clone() if index else packed.storage
        module.set_packed(PackedExperts(storage, SHAPE.E, SHAPE.D, SHAPE.F, args.format))
    packed_peft.install()
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets))
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(args.device).train()


def make_step(model: nn.Module, args: argparse.Namespace) -> Callable[[], None]:
    """A step on ``args.tokens`` tokens; returns when the device has finished it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    x = torch.randn(args.tokens // args.sequence, args.sequence, SHAPE.D, device=args.device, dtype=torch.bfloat16)
    x.requires_grad_()  # as LLaMA-Factory has it, for checkpointing: the first layer's backward is computed too

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16):
            out: Tensor = model(inputs_embeds=x).last_hidden_state
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(step: Callable[[], None], repeats: int) -> list[dict[str, float]]:
    """Milliseconds of each phase and of the whole step, step by step, after two to warm up."""
    rows, clock = [], Clock()
    with clock.running():
        for number in range(repeats + 2):
            clock.reset()
            start = time.perf_counter()
            step()
            whole = time.perf_counter() - start
            parts = clock.seconds | {"the rest": whole - sum(clock.seconds.values()), "step": whole}
            if number >= 2:
                rows.append({name: 1e3 * seconds for name, seconds in parts.items()})
    return rows


def on_the_device(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a step that the GPU spends in copies to the host, to the device, and in everything else."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    spent = {"copies to the host": 0.0, "copies to the device": 0.0, "kernels": 0.0}
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            to_host, to_device = "DtoH" in event.name, "HtoD" in event.name
            kind = "copies to the host" if to_host else "copies to the device" if to_device else "kernels"
            spent[kind] += event.time_range.elapsed_us() / 1e3
    return spent


def table(rows: list[dict[str, float]], args: argparse.Namespace) -> Table:
    made = Table("part", "ms (20th to 80th percentile)", "of the step", title=f"{args.layers} layers on {args.device}")
    whole = statistics.median(row["step"] for row in rows)
    for name in rows[0]:
        p20, *_, p80 = statistics.quantiles([row[name] for row in rows], n=5, method="inclusive")
        median = statistics.median(row[name] for row in rows)
        made.add_row(name, f"{median:.0f} ({p20:.0f} to {p80:.0f})", f"{median / whole:.0%}")
    return made


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="default: 2 on a CPU, with a GPU as many as host memory holds")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of one sequence")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--policy", default="retain", choices=["retain", "recompute"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of whole layers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.tokens % args.sequence:
        parser.error(f"--tokens: expected a multiple of --sequence {args.sequence}, got {args.tokens}")
    return args


def main() -> None:
    args, console = parse_args(), Console(width=120)
    torch.set_num_threads(native.num_threads())
    packed = checked_experts(args.format, args.rank)
    args.layers = args.layers or (layers_that_fit(packed, args.tokens) if args.device == "cuda" else 2)
    with console.status(f"{args.layers} layers ..."):
        step = make_step(make_stack(packed, args), args)
        with machine.OtherLoad() as others:
            rows = measure(step, args.repeats)
    console.print(table(rows, args))
    seconds = statistics.median(row["step"] for row in rows) / 1e3
    rate = args.tokens / seconds
    console.print(
        f"{rate:.0f} tok/s: {args.tokens} tokens a step in sequences of {args.sequence}, {args.format} experts, "
        f"LoRA rank {args.rank}, {args.policy}{', checkpointing' if args.checkpointing else ''}; "
        f"{LAYERS} layers at this pace: {rate * args.layers / LAYERS:.1f} tok/s\n"
        f"{machine.cpu_name()}, {native.isa()}, {native.num_threads()} threads; "
        f"other processes took {others.cores:.1f} cores"
    )
    if args.device == "cuda":
        spent = ", ".join(f"{what} {ms:.0f} ms" for what, ms in on_the_device(step).items())
        console.print(f"{torch.cuda.get_device_name()}, of one step: {spent}")


if __name__ == "__main__":
    main()
