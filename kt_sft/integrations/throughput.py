"""Tokens per second in LLaMA-Factory's training log.

    tokens_per_second = non-padding input tokens of the steps since the last log / seconds spent inside these steps

over all data-parallel ranks. Evaluation, checkpoint writing and data set preparation are not counted. The figure goes
into the progress line, trainer_state.json and trainer_log.jsonl. Only runs with use_kt get it.
"""

from __future__ import annotations

import time
from typing import Any

KEY = "tokens_per_second"


class TokenMeter:
    """Accumulates step time between two readings."""

    def __init__(self) -> None:
        self.tokens_before = 0
        self.seconds = 0.0
        self._step_began: float | None = None

    def begin(self, tokens_seen: int) -> None:
        self.tokens_before, self.seconds = tokens_seen, 0.0

    def step_began(self) -> None:
        self._step_began = time.perf_counter()

    def step_ended(self) -> None:
        if self._step_began is not None:
            self.seconds += time.perf_counter() - self._step_began
            self._step_began = None

    def read(self, tokens_seen: int) -> float | None:
        """Tokens per second since the last reading, None when no step ran."""
        tokens, seconds = tokens_seen - self.tokens_before, self.seconds
        self.begin(tokens_seen)
        return round(tokens / seconds, 1) if tokens > 0 and seconds > 0 else None


def patch_callbacks(callbacks: Any) -> None:
    """Give LLaMA-Factory's LogCallback a token meter."""
    from .llamafactory import active_config

    stock = callbacks.LogCallback

    class LogCallback(stock):  # type: ignore[misc, valid-type]
        __doc__ = stock.__doc__

        def __init__(self) -> None:
            super().__init__()
            self.meter = TokenMeter()

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            self.meter.begin(state.num_input_tokens_seen)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, **kwargs)
            self.meter.step_began()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.meter.step_ended()
            super().on_step_end(args, state, control, **kwargs)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            extra = {}
            if active_config() is not None and logs is not None and "loss" in logs:
                rate = self.meter.read(state.num_input_tokens_seen)
                extra = {} if rate is None else {KEY: rate}
                logs.update(extra)
                state.log_history[-1].update(extra)
            # the file is written by a thread: it gets this call's figure, not the newest
            self._write_log = lambda output_dir, entry: stock._write_log(self, output_dir, {**entry, **extra})
            super().on_log(args, state, control, logs=logs, **kwargs)

    callbacks.LogCallback = LogCallback
