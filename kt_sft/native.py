"""The only importer of the compiled kernels: what this machine runs, and typed wrappers for the layers above.

``KT_SFT_ISA`` (or KTransformers' ``KT_KERNEL_CPU_VARIANT``) forces an instruction set; one that the CPU lacks raises.
``KT_SFT_NUMA`` gives the NUMA nodes instead of the kernel's list (topology.py).
"""

from __future__ import annotations

import logging
import os
from typing import Any

from kt_sft import topology

try:
    import kt_sft._C as _C
except ImportError as error:  # pragma: no cover - a broken installation
    raise ImportError(
        f"kt_sft's compiled kernels cannot be loaded ({error}). Reinstall the package with `pip install .`"
    ) from error

logger = logging.getLogger(__name__)

_KT_VARIANTS = {"amx": "amx", "avx512": "avx512", "avx2": "avx2"}


def _forced_isa() -> str:
    forced = os.environ.get("KT_SFT_ISA", "")
    if not forced and (variant := os.environ.get("KT_KERNEL_CPU_VARIANT", "")):
        forced = _KT_VARIANTS.get(variant.lower(), variant.lower())
    return forced or "auto"


_C.select_isa(_forced_isa())

_given = os.environ.get("KT_SFT_NUMA", "")
_ALL_NODES = topology.parse(_given) if _given else topology.detect()
_C.set_nodes(_ALL_NODES)

isa = _C.isa
isas = _C.isas
select_isa = _C.select_isa
formats = _C.formats
num_threads = _C.num_threads
set_num_threads = _C.set_num_threads
nodes = _C.nodes
set_nodes = _C.set_nodes
packed_bytes = _C.packed_bytes
peak_flops = _C.peak_flops
peak_int8 = _C.peak_int8
computes_int8 = _C.computes_int8
ReadProbe = _C.ReadProbe
workspace_bytes = _C.workspace_bytes
wish_huge_pages = _C.wish_huge_pages
map_file_over = _C.map_file_over
set_workspace_poison = _C.set_workspace_poison
sort_by_expert = _C.sort_by_expert
PackedHandle = _C.PackedHandle
pack = _C.pack
pack_codes = _C.pack_codes
copy = _C.copy
unpack = _C.unpack
product = _C.product
product_int8 = _C.product_int8
few_tokens = _C.few_tokens
forward = _C.forward
backward = _C.backward


def use_nodes(most: int) -> None:
    """Split the experts over at most ``most`` NUMA nodes: neighbours are put together. Call it before packing."""
    if most > len(_ALL_NODES):
        logger.info("numa_nodes: %d: this process can use %d; that many are used.", most, len(_ALL_NODES))
    chosen = topology.at_most(_ALL_NODES, most)
    if chosen != nodes():
        set_nodes(chosen)


def info() -> dict[str, Any]:
    """What runs here: isa (chosen), isas (all that this CPU runs), formats, threads, numa_nodes (CPUs of each)."""
    return {
        "isa": isa(),
        "isas": isas(),
        "formats": formats(),
        "threads": num_threads(),
        "numa_nodes": nodes(),
    }
