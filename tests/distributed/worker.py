"""What one rank of a test does: ``python -m tests.distributed.worker CASE FOLDER`` (launch.py sets the environment)."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kt_sft import native
from kt_sft.config import KtConfig
from kt_sft.distributed import agreement, start
from kt_sft.distributed.memory import filled_once
from kt_sft.distributed.sharing import Sharing
from kt_sft.nn.experts import KtExperts, KtExpertsLinear, LoraTerm
from kt_sft.ops import Activation, ExpertBiases, pack_experts
from kt_sft.weights.loader import load_experts
from tests.weights import checkpoints

E, D, F, K, R = 8, 64, 48, 3, 4
TOKENS = ([13, 40], [7, 0], [0, 0], [1, 300])  # of the two ranks, step by step

GATE = Activation("clamped_swiglu", alpha=1.702, limit=7.0)
Outcome = dict[str, Tensor]


class Projection(nn.Module):
    """What a PEFT layer is to the experts, without the seconds that importing PEFT takes."""

    def __init__(self, base: KtExpertsLinear) -> None:
        super().__init__()
        self.weight, self.dropout = base.weight, 0.0
        self.lora_a = nn.Parameter(torch.randn(E, R, base.in_features) * 0.1)
        self.lora_b = nn.Parameter(torch.randn(E, base.out_features, R) * 0.1)

    def lora_terms(self) -> list[LoraTerm]:
        return [LoraTerm(a=self.lora_a, b=self.lora_b, scaling=2.0, dropout=self.dropout)]


class Layer(nn.Module):
    """Router and experts with LoRA on all projections; the same on every rank."""

    def __init__(self, sharing: Sharing | None, policy: str = "retain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(D, E, bias=False)
        self.experts = KtExperts(
            num_experts=E, hidden_size=D, intermediate_size=F, activation_policy=policy, activation=GATE, has_bias=True
        )
        weights = [torch.randn(shape) * 0.1 for shape in ((E, F, D), (E, F, D), (E, D, F))]
        biases = [torch.randn(E, width) for width in (F, F, D)]
        held = sharing.place.experts(E) if sharing else range(E)
        weights, (gate, up, down) = ([t[held.start : held.stop] for t in part] for part in (weights, biases))
        held_biases = ExpertBiases(gate=gate, up=up, down=down)
        packed = pack_experts(*weights, weight_format="bf16", activation=GATE, biases=held_biases)
        self.experts.set_packed(packed, sharing.layer(packed, E) if sharing else None)
        for name in self.experts.names:
            self.experts.add_module(name, Projection(self.experts.get_submodule(name)))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.softmax(self.router(x), dim=-1).topk(K)
        return self.experts(x, ids, weights)


def tokens(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    count = TOKENS[step][rank]
    return tuple(torch.randn(count, D, generator=generator).bfloat16().float() for _ in range(2))  # type: ignore


def one_pass(layer: Layer, rank: int, step: int, checkpointing: Any = None) -> Outcome:
    """Output and gradients of one rank's tokens; the factors' gradients are not reduced."""
    x, grad = tokens(rank, step)
    x.requires_grad_()
    layer.zero_grad()
    out = layer(x) if checkpointing is None else checkpoint(layer, x, use_reentrant=checkpointing)
    out.backward(grad)
    grads = {f"grad {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "grad x": x.grad, **grads}  # type: ignore[dict-item]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-6))


def largest_error(got: Outcome, rank: int, step: int, reference: Layer) -> float:
    """Of this rank's rows, and of the factors' gradients averaged over the ranks as DDP does."""
    alone = [one_pass(reference, r, step) for r in range(2)]
    errors = [error(got[name], alone[rank][name]) for name in ("out", "grad x")]
    for name, parameter in reference.named_parameters():
        mean = got.get(f"grad {name}", torch.zeros_like(parameter)).clone()
        dist.all_reduce(mean)
        expected = sum(a.get(f"grad {name}", torch.zeros_like(parameter)) for a in alone)
        errors.append(error(mean / 2, torch.as_tensor(expected) / 2))
    return max(errors)


def equality(rank: int, sharing: Sharing) -> dict[str, Any]:
    """Uneven and empty batches, with both policies and with gradient checkpointing, against every rank alone."""
    errors = {}
    reference = Layer(None).train()
    for policy in ("retain", "recompute"):
        layer = Layer(sharing, policy).train()
        for step in range(len(TOKENS)):
            errors[f"{policy} {step}"] = largest_error(one_pass(layer, rank, step), rank, step, reference)
        for reentrant in (False, True):
            got = one_pass(layer, rank, 0, checkpointing=reentrant)
            errors[f"{policy} checkpoint {reentrant}"] = largest_error(got, rank, 0, reference)
    assert sharing.rounds is not None
    return {"errors": errors, "shared": sharing.rounds.shared}


def alone(rank: int, sharing: Sharing) -> dict[str, Any]:
    """What one rank does while the other does nothing: evaluate, generate unevenly; then both train again."""
    layer, reference = Layer(sharing).eval(), Layer(None).eval()
    dist.barrier()
    patience, agreement.PATIENCE_S = agreement.PATIENCE_S, 0.5
    x, _ = tokens(0, 0)
    errors = []
    with torch.no_grad():
        for step in range(5 if rank == 0 else 2):
            errors.append(error(layer(x + step), reference(x + step)))
    if rank == 0:  # trains all alone; the others would be waited for in the first layer, and once only
        layer.train()
        errors.append(error(one_pass(layer, 0, 0)["grad x"], one_pass(reference, 0, 0)["grad x"]))
    dist.barrier()
    agreement.PATIENCE_S = patience
    got = one_pass(layer.train(), rank, 0)
    return {"errors": [*errors, largest_error(got, rank, 0, reference)]}


def dropout(rank: int, sharing: Sharing) -> dict[str, Any]:
    """Adapters' dropout is drawn by the rank of the tokens."""
    layer, reference = Layer(sharing).train(), Layer(None).train()
    for model in (layer, reference):
        for name in model.experts.names:
            model.experts.get_submodule(name).dropout = 0.5  # type: ignore[assignment]
    torch.manual_seed(rank)
    got = one_pass(layer, rank, 0)
    torch.manual_seed(rank)
    expected = one_pass(reference, rank, 0)
    errors = [error(got[name], expected[name]) for name in ("out", "grad x")]
    for name in [n for n in expected if "lora" in n]:
        both = [got[name].clone(), expected[name].clone()]
        for tensor in both:
            dist.all_reduce(tensor)
        errors.append(error(*both))
    return {"errors": errors}


def bad_ids(rank: int, sharing: Sharing) -> dict[str, Any]:
    layer = Layer(sharing).train()
    x, _ = tokens(0, 0)
    try:
        layer.experts(x, torch.full((len(x), K), E), torch.ones(len(x), K))
    except ValueError as failure:
        return {"error": str(failure)}
    return {"error": None}


def memory(rank: int, sharing: Sharing) -> dict[str, Any]:
    """One copy of experts packed in memory: filled by the first rank, its pages shared by all."""
    assert sharing.host_peers is not None
    expected = (torch.arange(64 << 20) % 251).to(torch.uint8)

    def fill(target: Tensor) -> None:
        target.copy_(expected)

    copy = filled_once(sharing.host_peers, len(expected), fill)
    right = torch.equal(copy, expected)
    dist.barrier()  # both have touched all of it
    held = proportional_kib(copy)
    dist.barrier()
    return {"right": right, "kib": held}


def loading(rank: int, sharing: Sharing) -> dict[str, Any]:
    """A checkpoint's experts packed in memory while their file is written, through the file, and without one.

    Each host has its own store.
    """
    place, folder = sharing.place, Path(sys.argv[2])
    host = place.hosts[place.rank]
    if rank == 0:
        checkpoints.write(folder / "model", checkpoints.separate_tensors(checkpoints.weights()))
    dist.barrier()
    held = place.experts(checkpoints.E)
    outcome: dict[str, Any] = {"held": len(held), "right": True, "kib": {}}
    own = str(folder / f"cache{host}")
    for name, cache in (("memory", own), ("file", own), ("none", "none")):
        packed = load_experts(
            folder / "model",
            checkpoints.separate_layers(),
            config=KtConfig(cache_dir=cache),
            progress=False,
            held=held,
            peers=sharing.host_peers,
            **checkpoints.SIZES,
        )
        for layer, weights in checkpoints.weights().items():
            expected = pack_experts(*(w[held.start : held.stop] for w in weights), weight_format="int8")
            outcome["right"] &= torch.equal(packed[layer].storage, expected.storage)
        dist.barrier()
        outcome["kib"][name] = proportional_kib(next(iter(packed.values())).storage)
        dist.barrier()
    return outcome


def loading_on_nodes(rank: int, sharing: Sharing) -> dict[str, Any]:
    """The same where the first rank splits the experts over nodes, and decides for the other."""
    native.set_nodes([[], []] if rank == 0 else [[]])
    try:
        return loading(rank, sharing)
    finally:
        native.set_nodes([[]])


def proportional_kib(tensor: Tensor) -> tuple[int, int]:
    """Proportional and resident set size of the mapping that ``tensor`` lies in, from /proc/self/smaps."""
    address, inside, found = tensor.data_ptr(), False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, *values = line.split()
        if "-" in field:
            begin, end = (int(part, 16) for part in field.split("-"))
            inside = begin <= address < end
        elif inside:
            found[field] = values[0]
    return int(found["Pss:"]), int(found["Rss:"])


def packing_fails(rank: int, sharing: Sharing) -> dict[str, Any]:
    assert sharing.host_peers is not None

    def fill(target: Tensor) -> None:
        raise OSError("the disk of rank 0")

    try:
        filled_once(sharing.host_peers, 4096, fill)
    except (OSError, RuntimeError) as failure:
        return {"error": str(failure)}
    return {"error": None}


def _steps(sharing: Sharing, rank: int, trouble: Any) -> None:
    layer = Layer(sharing).train()
    for step in range(1000):
        if rank == 1 and step == 3:
            trouble(layer)
        one_pass(layer, rank, 0)
        dist.barrier()


def killed(rank: int, sharing: Sharing) -> None:
    _steps(sharing, rank, lambda layer: os.kill(os.getpid(), signal.SIGKILL))


def raising(rank: int, sharing: Sharing) -> None:
    def trouble(layer: Layer) -> None:
        raise KeyError("the data of rank 1")

    _steps(sharing, rank, trouble)


def nan(rank: int, sharing: Sharing) -> None:
    def trouble(layer: Layer) -> None:
        layer(torch.full((3, D), float("nan")))

    _steps(sharing, rank, trouble)


def stuck(rank: int, sharing: Sharing) -> None:
    """Rank 1 fails while rank 0 is in code that does not come back."""
    if rank == 1:
        time.sleep(0.5)
        raise KeyError("the data of rank 1")
    time.sleep(100)


def main() -> None:
    faulthandler.enable()
    case, folder = sys.argv[1], Path(sys.argv[2])
    native.set_num_threads(1)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    hosts = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    sharing = start("world" if hosts > 1 else "host")
    assert sharing is not None
    result = {name: globals()[name](rank, sharing) for name in case.split("+")}
    (folder / f"{case}.{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
