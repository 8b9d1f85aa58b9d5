"""What the routed experts of one MoE layer are: sizes, names, and whether packed experts can stand in for them.

Every transformers 5 experts class under ``use_experts_implementation`` has one interface and states its metadata, so
hardly anything here knows a model family. Supported is what the kernels compute,

    expert(x) = W_down activation(W_gate x + b_gate, W_up x + b_up) + b_down

with the activations of ``ops.activation`` and with or without biases; gate_up_proj (E, 2F, D) = [gate; up] and
down_proj (E, D, F) may be transposed, gate and up may alternate. Which activation a class computes is tried out.
Anything else is refused by naming what was found. transformers 4 keeps experts as a ModuleList: see ``blocks_v4``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.experts import FusedLayout, ProjectionNames
from ..ops import Activation, ExpertBiases
from ..ops.activation import SILU

logger = logging.getLogger(__name__)

TRIPLES = (ProjectionNames(), ProjectionNames("w1", "w3", "w2"))

# Classes that do not state their metadata: Llama 4's, and gpt-oss's in transformers 4.
_UNSTATED: dict[str, dict[str, bool]] = {
    "Llama4TextExperts": {"has_gate": True, "has_bias": False, "is_transposed": True},
    "GptOssExperts": {"has_gate": True, "has_bias": True, "is_transposed": True, "interleaved": True},
}


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """Sizes of the experts of one layer (E experts, D hidden, F intermediate) and their checkpoint names."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    names: ProjectionNames = field(default_factory=ProjectionNames)
    block_name: str = "mlp"
    fused: FusedLayout = field(default_factory=FusedLayout)
    activation: Activation = SILU
    has_bias: bool = False


def unsupported(where: str, found: str) -> ValueError:
    return ValueError(
        f"{where}: expected experts with gate, up and down projections and silu(gate) * up or gpt-oss's clamped SwiGLU "
        f"between them, got {found}; "
        "this model's experts cannot run on the CPU kernels as they are: if they compute the same under other names or "
        "in code outside transformers, say so with family_rules (docs/formats.md), else load it without kt_sft"
    )


def is_fused(module: nn.Module) -> bool:
    """Whether the module holds the experts of a layer as 3-D parameters."""
    names = ("gate_up_proj", "up_proj", "down_proj")
    return any(p.ndim == 3 and name.startswith(names) for name, p in module.named_parameters(recurse=False))


def describe_fused(module: nn.Module, where: str) -> MoeSpec:
    """The spec (with default names) of an experts module with fused weights, or the reason why it is not supported."""
    found = _difference(module)
    gate = None if found else _gate_of(module)
    if gate is None:
        raise unsupported(where, f"{type(module).__name__} with {found or _activation_in_words(module)}")
    activation, interleaved = gate
    gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    stated = _stated(module)
    experts, *matrix = down.shape
    hidden, intermediate = reversed(matrix) if stated["is_transposed"] else matrix
    expected = (hidden, 2 * intermediate) if stated["is_transposed"] else (2 * intermediate, hidden)
    if gate_up.shape != (experts, *expected):
        shapes = f"gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)}"
        raise unsupported(where, f"{type(module).__name__} with {shapes}")
    return MoeSpec(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        dtype=down.dtype,
        fused=FusedLayout(transposed=stated["is_transposed"], interleaved=interleaved),
        activation=activation,
        has_bias=stated["has_bias"],
    )


def _unstated(module: nn.Module) -> dict[str, bool]:
    of_transformers = type(module).__module__.startswith("transformers.models.")
    return _UNSTATED.get(type(module).__name__, {}) if of_transformers else {}


def _stated(module: nn.Module) -> dict[str, Any]:
    """What the class says about itself; some classes do not."""
    unstated = _unstated(module)
    return {name: getattr(module, name, unstated.get(name)) for name in ("has_gate", "has_bias", "is_transposed")}


def _difference(module: nn.Module) -> str | None:
    """How the module differs from the common experts interface, in words."""
    tensors = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    stated = _stated(module)
    wanted = {"gate_up_proj", "down_proj"}
    if tensors != (wanted | {f"{name}_bias" for name in wanted} if stated["has_bias"] else wanted):
        return f"tensors {sorted(tensors)}"
    for name, choices in {"has_gate": (True,), "has_bias": (True, False), "is_transposed": (True, False)}.items():
        if not any(stated[name] is choice for choice in choices):
            return f"{name}={stated[name]}"
    if getattr(module, "has_post_expert_norm", False) is not False:
        return f"has_post_expert_norm={module.has_post_expert_norm}"
    return None


def _gate_of(module: Any) -> tuple[Activation, bool] | None:
    """The activation, and whether gate and up alternate: whichever computes what the module's gate computes."""
    known = [SILU] if is_silu(getattr(module, "act_fn", None)) else []
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if isinstance(alpha, int | float) and isinstance(limit, int | float):
        known.append(Activation("clamped_swiglu", alpha=float(alpha), limit=float(limit)))
    if not hasattr(module, "_apply_gate"):
        interleaved = _unstated(module).get("interleaved", False)
        return (known[0], interleaved) if len(known) == 1 else None
    gate = torch.linspace(-20, 20, 48, dtype=torch.float32, device="cpu")
    up = gate.roll(7) * 0.9
    layouts = {False: torch.cat([gate, up]), True: torch.stack([gate, up], dim=1).flatten()}
    for interleaved, gate_up in layouts.items():
        try:
            computed = module._apply_gate(gate_up[None])[0]
        except Exception as error:  # whatever a class needs for it: then it is none of those known here
            logger.debug("%s._apply_gate: %r", type(module).__name__, error)
            return None
        for activation in known:
            if torch.allclose(computed, activation(gate, up), rtol=1e-5, atol=1e-6):
                return activation, interleaved
    return None


def _activation_in_words(module: Any) -> str:
    if is_silu(getattr(module, "act_fn", None)) or not hasattr(module, "act_fn"):
        return "a gate of its own (_apply_gate)"
    return f"activation {module.act_fn}"


def fused_expert(module: nn.Module, fused: FusedLayout, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate (F, D), up (F, D) and down (D, F) of one expert of a loaded module."""
    gate_up, down = (module.get_parameter(name).data[index] for name in ("gate_up_proj", "down_proj"))
    if fused.transposed:
        gate_up, down = gate_up.T, down.T
    gate, up = (gate_up[0::2], gate_up[1::2]) if fused.interleaved else gate_up.chunk(2)
    return gate, up, down


def fused_biases(module: nn.Module, fused: FusedLayout, experts: range) -> ExpertBiases:
    """The biases of some experts of a loaded module."""
    held = slice(experts.start, experts.stop)
    gate_up, down = (module.get_parameter(f"{name}_bias").data[held] for name in ("gate_up_proj", "down_proj"))
    gate, up = (gate_up[:, 0::2], gate_up[:, 1::2]) if fused.interleaved else gate_up.chunk(2, dim=1)
    return ExpertBiases(gate=gate, up=up, down=down)


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
