"""Pack experts as INT4 with error-compensated rounding, on the inputs that they see while the model reads a text.

All sequences go through the model at once, one layer after the other. In place of each layer's experts stands a module
that, when its inputs arrive, does this for one expert after the other and keeps nothing:

    X = the rows routed to the expert       gate, up: rounded with X^T X       H = silu(X gate^T) * (X up^T)
    down: rounded with H^T H                out[t] += w[t, k] * (H down^T)[t]

All values are those of the rounded weights, so later layers are rounded for the inputs that they will really get. In
memory are the model without its experts, the activations of one layer and one expert. An expert that sees fewer than
``MIN_ROWS`` rows is rounded to the nearest.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..config import KtConfig
from ..nn.experts import KtExperts
from ..ops.activation import SILU
from ..ops.packed import PackedExperts
from ..weights.cache import NEAREST, CacheMiss, PackedWriter, build_lock, open_packed
from ..weights.formats import open_checkpoint
from ..weights.loader import Job, make_job, open_built
from ..weights.rounding import BLOCK, DAMPING, round_int4
from .convert import by_size, expert_tensors, experts_on_cpu, local_path, set_threads
from .pack import Packed

logger = logging.getLogger(__name__)

MIN_ROWS = 128
SEQUENCE = 1024  # tokens


class CalibratedExperts(nn.Module):
    """Stands in for the experts of one layer: rounds them for the inputs of its one call, and computes with them."""

    def __init__(self, layer: str, job: Job, writer: PackedWriter, bar: tqdm) -> None:
        super().__init__()
        self._layer, self._job, self._writer, self._bar = layer, job, writer, bar

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (..., D), top_k_index (T, K), top_k_weights (T, K) -> like hidden_states."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        few = []
        for e in self._job.held:
            token_N, slot_N = (top_k_index == e).nonzero(as_tuple=True)
            x_ND = x_TD[token_N].float()
            if not self._writer.holds(self._layer, e):
                packed = self._pack(e, x_ND)
                self._writer.put(self._layer, e, packed.storage)
            else:
                packed = self._one(self._writer.get(self._layer, e))
            gate, up, down = (matrix[0].float() for matrix in packed.dequantize())
            y_ND = _hidden(x_ND, gate, up) @ down.T
            out_TD.index_add_(0, token_N, y_ND * top_k_weights[token_N, slot_N, None].float())
            if len(token_N) < MIN_ROWS:
                few.append(e)
            self._bar.update()
        if few:
            message = "%s: %d of %d experts saw fewer than %d rows of the text and were rounded to the nearest: %s"
            logger.info(message, self._layer, len(few), len(self._job.held), MIN_ROWS, ", ".join(map(str, few)))
        return out_TD.to(hidden_states.dtype).view(hidden_states.shape)

    def _one(self, storage: Tensor) -> PackedExperts:
        spec = self._job.spec
        return PackedExperts(storage, 1, spec.hidden_size, spec.intermediate_size, self._job.layout(self._layer))

    def _pack(self, expert: int, x_ND: Tensor) -> PackedExperts:
        spec = self._job.spec
        packed = self._one(torch.zeros(spec.slot(spec.layers.index(self._layer)), dtype=torch.uint8))
        gate, up, down = self._job.readers[self._layer].read(expert).dequantize()
        if len(x_ND) < MIN_ROWS:
            packed.pack_expert_(0, gate, up, down)
            return packed
        group = packed.group_size
        both = round_int4(torch.cat([gate, up]), x_ND.T @ x_ND, group)
        new_gate, new_up = both.rows(slice(0, len(gate))), both.rows(slice(len(gate), 2 * len(gate)))
        h_NF = _hidden(x_ND, *(part.dequantize(torch.bfloat16).float() for part in (new_gate, new_up)))
        new_down = round_int4(down, h_NF.T @ h_NF, group)
        for projection, part in enumerate((new_gate, new_up, new_down)):
            assert part.scales is not None
            packed.pack_codes_(0, projection, part.codes, [part.scales.view(torch.uint8)])
        return packed


def _hidden(x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    return F.silu(x_ND @ gate_FD.T) * (x_ND @ up_FD.T)


def pack_calibrated(
    model: str | os.PathLike[str],
    config: KtConfig,
    text: str,
    *,
    tokens: int = 64 * SEQUENCE,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Packed:
    """Pack the experts of a folder or hub name into ``config.weight_path``, rounded for the first ``tokens`` of a text.

    Raises:
        ValueError: not int4, a text that is too short, or what ``pack_checkpoint`` raises.
        OSError: the folder cannot be written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if config.weight_format != "int4":
        raise ValueError(f"calibration: expected int4, whose rounding it improves, got {config.weight_format}")
    folder = local_path(model, revision)
    set_threads(config)
    ids = sequences(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code), text, tokens)
    rounding = _mark(ids)
    found: list[Packed] = []

    def fill(loaded: Any, *args: Any, **kwargs: Any) -> None:
        found.append(_round_all(loaded, folder, config, ids, rounding))

    with experts_on_cpu(folder, config, fill=fill):
        AutoModelForCausalLM.from_pretrained(
            config.non_expert_weight_path or folder, dtype="auto", trust_remote_code=trust_remote_code
        )
    return found[0]


def sequences(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """The beginning of a text as token ids (sequences, ``SEQUENCE``)."""
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids[:tokens]
    if len(ids) < SEQUENCE:
        raise ValueError(f"calibration: expected a text of at least {SEQUENCE} tokens, got {len(ids)}")
    return torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)


def _mark(ids: Tensor) -> str:
    """Names the text and the method, so that a file of another text is not continued."""
    settings = f"{BLOCK} {DAMPING} {MIN_ROWS} {list(ids.shape)} ".encode()
    return "gptq-" + hashlib.blake2b(settings + ids.numpy().tobytes(), digest_size=8).hexdigest()


def jobs_of(model: Any, folder: str, config: KtConfig, rounding: str = NEAREST) -> Iterator[Job]:
    directory = local_path(config.expert_checkpoint_path or folder, None)
    checkpoint = open_checkpoint(directory)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, KtExperts)}
    for path, m in layers.items():
        if m.has_bias or m.activation != SILU:
            raise ValueError(
                f"calibration: {path}: expected SiLU-gated experts without biases, got {m.activation} "
                f"{'with' if m.has_bias else 'without'} biases; convert this model without --calibration"
            )
    for (num_experts, hidden, intermediate), group in by_size(layers).items():
        job = make_job(
            directory,
            {path: expert_tensors(path, m, model, checkpoint, config) for path, m in group.items()},
            num_experts=num_experts,
            hidden_size=hidden,
            intermediate_size=intermediate,
            config=config,
        )
        job = replace(job, spec=replace(job.spec, rounding=rounding)).with_layouts()
        if kept := {str(matrix) for layout in job.spec.layouts or () for matrix in layout} - {"int4"}:
            raise ValueError(
                f"calibration: expected experts that are not INT4 already, got {', '.join(sorted(kept))}, which stays "
                "as it is; convert this model without --calibration"
            )
        yield job


def _round_all(model: Any, folder: str, config: KtConfig, ids: Tensor, rounding: str) -> Packed:
    jobs = list(jobs_of(model, folder, config, rounding))
    paths = [job.path for job in jobs if job.path is not None]
    assert len(paths) == len(jobs)
    total = sum(len(job.readers) * len(job.held) for job in jobs)
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(build_lock(path))
        if not all(_is_there(job, path) for job, path in zip(jobs, paths, strict=True)):
            bar = stack.enter_context(tqdm(total=total, unit="expert", desc="rounding experts (int4)", disable=None))
            writers = [stack.enter_context(PackedWriter(p, job.spec)) for job, p in zip(jobs, paths, strict=True)]
            for job, writer in zip(jobs, writers, strict=True):
                for layer in job.readers:
                    model.set_submodule(layer, CalibratedExperts(layer, job, writer, bar))
            with torch.no_grad():
                model.eval().base_model(input_ids=ids, use_cache=False)
            for writer in writers:
                writer.commit()
        packed = [p for job, path in zip(jobs, paths, strict=True) for p in open_built(path, job.spec).values()]
    return Packed(files=paths, layers=len(packed), nbytes=sum(p.nbytes for p in packed))


def _is_there(job: Job, path: Path) -> bool:
    try:
        open_packed(path, job.spec)
    except CacheMiss as miss:
        logger.info("Packing the experts of %s into %s: %s.", job.checkpoint.folder, path, miss)
        return False
    return True
