"""Resume a training under another launcher, or with another number of ranks, than the one that wrote the checkpoint.

Stock Trainer writes whole tensors beside the adapter's file, under names that only the same kind of launcher reads:

    one process, DDP         optimizer.pt, a parameter's state under its number
    FSDP2, FULL_STATE_DICT   optimizer.bin, a parameter's state under its name; pytorch_model_fsdp.bin

Here each kind reads the other's, with any number of ranks. A parameter's number counts through the optimizer's groups,
which the Trainer forms in the same way everywhere. DeepSpeed divides the optimizer's state among its ranks: its
checkpoints are refused elsewhere. Models without packed experts go through unchanged.

A run that was killed while it saved leaves a folder without trainer_state.json, which the Trainer writes last: such a
checkpoint is passed over for the one before it, or refused where it is asked for by name.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WEIGHTS, BY_NAME, BY_NUMBER, SCHEDULER = "pytorch_model_fsdp.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt"
State = dict[str, Any]

logger = logging.getLogger(__name__)


def patch_trainer(module: Any) -> None:
    """Let ``Trainer`` read what another launcher wrote."""
    trainer = module.Trainer
    load = trainer._load_from_checkpoint
    trainer.train = _from_a_whole_checkpoint(trainer.train)
    trainer._inner_training_loop = _loading_adapter_before_sharding(trainer._inner_training_loop, load)
    trainer._load_from_checkpoint = _loading_weights(load)
    trainer._load_optimizer_and_scheduler = _loading_optimizer(trainer._load_optimizer_and_scheduler)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The checkpoint-N folder of ``output_dir`` with the largest N that was written to its end, or None."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    numbered = [path for path, step in steps.items() if step.isdigit() and path.is_dir()]
    for path in sorted(numbered, key=lambda path: int(steps[path]), reverse=True):
        if _is_complete(path):
            return str(path)
        logger.warning("%s is passed over: it has no whole trainer_state.json, the run ended while saving it.", path)
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _from_a_whole_checkpoint(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint and _has_experts(self.model):
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
            else:
                _refuse_incomplete(Path(resume_from_checkpoint))
        return stock(self, resume_from_checkpoint, *args, **kwargs)

    return train


def _refuse_incomplete(checkpoint: Path) -> None:
    if checkpoint.is_dir() and not _is_complete(checkpoint):
        raise ValueError(
            f"resume_from_checkpoint: expected a whole checkpoint, got {checkpoint} without a whole trainer_state.json "
            "(the run ended while saving it); without resume_from_checkpoint the last whole one of output_dir is taken"
        )


def written_by_another(trainer: Any, checkpoint: str | None) -> str | None:
    """Return "fsdp" or "plain", what the checkpoint is, where the run is of the other kind; else None.

    Raises:
        ValueError: a checkpoint that only the launcher that wrote it can read.
    """
    if checkpoint is None or not _has_experts(trainer.model):
        return None
    folder = Path(checkpoint)
    if trainer.is_deepspeed_enabled or not folder.is_dir():
        return None
    if any(folder.glob("global_step*")):
        raise ValueError(
            f"resume_from_checkpoint: {folder} was written by DeepSpeed, which divides the optimizer's state among its "
            "ranks; resume with DeepSpeed and the same number of ranks, or give the folder as adapter_name_or_path "
            "(the adapter continues, the optimizer starts anew)"
        )
    if trainer.is_fsdp_enabled:
        return None if any(folder.glob("pytorch_model_fsdp*")) else "plain"
    return "fsdp" if (folder / WEIGHTS).exists() else None


def _has_experts(model: Any) -> bool:
    from kt_sft.nn.experts import KtExperts

    return any(isinstance(module, KtExperts) for module in model.modules())


def _loading_adapter_before_sharding(stock: Callable, load: Callable) -> Callable:
    @functools.wraps(stock)
    def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        checkpoint = kwargs.get("resume_from_checkpoint")
        if written_by_another(self, checkpoint) == "plain":
            load(self, checkpoint)  # into whole parameters, which FSDP2 divides later
        return stock(self, *args, **kwargs)

    return loop


def _loading_weights(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def load(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        written = written_by_another(self, resume_from_checkpoint)
        if written == "plain":
            return  # done before sharding
        if written is None:
            stock(self, resume_from_checkpoint, model)
            return
        with _without(resume_from_checkpoint, WEIGHTS) as folder:
            stock(self, folder, model)

    return load


@contextmanager
def _without(checkpoint: str, name: str) -> Iterator[str]:
    """The checkpoint's files but ``name``, as links in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(checkpoint).resolve().iterdir():
            if path.name != name:
                (Path(folder) / path.name).symlink_to(path)
        yield folder


def _loading_optimizer(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def load(self: Any, checkpoint: str | None) -> None:
        file = {"fsdp": BY_NAME, "plain": BY_NUMBER, None: None}[written_by_another(self, checkpoint)]
        if checkpoint is None or file is None or not (Path(checkpoint) / file).exists():
            stock(self, checkpoint)
            return
        import torch

        def read(name: str) -> Any:
            return torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True, mmap=True)

        names = names_by_group(self.model, self.optimizer)
        if file == BY_NAME:
            self.optimizer.load_state_dict(by_number(read(file), names))
        else:
            _set_sharded(self.model, self.optimizer, by_name(read(file), names))
        self.lr_scheduler.load_state_dict(read(SCHEDULER))

    return load


def _set_sharded(model: Any, optimizer: Any, state: State) -> None:
    """Whole tensors, the same on all ranks, into FSDP2's shards."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def names_by_group(model: Any, optimizer: Any) -> list[list[str]]:
    """The parameters' names, as torch.distributed.checkpoint has them, for each group of the optimizer."""
    names = {id(p): name.replace("_checkpoint_wrapped_module.", "") for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def by_number(saved: State, names: list[list[str]]) -> State:
    """State under names -> under numbers, in the order of ``names``; the groups' own settings go along."""
    groups = {tuple(sorted(group["params"])): group for group in saved["param_groups"]}
    numbers = itertools.count()
    state, param_groups = {}, []
    for group in names:
        if tuple(sorted(group)) not in groups:
            raise _other_parameters(len(names), len(groups))
        own = {name: next(numbers) for name in group}
        state.update({own[name]: saved["state"][name] for name in group if name in saved["state"]})
        param_groups.append({**groups[tuple(sorted(group))], "params": list(own.values())})
    return {"state": state, "param_groups": param_groups}


def by_name(saved: State, names: list[list[str]]) -> State:
    """State under numbers -> under names."""
    groups = saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group) for group in names]:
        raise _other_parameters(len(names), len(groups))
    own: dict[int, str] = {}
    for group, group_names in zip(groups, names, strict=True):
        own.update(zip(group["params"], group_names, strict=True))
    return {
        "state": {own[number]: state for number, state in saved["state"].items()},
        "param_groups": [{**group, "params": group_names} for group, group_names in zip(groups, names, strict=True)],
    }


def _other_parameters(expected: int, got: int) -> ValueError:
    return ValueError(
        f"resume_from_checkpoint: expected an optimizer over the parameters that are trained now ({expected} groups), "
        f"got one over others ({got} groups); keep lora_target, additional_target and the optimizer of the first run"
    )
