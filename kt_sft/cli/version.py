"""``kt-sft version``: what is installed and what the kernels chose on this machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import typer

from kt_sft.topology import describe

from .errors import CommandError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "deepspeed", "safetensors", "numpy")


def register(app: typer.Typer) -> None:
    app.command("version", help="Print versions, the chosen ISA, formats, threads and NUMA nodes.")(show)


def rows() -> list[tuple[str, str]]:
    """(name, value) pairs, kt_sft first, then the kernels, then the packages around it."""
    return [("kt_sft", _version("kt-sft")), *_kernel_rows(), ("python", platform.python_version()), *_package_rows()]


def _version(name: str) -> str:
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return "not installed"


def _package_rows() -> list[tuple[str, str]]:
    return [(name, _version(name)) for name in PACKAGES]


def _kernel_rows() -> list[tuple[str, str]]:
    try:
        from kt_sft.native import info as kernel_info

        info = kernel_info()
    except ImportError as error:
        return [("kernels", f"not built ({error}); run: pip install .")]
    except ValueError as error:  # KT_SFT_ISA names what this CPU cannot run
        raise CommandError(str(error)) from None
    return [
        ("ISA", f"{info['isa']} (this CPU can run: {', '.join(info['isas'])}; KT_SFT_ISA forces one)"),
        ("weight formats", ", ".join(info["formats"])),
        ("threads", str(info["threads"])),
        ("NUMA nodes", describe(info["numa_nodes"])),
    ]


def show() -> None:
    """Print one ``name  value`` line each, the same on a terminal and in a log."""
    for name, value in rows():
        typer.echo(f"{name:<16}{value}")
