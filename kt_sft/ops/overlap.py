"""The same layer call in two halves, so that the caller computes something else meanwhile.

    pending = submit_experts(hidden_states, topk_ids, topk_weights, packed, lora)
    shared = shared_expert(hidden_states)
    out = pending.wait() + shared

One thread of this module runs the passes, in the order in which they were submitted. In the graph a call is two nodes,
and each half of the forward is the other half of the backward:

    Submit   forward: starts the kernels             backward: waits for the gradients
    Wait     forward: waits for the output           backward: starts the kernels

Autograd runs the nodes in the reverse of the order in which they were made, so what lies between submit and wait in the
forward (the shared expert) lies between the two halves in the backward as well.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .experts import ExpertsLora, checked_arguments, input_gradients
from .kernels import LOCAL, Kernels
from .packed import PackedExperts
from .passes import Backward, Call, Forward
from .threads import keep_openmp_from_spinning

_worker: ThreadPoolExecutor | None = None


def _start(work: Forward | Backward) -> Future:
    """Queue a pass. The executor's thread is joined when the interpreter exits, so none is cut off in the kernels."""
    global _worker
    if _worker is None:
        _worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kt_sft-experts")
    return _worker.submit(work.run)


def _forget_after_fork() -> None:
    global _worker
    _worker = None  # its thread lives in the parent only


os.register_at_fork(after_in_child=_forget_after_fork)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


class _InFlight:
    """What the two nodes of a call share."""

    def __init__(self, call: Call, tensors: tuple[Any, ...]) -> None:
        forward = Forward(call, *tensors)
        self.forward: tuple[Forward, Future[Tensor]] | None = (forward, _start(forward))
        self.backward: tuple[Backward, Future[tuple[Tensor | None, ...]]] | None = None
        self._tensors, self._versions = tensors, _versions(tensors)

    def finish(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The output, and what backward needs. Raises what the pass raised, as often as it is asked."""
        assert self.forward is not None
        forward, future = self.forward
        out_TD = future.result()
        if _versions(self._tensors) != self._versions:
            raise ValueError(
                "submit_experts: expected its arguments unchanged until wait(), got one that was modified in place; "
                "submit a clone of it"
            )
        forward.transfer.deliver(out_TD)
        saved = (*forward.saved(), *self._tensors[4:])
        self.forward, self._tensors = None, ()
        return out_TD, saved


class _Submit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, in_flight: _InFlight, *tensors: Any) -> Tensor:
        ctx.in_flight = in_flight
        return tensors[0].new_empty(0)  # only its place in the graph matters

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        backward, future = ctx.in_flight.backward
        grads = future.result()
        backward.transfer.deliver(*grads)
        ctx.in_flight.backward = None
        return input_gradients(grads)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, in_flight: _InFlight, call: Call, weights_dtype: torch.dtype) -> Tensor:
        out_TD, saved = in_flight.finish()
        ctx.in_flight, ctx.call, ctx.weights_dtype = in_flight, call, weights_dtype
        ctx.save_for_backward(*saved)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        backward = Backward(ctx.call, ctx.weights_dtype, ctx.saved_tensors, grad_out_TD)
        ctx.in_flight.backward = (backward, _start(backward))
        return grad_out_TD.new_empty(0), None, None, None


class PendingExperts:
    """A call under way, see :func:`submit_experts`."""

    def __init__(self, call: Call, tensors: tuple[Any, ...]) -> None:
        self._call, self._weights_dtype = call, tensors[2].dtype
        self._in_flight = _InFlight(call, tensors)
        self._token = _Submit.apply(self._in_flight, *tensors) if call.differentiable else None
        self._out_TD: Tensor | None = None

    def done(self) -> bool:
        """Whether :meth:`wait` returns at once."""
        return self._in_flight.forward is None or self._in_flight.forward[1].done()

    def wait(self) -> Tensor:
        """The output (T, D), as :func:`moe_experts` returns it, for the current stream; raises what the call raised."""
        if self._out_TD is None:
            if self._token is None:
                self._out_TD, _ = self._in_flight.finish()
            else:
                self._out_TD = _Wait.apply(self._token, self._in_flight, self._call, self._weights_dtype)
                self._token = None
        return self._out_TD


def submit_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    packed: PackedExperts,
    lora: ExpertsLora | None = None,
    *,
    activation_policy: str = "retain",
    compute_type: str = "bf16",
    gradient_compute_type: str = "bf16",
    kernels: Kernels = LOCAL,
) -> PendingExperts:
    """Start :func:`moe_experts` with these arguments and return at once; ``wait()`` gives its output.

    Several calls may be in flight; they are computed one after the other. The arguments must stay unchanged until
    ``wait()`` (an in-place change raises there). Shapes, dtypes and devices that do not fit raise ValueError here,
    expert ids out of range in ``wait()``.
    """
    call, tensors = checked_arguments(
        hidden_states,
        topk_ids,
        topk_weights,
        packed,
        lora,
        activation_policy=activation_policy,
        compute_type=compute_type,
        gradient_compute_type=gradient_compute_type,
        kernels=kernels,
    )
    keep_openmp_from_spinning()
    return PendingExperts(call, tensors)
