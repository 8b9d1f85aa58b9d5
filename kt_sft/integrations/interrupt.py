"""Ctrl-C and the end of input in LLaMA-Factory's commands: one line and exit status 130, no traceback, no abort.

A chat generates in a daemon thread. Leaving the interpreter while that thread runs a kernel may abort the process,
so an interrupted chat first asks ``generate`` to stop after the current token and waits for it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

INTERRUPTED = 128 + 2  # what a shell reports for SIGINT
_WAIT_S = 30.0

_stop = threading.Event()
_generating = threading.Lock()


def ending_cleanly(function: Callable, what: str, hint: str = "") -> Callable:
    """Wrap ``function``: KeyboardInterrupt becomes a line on stderr and exit status 130."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            sys.stderr.write(f"\n{what} interrupted. {hint}\n")
            sys.exit(INTERRUPTED)

    return run


def patch_launcher(launcher: ModuleType) -> None:
    """``llamafactory-cli``: an interrupt that nothing closer caught (imports, data, torchrun's parent)."""
    launcher.launch = ending_cleanly(launcher.launch, "llamafactory-cli")


def patch_chat_model(chat_model: ModuleType) -> None:
    """``run_chat`` ends at Ctrl-C and at the end of piped input."""
    stock_run_chat = chat_model.run_chat

    @functools.wraps(stock_run_chat)
    def run_chat() -> None:
        try:
            stock_run_chat()
        except EOFError:
            sys.stdout.write("\n")
        except KeyboardInterrupt:
            sys.stderr.write("\nChat interrupted.\n")
            stop_generation()
            sys.exit(INTERRUPTED)

    chat_model.run_chat = run_chat


def stop_generation() -> None:
    """Ask the running ``generate`` to stop and wait until it has left the kernels."""
    _stop.set()
    if _generating.acquire(timeout=_WAIT_S):
        _generating.release()


def patch_hf_engine(hf_engine: ModuleType) -> None:
    """Let :func:`stop_generation` reach the engine's ``model.generate``."""
    stock_init = hf_engine.HuggingfaceEngine.__init__

    @functools.wraps(stock_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        self.model.generate = _stoppable(self.model.generate)

    hf_engine.HuggingfaceEngine.__init__ = __init__


def _stoppable(generate: Callable) -> Callable:
    @functools.wraps(generate)
    def run(*args: Any, **kwargs: Any) -> Any:
        from transformers import StoppingCriteriaList

        criteria = kwargs.pop("stopping_criteria", None) or StoppingCriteriaList()
        criteria.append(_stop_requested)
        with _generating:
            return generate(*args, stopping_criteria=criteria, **kwargs)

    return run


def _stop_requested(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
    import torch

    return torch.full((input_ids.shape[0],), _stop.is_set(), dtype=torch.bool, device=input_ids.device)
