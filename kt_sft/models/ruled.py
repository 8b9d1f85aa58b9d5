"""Experts modules that a user's rule names (kt_sft/rules.py): their sizes, and how their block calls them.

Sizes come from the tensors that the rule names: those of the checkpoint, or of a model that is loaded already. A module
that is called with (hidden_states, topk_ids, topk_weights) is exchanged as it is. Experts in a ModuleList are computed
by the block: either one of its methods takes these three, or its code calls expert by expert and goes on doing so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from ..nn.experts import KtExperts, ProjectionNames
from ..rules import FamilyRule
from ..weights.checkpoint import Checkpoint, ExpertTensors
from ..weights.formats import MAIN, format_of, is_stored
from ..weights.stored import Stored, partner
from .spec import MoeSpec


class Source(Protocol):
    """Shapes of matrices by their unquantised names."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """(rows, columns), or (experts, rows, columns) of a stack; None if there is no such tensor."""


class OfCheckpoint:
    """Shapes in a checkpoint, whatever its format."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def shape(self, name: str) -> tuple[int, ...] | None:
        main = next((partner(name, s) for s in MAIN if partner(name, s) in self._checkpoint), None)
        if main is None or not is_stored(name, self._checkpoint):
            return None
        stored = self._checkpoint.shape(main)
        if len(stored) < 3:
            whole = Stored(self._checkpoint, name)
            return format_of(whole).shape(whole)
        one = Stored(self._checkpoint, name, 0)
        return stored[0], *format_of(one).shape(one)


class OfModel:
    """Shapes of a model's own parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)


def rule_for(path: str, rules: Sequence[FamilyRule]) -> FamilyRule | None:
    """The first rule for the module at ``path``."""
    return next((rule for rule in rules if rule.tensors(path) is not None), None)


def require_used(rules: Sequence[FamilyRule], paths: Sequence[str], model: nn.Module) -> None:
    """Raise ValueError for a rule that is for none of the experts modules found."""
    for rule in rules:
        if not any(rule.tensors(path) is not None for path in paths):
            lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) or "expert" in n.lower()]
            raise ValueError(
                f"family_rules: expected a module of {type(model).__name__} whose path matches {rule.module!r}, got "
                f"none; paths that may be meant: {', '.join(lists[:6]) or 'none'}"
            )


def tensors_of(path: str, rule: FamilyRule) -> ExpertTensors:
    names = rule.tensors(path)
    assert names is not None
    down = names.pop("down")
    return ExpertTensors(down=down, interleaved=rule.interleaved, transposed=rule.transposed, **names)


def describe_ruled(module: nn.Module, path: str, rule: FamilyRule, source: Source) -> MoeSpec:
    """The spec of the experts module at ``path``; ValueError if the rule does not fit the tensors."""
    tensors = tensors_of(path, rule)
    first = {name: _shape_of(name, tensors, path, source) for name in tensors.names()}
    rows, columns = first[tensors.down][-2:]
    hidden, intermediate = (columns, rows) if rule.transposed else (rows, columns)
    for name in tensors.names()[:-1]:
        expected = (intermediate * (2 if tensors.fused else 1), hidden)
        got = first[name][-2:]
        if got != (expected[::-1] if rule.transposed else expected):
            raise ValueError(
                f"family_rules: {path}: expected {name!r} of shape {expected[::-1] if rule.transposed else expected} "
                f"beside {tensors.down!r} {first[tensors.down][-2:]}, got {got}; "
                f"check gate, up, down and transposed (now {rule.transposed})"
            )
    return MoeSpec(
        num_experts=first[tensors.down][0] if tensors.stacked else _count(tensors.down, source),
        hidden_size=hidden,
        intermediate_size=intermediate,
        dtype=next(module.parameters()).dtype,
        names=_projections(tensors),
        block_name=path.rpartition(".")[0].rpartition(".")[2],
    )


def _shape_of(name: str, tensors: ExpertTensors, path: str, source: Source) -> tuple[int, ...]:
    wanted = name.replace("{expert}", "0")
    shape = source.shape(wanted)
    if shape is None or len(shape) != (3 if tensors.stacked else 2):
        kind = "a stack of matrices" if tensors.stacked else "a matrix"
        found = "no such tensor" if shape is None else f"shape {shape}"
        raise ValueError(f"family_rules: {path}: expected {kind} {wanted!r}, got {found}; check the rule's names")
    return shape


def _count(down: str, source: Source) -> int:
    count = 0
    while source.shape(down.replace("{expert}", str(count))) is not None:
        count += 1
    return count


def _projections(tensors: ExpertTensors) -> ProjectionNames:
    """What ``lora_target`` calls the projections: the last parts of their names, if these tell them apart."""
    names = [name.removesuffix(".weight").rpartition(".")[2] for name in tensors.names()]
    usable = not tensors.fused and len(set(names)) == 3 and all(name.isidentifier() for name in names)
    taken = any(hasattr(KtExperts, name) for name in names)
    return ProjectionNames(*names) if usable and not taken else ProjectionNames()


def ruled_expert(module: nn.Module, path: str, rule: FamilyRule, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of one expert of a loaded module; ValueError if the rule's tensors are not in it."""
    tensors = tensors_of(path, rule)
    parameters = dict(module.named_parameters(prefix=path))

    def matrix(name: str) -> Tensor:
        name = name.replace("{expert}", str(index))
        if name not in parameters:
            raise ValueError(f"family_rules: expected {name!r} inside of {path}, got no such parameter")
        weight = parameters[name].data
        weight = weight[index] if tensors.stacked else weight
        return weight.T if tensors.transposed else weight

    if tensors.gate is not None and tensors.up is not None:
        return matrix(tensors.gate), matrix(tensors.up), matrix(tensors.down)
    both = matrix(tensors.gate_up or "")
    gate, up = (both[0::2], both[1::2]) if tensors.interleaved else both.chunk(2)
    return gate, up, matrix(tensors.down)


def caller(model: nn.Module, module: nn.Module, path: str, rule: FamilyRule) -> list[tuple[nn.Module, str, MethodType]]:
    """The method of the block to exchange, as (block, name, method); none if the block can stay as it is.

    Raises ValueError if the experts cannot be called in the way that the rule says.
    """
    block = model.get_submodule(path.rpartition(".")[0])
    if rule.method is not None:
        method = getattr(type(block), rule.method, None)
        if not callable(method) or _arguments(method) != 3:
            raise ValueError(
                f"family_rules: {path}: expected a method {rule.method!r} of {type(block).__name__} that takes "
                f"(hidden_states, topk_ids, topk_weights), got {_signature(method)}"
            )
        return [(block, rule.method, MethodType(_calling(path.rpartition(".")[2]), block))]
    if not isinstance(module, nn.ModuleList) and _arguments(type(module).forward) != 3:
        raise ValueError(
            f"family_rules: {path}: expected forward(hidden_states, topk_ids, topk_weights) of "
            f"{type(module).__name__}, got {_signature(type(module).forward)}; name the parent's method that takes "
            "these (method), or the ModuleList of the experts"
        )
    return []


def _calling(name: str) -> Callable[..., Tensor]:
    def routed(self: Any, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return getattr(self, name)(hidden_states, topk_ids, topk_weights)

    return routed


def _arguments(function: Callable[..., Any]) -> int:
    """Positional arguments without defaults, after self."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def _signature(function: Any) -> str:
    return f"{getattr(function, '__name__', function)}{inspect.signature(function)}" if callable(function) else "none"
