"""Run LLaMA-Factory jobs one after another in this process: ``python driver.py jobs.json``.

Also under torchrun and accelerate launch, with FSDP2 on the CPU where that is asked for.

A job is {"verb": "train" | "chat" | "load" | "compare" | "parse", "args": {...}}. Results go to jobs.results.json:
train -> None, chat -> the reply to "Who are you?", load -> what the loaded model looks like,
compare -> errors of logits and of LoRA gradients against transformers' model of the folder args["reference"],
parse -> the expert settings that kt_sft took from the arguments.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def train(args: dict[str, Any]) -> None:
    from llamafactory.train.tuner import run_exp

    run_exp(args)


def chat(args: dict[str, Any]) -> str:
    from llamafactory.chat import ChatModel

    question = [{"role": "user", "content": "Who are you?"}]
    return ChatModel(args).chat(question, max_new_tokens=8, do_sample=False)[0].response_text


def _loaded(args: dict[str, Any]) -> tuple[Any, Any]:
    """The model as a training gets it, and the training's arguments."""
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    model_args, _, training_args, finetuning_args, _ = get_train_args(args)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    return load_model(tokenizer, model_args, finetuning_args, is_trainable=True), training_args


def compare(args: dict[str, Any]) -> dict[str, Any]:
    """In fp32, on the values that a bf16 training has, and with random factors B: LoRA starts with zeros."""
    import torch

    from tests.families import errors_of, stock_model

    remote = {"trust_remote_code": True} if args.get("trust_remote_code") else {}
    reference = stock_model(Path(args.pop("reference")), torch.bfloat16, **remote).float()
    model, _ = _loaded(args)
    torch.manual_seed(6)  # no routing near-tie that bf16 products would flip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    error, errors = errors_of(model.float().train(), reference)
    return {"logits": error, "gradients": errors}


def load(args: dict[str, Any]) -> dict[str, Any]:
    model, training_args = _loaded(args)
    return {
        "modules": sorted({type(module).__name__ for module in model.modules()}),
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "n_gpu": training_args.n_gpu,
    }


def parse(args: dict[str, Any]) -> dict[str, Any]:
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import parser

    from kt_sft.integrations.llamafactory import active_config

    if args.get("do_train"):
        _, data_args, *_ = parser._parse_train_args({**args, "use_cpu": True})
    else:
        _, data_args, *_ = parser._parse_infer_args(args)
    config = active_config()
    assert config is not None
    return {"weight_format": config.weight_format, "template_known": data_args.template in TEMPLATES}


def _several_processes() -> None:
    """Keep the process group from job to job: a second one cannot be made from the launcher's store."""
    import torch.distributed

    torch.distributed.destroy_process_group = lambda group=None: None
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        import fsdp_on_cpu

        fsdp_on_cpu.enable()


def main() -> None:
    path = Path(sys.argv[1])
    if "WORLD_SIZE" in os.environ:
        _several_processes()
    verbs = {"train": train, "chat": chat, "load": load, "compare": compare, "parse": parse}
    results, environment = [], dict(os.environ)
    for job in json.loads(path.read_text()):
        results.append(verbs[job["verb"]](job["args"]))
        os.environ.clear()  # a bf16 run leaves ACCELERATE_MIXED_PRECISION behind
        os.environ.update(environment)
    if os.environ.get("RANK", "0") == "0":
        path.with_suffix(".results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
