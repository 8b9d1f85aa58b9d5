"""Whole models with LoRA: on the GPU as on the CPU, while no expert weight is in the GPU's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kt_sft
from kt_sft.integrations import peft as packed_peft
from kt_sft.nn.experts import KtExperts
from tests.families import FAMILIES, rms_ratio, save_checkpoint, tiny_model, token_ids

LOGITS_RMS, GRADIENT_RMS = 1e-2, 2e-2


def with_lora(model: nn.Module, rank: int = 4) -> Any:
    """Factors that are all nonzero, and the same on every call."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "o_proj", "kv_b_proj", *packed_peft.expert_target_names(model)]
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=rank, target_modules=targets, init_lora_weights=False))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    ids = ids.to(next(model.parameters()).device)
    return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=list(FAMILIES))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same model with adapters on the CPU and on the GPU."""
    folder = save_checkpoint(tiny_model(request.param), tmp_path_factory.mktemp(request.param))
    options = dict(weight_format="int8", cache_dir="none", dtype=torch.float32)
    cpu, gpu = (with_lora(kt_sft.from_pretrained(folder, **options)).train() for _ in range(2))
    return cpu, gpu.cuda()


def test_logits_and_gradients(models):
    cpu, gpu = models
    with torch.no_grad():
        assert rms_ratio(gpu(token_ids().cuda()).logits.cpu(), cpu(token_ids()).logits) < LOGITS_RMS
    for model in models:
        model.zero_grad()
        loss_of(model, token_ids()).backward()
    expected, got = gradients(cpu), gradients(gpu)
    assert got.keys() == expected.keys() and any(".experts." in name for name in got)
    assert {n: r for n in expected if not (r := rms_ratio(got[n], expected[n])) <= GRADIENT_RMS} == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_training(models, reentrant):
    """Five steps with checkpointing, clipping and AdamW under bf16 autocast, as the Trainer has it: the same losses."""
    losses = []
    for model in models:
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        device = next(model.parameters()).device.type
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        losses.append([])
        for step in range(5):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(model, token_ids(seed=step))
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_generation(models):
    """Greedy tokens; a near-tie may fall to either side, after which the texts differ."""
    prompt = token_ids(batch=1, length=5)
    outs = [m.eval().generate(prompt.to(m.device), max_new_tokens=8, do_sample=False).cpu() for m in models]
    for model in models:
        model.train()
    assert outs[0].shape == outs[1].shape and torch.equal(outs[0][:, :6], outs[1][:, :6])


def test_no_expert_weight_is_on_the_gpu():
    """Neither after the move, nor at the peak of a training step: less than half of one layer's experts."""
    sizes = dict(hidden_size=256, moe_intermediate_size=2048, num_experts=16)
    model = kt_sft.convert_model(tiny_model("qwen3_moe", **sizes), weight_format="int8")
    model = with_lora(model, rank=2).train()
    experts = [m for m in model.modules() if isinstance(m, KtExperts)]
    one_layer = experts[0].packed.nbytes
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model.cuda()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert torch.cuda.memory_allocated() - before <= 1.1 * held + 2**20
    loss_of(model, token_ids()).backward()  # cuBLAS takes its workspaces
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_of(model, token_ids()).backward()
    assert torch.cuda.max_memory_allocated() - before < one_layer / 2
    assert all(m.packed.storage.device.type == "cpu" for m in experts)


def test_one_rank_of_fsdp2(tmp_path):
    """Sharded factors (DTensors on the GPU) train as whole ones do."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    folder = save_checkpoint(tiny_model("qwen3_moe"), tmp_path)
    options = dict(weight_format="int8", cache_dir="none", dtype=torch.float32)
    whole, sharded = (with_lora(kt_sft.from_pretrained(folder, **options)).train().cuda() for _ in range(2))
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        for layer in sharded.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        for model in (whole, sharded):
            loss_of(model, token_ids()).backward()
        full = {n: p.grad.full_tensor().cpu() for n, p in sharded.named_parameters() if p.grad is not None}
    finally:
        dist.destroy_process_group()
    expected = gradients(whole)
    assert full.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(full[name], gradient, rtol=1e-4, atol=1e-6)
