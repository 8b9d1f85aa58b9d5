"""`make demo`: fine-tune a real small MoE through stock LLaMA-Factory, experts on the CPU, and show what it learnt.

1 model     SmolLM2-135M-Instruct from its package, upcycled to a Mixtral with 8 experts (0.69 B parameters)
2 data      LLaMA-Factory's identity examples; some kept out of training
3 training  USE_KT=1 llamafactory-cli train examples/demo_kt_lora_sft.yaml
4 result    three questions and the held-out loss, base model against trained adapter

python -m scripts.demo.run [--quick] [key=value ...]     (key=value overrides the YAML, as in LLaMA-Factory)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml
from rich.console import Console

from . import data, paths
from .make_moe import Build, make_moe

EXAMPLE = paths.ROOT / "examples" / "demo_kt_lora_sft.yaml"
QUICK = ("max_steps=2", "cutoff_len=128")


def settings(overrides: list[str], example: Path = EXAMPLE) -> dict:
    """The YAML with ``key=value`` overrides, as LLaMA-Factory reads it."""
    values = yaml.safe_load(example.read_text())
    return values | {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in overrides)}


def train(overrides: list[str], example: Path = EXAMPLE) -> float:
    """Run LLaMA-Factory on the example; return the wall time in seconds."""
    command = [str(Path(sys.executable).with_name("llamafactory-cli")), "train", str(example), *overrides]
    environment = {
        "USE_KT": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LLAMAFACTORY_VERBOSITY": "WARN",
    }
    start = time.monotonic()
    code = subprocess.call(command, cwd=paths.ROOT, env={**os.environ, **environment})
    if code:
        raise RuntimeError(f"llamafactory-cli train ended with exit code {code}; its message is above")
    return time.monotonic() - start


def summary(output: Path) -> str:
    """Loss and speed out of the trainer's own files."""
    history = [
        entry for entry in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]
    results = json.loads((output / "train_results.json").read_text())
    speeds = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    speed = f", {sum(speeds) / len(speeds):.0f} tok/s" if speeds else ""
    first, last = history[0]["loss"], history[-1]["loss"]
    return f"loss {first:.2f} -> {last:.2f} in {results['train_runtime']:.0f} s of steps{speed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 experts and two steps: checks the plumbing only")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="  %(message)s")
    logging.getLogger("scripts").setLevel(logging.INFO)
    console, start = Console(), time.monotonic()

    console.rule("1 model")
    build = Build(num_experts=4 if options.quick else 8)
    model_dir = make_moe(build)
    console.rule("2 data")
    data.make_data()
    console.rule("3 training: USE_KT=1 llamafactory-cli train examples/demo_kt_lora_sft.yaml")
    overrides = [f"model_name_or_path={model_dir}", *(QUICK if options.quick else ()), *options.overrides]
    values = settings(overrides)
    output = paths.ROOT / values["output_dir"]
    seconds = train(overrides)
    console.rule("4 result")
    compare_seconds = time.monotonic()
    from .evaluate import compare

    compare(model_dir, output, values["kt_config"], console)
    compare_seconds = time.monotonic() - compare_seconds
    console.print(f"training   {summary(output)}")
    console.print(f"adapter    {os.path.relpath(output)}/adapter_model.safetensors, loss plot training_loss.png")
    total = time.monotonic() - start
    console.print(
        f"time       {total:.0f} s: training {seconds:.0f} s with loading, comparison {compare_seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ValueError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
