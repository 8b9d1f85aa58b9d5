"""``kt-sft plan MODEL``: memory, disk and time that a fine-tuning run takes, before anything is downloaded."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import CommandError
from .sizes import billions, duration, gb, parse_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kt_sft.planning.job import Host
    from kt_sft.planning.report import Option, Plan

HELP = """Memory, disk and time of a fine-tuning run, from config.json alone.

MODEL is a folder, a config.json, or a hub name (only config.json and the shard index are read). One row per weight
format, then the account of one of them, line by line. This machine's RAM, disk and speed are looked up and measured;
the options describe another one.

    kt-sft plan ~/models/Qwen3-30B-A3B --gpus 1

    kt-sft plan config.json --gpus 2 --gpu-memory 48GB --ram 1TB --cutoff-len 4096 --lora-rank 16
"""
_MACHINE = "This or another machine"
_EFFICIENCY = "assumed: as benchmarks/results show for AVX512-BF16"


def register(app: typer.Typer) -> None:
    app.command("plan", help=HELP)(plan)


def plan(
    model: Annotated[str, typer.Argument(help="Folder, config.json or hub name.")],
    format: Annotated[
        str, typer.Option(help="Format of the account; all: the checkpoint's own, else the widest that fits.")
    ] = "all",
    gpus: Annotated[
        int | None, typer.Option(help="GPUs, one process each; 0: all on the CPU. Default: this machine's.")
    ] = None,
    cutoff_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences per process and step.")] = 1,
    lora_rank: Annotated[int, typer.Option(help="0: no adapters.")] = 8,
    expert_lora: Annotated[bool, typer.Option(help="Adapters on the routed experts too (lora_target: all).")] = True,
    activation_policy: Annotated[str, typer.Option(help="retain or recompute (kt_cpu_activation).")] = "retain",
    gradient_checkpointing: Annotated[bool, typer.Option(help="As LLaMA-Factory has it by default.")] = True,
    sharded: Annotated[bool, typer.Option("--fsdp2/--ddp", help="How several GPUs share the model.")] = True,
    gpu_memory: Annotated[str | None, typer.Option(help="Per GPU, e.g. 24GB.", rich_help_panel=_MACHINE)] = None,
    ram: Annotated[str | None, typer.Option(help="E.g. 512GB.", rich_help_panel=_MACHINE)] = None,
    disk_speed: Annotated[str | None, typer.Option(help="E.g. 3GB/s.", rich_help_panel=_MACHINE)] = None,
    memory_bandwidth: Annotated[str | None, typer.Option(help="E.g. 200GB/s.", rich_help_panel=_MACHINE)] = None,
    cpu_tflops: Annotated[float | None, typer.Option(help="BF16 peak of the CPU.", rich_help_panel=_MACHINE)] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="Sustained by a GPU.", rich_help_panel=_MACHINE)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, in bytes and seconds.")] = False,
) -> None:
    given = {
        "ram": _size("--ram", ram),
        "gpu_memory": _size("--gpu-memory", gpu_memory),
        "disk": _size("--disk-speed", disk_speed),
        "memory": _size("--memory-bandwidth", memory_bandwidth),
        "cpu": _tera("--cpu-tflops", cpu_tflops),
        "gpu": _tera("--gpu-tflops", gpu_tflops),
    }
    try:
        from kt_sft.machine import facts
        from kt_sft.planning import job, report, source

        found = source.find(model)
        wanted = job.Job(
            gpus=len(facts.gpus()) if gpus is None else gpus,
            cutoff_len=cutoff_len,
            batch_size=batch_size,
            lora_rank=lora_rank,
            expert_lora=expert_lora,
            activation_policy=activation_policy,
            gradient_checkpointing=gradient_checkpointing,
            sharded=sharded,
        )
        formats = () if format == "all" else (format,)
        report.check_formats(formats)
        result = report.make(found, wanted, _host(job.this_host(found.shard), given), formats)
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from None
    if as_json:
        typer.echo(json.dumps(report.as_dict(result), indent=2))
    else:
        _show(result)


def _size(option: str, text: str | None) -> float | None:
    return None if text is None else parse_size(option, text)


def _tera(option: str, value: float | None) -> float | None:
    if value is not None and value <= 0:
        raise CommandError(f"{option}: expected TFLOP/s above 0, got {value}")
    return None if value is None else value * 1e12


def _host(host: Host, given: dict[str, float | None]) -> Host:
    """This machine with what the options say about another one."""
    from kt_sft.machine.probes import Rate

    changes: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        changes[name] = Rate(value, "given") if name in ("disk", "memory", "cpu", "gpu") else int(value)
        if name == "ram":
            changes["ram_free"] = int(value)
    if given["cpu"] is not None:
        ratio = given["cpu"] / host.cpu.value
        changes["pack"] = {
            n: Rate(r.value * ratio, "this machine's, scaled by --cpu-tflops") for n, r in host.pack.items()
        }
    return dataclasses.replace(host, **changes)


def _show(plan: Plan) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    parts = plan.parts
    counts = f"{billions(parts.total_parameters)} parameters, {billions(parts.active_parameters)} active per token"
    console.print(f"[bold]{escape(plan.name)}: {counts}[/]", highlight=False)
    console.print(f"{parts.counted}; checkpoint {gb(plan.checkpoint)} ({plan.stored.name}; {plan.checkpoint_from})")
    console.print(_model_table(plan))
    for note in plan.parts.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    console.print(_options_table(plan))
    for option in plan.options:
        verdict = "[green]fits here[/]" if option.fits else f"[red]needs {' and '.join(option.short)}[/]"
        console.print(f"{option.weight_format}: {verdict}", highlight=False)
    console.print(_account_table(plan, plan.best))
    _show_rates(console, plan, plan.best)
    if plan.parts.obstacle:
        console.print(f"[red]cannot run yet:[/] {escape(plan.parts.obstacle)}", highlight=False)


def _model_table(plan: Plan) -> Table:
    from rich.table import Table

    parts = plan.parts
    table = Table()
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("how")
    for group in parts.experts:
        sizes = f"{group.layers} layers x {group.experts} experts x 3 x {group.hidden} x {group.intermediate}"
        count = group.weights + group.layers * group.biases
        table.add_row(
            "routed experts", f"{count:,}", f"{sizes}{' + biases' if group.biases else ''}, top-{parts.top_k}"
        )
    for name, count in parts.rest.items():
        if count:
            table.add_row(name, f"{count:,}", "")
    return table


def _options_table(plan: Plan) -> Table:
    from rich.table import Table

    from kt_sft.planning import memory, speed

    job = plan.job
    where = f"{job.gpus} x GPU of {gb(plan.host.gpu_memory)}" if job.gpus else "no GPU"
    target = f"LoRA rank {job.lora_rank}{'' if job.expert_lora else ', not on the experts'}"
    table = Table(title=f"{where}; {job.batch_size} x {job.cutoff_len:,} tokens a step; {target}", title_justify="left")
    table.add_column("format", no_wrap=True)
    heads = [
        "experts",
        "RAM",
        *(["GPU"] if job.gpus else []),
        "first\nload",
        "next\nload",
        "step",
        "tok/s",
    ]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for option in plan.options:
        step = speed.seconds(option.step)
        table.add_row(
            option.weight_format,
            gb(option.packed),
            gb(memory.total(option.ram)),
            *([gb(memory.total(option.gpu))] if job.gpus else []),
            duration(speed.seconds(option.first_load)),
            duration(speed.seconds(option.next_load)),
            duration(step),
            f"{job.processes * job.tokens / step:,.3g}",
        )
    return table


def _account_table(plan: Plan, option: Option) -> Table:
    from rich.table import Table

    from kt_sft.planning import memory, speed

    table = Table(title=f"The account of {option.weight_format}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()

    def section(title: str, rows: list[tuple[str, str, str]], amount: str) -> None:
        for row in rows:
            table.add_row(*row)
        if rows:
            table.add_row(f"[bold]{title}[/]", f"[bold]{amount}[/]", "", end_section=True)

    for title, lines in (("host memory", option.ram), ("memory of each GPU", option.gpu)):
        section(title, [(line.name, gb(line.nbytes), line.how) for line in lines], gb(memory.total(lines)))
    for title, spans in (("first load", option.first_load), ("next load", option.next_load), ("step", option.step)):
        rows = [(span.name, duration(span.seconds), span.how) for span in spans]
        section(title, rows, duration(speed.seconds(spans)))
    return table


def _show_rates(console: Console, plan: Plan, option: Option) -> None:
    """Which rates were measured and which assumed, and what this machine has."""
    from kt_sft.planning.job import AS_STORED

    host = plan.host
    pack = host.pack[AS_STORED if option.kept else option.weight_format]
    rates = [
        (f"CPU {host.cpu.value / 1e12:.3g} TFLOP/s", host.cpu.source),
        (f"{host.efficiency:.0%} of it for the experts, {host.lora_efficiency:.0%} for their adapters", _EFFICIENCY),
        (f"memory {gb(host.memory.value)}/s", host.memory.source),
        (f"disk {gb(host.disk.value)}/s", host.disk.source),
        (f"packing {gb(pack.value)}/s", pack.source),
    ]
    if plan.job.gpus:
        rates += [
            (f"GPU {host.gpu.value / 1e12:.3g} TFLOP/s", host.gpu.source),
            (f"host to GPU {gb(host.link.value)}/s", host.link.source),
        ]
    for what, how in rates:
        console.print(f"  {what}; {how}", highlight=False, style="dim")
    console.print(f"  RAM {gb(host.ram)}, free {gb(host.ram_free)}", highlight=False, style="dim")
    folder = host.cache_folder or "none (KT_SFT_CACHE)"
    console.print(f"  cache folder {folder}, free {gb(host.cache_free)}", highlight=False, style="dim")
