"""One training step of a layer in one process with all cores, and in ranks that divide cores and tokens.

    python -m benchmarks.bench_ranks [--tokens 2048] [--ranks 2] [--modes one none host world]

One layer of Qwen3-30B-A3B (128 experts, top-8, hidden 2048, intermediate 768), int8 experts, LoRA rank 16: forward and
backward, without the framework's gradient reduction. ``one``: a single process; otherwise the setting expert_parallel
(world: every rank poses as a host of its own). Milliseconds are those of the slowest rank, the best of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from kt_sft import native
from kt_sft.distributed import start
from kt_sft.ops import ExpertsLora, PackedExperts, moe_experts
from kt_sft.ops.kernels import LOCAL

E, D, F, K, R = 128, 2048, 768, 8, 16


def packed_experts(held: range) -> PackedExperts:
    """Experts that differ by a scale only: their values do not matter here."""
    packed = PackedExperts.empty(len(held), D, F, "int8")
    weights = [torch.randn(shape) * 0.02 for shape in ((F, D), (F, D), (D, F))]
    for index, expert in enumerate(held):
        packed.pack_expert_(index, *(w * (1 + expert / E) for w in weights))
    return packed


def factors() -> dict[str, Tensor]:
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    made = {}
    for name, (inputs, outputs) in shapes.items():
        made[f"{name}_a"] = (torch.randn(E, R, inputs) * 0.02).requires_grad_()
        made[f"{name}_b"] = (torch.randn(E, outputs, R) * 0.02).requires_grad_()
    return made


def run_rank(mode: str, tokens: int, repeats: int) -> None:
    """Print the milliseconds of this rank's forward and backward passes, repeat by repeat."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    native.set_num_threads(max(1, native.num_threads() // ranks))
    torch.set_num_threads(native.num_threads())
    sharing = start(mode) if mode != "one" else None
    packed = packed_experts(sharing.place.experts(E) if sharing else range(E))
    layer = sharing.layer(packed, E) if sharing else None
    lora = ExpertsLora(**factors(), scaling=1.0)
    torch.manual_seed(rank)
    own = tokens // ranks
    x, grad = torch.randn(own, D, dtype=torch.bfloat16).requires_grad_(), torch.randn(own, D, dtype=torch.bfloat16)
    ids, weights = torch.rand(own, E).topk(K).indices, torch.rand(own, K)
    rows = []
    for _ in range(repeats):
        dist.barrier()
        kernels = layer.kernels(training=True, overflow_is_normal=False) if layer else LOCAL
        begin, cpu = time.perf_counter(), time.process_time()
        out = moe_experts(x, ids, weights, packed, lora, kernels=kernels)
        middle = time.perf_counter()
        out.backward(grad)
        end = time.perf_counter()
        rows.append([1e3 * (middle - begin), 1e3 * (end - middle), 1e3 * (time.process_time() - cpu)])
    sys.stdout.write(json.dumps(rows) + "\n")
    dist.destroy_process_group()


def measure(mode: str, tokens: int, ranks: int, repeats: int) -> tuple[float, float, float]:
    """Forward and backward milliseconds of the slowest rank, and CPU milliseconds of all ranks: the best step."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(ranks):
        local = 0 if mode == "world" else rank
        places = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": local, "MASTER_PORT": port}
        env = os.environ | {k: str(v) for k, v in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-m", "benchmarks.bench_ranks", "--rank-of", mode]
        command += ["--tokens", str(tokens), "--repeats", str(repeats)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    rows = [json.loads(p.communicate()[0].splitlines()[-1]) for p in processes]
    steps = [
        (max(r[0] for r in step), max(r[1] for r in step), sum(r[2] for r in step)) for step in zip(*rows, strict=True)
    ]
    return min(steps, key=lambda step: step[0] + step[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of all ranks together")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--modes", nargs="+", default=["one", "none", "host", "world"])
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of, args.tokens, args.repeats)
        return
    for mode in args.modes:
        ranks = 1 if mode == "one" else args.ranks
        forward, backward, cpu = measure(mode, args.tokens, ranks, args.repeats)
        sys.stdout.write(
            f"{mode:6} {ranks} ranks, {args.tokens} tokens: forward {forward:.0f} + backward {backward:.0f} = "
            f"{forward + backward:.0f} ms, {cpu:.0f} ms of CPU\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
