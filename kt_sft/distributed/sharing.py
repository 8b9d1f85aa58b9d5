"""What a model sees of the other ranks: kernels for its layers that may compute together with them.

``start`` is called by all ranks when a model is loaded, after torch.distributed has been initialised; from then on a
thread (rounds.py) meets those of the other ranks. With ``host``, every rank maps all experts of its host, so passes in
evaluation mode are computed alone and no agreement is needed for them; training passes are shared when the ranks are
in step. With ``world``, a host holds only its share of the experts and every pass goes through the rounds.
"""

from __future__ import annotations

import atexit
import logging
import math
import os

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import EXPERT_PARALLEL
from ..ops.kernels import LOCAL, Inputs, Kept, Kernels
from ..ops.packed import PackedExperts
from .agreement import Kind
from .failures import announce_uncaught
from .peers import Peers
from .place import Place, hosts_of
from .rounds import Request, Rounds
from .work import Job

logger = logging.getLogger(__name__)

_active: Sharing | None = None


class Sharing:
    """The ranks that share experts with this one. Constructed by all ranks of torch.distributed together."""

    def __init__(self, expert_parallel: str) -> None:
        everyone = Peers(list(range(dist.get_world_size())), "setup")
        modes = [mode for (mode,) in everyone.numbers([EXPERT_PARALLEL.index(expert_parallel)])]
        if len(set(modes)) > 1:
            names = [EXPERT_PARALLEL[mode] for mode in modes]
            raise ValueError(f"expert_parallel: expected the same setting on every rank, got {names}")
        local_ranks = [local for (local,) in everyone.numbers([int(os.environ.get("LOCAL_RANK", dist.get_rank()))])]
        hosts = hosts_of(local_ranks)
        own_host = [r for r, host in enumerate(hosts) if host == hosts[dist.get_rank()]]
        sharded = expert_parallel == "world" and hosts[-1] > 0
        members = everyone.members if sharded else own_host
        self.place = Place(
            rank=members.index(dist.get_rank()), hosts=hosts if sharded else (0,) * len(members), sharded=sharded
        )
        self.host_peers = Peers(own_host, "host") if len(own_host) > 1 else None
        self.rounds = Rounds(Peers(members, "rounds"), self.place) if len(members) > 1 else None
        everyone.close()
        if self.rounds is not None:
            logger.info(
                "The experts are shared by %d ranks%s.", len(members), " and sharded over the hosts" if sharded else ""
            )
            announce_uncaught(self.rounds)
            atexit.register(self.rounds.leave)

    def layer(self, packed: PackedExperts, num_experts: int) -> SharedLayer | None:
        """Register the next layer; None where there is nobody to share it with."""
        if self.rounds is None:
            return None
        return SharedLayer(self.rounds, self.rounds.add_layer(packed), num_experts)


def start(expert_parallel: str) -> Sharing | None:
    """The sharing of this process, begun at the first call; None for a single process or ``none``.

    Raises:
        ValueError: ``world`` before torch.distributed has been initialised, or ranks that disagree.
    """
    global _active
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if expert_parallel == "none" or (ranks == 1 and not _initialized()):
        return None
    if not _initialized():
        if expert_parallel == "world":
            raise ValueError(
                "expert_parallel: world needs torch.distributed before the model is loaded; call "
                "torch.distributed.init_process_group first"
            )
        logger.info("torch.distributed is not initialised: every rank computes its own tokens.")
        return None
    if _active is None and dist.get_world_size() > 1:
        _active = Sharing(expert_parallel)
    return _active


def active() -> Sharing | None:
    """What :func:`start` has begun."""
    return _active


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _forget_after_fork() -> None:
    global _active
    _active = None  # its thread lives in the parent only


os.register_at_fork(after_in_child=_forget_after_fork)


class SharedLayer:
    """One layer, by the number that all ranks know it by."""

    def __init__(self, rounds: Rounds, number: int, num_experts: int) -> None:
        self.rounds, self.number, self.num_experts = rounds, number, num_experts

    @property
    def held(self) -> range:
        """The experts that this host holds."""
        return self.rounds.place.experts(self.num_experts)

    def kernels(self, *, training: bool, overflow_is_normal: bool) -> Kernels:
        """For one call. ``overflow_is_normal``: a loss scaler (fp16) handles gradients that are not finite."""
        if not training and not self.rounds.place.sharded:
            return LOCAL
        return SharedKernels(self, training, overflow_is_normal)


class SharedKernels:
    """The passes of one call, together with the other ranks where they are in step (see ``ops.kernels.Kernels``)."""

    def __init__(self, layer: SharedLayer, training: bool, overflow_is_normal: bool) -> None:
        self._layer, self._kind = layer, Kind.FORWARD if training else Kind.EVALUATION
        self._overflow_is_normal = overflow_is_normal

    def forward(self, inputs: Inputs, retain: bool, dtype: torch.dtype) -> tuple[Tensor, Kept]:
        self._check_ids(inputs.ids)
        self._check_finite("hidden states", inputs.x)
        job = Job(**inputs._asdict(), retain=retain, total_experts=self._total)
        answer = self._layer.rounds.ask(Request(self._kind, self._layer.number, job))
        if answer is None:
            out, *_ = LOCAL.forward(inputs, False, dtype)
            return out, _pack_kept(None, -1, retain)
        result, number = answer
        return result.rows[0], _pack_kept(result.kept, number, retain)

    def backward(
        self, inputs: Inputs, kept: Kept, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        if not self._overflow_is_normal:
            self._check_finite("gradients", grad_out)
        gate_up, number = _unpack_kept(kept, inputs.packed.intermediate_size)
        job = Job(**inputs._asdict(), kept=gate_up, grad_out=grad_out, total_experts=self._total)
        answer = self._layer.rounds.ask(Request(Kind.BACKWARD, self._layer.number, job, number))
        if answer is None:
            return LOCAL.backward(inputs, (None, None), grad_out)
        result, _ = answer
        grad_x, grad_weights, *grad_x_lora = result.rows
        return grad_x, grad_weights, grad_x_lora[0] if grad_x_lora else None, result.factor_grads

    @property
    def _total(self) -> int:
        return self._layer.num_experts

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self._total:
            raise ValueError(
                f"topk_ids: expected expert ids 0 to {self._total - 1}, got {int(ids.min())} to {int(ids.max())}"
            )

    def _check_finite(self, what: str, values: Tensor) -> None:
        """Here, on the rank where they come from: after the exchange every rank would hold them."""
        if not math.isfinite(values.sum(dtype=torch.float32)):
            raise ValueError(
                f"{what} of experts layer {self._layer.number}: expected finite values, got NaN or Inf on rank "
                f"{dist.get_rank() if _initialized() else self._layer.rounds.place.rank}; "
                "look at this rank's data (labels that are all ignored?), the learning rate and the loss"
            )


def _pack_kept(gate_up: Tensor | None, number: int, retain: bool) -> Kept:
    """Gate and up, and the number of their exchange, in two tensors whose shapes are always the same.

    Gradient checkpointing insists that recomputed tensors have the shapes of the first pass, but how many rows a rank
    keeps depends on the others: autograd gets a view of the first element, which keeps the whole storage alive.
    """
    if not retain:
        return None, None
    view = torch.zeros(1, dtype=torch.bfloat16) if gate_up is None or not gate_up.numel() else gate_up.view(-1)[:1]
    return view, torch.tensor([number if gate_up is not None else -1])


def _unpack_kept(kept: Kept, width: int) -> tuple[Tensor | None, int]:
    view, number = kept
    if view is None or number is None or int(number) < 0:
        return None, -1
    elements = view.untyped_storage().nbytes() // view.element_size()
    if elements % (2 * width):  # moved by a saved-tensors hook: only the view came along
        return None, -1
    return torch.as_strided(view, (2, elements // (2 * width), width), (elements // 2, width, 1), 0), int(number)
