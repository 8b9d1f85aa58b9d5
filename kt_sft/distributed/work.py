"""One exchange: the rows of several ranks together, each rank computing its share of them.

    gather     every rank gets x, ids, weights (and dropout's inputs, and dO) of all ranks
    compute    it leaves out the slots of others (id -1) and runs the same kernels on its own experts
    reduce     out[t], dX[t], dw[t] = the sum of the ranks' partial results, in the order of the ranks
    factors    dA, dB of an expert stay with the ranks that computed it, over the tokens of all ranks

Data parallel training averages a factor's gradient over the ranks: (1/W) sum_r g_r. Alone, rank r holds g_r of its own
tokens for all experts; here, of all tokens for its own rows. The sum over the ranks is the same, so the average is what
the framework expects (DDP, FSDP2, ZeRO-1/2, with or without gradient accumulation), and nothing is rescaled.

Letters: T tokens of all ranks, K top-k, D hidden, F intermediate, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kt_sft import native

from ..ops import memory
from ..ops.kernels import factor_names
from ..ops.packed import PackedExperts
from .peers import Peers
from .place import Place
from .transport import Transport


@dataclass(kw_only=True)
class Job:
    """One pass of one layer that a rank asks for, or takes part in with no rows (``x`` of zero rows)."""

    packed: PackedExperts
    x: Tensor  # (tokens, D) bf16
    ids: Tensor  # (tokens, K) int64
    weights: Tensor  # (tokens, K) fp32
    lora: dict[str, Any]
    int8: bool
    int8_gradients: bool = False
    retain: bool = False
    kept: Tensor | None = None  # Result.kept of the forward pass, if that was the same exchange
    grad_out: Tensor | None = None  # (tokens, D) bf16: a backward pass
    total_experts: int | None = None  # where ``packed`` holds this host's share of them only

    @property
    def num_experts(self) -> int:
        return self.packed.num_experts if self.total_experts is None else self.total_experts

    def rows(self) -> list[Tensor]:
        extra = [self.lora[name] for name in ("x", "down_keep") if name in self.lora]
        return [self.x, self.ids, self.weights, *extra, *([] if self.grad_out is None else [self.grad_out])]

    def widths(self) -> list[int]:
        """Columns of the results that are summed: out; or dX, dw and the adapters' own dX."""
        D, K = self.x.shape[1], self.ids.shape[1]
        if self.grad_out is None:
            return [D]
        return [D, K, *([D] if "x" in self.lora else [])]


@dataclass
class Result:
    """``rows`` as :meth:`Job.widths` lists them, of the asking rank's tokens."""

    rows: list[Tensor]
    kept: Tensor | None = None  # (2, T K, F) bf16: gate and up of this rank's share, in its first rows
    factor_grads: dict[str, Tensor] = field(default_factory=dict)


class _Share(NamedTuple):
    """The call that this rank computes."""

    experts: range
    ids: Tensor  # (T, K): local expert numbers, -1 where another rank computes
    x: Tensor
    weights: Tensor
    lora: dict[str, Any]
    grad_out: Tensor | None


def run(job: Job, counts: list[int], place: Place, peers: Peers, transport: Transport) -> Result:
    """A collective of all ranks: rank r brings ``counts[r]`` tokens. An error of one rank raises on all."""
    gathered = transport.gather(job.rows(), counts, job.widths())
    partials = transport.partials()
    result, error = Result([]), None
    try:
        share = _share(job, gathered, place)
        if share.grad_out is None:
            result.kept = _forward(job, share, partials)
        else:
            result.factor_grads = _backward(job, share, partials)
    except Exception as failure:
        error = failure
    peers.raise_any(error, "while it computed its share of the experts")
    result.rows = transport.reduce(partials)
    return result


def _share(job: Job, gathered: list[Tensor], place: Place) -> _Share:
    x, ids, weights, *rest = gathered
    experts = place.experts(job.num_experts)
    names = [name for name in ("x", "down_keep") if name in job.lora]
    lora: dict[str, Any] = {**job.lora, "share": True}
    lora.update(zip(names, rest, strict=False))
    for name in factor_names(lora):
        lora[name] = lora[name][experts.start : experts.stop]
    own = _own_ids(ids, job.num_experts, experts, place)
    return _Share(experts, own, x, weights, lora, None if job.grad_out is None else rest[-1])


def _own_ids(ids: Tensor, num_experts: int, experts: range, place: Place) -> Tensor:
    counts, order = torch.empty(num_experts, dtype=torch.int32), torch.empty(ids.numel(), dtype=torch.int32)
    native.sort_by_expert(ids.flatten(), num_experts, counts, order)
    begin, end = place.share(counts.tolist())
    slots = order[begin:end].long()
    own = torch.full_like(ids, -1)
    own.view(-1)[slots] = ids.view(-1)[slots] - experts.start
    return own


def _forward(job: Job, share: _Share, partials: list[Tensor]) -> Tensor | None:
    kept = None
    if job.retain:  # pages of other ranks' rows are never touched
        kept = torch.empty(2, share.ids.numel(), job.packed.intermediate_size, dtype=torch.bfloat16)
    native.forward(
        *job.packed.native_args(), share.x, share.ids, share.weights, share.lora, kept, job.int8, partials[0]
    )
    return kept


def _backward(job: Job, share: _Share, partials: list[Tensor]) -> dict[str, Tensor]:
    grads = {name: memory.recycled(job.lora[name].shape, torch.float32) for name in factor_names(job.lora)}
    begin, end = share.experts.start, share.experts.stop
    for grad in grads.values():
        grad[:begin].zero_()
        grad[end:].zero_()
    held = {f"grad_{name}": grad[begin:end] for name, grad in grads.items()}
    grad_x, grad_weights, *grad_x_lora = partials
    assert share.grad_out is not None
    native.backward(
        *job.packed.native_args(), share.x, share.ids, share.weights, {**share.lora, **held}, job.kept, job.int8,
        job.int8_gradients, share.grad_out, grad_x, grad_x_lora[0] if grad_x_lora else None, grad_weights,
    )  # fmt: skip
    return grads
