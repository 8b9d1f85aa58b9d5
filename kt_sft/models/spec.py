"""What the routed experts of one MoE layer are: sizes, names, and whether packed experts can stand in for them.

Every transformers 5 experts class under ``use_experts_implementation`` has one interface and states its metadata, so
nothing here knows a model family. Supported is what the kernels compute,

    expert(x) = W_down (silu(W_gate x) * (W_up x)),      gate_up_proj (E, 2F, D) = [gate; up],  down_proj (E, D, F)

Anything else is refused by naming what was found. transformers 4 keeps experts as a ModuleList: see ``blocks_v4``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from ..nn.experts import ProjectionNames

TRIPLES = (ProjectionNames(), ProjectionNames("w1", "w3", "w2"))


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """Sizes of the experts of one layer (E experts, D hidden, F intermediate) and their checkpoint names."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    names: ProjectionNames = field(default_factory=ProjectionNames)
    block_name: str = "mlp"


def unsupported(where: str, found: str) -> ValueError:
    return ValueError(
        f"{where}: expected SiLU-gated experts without bias (gate, up and down projections), got {found}; "
        "this model's experts cannot run on the CPU kernels as they are: if they compute the same under other names or "
        "in code outside transformers, say so with family_rules (docs/formats.md), else load it without kt_sft"
    )


def is_fused(module: nn.Module) -> bool:
    """Whether the module holds the experts of a layer as 3-D parameters."""
    names = ("gate_up_proj", "up_proj", "down_proj")
    return any(p.ndim == 3 and name.startswith(names) for name, p in module.named_parameters(recurse=False))


def describe_fused(module: nn.Module, where: str) -> MoeSpec:
    """The spec (with default names) of a transformers 5 experts module, or the reason why it is not supported."""
    found = _difference(module)
    if found:
        raise unsupported(where, f"{type(module).__name__} with {found}")
    gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    experts, hidden, intermediate = down.shape
    if gate_up.shape != (experts, 2 * intermediate, hidden):
        shapes = f"gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)}"
        raise unsupported(where, f"{type(module).__name__} with {shapes}")
    return MoeSpec(num_experts=experts, hidden_size=hidden, intermediate_size=intermediate, dtype=down.dtype)


def _difference(module: nn.Module) -> str | None:
    """How the module differs from the common experts interface, in words."""
    tensors = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if tensors != {"gate_up_proj", "down_proj"}:
        return f"tensors {sorted(tensors)}"
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False}
    later = {"is_concatenated": True, "has_post_expert_norm": False}
    for name, wanted in {**flags, **{k: v for k, v in later.items() if hasattr(module, k)}}.items():
        value = getattr(module, name, None)
        if value is not wanted:
            return f"{name}={value}"
    from transformers.integrations import moe  # transformers 5 only, like the flags above

    if getattr(type(module), "_apply_gate", None) is not moe._default_apply_gate:
        return "a gate of its own (_apply_gate)"
    if not is_silu(getattr(module, "act_fn", None)):
        return f"activation {getattr(module, 'act_fn', None)}"
    return None


def is_silu(activation: object) -> bool:
    if not callable(activation):
        return False
    probe = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], device="cpu")
    with torch.no_grad():
        return bool(torch.allclose(activation(probe), F.silu(probe), rtol=1e-6, atol=0))


def describe_list(experts: nn.ModuleList, where: str) -> MoeSpec:
    """The spec of a ModuleList of gated MLPs (transformers 4)."""
    first = experts[0]
    children = {name for name, child in first.named_children() if isinstance(child, nn.Linear)}
    names = next((triple for triple in TRIPLES if set(triple) == children), None)
    if names is None:
        raise unsupported(where, f"{type(first).__name__} with Linear layers {sorted(children)}")
    linears = [child for name in names if isinstance(child := first.get_submodule(name), nn.Linear)]
    if any(linear.bias is not None for linear in linears):
        raise unsupported(where, f"{type(first).__name__} with biases")
    if not is_silu(getattr(first, "act_fn", None)):
        raise unsupported(where, f"{type(first).__name__} with activation {getattr(first, 'act_fn', None)}")
    return MoeSpec(
        num_experts=len(experts),
        hidden_size=linears[0].in_features,
        intermediate_size=linears[0].out_features,
        dtype=linears[0].weight.dtype,
        names=names,
    )
