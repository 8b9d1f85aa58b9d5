"""The frozen routed experts of one MoE layer as a module without parameters.

``KtExperts`` has the interface of transformers' experts modules: the model's own router chooses, this module computes

    out[t] = sum_k  top_k_weights[t, k] * expert_{top_k_index[t, k]}(hidden_states[t])

with the packed weights. They are neither parameters nor buffers: ``state_dict``, ``.to()``, FSDP and the optimizer
never see them, and copies of the module share them.

Its three children are placeholders for "the Linear layers of this projection, one per expert", under the names that
the family's checkpoints use (``gate_proj``/``up_proj``/``down_proj``, or Mixtral's ``w1``/``w3``/``w2``). They compute
nothing. They exist so that adapters are targeted by the names that users type, and so that a LoRA layer has its place
in the module tree: a child that a LoRA layer has wrapped hands its factors to ``KtExperts.forward``.

Letters: T tokens, D hidden, F intermediate, E experts, K top-k, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..distributed.sharing import SharedLayer
from ..ops import Activation, ExpertsLora, PackedExperts, PendingExperts, moe_experts, submit_experts
from ..ops.activation import SILU
from ..ops.kernels import LOCAL, Kernels


class ProjectionNames(NamedTuple):
    """What a model family calls the three matrices of an expert: ``down(silu(gate(x)) * up(x))``."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class FusedLayout(NamedTuple):
    """How a family stacks gate and up of its experts: the adapters of stock PEFT and some checkpoints follow it.

    transposed: (E, D, 2F) and (E, F, D) instead of (E, 2F, D) and (E, D, F). interleaved: gate and up alternate along
    2F instead of following one another.
    """

    transposed: bool = False
    interleaved: bool = False


class LoraTerm(NamedTuple):
    """One adapter on one projection: adds ``scaling * (dropout(x) a_e^T) b_e^T`` for expert e."""

    a: Tensor  # (E, R, in)
    b: Tensor  # (E, out, R)
    scaling: float
    dropout: float


class KtExpertsLinear(nn.Module):
    """Placeholder for the E Linear layers of one projection. Holds no tensor; ``KtExperts`` computes with it."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        """An empty tensor: PEFT reads the device and dtype for new factors from it."""
        return torch.empty(0, dtype=self.dtype, device="cpu")

    def lora_terms(self) -> list[LoraTerm]:
        return []

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "a projection of packed experts: expected to be computed by its KtExperts parent, got a direct call; "
            "call the experts module with (hidden_states, top_k_index, top_k_weights)"
        )

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


class _Shared:
    """Keeps a PackedExperts out of ``copy.deepcopy`` (copies share it) and out of pickles (refused)."""

    def __init__(self) -> None:
        self.packed: PackedExperts | None = None
        self.layer: SharedLayer | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self

    def __reduce__(self) -> NoReturn:
        raise ValueError(
            "packed experts: expected to stay in their process, got a request to pickle them; "
            "save the adapter (save_pretrained of the PEFT model) and load the base with kt_sft.from_pretrained"
        )


class KtExperts(nn.Module):
    """Packed frozen experts with transformers' experts interface. See the module docstring."""

    _is_hf_initialized = True  # transformers must not initialise it

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        names: ProjectionNames = ProjectionNames(),  # noqa: B008 (immutable)
        block_name: str = "mlp",
        fused: FusedLayout = FusedLayout(),  # noqa: B008 (immutable)
        activation: Activation = SILU,
        has_bias: bool = False,
        activation_policy: str = "retain",
        compute_type: str = "bf16",
        gradient_compute_type: str = "bf16",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``block_name`` is what checkpoints call the parent module, e.g. Mixtral's ``block_sparse_moe``.

        ``activation`` and ``has_bias`` are what the experts compute; packed experts must agree.
        """
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.names, self.block_name, self.fused = names, block_name, fused
        self.activation, self.has_bias = activation, has_bias
        self.activation_policy, self.compute_type = activation_policy, compute_type
        self.gradient_compute_type = gradient_compute_type
        self._shared = _Shared()
        E, D, F = num_experts, hidden_size, intermediate_size
        for name, (inputs, outputs) in zip(names, ((D, F), (D, F), (F, D)), strict=True):
            self.add_module(name, KtExpertsLinear(E, inputs, outputs, dtype))

    @property
    def is_loaded(self) -> bool:
        return self._shared.packed is not None

    @property
    def packed(self) -> PackedExperts:
        if self._shared.packed is None:
            raise ValueError(
                "packed experts: expected loaded weights, got none; "
                "build the model with kt_sft.from_pretrained or inside experts_on_cpu"
            )
        return self._shared.packed

    @packed.setter
    def packed(self, packed: PackedExperts) -> None:
        self.set_packed(packed)

    def set_packed(self, packed: PackedExperts, layer: SharedLayer | None = None) -> None:
        """Compute with ``packed``: all experts, or those that this host holds of a ``layer`` shared by the ranks."""
        held = self.num_experts if layer is None else len(layer.held)
        expected = (held, self.hidden_size, self.intermediate_size)
        got = (packed.num_experts, packed.hidden_size, packed.intermediate_size)
        if got != expected:
            raise ValueError(
                f"packed experts: expected (experts, hidden, intermediate) = {expected}, got {got}; "
                "load the experts of this model"
            )
        if (packed.activation, packed.biases is not None) != (self.activation, self.has_bias):
            raise ValueError(
                f"packed experts: expected {self.activation} {'with' if self.has_bias else 'without'} biases, got "
                f"{packed.activation} {'without' if packed.biases is None else 'with'}; load the experts of this model"
            )
        self._shared.packed, self._shared.layer = packed, layer

    @property
    def weight(self) -> Tensor:
        """An empty tensor, for code that asks any target module for its device and dtype."""
        return self.get_submodule(self.names.gate).weight  # type: ignore[return-value]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, kernels: Kernels | None = None
    ) -> Tensor:
        """hidden_states (..., D), top_k_index (T, K) and top_k_weights (T, K) -> like hidden_states."""
        flat = hidden_states.dim() == 2  # a change of shapes costs more than the checks of a call
        out_TD = moe_experts(
            hidden_states if flat else hidden_states.reshape(-1, self.hidden_size),
            top_k_index,
            top_k_weights,
            self.packed,
            self._lora(),
            activation_policy=self.activation_policy,
            compute_type=self.compute_type,
            gradient_compute_type=self.gradient_compute_type,
            kernels=kernels or self._kernels(hidden_states),
        )
        return out_TD if flat else out_TD.view(hidden_states.shape)

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, index: int) -> Callable[[Tensor], Tensor]:
        """Expert ``index`` alone, (..., D) -> (..., D): for blocks that loop over a list of experts."""
        if not -self.num_experts <= index < self.num_experts:
            raise IndexError(f"expert {index}: expected one of {self.num_experts}")
        return partial(self._one, index % self.num_experts)

    def _one(self, index: int, hidden_states: Tensor) -> Tensor:
        layer = self._shared.layer
        if layer is not None and len(layer.held) < self.num_experts:
            raise ValueError(
                "expert_parallel: 'world' needs a block that calls all experts at once, got one that calls expert by "
                "expert; use expert_parallel: host, or name the block's method in the family rule"
            )
        x_TD = hidden_states.reshape(-1, self.hidden_size)
        ids_TK = torch.full((len(x_TD), 1), index, device=x_TD.device)
        weights_TK = torch.ones(ids_TK.shape, dtype=torch.float32, device=x_TD.device)
        return self.forward(hidden_states, ids_TK, weights_TK, kernels=LOCAL)

    def submit(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> PendingExperts:
        """Start ``forward`` and return at once, so that a block can run its shared expert before ``wait()``.

        hidden_states (T, D), top_k_index (T, K) and top_k_weights (T, K); ``wait()`` gives (T, D).
        """
        return submit_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.packed,
            self._lora(),
            activation_policy=self.activation_policy,
            compute_type=self.compute_type,
            gradient_compute_type=self.gradient_compute_type,
            kernels=self._kernels(hidden_states),
        )

    def _kernels(self, hidden_states: Tensor) -> Kernels:
        layer = self._shared.layer
        if layer is None:
            return LOCAL
        device = hidden_states.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        return layer.kernels(training=self.training, overflow_is_normal=half is torch.float16)

    def _lora(self) -> ExpertsLora | None:
        projections: Any = self._modules  # get_submodule costs 1.5 us each
        return combine_lora(*[projections[name].lora_terms() for name in self.names])

    def extra_repr(self) -> str:
        state = f"{self.packed.weight_format}, {self.packed.nbytes / 2**20:.1f} MiB" if self.is_loaded else "not loaded"
        return (
            f"experts={self.num_experts}, hidden={self.hidden_size}, intermediate={self.intermediate_size}, "
            f"weights={state}"
        )


def combine_lora(gate: list[LoraTerm], up: list[LoraTerm], down: list[LoraTerm]) -> ExpertsLora | None:
    """Fold the active adapters of the three projections into one: per projection, factors joined along R.

    ``sum_i s_i B_i A_i = s [s_1/s B_1, s_2/s B_2, ...] [A_1; A_2; ...]`` with one s for the layer.
    """
    terms = [*gate, *up, *down]
    if not terms:
        return None
    dropouts = {term.dropout for term in terms}
    if len(dropouts) > 1:
        raise ValueError(
            f"lora_dropout of the active adapters on the experts: expected one value, got {sorted(dropouts)}; "
            "give the adapters that train together the same lora_dropout"
        )
    scaling = terms[0].scaling if len({term.scaling for term in terms}) == 1 else 1.0
    factors: dict[str, Tensor] = {}
    for name, projection in (("gate", gate), ("up", up), ("down", down)):
        if projection:
            factors[f"{name}_a"], factors[f"{name}_b"] = _join(projection, scaling)
    return ExpertsLora(**factors, scaling=scaling, dropout=dropouts.pop())


def _join(terms: list[LoraTerm], scaling: float) -> tuple[Tensor, Tensor]:
    if len(terms) == 1 and terms[0].scaling == scaling:
        return terms[0].a, terms[0].b
    dtype = terms[0].a.dtype
    a = torch.cat([term.a.to(dtype) for term in terms], dim=1)
    b = torch.cat([(term.b * (term.scaling / scaling)).to(dtype) for term in terms], dim=2)
    return a, b
