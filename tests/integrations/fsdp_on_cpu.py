"""A training script like src/train.py that lets Accelerate use FSDP2 on CPU processes (gloo).

Stock Accelerate keeps MULTI_CPU and silently trains with DDP; this switches the state after it has been set up.
"""

from __future__ import annotations

import functools
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def enable() -> None:
    stock_init = AcceleratorState.__init__

    @functools.wraps(stock_init)
    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        stock_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = __init__  # type: ignore[method-assign]


if __name__ == "__main__":
    from llamafactory.train.tuner import run_exp

    enable()
    run_exp()
