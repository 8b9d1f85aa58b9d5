"""Tell the other ranks what ended this one, and name the rank that failed first where an error is only its echo.

An exception that ends the program is announced before the interpreter leaves. On the other ranks, stock collectives
then fail with "Connection closed by peer": the line that says why comes before that traceback.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rounds import Rounds

logger = logging.getLogger(__name__)


def announce_uncaught(rounds: Rounds) -> None:
    """Extend ``sys.excepthook``."""
    before = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if rounds.error is None:
            rounds.fail(f"{kind.__name__}: {error}")
        else:
            logger.error("Caused by another rank: %s.", rounds.error)
        before(kind, error, trace)

    sys.excepthook = excepthook
