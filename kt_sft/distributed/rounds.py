"""When the ranks compute together: a thread of every rank meets those of the others, round after round.

In each round every rank says what its training code waits for, if anything. From these headers, which all ranks see
alike, all come to the same decision (agreement.py): compute one pass together, compute alone, or wait.

The threads meet whatever the training code does, so nobody can wait for a rank that has no data left, generates fewer
tokens, evaluates alone or has finished. Only the speed depends on the ranks being in step, never the result (beyond
the order of sums). The same rounds carry errors from rank to rank.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import zlib
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from ..ops.kernels import factor_names
from ..ops.packed import PackedExperts
from . import serving, work
from .agreement import Action, Decision, Header, Kind, decide
from .peers import PeerLost, Peers
from .place import Place
from .transport import NetworkTransport, SharedMemoryTransport, Transport

logger = logging.getLogger(__name__)

_IDLE_TICK_S, _SERVING_TICK_S = 0.05, 0.0002  # between rounds without a request of this rank
_GRACE_S = 6.0  # for the training code to notice that a rank has failed


@dataclass
class Request:
    """A job and where it stands. ``answer`` is a Result, or None: compute alone."""

    kind: Kind
    layer: int
    job: work.Job
    forward_round: int = -1
    since: float = field(default_factory=time.monotonic)
    answer: Future[tuple[work.Result, int] | None] = field(default_factory=Future)

    def header(self) -> Header:
        job = self.job
        shapes = [(name, list(job.lora[name].shape), str(job.lora[name].dtype)) for name in factor_names(job.lora)]
        settings = [job.lora.get("scaling"), "x" in job.lora, "down_keep" in job.lora, job.retain]
        settings += [job.int8, job.int8_gradients]
        text = json.dumps([job.x.shape[1], job.ids.shape[1], shapes, settings])
        waited = int((time.monotonic() - self.since) * 1e6)
        tokens, signature = job.x.shape[0], zlib.crc32(text.encode())
        return Header(self.kind, self.layer, signature, tokens, self.forward_round, waited)


class RankFailed(RuntimeError):
    """Another rank has failed; the message names it and its error."""


class Rounds:
    """The thread, and what it shares with the threads that compute the model. Constructed by all ranks together."""

    def __init__(self, peers: Peers, place: Place) -> None:
        self.place, self._peers = place, peers
        self._transport: Transport = NetworkTransport(peers) if place.sharded else SharedMemoryTransport(peers)
        self._layers: WeakValueDictionary[int, PackedExperts] = WeakValueDictionary()
        self._num_layers, self._pid = 0, os.getpid()
        self._changed = threading.Condition()
        self._queue: deque[Request] = deque()
        self.shared = 0  # passes computed together
        self._number, self._out_of_step, self._serving_until = 0, False, 0.0
        self._leaving, self._failure = False, ""  # what this rank tells the others
        self._over = False
        self._error: RuntimeError | None = None
        self._ender: threading.Timer | None = None
        self._thread = threading.Thread(target=self._run, name="kt_sft-rounds", daemon=True)
        self._thread.start()

    def add_layer(self, packed: PackedExperts) -> int:
        """The number of a layer; all ranks add the same layers in the same order."""
        layer = self._num_layers
        self._layers[layer] = packed
        self._num_layers += 1
        return layer

    def ask(self, request: Request) -> tuple[work.Result, int] | None:
        """The result and the number of its round, or None: compute alone. Raises when a rank has failed."""
        with self._changed:
            if self._error is not None:
                raise type(self._error)(*self._error.args)
            if self._over:
                return None
            self._queue.append(request)
            self._changed.notify_all()
        return request.answer.result()

    def fail(self, cause: str) -> None:
        """Tell the other ranks that this one has failed; returns when they know, or after two seconds."""
        if os.getpid() != self._pid:  # a forked child, which has no part in this
            return
        with self._changed:
            self._failure = cause
            self._changed.notify_all()
        self._thread.join(timeout=2.0)

    def leave(self) -> None:
        """This process ends. Where others need its experts, it goes on computing for them until they end, too."""
        if os.getpid() != self._pid:
            return
        if self._ender is not None:
            self._ender.cancel()
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        self._thread.join(timeout=None if self.place.sharded else 10.0)

    @property
    def error(self) -> RuntimeError | None:
        """What another rank failed with."""
        return self._error

    def _run(self) -> None:
        try:
            while self._meet():
                pass
        except BaseException as error:
            self._stop(error)
            return
        self._stop(None)

    def _meet(self) -> bool:
        """One round; False after the last."""
        request = self._next()
        own = request.header() if request else Header()
        own = own._replace(leaving=int(self._leaving), failed=int(bool(self._failure)))
        headers = [Header(*numbers) for numbers in self._peers.numbers(list(own))]
        self._number += 1
        if any(h.failed for h in headers):
            texts = self._peers.texts(self._failure)
            first = next(i for i, h in enumerate(headers) if h.failed)
            raise RankFailed(f"rank {self._peers.members[first]} failed: {texts[first]}")
        leaving = [bool(h.leaving) for h in headers]
        if all(leaving) or (any(leaving) and not self.place.sharded):
            return False
        decision = decide(headers, sharded=self.place.sharded, out_of_step=self._out_of_step)
        if decision.action != Action.WAIT:
            self._act(decision, request, headers)
        return True

    def _next(self) -> Request | None:
        tick = _SERVING_TICK_S if time.monotonic() < self._serving_until else _IDLE_TICK_S
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._leaving or self._failure, timeout=tick)
            if self._leaving and not self._queue:
                self._changed.wait(tick)
            return self._queue[0] if self._queue else None

    def _act(self, decision: Decision, request: Request | None, headers: list[Header]) -> None:
        self._out_of_step = decision.action != Action.SHARE
        if decision.action == Action.SHARE:
            assert request is not None
            if len({h.round for h in headers}) > 1:
                request.job.kept = None  # of forward passes that were not one exchange
            self._answer(request, [h.tokens for h in headers])
        elif decision.action == Action.SERVE:
            self._serve(decision.rank, request, headers)
        elif request is not None:
            self._queue.popleft()
            request.answer.set_result(None)

    def _answer(self, request: Request, counts: list[int]) -> None:
        result = work.run(request.job, counts, self.place, self._peers, self._transport)
        self.shared += 1
        self._queue.popleft()
        request.answer.set_result((result, self._number))

    def _serve(self, rank: int, request: Request | None, headers: list[Header]) -> None:
        """Everyone computes for ``rank``, with its LoRA factors, which others may not have at hand."""
        self._serving_until = time.monotonic() + 0.05
        asking = request if rank == self._peers.index else None
        header = headers[rank]
        job = serving.announce(self._peers, rank, asking.job if asking else None, self._layers[header.layer], header)
        counts = [h.tokens if i == rank else 0 for i, h in enumerate(headers)]
        result = work.run(job, counts, self.place, self._peers, self._transport)
        for grad in result.factor_grads.values():
            self._peers.sum(grad)
        if asking is not None:
            self._queue.popleft()
            asking.answer.set_result((result, -1))

    def _stop(self, error: BaseException | None) -> None:
        """The thread ends: after a clean farewell, or because of ``error``, which every later question raises."""
        with self._changed:
            self._over = True
            if error is not None:
                known = isinstance(error, RankFailed | PeerLost)
                self._error = RankFailed(f"{error}") if known else RuntimeError(f"shared experts: {error}")
                self._error.__cause__ = None if known else error
            waiting, self._queue = list(self._queue), deque()
        for request in waiting:
            if self._error is None:
                request.answer.set_result(None)
            else:
                request.answer.set_exception(self._error)
        self._peers.close()
        logger.info("%d passes of experts were computed together with other ranks.", self.shared)
        if self._error is None or self._failure:
            return
        logger.error("%s; this process ends, too.", self._error)
        self._ender = threading.Timer(_GRACE_S, os._exit, [1])
        self._ender.daemon = True
        self._ender.start()
