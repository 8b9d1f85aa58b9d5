"""Adapter tensors of packed experts: how files name and lay them out, to and from the layers' own 3-D factors.

In the model one projection of one layer has ``lora_A`` (E, R, in) and ``lora_B`` (E, out, R). Files may hold

- portable, written here and read by stock PEFT on transformers 4, vLLM, SGLang and llama.cpp's converter:
  ``<block>.experts.<e>.gate_proj.lora_A.weight`` (R, in), ``...lora_B.weight`` (out, R); names as in the checkpoint's
  experts (Mixtral: ``block_sparse_moe.experts.<e>.w1``);
- fused, written by PEFT's ``target_parameters`` on transformers 5: ``<block>.experts.lora_{A,B}.weight`` for one of
  gate_up_proj and down_proj, ``<block>.experts.base_layer.lora_{A,B}.weight`` for the other. Both factors are 2-D over
  (E * R): lora_A is expert-slowest, lora_B is expert-fastest, and which faces the input depends on the PEFT version;
- the 3-D factors themselves, ``<block>.experts.gate_proj.lora_A.weight``.

Pure functions on dictionaries; keys carry no adapter name, as in PEFT's files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.names import hub_path
from ..nn.experts import KtExperts

FACTORS = ("lora_A", "lora_B")


def experts_modules(model: nn.Module) -> dict[str, KtExperts]:
    return {path: module for path, module in model.named_modules() if isinstance(module, KtExperts)}


def to_portable(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """3-D factors -> per-expert 2-D keys; other keys and sharded tensors stay as they are."""
    owners = {
        f"{path}.{name}.{factor}.weight": (f"{hub_path(path, experts)}", f"{name}.{factor}.weight")
        for path, experts in experts_modules(model).items()
        for name in experts.names
        for factor in FACTORS
    }
    own_to_hub = {own: hub for own, hub in _blocks(model) if own != hub}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in owners and not hasattr(value, "device_mesh"):
            base, leaf = owners[key]
            out.update({f"{base}.{e}.{leaf}": matrix.clone() for e, matrix in enumerate(value.unbind(0))})
        else:
            out[_moved(key, own_to_hub)] = value
    return out


def from_files(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Any of the layouts above -> 3-D factors; other keys stay as they are."""
    state = dict(state)
    for path, experts in experts_modules(model).items():
        for base in dict.fromkeys((hub_path(path, experts), path)):
            _take_per_expert(state, base, path, experts)
            _take_fused(state, base, path, experts)
    hub_to_own = {hub: own for own, hub in _blocks(model) if own != hub}
    return {_moved(key, hub_to_own): value for key, value in state.items()}


def _blocks(model: nn.Module) -> list[tuple[str, str]]:
    """(path, path in the checkpoint) of every block with packed experts, so that its router goes along."""
    pairs = [(path, hub_path(path, experts)) for path, experts in experts_modules(model).items()]
    return [(own.rpartition(".")[0], hub.rpartition(".")[0]) for own, hub in pairs]


def _moved(key: str, prefixes: dict[str, str]) -> str:
    """``key`` with the first of ``prefixes`` that it starts with exchanged."""
    for old, new in prefixes.items():
        if key.startswith(f"{old}.") and ".experts." not in key.removeprefix(old):
            return new + key.removeprefix(old)
    return key


def _take_per_expert(state: dict[str, Tensor], base: str, path: str, experts: KtExperts) -> None:
    for name in experts.names:
        for factor in FACTORS:
            keys = [f"{base}.{e}.{name}.{factor}.weight" for e in range(experts.num_experts)]
            missing = [key for key in keys if key not in state]
            if len(missing) == len(keys):
                continue
            if missing:
                raise ValueError(
                    f"adapter: expected {len(keys)} experts in {base}, got {len(keys) - len(missing)} "
                    f"(missing {missing[0]}); the file is incomplete or of another model"
                )
            state[f"{path}.{name}.{factor}.weight"] = torch.stack([state.pop(key) for key in keys])
    for key in state:
        if key.startswith(f"{base}.") and key.removeprefix(f"{base}.").split(".")[0].isdigit():
            raise ValueError(
                f"adapter: expected experts 0..{experts.num_experts - 1} with projections {tuple(experts.names)}, "
                f"got {key}; the file is of another model"
            )


def _take_fused(state: dict[str, Tensor], base: str, path: str, experts: KtExperts) -> None:
    D, F = experts.hidden_size, experts.intermediate_size
    for inner in ("base_layer.", ""):
        keys = [f"{base}.{inner}{factor}.weight" for factor in FACTORS]
        if not all(key in state for key in keys):
            continue
        lora_a, lora_b = (state.pop(key) for key in keys)
        is_down = {lora_a.shape[1], lora_b.shape[0]} == {F, D}
        inputs, outputs = (F, D) if is_down else (D, 2 * F)
        a_ERI, b_EOR = split_fused(
            lora_a, lora_b, experts.num_experts, inputs, outputs, keys[0], transposed=experts.fused.transposed
        )
        if is_down:
            parts = {experts.names.down: (a_ERI, b_EOR)}
        else:
            gate, up = experts.names.gate, experts.names.up
            alternate = experts.fused.interleaved
            of_gate, of_up = (slice(0, None, 2), slice(1, None, 2)) if alternate else (slice(0, F), slice(F, None))
            parts = {gate: (a_ERI, b_EOR[:, of_gate]), up: (a_ERI.clone(), b_EOR[:, of_up])}
        for name, (a, b) in parts.items():
            state[f"{path}.{name}.lora_A.weight"], state[f"{path}.{name}.lora_B.weight"] = a, b.contiguous()


def split_fused(
    lora_a: Tensor, lora_b: Tensor, num_experts: int, inputs: int, outputs: int, where: str, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """PEFT's ``target_parameters`` factors of a (E, outputs, inputs) parameter -> A (E, R, inputs), B (E, outputs, R).

    lora_A (E*R, x) is read as (E, R, x) and lora_B (y, R*E) as (y, R, E). PEFT 0.18 pairs x = outputs with y = inputs
    (it takes the parameter's first matrix dimension for the input); later versions pair x = inputs with y = outputs.
    The shapes tell, unless inputs == outputs. A parameter (E, inputs, outputs), ``transposed``, has x = inputs in all.
    """
    x, y = lora_a.shape[1], lora_b.shape[0]
    if inputs == outputs and not transposed:
        raise ValueError(
            f"adapter tensor {where}: expected inputs and outputs of different size, got {inputs} for both, so the "
            "fused layout is ambiguous; save the adapter with per-expert keys"
        )
    if {x, y} != {inputs, outputs} or lora_a.shape[0] != lora_b.shape[1] or lora_a.shape[0] % num_experts:
        raise ValueError(
            f"adapter tensor {where}: expected factors of {num_experts} experts of ({outputs}, {inputs}), got "
            f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}; the file is of another model"
        )
    rank = lora_a.shape[0] // num_experts
    a_ERx = lora_a.reshape(num_experts, rank, x)
    b_EyR = lora_b.reshape(y, rank, num_experts).permute(2, 0, 1)
    if x == inputs:  # so it is where a transposed parameter is square
        return a_ERx.contiguous(), b_EyR.contiguous()
    return b_EyR.transpose(1, 2).contiguous(), a_ERx.transpose(1, 2).contiguous()
