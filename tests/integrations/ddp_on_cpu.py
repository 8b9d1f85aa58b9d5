"""A training script like src/train.py that can resume with DDP on CPU processes (gloo).

Stock transformers loads the optimizer to the device of the rank, which stock Accelerate calls "cpu:0"; torch.load knows
"cpu" only.
"""

from __future__ import annotations

import torch


def enable() -> None:
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


if __name__ == "__main__":
    from llamafactory.train.tuner import run_exp

    enable()
    run_exp()
