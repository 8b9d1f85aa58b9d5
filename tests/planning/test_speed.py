"""Times by hand for round rates; what changes them and by how much; the whole plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kt_sft.machine.probes import Rate
from kt_sft.planning import report, source, speed
from kt_sft.planning.job import Host, Job
from kt_sft.planning.model import ExpertLayers, ModelParts
from kt_sft.planning.storage import Storage

PARTS = ModelParts(
    counted="by hand",
    experts=(ExpertLayers(layers=10, experts=64, hidden=1024, intermediate=512),),
    top_k=4,
    rest={"embeddings and head": 2 * 1000 * 1024, "attention": 10_000_000},
    hidden=1024,
    layers=10,
    vocabulary=1000,
    adapted=80_000,
    widest=8_000,
    obstacle=None,
)
HOST = Host(
    ram=64 << 30,
    ram_free=32 << 30,
    gpu_memory=24 << 30,
    cache_free=100 << 30,
    cache_folder=Path("cache"),
    cpu=Rate(1e12, "given"),
    memory=Rate(100e9, "given"),
    disk=Rate(1e9, "given"),
    gpu=Rate(40e12, "given"),
    pack={
        "bf16": Rate(4e9, "given"),
        "int8": Rate(4e9, "given"),
        "int4": Rate(4e9, "given"),
        "as stored": Rate(4e9, "given"),
    },
    efficiency=0.5,
)
JOB = Job(cutoff_len=1000, lora_rank=0)


def experts_seconds(job: Job = JOB, host: Host = HOST) -> float:
    return speed.step_spans(PARTS, job, host, "bf16")[0].seconds


def test_experts_by_hand():
    compute = 10 * 2 * 3 * 1024 * 512 * 4 * 1000 / 0.5e12  # half of the peak
    stream = 10 * 64 * 3 * 1024 * 512 * 2 / 100e9  # a thousand tokens reach every expert
    assert experts_seconds() == pytest.approx(3 * (compute + stream), rel=1e-6)
    assert experts_seconds(replace(JOB, gradient_checkpointing=False)) == pytest.approx(2 * (compute + stream))
    recompute = experts_seconds(replace(JOB, activation_policy="recompute"))
    assert recompute == pytest.approx((3 + 2 / 3) * (compute + stream))


def test_one_token_streams_its_own_experts_only():
    one = experts_seconds(replace(JOB, cutoff_len=1), replace(HOST, cpu=Rate(1e30, "given")))
    assert one == pytest.approx(3 * 10 * 4 * 3 * 1024 * 512 * 2 / 100e9)


def test_processes_share_the_cpu():
    two = speed.step_spans(PARTS, replace(JOB, gpus=2), HOST, "bf16")
    assert two[0].seconds == pytest.approx(2 * experts_seconds())
    assert [span.name for span in two][-2:] == ["everything else (GPU)", "host to GPU and back"]


def test_adapters_take_time():
    spans = speed.step_spans(PARTS, replace(JOB, lora_rank=16), HOST, "bf16")
    flops = 10 * 2 * 3 * 16 * (1024 + 512) * 4 * 1000
    assert spans[1].seconds == pytest.approx(4.5 * flops / (1e12 * HOST.lora_efficiency))


def test_loads_are_bound_by_disk_or_packing():
    stored = Storage(name="bf16", experts=2, rest=2)
    packed = 10 * 64 * 3 * 1024 * 512 * 2
    first = speed.first_load_spans(PARTS, HOST, "bf16", stored, packed)
    assert speed.seconds(first) == pytest.approx(2 * packed / 1e9)
    slow = replace(HOST, pack={"bf16": Rate(1e8, "given")})
    assert speed.seconds(speed.first_load_spans(PARTS, slow, "bf16", stored, packed)) == pytest.approx(packed / 1e8)
    again = speed.next_load_spans(PARTS, HOST, "bf16", stored)
    assert speed.seconds(again) == pytest.approx((packed + 2 * PARTS.rest_parameters) / 1e9)


CONFIG = Path(__file__).parent / "configs" / "qwen3_235b_a22b.json"


def test_what_fits():
    found = source.find(CONFIG)
    roomy = replace(HOST, ram=1 << 40, ram_free=1 << 40, cache_free=1 << 40)
    assert report.make(found, JOB, roomy).best.weight_format == "bf16"
    tight = replace(roomy, ram=256 << 30, ram_free=200 << 30)
    plan = report.make(found, JOB, tight)
    assert plan.best.weight_format == "int4"
    assert "more RAM" in plan.option("bf16").short[0]
    assert "to be freed" in plan.option("int8").short[0]
    small = report.make(found, replace(JOB, gpus=1, lora_rank=64), replace(roomy, cache_free=1 << 30))
    assert [s.split(" GB ")[1] for s in small.option("int8").short] == [
        "more memory per GPU",
        "more disk for the cache (or cache_dir: none)",
    ]


def test_quantised_experts_are_planned_as_they_are():
    found = source.find(CONFIG.with_name("deepseek_v3.json"))
    plan = report.make(found, JOB, replace(HOST, ram=1 << 41, ram_free=1 << 41, cache_free=1 << 41))
    assert [o.weight_format for o in plan.options] == ["auto (fp8)", "bf16", "int8", "int4"]
    assert plan.best.weight_format == "auto (fp8)"
    assert plan.best.packed == pytest.approx(plan.stored.expert_bytes(plan.parts), rel=1e-3)


def test_a_quantised_rest_is_copied_as_bf16():
    fp8 = report.make(source.find(CONFIG.with_name("deepseek_v3.json")), JOB, HOST)
    assert fp8.best.cache - fp8.best.packed == 2 * fp8.parts.rest_parameters
    assert fp8.best.cache - fp8.best.packed == pytest.approx(34e9, rel=0.02)
    plain = report.make(source.find(CONFIG), JOB, HOST)
    assert plain.best.cache == plain.best.packed
    int4 = report.make(source.find(CONFIG.with_name("kimi_k2_thinking.json")), JOB, HOST)
    assert int4.best.cache == int4.best.packed  # experts only


def test_as_json_sums_up():
    plan = report.make(source.find(CONFIG), JOB, HOST)
    data = json.loads(json.dumps(report.as_dict(plan)))
    for row in data["options"]:
        assert row["total"]["ram_bytes"] == sum(nbytes for _, nbytes, _ in map(dict.values, row["ram"]))
        assert row["total"]["step_seconds"] == pytest.approx(sum(s for _, s, _ in map(dict.values, row["step"])))
    assert [row["weight_format"] for row in data["options"]] == ["bf16", "int8", "int4"]


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="format: expected one of auto, bf16, int8, int4; got 'int3'"):
        report.make(source.find(CONFIG), JOB, HOST, ("int3",))
