"""The only importer of the compiled kernels: what this machine runs, and typed wrappers for the layers above.

``KT_SFT_ISA`` (or KTransformers' ``KT_KERNEL_CPU_VARIANT``) forces an instruction set; one that the CPU lacks raises.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

try:
    import kt_sft._C as _C
except ImportError as error:  # pragma: no cover - a broken installation
    raise ImportError(
        f"kt_sft's compiled kernels cannot be loaded ({error}). Reinstall the package with `pip install .`"
    ) from error

_KT_VARIANTS = {"amx": "amx", "avx512": "avx512", "avx2": "avx2"}


def _forced_isa() -> str:
    forced = os.environ.get("KT_SFT_ISA", "")
    if not forced and (variant := os.environ.get("KT_KERNEL_CPU_VARIANT", "")):
        forced = _KT_VARIANTS.get(variant.lower(), variant.lower())
    return forced or "auto"


_C.select_isa(_forced_isa())

isa = _C.isa
isas = _C.isas
select_isa = _C.select_isa
formats = _C.formats
num_threads = _C.num_threads
set_num_threads = _C.set_num_threads
packed_bytes = _C.packed_bytes
peak_flops = _C.peak_flops
peak_int8 = _C.peak_int8
computes_int8 = _C.computes_int8
read_bandwidth = _C.read_bandwidth
workspace_bytes = _C.workspace_bytes
wish_huge_pages = _C.wish_huge_pages
set_workspace_poison = _C.set_workspace_poison
sort_by_expert = _C.sort_by_expert
PackedHandle = _C.PackedHandle
pack = _C.pack
pack_codes = _C.pack_codes
unpack = _C.unpack
product = _C.product
product_int8 = _C.product_int8
forward = _C.forward
backward = _C.backward


def numa_nodes() -> int:
    """Number of NUMA nodes with memory, as the kernel lists them."""
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))


def info() -> dict[str, Any]:
    """What runs here: isa (chosen), isas (all that this CPU runs), formats, threads, numa_nodes."""
    return {
        "isa": isa(),
        "isas": isas(),
        "formats": formats(),
        "threads": num_threads(),
        "numa_nodes": numa_nodes(),
    }
