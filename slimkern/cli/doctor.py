"""``slimkern doctor``: what this machine has, what of it is used, and whether it works."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

EXIT_BROKEN = 1


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        state: ``ok``, ``missing`` (an optional part is not there) or ``broken``.
        detail: what was found.
    """

    name: str
    state: Literal["ok", "missing", "broken"]
    detail: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the installation: versions, instruction sets, kernels, threads, GPU.

    Each kernel is run and compared with a float64 reference. Ends with a non-zero exit code where
    something is broken; an optional part that is missing is not.
    """
    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        _print(findings)
    if any(f.state == "broken" for f in findings):
        raise typer.Exit(EXIT_BROKEN)


def examine() -> list[Finding]:
    """All findings, in the order they are shown."""
    from slimkern import machine

    found = machine.versions()
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    findings = [Finding("versions", "ok", versions), *_packages()]
    findings += _guarded("instruction sets", _isas)
    findings += _guarded("threads", _threads)
    findings += _guarded("CPU kernels", _cpu_kernels)
    findings += _guarded("GPU", _gpu)
    return findings


def _guarded(name: str, examination: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings, or the error that a broken installation raises as a finding."""
    try:
        return list(examination())
    except (ImportError, RuntimeError, ValueError, OSError, AttributeError) as error:
        return [Finding(name, "broken", " ".join(str(error).split()))]


def _packages() -> Iterator[Finding]:
    """Optional packages: there and importable, or which extra brings them."""
    for package, extra in (("transformers", "hf"), ("accelerate", "hf"), ("matplotlib", "demo")):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                yield Finding(package, "broken", str(error))
            else:
                hint = f"not installed; pip install 'slimkern[{extra}]'"
                yield Finding(package, "missing", hint)
        except ImportError as error:
            yield Finding(package, "broken", str(error))
        else:
            yield Finding(package, "ok", "importable")


def _isas() -> Iterator[Finding]:
    from slimkern import cpu

    have = [name for name, there in cpu.features().items() if there]
    kernels = ", ".join(cpu.available_isas())
    override = os.environ.get("SLIMKERN_ISA")
    note = f"; SLIMKERN_ISA={override}" if override else ""
    detail = f"in use {cpu.isa()}; kernels for {kernels}; the machine has {', '.join(have)}{note}"
    yield Finding("instruction sets", "ok", detail)


def _threads() -> Iterator[Finding]:
    import torch

    from slimkern import cpu, machine

    here = machine.machine()
    detail = (
        f"{cpu.threads()} per kernel (torch {torch.get_num_threads()}) on {here['cores']} "
        f"usable cores: {here['cpu']}"
    )
    yield Finding("threads", "ok", detail)


def _cpu_kernels() -> Iterator[Finding]:
    """Run ``indexed_linear`` on every instruction set, against float64."""
    import torch

    from slimkern import cpu

    before = cpu.isa()
    try:
        for isa in cpu.available_isas():
            cpu.set_isa(isa)
            for dtype in (torch.float32, torch.bfloat16):
                yield _kernel(f"indexed_linear {isa} {str(dtype)[6:]}", "cpu", "cpu", dtype)
    finally:
        cpu.set_isa(before)


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "missing", "none that torch can use; the Triton kernels are not run")
        return
    capability = ".".join(str(n) for n in torch.cuda.get_device_capability(0))
    yield Finding("GPU", "ok", f"{torch.cuda.get_device_name(0)}, capability {capability}")
    for dtype in (torch.float32, torch.bfloat16):
        yield _kernel(f"indexed_linear triton {str(dtype)[6:]}", "cuda", "triton", dtype)


def _kernel(name: str, device: str, backend: str, dtype: object) -> Finding:
    """One small product with gathered rows and columns.

    The inputs are exact in ``dtype``. With K products accumulated in float32, each entry is off by
    at most ``(K + 2) eps32 (|x| |W|ᵀ + |b|)``, plus half a unit in the last place of ``dtype`` of
    the result (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). TF32
    is switched off on a GPU by asking for the highest float32 precision.
    """
    import torch

    from slimkern.ops import indexed_linear

    assert isinstance(dtype, torch.dtype)
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=random).to(dtype) for shape in ((5, 37), (53, 71), (53,))
    )
    rows = torch.arange(0, 53, 2)
    cols = torch.randperm(71, generator=random)[:37].sort().values
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        parts = (t.to(device) for t in (x, weight, bias, rows, cols))
        y = indexed_linear(*parts, backend=backend).cpu().double()
    finally:
        torch.set_float32_matmul_precision(precision)
    wide = [t.double() for t in (x, weight[rows][:, cols], bias[rows])]
    exact = wide[0] @ wide[1].T + wide[2]
    size = wide[0].abs() @ wide[1].abs().T + wide[2].abs()
    rounding = 0.5 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    bound = (37 + 2) * torch.finfo(torch.float32).eps * size
    bound += rounding * (exact.abs() + bound)
    worst = float(((y - exact).abs() / bound).max())
    if worst <= 1.0:
        return Finding(name, "ok", f"error {worst:.2f} of the bound")
    return Finding(name, "broken", f"error {worst:.3g} times the bound of rounding")


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.name, state, escape(finding.detail))
    Console().print(table)
