"""The account of host memory against what is held: packed experts, saved tensors, workspace, adapters, a load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kt_sft.nn.experts import KtExperts
from kt_sft.ops import ExpertsLora, moe_experts, pack_experts
from kt_sft.planning import memory
from kt_sft.planning.job import Job
from kt_sft.planning.model import ExpertLayers, ModelParts, describe
from tests.families import save_checkpoint, tiny_config, tiny_model

ROOT = Path(__file__).parents[2]


def parts_of(family: str) -> ModelParts:
    return describe(tiny_config(family).to_dict())


def run(script: str, *arguments: str) -> list[int]:
    """The integers that the script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_packed_bytes_are_those_of_a_loaded_model(tmp_path, family, weight_format):
    import kt_sft

    folder = save_checkpoint(tiny_model(family), tmp_path)
    model = kt_sft.from_pretrained(folder, weight_format=weight_format, cache_dir="none")
    held = sum(m.packed.nbytes for m in model.modules() if isinstance(m, KtExperts))
    assert memory.packed_bytes(parts_of(family), weight_format) == held
    rest = sum(p.numel() for p in model.parameters())
    assert parts_of(family).rest_parameters == rest


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_adapters_are_those_of_peft(tmp_path, family):
    from peft import LoraConfig, get_peft_model

    import kt_sft

    model = kt_sft.convert_model(tiny_model(family), weight_format="bf16")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trained = {True: 0, False: 0}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            trained[".experts." in name] += parameter.numel()
    expected = memory.adapter_parameters(parts_of(family), Job(lora_rank=4))
    assert expected == (trained[True], trained[False])
    assert memory.adapter_parameters(parts_of(family), Job(lora_rank=4, expert_lora=False)) == (0, trained[False])


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_saved_bytes_are_what_autograd_keeps(policy, rank):
    T, K, E, D, F = 50, 2, 8, 64, 96
    packed = pack_experts(torch.randn(E, F, D), torch.randn(E, F, D), torch.randn(E, D, F), "bf16")
    x = torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True)
    ids, weights = torch.randint(E, (T, K)), torch.rand(T, K)
    factors = {f"{name}_a": torch.randn(E, rank, D) for name in ("gate", "up")}
    factors |= {f"{name}_b": torch.randn(E, F, rank) for name in ("gate", "up")}
    lora = ExpertsLora(**factors) if rank else None
    parameters = {factor.data_ptr() for factor in factors.values()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_experts(x, ids, weights, packed, lora, activation_policy=policy)
    layer = ExpertLayers(layers=3, experts=E, hidden=D, intermediate=F)
    parts = replace(parts_of("mixtral"), experts=(layer,), top_k=K)
    job = Job(cutoff_len=T, activation_policy=policy, lora_rank=rank)
    assert memory.saved_bytes(parts, job) == pytest.approx(sum(kept.values()), rel=0.02)
    assert memory.saved_bytes(parts, replace(job, gradient_checkpointing=False)) == 3 * memory.saved_bytes(parts, job)


WORKSPACE = """
    import torch
    from kt_sft import native
    from kt_sft.ops import ExpertsLora, moe_experts, pack_experts
    from tests.planning.test_memory import WORKSPACE_CASES

    T, K, E, D, F = 3000, 2, 4, 256, 160
    packed = pack_experts(torch.randn(E, F, D), torch.randn(E, F, D), torch.randn(E, D, F), "bf16")
    for rank, policy in WORKSPACE_CASES:  # it only ever grows
        lora = None
        if rank:
            shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
            a = {f"{name}_a": torch.randn(E, rank, i, requires_grad=True) for name, (i, _) in shapes.items()}
            b = {f"{name}_b": torch.randn(E, o, rank, requires_grad=True) for name, (_, o) in shapes.items()}
            lora = ExpertsLora(**a, **b)
        x, weights = torch.randn(T, D, requires_grad=True), torch.rand(T, K)
        moe_experts(x, torch.randint(E, (T, K)), weights, packed, lora, activation_policy=policy).sum().backward()
        print(native.workspace_bytes())
"""
WORKSPACE_CASES = [(0, "retain"), (8, "retain"), (8, "recompute")]


def test_workspace():
    layer = ExpertLayers(layers=2, experts=4, hidden=256, intermediate=160)
    parts = replace(parts_of("mixtral"), experts=(layer,), top_k=2)
    jobs = [Job(cutoff_len=3000, lora_rank=rank, activation_policy=policy) for rank, policy in WORKSPACE_CASES]
    assert [memory.workspace_bytes(parts, job) for job in jobs] == pytest.approx(run(WORKSPACE), rel=0.2)


LOAD = """
    import ctypes, re, sys, torch
    import kt_sft
    from kt_sft.nn.experts import KtExperts
    from kt_sft.weights import saving

    def resident():
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps of the loader's buffers is not held
        return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

    def load(folder):
        model = kt_sft.from_pretrained(folder, weight_format="int8", cache_dir=folder + "/cache")
        [m.packed.storage.max() for m in model.modules() if isinstance(m, KtExperts)]  # every page of the two files
        [p.detach().max() for p in model.parameters()]
        return model

    load(sys.argv[1])  # a small model first: imports and threads are not what is measured
    saving.finish()
    before = resident()
    model = load(sys.argv[2])
    print(resident() - before)
"""
DEMO = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152)


def write_checkpoint(folder: Path, **settings) -> Path:
    """A Mixtral checkpoint in bf16, all weights alike: of the demonstration's sizes, with fewer layers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("mixtral", **settings), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.detach().fill_(0.01)
    model.save_pretrained(folder)
    return folder


def test_a_load_takes_what_the_plan_says(tmp_path):
    """Growth of the resident set when a packed model starts, against packed experts and the rest of the weights."""
    import kt_sft

    small = write_checkpoint(tmp_path / "small")
    big = write_checkpoint(tmp_path / "big", **DEMO, num_hidden_layers=6)
    parts, job = describe(json.loads((big / "config.json").read_text())), Job(lora_rank=0)
    lines = memory.host_lines(parts, job, "int8")
    planned = sum(line.nbytes for line in lines if line.name == "packed experts" or line.name in parts.rest)
    assert 240e6 < planned < 260e6
    kt_sft.from_pretrained(big, weight_format="int8", cache_dir=big / "cache")
    (measured,) = run(LOAD, str(small), str(big))
    assert planned == pytest.approx(measured, rel=0.05)


def test_gpus_take_the_weights_and_share_them():
    parts = parts_of("qwen3_moe")
    on_cpu = memory.host_lines(parts, Job(), "int8")
    on_gpu = memory.host_lines(parts, Job(gpus=1), "int8")
    assert "attention" in {line.name for line in on_cpu} and "attention" not in {line.name for line in on_gpu}
    whole, sharded, copied = (
        {line.name: line.nbytes for line in memory.model_lines(parts, job)}
        for job in (Job(gpus=1), Job(gpus=4), Job(gpus=4, sharded=False))
    )
    assert sharded["attention"] == whole["attention"] // 4
    assert copied == whole


def test_four_processes_share_one_copy_of_the_experts():
    parts = parts_of("qwen3_moe")
    one, four = ({line.name: line.nbytes for line in memory.host_lines(parts, Job(gpus=n), "int8")} for n in (1, 4))
    assert four["packed experts"] == one["packed experts"]
    assert four["Python and libraries"] == 4 * one["Python and libraries"]


@pytest.mark.parametrize(("name", "value"), [("gpus", -1), ("cutoff_len", 0), ("lora_rank", 1.5), ("batch_size", True)])
def test_impossible_jobs(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a whole number"):
        Job(**{name: value})


def test_unknown_policy():
    with pytest.raises(ValueError, match="activation_policy: expected retain or recompute, got 'keep'"):
        Job(activation_policy="keep")
