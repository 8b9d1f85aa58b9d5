"""Where the checkpoint keeps the experts of a module: hub-style names, found with transformers' own conversion rules.

transformers 5 renames and fuses on load (``block_sparse_moe.experts.3.w1.weight`` -> ``mlp.experts.gate_up_proj``).
``hub_names`` asks those rules which per-expert names become the fused ones; ``locate`` then looks which of the possible
layouts a checkpoint really has.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..nn.experts import KtExperts, ProjectionNames
from ..weights.checkpoint import Checkpoint, ExpertTensors
from ..weights.formats import is_stored
from .spec import TRIPLES


def hub_names(model: Any, path: str) -> tuple[ProjectionNames, str]:
    """The per-expert projection names and the name of the parent block in the checkpoints of this model family.

    ``path`` is the experts module's path in ``model`` (transformers 5), e.g. ``layers.3.mlp.experts``.
    """
    rename = _renamer(model)
    before, block, experts = path.rsplit(".", 2)
    for block_name in dict.fromkeys(["block_sparse_moe", block]):
        for names in TRIPLES:
            keys = [f"{before}.{block_name}.{experts}.0.{name}.weight" for name in names]
            targets = [f"{path}.gate_up_proj", f"{path}.gate_up_proj", f"{path}.down_proj"]
            if [rename(key) for key in keys] == targets:
                return names, block_name
    return TRIPLES[0], block


def _renamer(model: Any) -> Any:
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:  # transformers 4 renames nothing
        return lambda key: key
    rules = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
    return lambda key: core_model_loading.rename_source_key(key, renamings, converters)[0]


def locate(path: str, experts: KtExperts, base_prefix: str, checkpoint: Checkpoint) -> ExpertTensors:
    """The tensors of one layer in the checkpoint; ValueError if there are none.

    Looked for, in this order: hub-style per-expert names, per-expert names under the module's own path, fused names;
    each with and without the model's base prefix (checkpoints saved from the bare decoder lack it); then llama.cpp's.
    Any checkpoint format counts: the names are those of its unquantised tensors.
    """
    own = path
    hub = hub_path(path, experts)
    stripped = f"{base_prefix}."
    bases = [hub, own, *(base.removeprefix(stripped) for base in (hub, own)), f"{stripped}{hub}", f"{stripped}{own}"]
    for base in dict.fromkeys(bases):
        for names in dict.fromkeys([experts.names, *TRIPLES]):
            if is_stored(f"{base}.0.{names.gate}.weight", checkpoint):
                gate, up, down = (f"{base}.{{expert}}.{name}.weight" for name in names)
                return ExpertTensors(gate=gate, up=up, down=down)
        for suffix in ("", ".weight"):
            if is_stored(f"{base}.gate_up_proj{suffix}", checkpoint):
                return _fused(f"{base}.gate_up_proj{suffix}", f"{base}.down_proj{suffix}", experts, checkpoint)
    for number in re.findall(r"\blayers\.(\d+)\.", path):
        gate, up, down = (f"blk.{number}.ffn_{name}_exps" for name in ("gate", "up", "down"))
        if f"{gate}.weight" in checkpoint:
            found = ExpertTensors(gate=f"{gate}.weight", up=f"{up}.weight", down=f"{down}.weight")
            if f"{down}.bias" not in checkpoint:
                return found
            return replace(found, gate_bias=f"{gate}.bias", up_bias=f"{up}.bias", down_bias=f"{down}.bias")
    near = sorted(
        name for name in checkpoint.names() if f".{path.rsplit('.', 3)[-3]}." in name and ".experts." in name
    )[:3]
    raise ValueError(
        f"experts of {path}: expected tensors such as {hub}.0.{experts.names.gate}.weight, got "
        f"{near or 'no expert tensors of this layer'}; check that the checkpoint is complete and of this model"
    )


def _fused(gate_up: str, down: str, experts: KtExperts, checkpoint: Checkpoint) -> ExpertTensors:
    """Gate and up in alternating rows where the family has them so (gpt-oss); biases are optional."""
    gate_up_bias, down_bias = (f"{name}_bias" if f"{name}_bias" in checkpoint else None for name in (gate_up, down))
    return ExpertTensors(
        gate_up=gate_up,
        down=down,
        interleaved=experts.fused.interleaved,
        transposed=_transposed(gate_up, down, experts, checkpoint),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
    )


def _transposed(gate_up: str, down: str, experts: KtExperts, checkpoint: Checkpoint) -> bool:
    """Whether the stacks are (E, D, 2F) and (E, F, D), as Qwen3-VL's; at most one of the two can be square."""
    D, F = experts.hidden_size, experts.intermediate_size
    pairs = ((gate_up, (D, 2 * F)), (down, (F, D)))
    return any(n in checkpoint and checkpoint.shape(n)[1:] == s and s[0] != s[1] for n, s in pairs)


def hub_path(path: str, experts: KtExperts) -> str:
    """The module's path with the parent block's checkpoint name: where per-expert adapters keep their keys too."""
    before, _, leaf = path.rsplit(".", 2)
    return f"{before}.{experts.block_name}.{leaf}"
