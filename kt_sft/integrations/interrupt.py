"""Ctrl-C and the end of input in LLaMA-Factory's commands: one line and exit status 130, no traceback, no abort.

It holds for every run of LLaMA-Factory in this environment, with ``use_kt`` or without.

A ChatModel runs its event loop and ``generate`` in daemon threads. A daemon thread that still runs native code while
the interpreter shuts down can abort the process (it is unwound through C++ frames that must not throw). So whoever
leaves stops the loop, asks ``generate`` to end after the current token and waits for both: an interrupted chat at
once, every other process at exit.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

INTERRUPTED = 128 + 2  # what a shell reports for SIGINT
_WAIT_S = 10.0

_stop = threading.Event()
_chat_models: weakref.WeakSet[Any] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


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


def patch_launcher(launcher: Any) -> None:
    """``llamafactory-cli``: an interrupt that nothing closer caught (imports, data, torchrun's parent)."""
    launcher.launch = ending_cleanly(launcher.launch, "llamafactory-cli")


def patch_chat_model(chat_model: Any) -> None:
    """``run_chat`` ends at Ctrl-C and at the end of piped input; every ChatModel can be stopped."""
    atexit.register(stop_generation)
    stock_init = chat_model.ChatModel.__init__

    @functools.wraps(stock_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        _chat_models.add(self)

    chat_model.ChatModel.__init__ = __init__
    stock_run_chat = chat_model.run_chat

    @functools.wraps(stock_run_chat)
    def run_chat() -> None:
        try:
            stock_run_chat()
        except EOFError:
            sys.stdout.write("\n")
        except KeyboardInterrupt:
            sys.stderr.write("\nChat interrupted.\n")
            if not stop_generation():  # a long prompt is still being read
                sys.stdout.flush()
                os._exit(INTERRUPTED)
            sys.exit(INTERRUPTED)

    chat_model.run_chat = run_chat


def stop_generation() -> bool:
    """Stop every ChatModel's loop and ``generate``; True when their daemon threads have ended."""
    _stop.set()
    loops = [model._thread for model in list(_chat_models)]
    for model in list(_chat_models):
        model._loop.call_soon_threadsafe(model._loop.stop)
    for thread in loops:
        thread.join(_WAIT_S)
    generating = list(_threads)  # after the loops have ended: none of them starts another one
    for thread in generating:
        thread.join(_WAIT_S)
    return not any(thread.is_alive() for thread in loops + generating)


def patch_hf_engine(hf_engine: Any) -> None:
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
        if threading.current_thread().daemon:
            _threads.add(threading.current_thread())
        return generate(*args, stopping_criteria=criteria, **kwargs)

    return run


def _stop_requested(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
    import torch

    return torch.full((input_ids.shape[0],), _stop.is_set(), dtype=torch.bool, device=input_ids.device)
