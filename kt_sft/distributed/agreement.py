"""What the ranks decide in a round, from headers that all of them see alike (rounds.py).

    SHARE   all ranks wait for the same pass of the same layer: they compute it together
    ALONE   they never will (they wait for different passes, or one has waited too long): each computes its own tokens
    SERVE   where a host holds only its share of the experts: all compute for one rank that is alone in its pass
    WAIT    for the others, or for work

Once out of step, ranks no longer wait in every layer. They wait again in the first layer, where ranks that train
together meet after the framework's own synchronisation.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

PATIENCE_S = 20.0  # of a training pass for the other ranks: longer than ordinary differences between steps
REJOIN_PATIENCE_S = 2.0  # the same in the first layer, once out of step
EVALUATION_PATIENCE_S = 0.005  # evaluation is often uneven, and seldom synchronised


class Kind(enum.IntEnum):
    """What a rank waits for."""

    IDLE = 0
    FORWARD = 1
    BACKWARD = 2
    EVALUATION = 3  # a forward pass outside of training


class Header(NamedTuple):
    """What one rank tells the others in a round."""

    kind: int = Kind.IDLE
    layer: int = 0
    signature: int = 0  # of shapes and settings
    tokens: int = 0
    round: int = -1  # backward: the round of its forward, if that was shared
    waited_us: int = 0
    leaving: int = 0
    failed: int = 0

    @property
    def key(self) -> tuple[int, int, int]:
        return self.kind, self.layer, self.signature

    def out_of_patience(self, out_of_step: bool) -> bool:
        first = self.layer == 0 and self.kind != Kind.BACKWARD
        if self.kind == Kind.EVALUATION:
            limit = EVALUATION_PATIENCE_S if first or not out_of_step else 0.0
        elif out_of_step:
            limit = REJOIN_PATIENCE_S if first else 0.0
        else:
            limit = PATIENCE_S
        return self.waited_us >= limit * 1e6


class Action(enum.Enum):
    WAIT = enum.auto()
    SHARE = enum.auto()
    ALONE = enum.auto()
    SERVE = enum.auto()


class Decision(NamedTuple):
    action: Action
    rank: int = -1  # SERVE: whom


def decide(headers: list[Header], *, sharded: bool, out_of_step: bool) -> Decision:
    """``sharded``: no rank can compute alone. ``out_of_step``: the last pass was not shared."""
    active = [i for i, h in enumerate(headers) if h.kind != Kind.IDLE]
    if not active:
        return Decision(Action.WAIT)
    if len(active) == len(headers) and len({h.key for h in headers}) == 1:
        return Decision(Action.SHARE)
    in_vain = len(active) == len(headers) or any(h.leaving for h in headers)
    impatient = [i for i in active if in_vain or headers[i].out_of_patience(out_of_step)]
    if not impatient:
        return Decision(Action.WAIT)
    return Decision(Action.SERVE, impatient[0]) if sharded else Decision(Action.ALONE)
