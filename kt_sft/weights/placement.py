"""Mapped experts, moved to the NUMA nodes that compute with them.

The pages of a mapped cache file lie on the node that happened to read them. With several nodes every layer is copied,
each block row by a thread of its node: to anonymous memory, or, for the processes of a host, to an anonymous file that
they share. The mapping is given up; its pages in the page cache are the system's to drop. One node: nothing is copied.
"""

from __future__ import annotations

from kt_sft import native

from ..distributed.memory import filled_once
from ..distributed.peers import Peers
from ..ops.packed import PackedExperts


def on_nodes(layers: dict[str, PackedExperts], peers: Peers | None) -> dict[str, PackedExperts]:
    """The same layers, near the threads that read them; emptied layer by layer, so that few are there twice.

    ``peers``: the processes of this host that call this together. The first of them decides and copies for all.
    """
    nodes = len(native.nodes()) if peers is None else peers.numbers([len(native.nodes())])[0][0]
    if nodes == 1:
        return layers
    return {name: _moved(layers.pop(name), peers) for name in list(layers)}


def _moved(mapped: PackedExperts, peers: Peers | None) -> PackedExperts:
    if peers is None:
        return mapped.copy()
    return mapped.in_memory(filled_once(peers, mapped.nbytes, lambda memory: mapped.in_memory(memory).copy_(mapped)))
