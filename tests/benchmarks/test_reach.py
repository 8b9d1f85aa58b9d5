"""The lines of the table follow from the results: made-up figures on both sides of every goal."""

import pytest

from benchmarks import reach
from benchmarks.probes import Limits
from benchmarks.shapes import SHAPES

SHAPE = SHAPES["A"]
LIMITS = Limits(
    isa="avx512_bf16", threads=2, l2=400.0, dram=50.0, dram_4k=40.0,
    peaks={"avx512_bf16": 1.0, "avx2": 0.25}, int8_peaks={"avx512_bf16": 4.0},
)  # fmt: skip
WEIGHTS = {"bf16": 1152, "int8": 576, "int4": 324, "fp8": 576, "mxfp4": 306}  # MiB


def point(tokens, fwd_tflops, bwd_factor=1.0, infer_ms=1.0):
    ms = SHAPE.flops(tokens) / fwd_tflops / 1e9
    active = min(SHAPE.E, tokens * SHAPE.K)
    times = dict(fwd=ms, bwd=ms * bwd_factor, infer=infer_ms)
    found = dict(tokens=tokens, routing="balanced", active=active, rows=tokens * SHAPE.K / active)
    return found | {f"{part}_{q}": value for part, value in times.items() for q in ("ms", "p20", "p80")}


def row(name, *points, isa="avx512_bf16", **more):
    weights = WEIGHTS[name.split("*")[0].split("+")[0]]
    return dict(row=name, shape="A", isa=isa, points=list(points), weights_mib=weights) | more


def verdicts(results, part):
    return {line.what: (line.reached, line.figure) for line in part(reach.Results(results, LIMITS))}


@pytest.mark.parametrize(("rate", "reached"), [(0.51, True), (0.49, False)])
def test_forward_is_a_share_of_the_chosen_peak(rate, reached):
    results = [row(name, point(2048, rate)) for name in reach.FORMATS]
    found = verdicts(results, reach.forward_lines)
    assert found["forward, bf16 products, int8, 128 rows"][0] is reached
    assert found["formats against each other, forward"] == (True, "0%")


def test_formats_that_are_too_far_apart():
    rates = (0.8, 0.7, 0.7, 0.7, 0.6)
    results = [row(name, point(2048, rate)) for name, rate in zip(reach.FORMATS, rates, strict=True)]
    assert verdicts(results, reach.forward_lines)["formats against each other, forward"] == (False, "33%")


def test_a_row_that_did_not_run_is_named_with_its_reason():
    results = [row("int8", point(2048, 0.6)), dict(row="int8*int8", shape="A", unavailable="no such products")]
    found = verdicts(results, reach.int8_lines)
    assert set(found.values()) == {(None, "no such products")}
    assert verdicts([], reach.lora_lines)["LoRA rank 8, forward + backward"] == (None, "int8+lora8 was not run")


@pytest.mark.parametrize(("rate", "share", "faster"), [(1.7, True, True), (1.5, False, True), (0.8, False, False)])
def test_int8_products(rate, share, faster):
    results = [row("int8", point(2048, 0.6)), row("int8*int8", point(2048, rate))]
    found = [line.reached for line in reach.int8_lines(reach.Results(results, LIMITS))]
    assert found == [share, faster]


@pytest.mark.parametrize(("factor", "reached"), [(1.24, True), (1.26, False)])
def test_backward_against_forward(factor, reached):
    found = verdicts([row("int4", point(2048, 0.6, factor))], reach.backward_lines)
    assert found["backward for the inputs, int4"][0] is reached


@pytest.mark.parametrize(("rate", "reached"), [(0.45, True), (0.44, False)])
def test_lora_against_the_same_step_without(rate, reached):
    results = [row("int8", point(2048, 0.6)), row("int8+lora16", point(2048, rate))]
    assert verdicts(results, reach.lora_lines)["LoRA rank 16, forward + backward"][0] is reached


@pytest.mark.parametrize(("ms", "reached"), [(0.93, True), (0.96, False)])
def test_decode_reads_the_codes_of_the_active_experts_once(ms, reached):
    # 8 of 128 experts of 576 MiB = 37.7 MB: 0.755 ms at 50 GB/s, 0.944 ms at 80 % of that
    found = verdicts([row("int8", point(1, 0.1, infer_ms=ms))], reach.decode_lines)
    assert found["T = 1, int8"][0] is reached


def test_few_rows_are_judged_by_the_lower_of_the_two_roofs():
    results = reach.Results([row("bf16", point(256, 0.5), point(1024, 0.5))], LIMITS)
    few, more = results.points("bf16")
    assert results.roof("bf16", few) == pytest.approx(50e9 * 16 / 1e12)  # 2 operations a weight of 2 bytes, 16 rows
    assert results.roof("bf16", more) == 1.0
    found = verdicts([row("bf16", point(256, 0.5), point(1024, 0.5))], reach.few_rows_lines)
    assert found["16 rows, bf16"][0] is False and found["64 rows, bf16"][0] is False
    assert verdicts([row("bf16", point(256, 0.57))], reach.few_rows_lines)["16 rows, bf16"][0] is True


def test_limits_count_as_they_were_beside_the_measurement():
    beside = point(1, 0.1, infer_ms=0.93) | dict(infer_dram=60.0)
    assert verdicts([row("int8", beside)], reach.decode_lines)["T = 1, int8"][0] is False
    few = point(256, 0.5) | dict(fwd_dram=40.0)
    assert verdicts([row("bf16", few)], reach.few_rows_lines)["16 rows, bf16"][0] is True
    slow = point(1024, 0.5) | dict(fwd_peak=0.7, fwd_dram=50.0)
    assert verdicts([row("bf16", slow)], reach.few_rows_lines)["64 rows, bf16"] == (True, "71% (0.50 of 0.70 TFLOP/s)")


def test_every_instruction_set_is_judged_by_its_own_peak():
    results = [row("bf16", point(2048, 0.61)), row("bf16", point(2048, 0.14), isa="avx2")]
    found = verdicts(results, reach.isa_lines)
    assert found["avx512_bf16, bf16, 128 rows"][0] is True
    assert found["avx2, bf16, 128 rows"] == (False, "56% (0.14 of 0.25 TFLOP/s)")


@pytest.mark.parametrize(("held", "saved", "expected"), [(613, 713, (True, True)), (614, 714, (False, False))])
def test_memory(held, saved, expected):
    m = dict(packed_mib=576, workspace_mib=20, activations_mib=100, held_mib=held, saved_mib=saved)
    found = verdicts([row("int8", memory=m)], reach.memory_lines)
    assert tuple(found[f"memory {when}, int8"][0] for when in ("after backward", "between")) == expected


def test_packing_mapping_and_overhead():
    found = verdicts([row("int4", packing=dict(gb_per_s_per_thread=0.9, seconds=1.0))], reach.packing_lines)
    assert found["quantise + pack from bf16, int4"][0] is False
    slow = list(reach.other_lines(dict(mapped_gb_per_s=1.0, read_gb_per_s=2.0), dict(recorded=31e-6)))
    assert [line.reached for line in slow] == [False, False]
    fast = list(reach.other_lines(dict(mapped_gb_per_s=1.9, read_gb_per_s=2.0), dict(recorded=29e-6)))
    assert [line.reached for line in fast] == [True, True]
    assert reach.lines([], LIMITS, dict(unavailable="x"), dict(unavailable="y"))[-1].verdict == "not measured"
