"""The decision of a round, as a function of what the ranks say."""

from __future__ import annotations

import itertools

import pytest

from kt_sft.distributed.agreement import Action, Header, Kind, decide

LONG = 10**9
FORWARD = Header(Kind.FORWARD, 3, 7)
BACKWARD = Header(Kind.BACKWARD, 3, 7)
EVALUATION = Header(Kind.EVALUATION, 3, 7)


def action(*headers: Header, sharded: bool = False, out_of_step: bool = False) -> Action:
    return decide(list(headers), sharded=sharded, out_of_step=out_of_step).action


@pytest.mark.parametrize("header", [FORWARD, BACKWARD, EVALUATION])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_same_pass_is_shared(header, sharded):
    uneven = header._replace(tokens=5, waited_us=LONG, round=4)
    assert action(header, uneven, sharded=sharded) == Action.SHARE


def test_nothing_to_do():
    assert action(Header(), Header()) == Action.WAIT


@pytest.mark.parametrize(
    "other", [BACKWARD, FORWARD._replace(layer=4), FORWARD._replace(signature=8)], ids=["pass", "layer", "shapes"]
)
def test_different_passes_are_never_mixed(other):
    assert action(FORWARD, other) == Action.ALONE
    assert decide([FORWARD, other], sharded=True, out_of_step=False) == (Action.SERVE, 0)


def test_a_training_pass_waits_for_the_others_but_not_for_ever():
    assert action(FORWARD, Header()) == Action.WAIT
    assert action(FORWARD._replace(waited_us=LONG), Header()) == Action.ALONE
    assert decide([Header(), FORWARD._replace(waited_us=LONG)], sharded=True, out_of_step=False) == (Action.SERVE, 1)


def test_out_of_step_they_wait_in_the_first_layer_only():
    assert action(FORWARD, Header(), out_of_step=True) == Action.ALONE
    assert action(FORWARD._replace(layer=0), Header(), out_of_step=True) == Action.WAIT
    assert action(BACKWARD._replace(layer=0), Header(), out_of_step=True) == Action.ALONE


def test_nobody_waits_for_a_rank_that_leaves():
    assert action(FORWARD, Header(leaving=1), sharded=True) == Action.SERVE


def test_every_mixture_ends_when_patience_does():
    """No combination of what three ranks wait for can wait for ever."""
    kinds = [Header(), *(h._replace(waited_us=LONG) for h in (FORWARD, BACKWARD, EVALUATION))]
    for headers in itertools.product(kinds, repeat=3):
        for sharded, out_of_step in itertools.product((False, True), repeat=2):
            waits = action(*headers, sharded=sharded, out_of_step=out_of_step) == Action.WAIT
            assert waits == all(h.kind == Kind.IDLE for h in headers)
