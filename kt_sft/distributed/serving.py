"""All ranks compute one pass for one rank, whose layer they are not in: what it has to tell them, and gets back."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..ops.kernels import factor_names
from ..ops.packed import PackedExperts
from .agreement import Header, Kind
from .peers import Peers
from .work import Job

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def announce(peers: Peers, rank: int, job: Job | None, packed: PackedExperts, header: Header) -> Job:
    """Broadcast what ``rank`` (the one with a ``job``) asks for: on the others, the same job without rows."""
    factors = {} if job is None else {name: job.lora[name] for name in factor_names(job.lora)}
    told = ""
    if job is not None:
        told = json.dumps(
            {
                "top_k": job.ids.shape[1],
                "total_experts": job.total_experts,
                "int8": job.int8,
                "int8_gradients": job.int8_gradients,
                "factors": {n: [list(f.shape), str(f.dtype).removeprefix("torch.")] for n, f in factors.items()},
                "settings": {n: job.lora[n] for n in ("scaling", "keep_scale") if n in job.lora},
                "dropout": [n for n in ("x", "down_keep") if n in job.lora],
            }
        )
    told = json.loads(peers.texts(told)[rank])
    if job is None:
        factors = {name: torch.zeros(shape, dtype=_DTYPES[dtype]) for name, (shape, dtype) in told["factors"].items()}
    for factor in factors.values():
        peers.broadcast(factor, rank)
    if job is not None:
        job.retain, job.kept = False, None
        return job
    return _without_rows(told, factors, packed, header)


def _without_rows(told: dict, factors: dict[str, Tensor], packed: PackedExperts, header: Header) -> Job:
    D, K = packed.hidden_size, told["top_k"]
    x = torch.zeros(0, D, dtype=torch.bfloat16)
    dropout = {"x": x, "down_keep": torch.zeros(0, K, packed.intermediate_size, dtype=torch.uint8)}
    return Job(
        packed=packed,
        x=x,
        ids=torch.zeros(0, K, dtype=torch.int64),
        weights=torch.zeros(0, K),
        lora={**factors, **told["settings"], **{name: dropout[name] for name in told["dropout"]}},
        int8=told["int8"],
        int8_gradients=told["int8_gradients"],
        grad_out=x if header.kind == Kind.BACKWARD else None,
        total_experts=told["total_experts"],
    )
