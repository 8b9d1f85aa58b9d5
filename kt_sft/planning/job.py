"""What shall run (``Job``) and on what (``Host``): everything that the estimates depend on besides the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import ACTIVATION_POLICIES, KtConfig
from ..machine import facts, probes
from ..machine.probes import Rate
from ..ops.layout import QUANTISED

ASSUMED_DISK = Rate(2e9, "assumed: an NVMe drive")
ASSUMED_GPU = Rate(40e12, "assumed: 40 % of a 100 TFLOP/s GPU")
ASSUMED_LINK = Rate(25e9, "assumed: PCIe 4.0 x16")
ASSUMED_GPU_MEMORY = 24 << 30
AS_STORED = "as stored"  # the rate of codes that are packed as they are


@dataclass(frozen=True, kw_only=True)
class Job:
    """A fine-tuning run. ``batch_size``: sequences of ``cutoff_len`` tokens per process and step; one process per GPU.

    expert_lora: adapters on the routed experts too, as ``lora_target: all`` has them.
    sharded: FSDP2 (weights, adapters and optimizer divided among the GPUs); else every GPU holds all of them.
    """

    gpus: int = 0
    cutoff_len: int = 2048
    batch_size: int = 1
    lora_rank: int = 8
    expert_lora: bool = True
    activation_policy: str = "retain"
    gradient_checkpointing: bool = True
    sharded: bool = True

    def __post_init__(self) -> None:
        for name, least in (("gpus", 0), ("cutoff_len", 1), ("batch_size", 1), ("lora_rank", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if self.activation_policy not in ACTIVATION_POLICIES:
            raise ValueError(
                f"activation_policy: expected {' or '.join(ACTIVATION_POLICIES)}, got {self.activation_policy!r}"
            )

    @property
    def tokens(self) -> int:
        """Tokens per process and step."""
        return self.batch_size * self.cutoff_len

    @property
    def processes(self) -> int:
        return max(self.gpus, 1)

    @property
    def expert_rank(self) -> int:
        return self.lora_rank if self.expert_lora else 0


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine: bytes, and rates per second with where each comes from.

    ``pack``: BF16 bytes by weight format, and AS_STORED.
    """

    ram: int
    ram_free: int
    gpu_memory: int
    cache_free: int
    cache_folder: Path | None
    cpu: Rate
    memory: Rate
    disk: Rate
    gpu: Rate
    pack: dict[str, Rate]
    efficiency: float = 0.7  # of the peak, for products of many rows: see ``speed``
    lora_efficiency: float = 0.1  # for the rank-sized products, from README's rows int8 and int8 + LoRA rank 16
    link: Rate = ASSUMED_LINK


def this_host(shard: Path | None = None) -> Host:
    """Look at and measure this machine (one or two seconds). ``shard``: a file of the checkpoint, to time the disk."""
    memory, gpus, cache = facts.memory(), facts.gpus(), KtConfig().cache_folder
    disk = probes.read_rate(shard) if shard is not None else None
    return Host(
        ram=memory.total,
        ram_free=memory.available,
        gpu_memory=min((gpu.total for gpu in gpus), default=ASSUMED_GPU_MEMORY),
        cache_free=facts.disk_free(cache) if cache is not None else 0,
        cache_folder=cache,
        cpu=probes.peak_flops(),
        memory=probes.memory_bandwidth(),
        disk=disk or ASSUMED_DISK,
        gpu=ASSUMED_GPU,
        pack={name: probes.pack_rate(name) for name in QUANTISED} | {AS_STORED: probes.repack_rate()},
    )
