"""Every import is in a room that may hold it, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "slimkern"

STDLIB = set(sys.stdlib_module_names)
DATA = {"slimkern.discovery.groups"}  # frozen descriptions that plans and surgery speak in
BLOCKS = {"slimkern.discovery.block"}  # the same of what is fused
READERS = {
    "torch",
    "slimkern.discovery",
    "slimkern.plan",
    "slimkern.selection",
    "slimkern.config",
    "slimkern.config_checks",
    "slimkern.schedule",
}
REPORTS = {"slimkern.pruning_report"}  # frozen data
LIBRARY = {
    *READERS,
    *REPORTS,
    "slimkern.criteria",
    "slimkern.masks",
    "slimkern.mask_blocks",
    "slimkern.cuts",
    "slimkern.surgery",
    "slimkern.fuse",
    "slimkern.optimizer_state",
    "slimkern.pruning",
    "slimkern.patterns",
    "slimkern.removal",
    "slimkern.obs_step",
    "slimkern.nn",
    "slimkern.ops",
    "slimkern.cpu",
    "slimkern.auto_slim",
    "slimkern.targets",
    "slimkern.checkpoint",
    "slimkern.folders",
    "slimkern.skeleton",
    "slimkern.machine",
    "slimkern.parallel",
    "slimkern.shards",
    "slimkern.timing",
    "slimkern.budget",
    "slimkern.costs",
    "slimkern.latency",
    "slimkern.calibration",
    "slimkern.one_shot",
    "safetensors",
    "numpy",
}
HF = {"transformers", "accelerate"}
TRAINING = {*LIBRARY, *HF, "slimkern.training", "rich", "scipy", "pandas", "pyarrow"}
EVERYTHING = {*TRAINING, "slimkern", "typer", "click", "jinja2", "markupsafe", "matplotlib"}

_GEMM = ("configs", "descriptors", "grouped", "kernels", "product", "weights")
DEVICE_CODE = {
    "triton",
    "slimkern.ops._activations",
    "slimkern.ops._tile",
    *(f"slimkern.ops._gemm_{module}" for module in _GEMM),
}
_GPU = (
    "_activations",
    "_device_blocks",
    "_gemm",
    "_gemm_kernels",
    "_launch",
    "_rows",
    "_tile",
)  # shared by Triton's kernels

# The first prefix that fits decides. "slimkern.x" allows the module and all below it.
ROOMS: list[tuple[str, set[str]]] = [
    ("patterns/pattern.py", set()),
    ("patterns/selection.py", {"torch", "slimkern.patterns.pattern"}),
    ("patterns/scores.py", {"torch", "slimkern.criteria", "slimkern.nn.block_views"}),
    (
        "patterns/targets.py",
        {
            "torch",
            "slimkern.config",
            "slimkern.nn",
            "slimkern.patterns",
            "slimkern.shards",
            "slimkern.targets",
        },
    ),
    ("patterns/masks.py", {"torch", "slimkern.nn", "slimkern.ops", "slimkern.patterns.targets"}),
    (
        "patterns/track.py",
        {
            "torch",
            "slimkern.config",
            "slimkern.parallel",
            "slimkern.patterns",
            "slimkern.shards",
            "slimkern.track",
        },
    ),
    (
        "patterns/pruning.py",
        {
            "torch",
            "slimkern.config",
            "slimkern.nn",
            "slimkern.ops",
            "slimkern.parallel",
            "slimkern.patterns",
            "slimkern.track",
            *REPORTS,
        },
    ),
    ("patterns/", set()),
    ("ops/_registry.py", {"torch"}),
    ("ops/_native.py", {"torch", "slimkern._C"}),
    ("ops/_tile.py", {"torch", "triton"}),
    ("ops/_activations.py", {"triton"}),
    ("ops/_launch.py", {"torch", "triton", "slimkern.ops._tile"}),
    ("ops/_gemm_kernels.py", DEVICE_CODE),
    ("ops/_gemm_descriptors.py", DEVICE_CODE),
    ("ops/_tune.py", {"torch", "triton", "slimkern.ops._tile"}),
    ("ops/_gemm", {"torch", *DEVICE_CODE, "slimkern.ops._launch", "slimkern.ops._tune"}),
    ("ops/_rows.py", {"torch", "triton"}),
    ("ops/_kept_kernels.py", {"triton", "slimkern.ops._tile"}),
    ("ops/_drop.py", {"torch", "slimkern.ops._native"}),
    ("ops/_weights.py", {"torch"}),
    ("ops/_block_mask.py", {"torch"}),
    ("ops/_linear.py", {"torch"}),
    ("ops/_block_tiles.py", {"torch", "triton", "slimkern.ops._tile"}),
    (
        "ops/block_masked_linear/triton.py",
        {"torch", "triton", "slimkern.ops._block_tiles", "slimkern.ops._tile"},
    ),
    (
        "ops/_plain.py",
        {"torch", *(f"slimkern.ops.{m}" for m in ("_block_mask", "_math", "_native"))},
    ),
    ("ops/_math.py", {"torch", "slimkern.ops._native"}),
    ("ops/_fused.py", {"torch", "slimkern.ops._native"}),
    ("ops/_packed.py", {"torch", "slimkern.ops._registry"}),
    (
        "ops/_pack.py",
        {
            "torch",
            *(
                f"slimkern.ops.{m}"
                for m in ("_device_pack", "_math", "_native", "_packed", "_weights")
            ),
        },
    ),
    (
        "ops/_device_pack.py",
        {"torch", *(f"slimkern.ops.{m}" for m in ("_math", "_native", "_packed", "_weights"))},
    ),
    ("ops/_row_norm.py", {"torch", "triton", "slimkern.ops._launch", "slimkern.ops._tile"}),
    (
        "ops/_device_blocks.py",
        {
            "torch",
            *(f"slimkern.ops.{m}" for m in ("_device_pack", "_gemm", "_row_norm", "_tile")),
        },
    ),
    (
        "ops/attention_block/reference.py",
        {"torch", "slimkern.ops._weights", "slimkern.ops.ffn.reference"},
    ),
    (
        "ops/masked_ffn/reference.py",
        {"torch", "slimkern.ops._weights", "slimkern.ops.ffn.reference"},
    ),
    (
        "ops/masked_attention/reference.py",
        {"torch", "slimkern.ops._weights", "slimkern.ops.ffn.reference"},
    ),
    (
        "ops/encoder_layer/reference.py",
        {
            "torch",
            "slimkern.ops._weights",
            "slimkern.ops.attention_block.reference",
            "slimkern.ops.ffn.reference",
        },
    ),
    (
        "ops/encoder_stack/reference.py",
        {"torch", "slimkern.ops._weights", "slimkern.ops.encoder_layer.reference"},
    ),
    ("ops/kept_linear/reference.py", {"torch", "slimkern.ops.activation.reference"}),
    ("ops/add_norm/reference.py", {"torch", "slimkern.ops.seeded_dropout.reference"}),
    ("ops/block_masked_linear/reference.py", {"torch", "slimkern.ops._block_mask"}),
    ("ops/*/reference.py", {"torch", "slimkern.ops._weights"}),
    (
        "ops/*/cpu.py",
        {
            "torch",
            *(f"slimkern.ops.{m}" for m in ("_block_mask", "_drop", "_fused", "_native", "_plain")),
        },
    ),
    (
        "ops/kept_linear/triton.py",
        {"torch", "triton", "slimkern.ops.activation.triton"}
        | {f"slimkern.ops.{m}" for m in (*_GPU, "_kept_kernels")},
    ),
    (
        "ops/encoder_stack/triton.py",
        {"torch", "slimkern.ops._device_pack", "slimkern.ops.encoder_layer.triton"},
    ),
    (
        "ops/*/triton.py",
        {"torch", "triton", *(f"slimkern.ops.{m}" for m in _GPU)},
    ),
    ("ops/", {"torch", "slimkern.ops"}),
    ("nn/block_masked_conv1d.py", {"torch", "transformers", "slimkern.nn"}),
    ("nn/fused_text.py", {"torch", "transformers", "slimkern.nn", "slimkern.ops"}),
    ("nn/packs.py", {"torch", "slimkern.ops", *BLOCKS}),
    ("nn/fused.py", {"torch", "slimkern.ops", "slimkern.nn", *BLOCKS}),
    ("nn/masked_block.py", {"torch", "slimkern.ops", "slimkern.nn", *BLOCKS}),
    ("nn/masked.py", {"torch", "slimkern.ops", "slimkern.shards"}),
    ("nn/", {"torch", "slimkern.ops", "slimkern.nn"}),
    ("cpu.py", {"torch", "slimkern.ops._native"}),
    ("discovery/", {"torch", "slimkern.discovery"}),
    ("schedule.py", {"torch"}),
    (
        "config.py",
        {"torch", "slimkern.schedule", "slimkern.config_checks", "slimkern.patterns.pattern"},
    ),
    ("config_checks.py", set()),
    ("selection.py", {"torch"}),
    ("plan.py", {"torch", "slimkern.selection", *DATA}),
    ("parallel.py", {"torch"}),
    ("shards.py", {"torch", "slimkern.parallel"}),
    ("criteria.py", {"torch", "slimkern.discovery", "slimkern.plan", "slimkern.shards"}),
    (
        "cuts.py",
        {"torch", "slimkern.parallel", "slimkern.plan", "slimkern.nn", "slimkern.shards", *DATA},
    ),
    ("optimizer_state.py", {"torch"}),
    ("masks.py", {"torch", "slimkern.plan", "slimkern.nn", "slimkern.shards", *DATA}),
    (
        "surgery.py",
        {
            "torch",
            "slimkern.cuts",
            "slimkern.mask_blocks",
            "slimkern.masks",
            "slimkern.plan",
            "slimkern.nn",
            "slimkern.optimizer_state",
            "slimkern.shards",
            *DATA,
        },
    ),
    (
        "mask_blocks.py",
        {
            "torch",
            "slimkern.discovery",
            "slimkern.fuse_check",
            "slimkern.nn",
            "slimkern.plan",
        },
    ),
    ("fuse_samples.py", {"torch", "slimkern.ops", *BLOCKS}),
    (
        "fuse_check.py",
        {
            "torch",
            "slimkern.accuracy",
            "slimkern.fuse_samples",
            "slimkern.ops",
            "slimkern.nn",
            *BLOCKS,
        },
    ),
    (
        "fuse.py",
        {
            "torch",
            "slimkern.discovery",
            "slimkern.fuse_check",
            "slimkern.masks",
            "slimkern.nn",
            "slimkern.ops",
        },
    ),
    (
        "pruning.py",
        {
            *READERS,
            *REPORTS,
            "slimkern.pruning_state",
            "slimkern.track",
            "slimkern.parallel",
            "slimkern.obs_ranks",
            "slimkern.obs_step",
            "slimkern.optimizer_state",
            "slimkern.patterns",
            "slimkern.masks",
            "slimkern.surgery",
            "slimkern.nn",
        },
    ),
    (
        "obs_step.py",
        {
            "torch",
            "slimkern.calibration",
            "slimkern.cuts",
            "slimkern.shards",
            "slimkern.track",
            *DATA,
        },
    ),
    ("obs_ranks.py", {"torch", "slimkern.obs_step", "slimkern.parallel", "slimkern.track"}),
    ("pruning_report.py", set()),
    ("pruning_state.py", {"slimkern.plan", *DATA}),
    ("track.py", {*READERS, "slimkern.criteria", "slimkern.parallel", "slimkern.shards"}),
    ("machine.py", {"torch", "slimkern.cpu"}),
    ("accuracy.py", {"torch"}),
    ("memory.py", {"torch"}),
    ("timing.py", {"torch"}),
    ("targets.py", {"torch", "slimkern.config", *DATA}),
    ("auto_slim.py", LIBRARY),
    ("removal.py", LIBRARY),
    ("calibration/watch.py", {"torch"}),
    ("calibration/moments.py", {"torch"}),
    ("calibration/obs.py", {"torch"}),
    ("calibration/script.py", {"torch"}),
    ("calibration/store.py", {"torch", "safetensors"}),
    ("calibration/solve.py", {"torch", "slimkern.calibration.moments"}),
    ("calibration/batches.py", {"torch", "slimkern.discovery.inputs"}),
    (
        "calibration/record.py",
        {"torch", "slimkern.calibration.batches", "slimkern.calibration.script"},
    ),
    (
        "calibration/replay.py",
        {"torch", *(f"slimkern.calibration.{m}" for m in ("batches", "record", "script", "store"))},
    ),
    ("calibration/walk.py", {"torch", "slimkern.calibration", *DATA}),
    (
        "calibration/ranking.py",
        {
            "torch",
            "slimkern.calibration.batches",
            "slimkern.calibration.moments",
            "slimkern.calibration.watch",
            "slimkern.criteria",
            *DATA,
        },
    ),
    ("calibration/", set()),
    ("copies.py", {"torch"}),
    (
        "layerwise.py",
        {
            "torch",
            "slimkern.calibration",
            "slimkern.cuts",
            "slimkern.plan",
            "slimkern.surgery",
            *DATA,
        },
    ),
    (
        "curves.py",
        {
            "torch",
            "slimkern.calibration",
            "slimkern.copies",
            "slimkern.cuts",
            "slimkern.layerwise",
            "slimkern.plan",
            "slimkern.surgery",
            *DATA,
        },
    ),
    (
        "allocation.py",
        {
            "torch",
            "slimkern.budget",
            "slimkern.calibration.batches",
            "slimkern.calibration.walk",
            "slimkern.copies",
            "slimkern.costs",
            "slimkern.curves",
            "slimkern.latency",
            "slimkern.layerwise",
            "slimkern.plan",
            "slimkern.surgery",
            "slimkern.timing",
            *DATA,
        },
    ),
    (
        "one_shot.py",
        {
            "torch",
            "slimkern.allocation",
            "slimkern.calibration",
            "slimkern.config",
            "slimkern.copies",
            "slimkern.cuts",
            "slimkern.discovery",
            "slimkern.layerwise",
            "slimkern.masks",
            "slimkern.parallel",
            "slimkern.plan",
            "slimkern.selection",
            "slimkern.surgery",
            "slimkern.targets",
        },
    ),
    ("budget.py", {"numpy"}),
    ("costs.py", {"torch", "slimkern.cuts", "slimkern.plan", *DATA}),
    ("latency_cache.py", {"slimkern.machine", "slimkern.costs", *DATA}),
    (
        "latency.py",
        {
            "torch",
            "slimkern.machine",
            "slimkern.timing",
            "slimkern.copies",
            "slimkern.costs",
            "slimkern.latency_cache",
            "slimkern.plan",
            "slimkern.surgery",
            *DATA,
        },
    ),
    ("checkpoint.py", {*LIBRARY, "transformers"}),
    (
        "skeleton.py",
        {"torch", "huggingface_hub", "slimkern.cuts", "slimkern.plan", "slimkern.surgery"},
    ),
    ("folders.py", set()),
    ("training/checkpoints.py", {"transformers", "slimkern.training.state_files"}),
    ("training/healing.py", {"torch", "slimkern.training"}),
    ("training/loss.py", {"torch", "slimkern.training"}),
    ("training/", TRAINING),
    ("cli/", EVERYTHING),
    ("report/signs.py", set()),
    ("report/speed_schema.py", {"slimkern.machine"}),
    ("report/speed_check.py", {"slimkern.report.speed_schema"}),
    ("report/speed_text.py", {"slimkern.report.signs", "slimkern.report.speed_schema"}),
    ("report/speed_figures.py", {"matplotlib", "slimkern.report"}),
    ("report/speed_page.py", {"jinja2", "markupsafe", "slimkern.report", "slimkern.timing"}),
    ("report/speed_", {"slimkern.report", "slimkern.timing"}),
    ("report/", EVERYTHING),
    ("__init__.py", LIBRARY),
]
NOBODY_IMPORTS = ("slimkern.cli", "slimkern.report")


def _room(path: str) -> set[str]:
    for pattern, allowed in ROOMS:
        if path == pattern or path.startswith(pattern) or Path(path).match(pattern):
            return allowed
    raise AssertionError(f"slimkern/{path} is in no room: add it to the table")


def _imports(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def _allowed(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


def violations(path: Path, root: Path = PACKAGE) -> list[str]:
    relative = path.relative_to(root).as_posix()
    package = ".".join(["slimkern", *path.relative_to(root).parts[:-1]])
    allowed = _room(relative)
    wrong = []
    for line, name in _imports(ast.parse(path.read_text()), package):
        if name.split(".")[0] in STDLIB or _allowed(name, allowed):
            continue
        wrong.append(f"{relative}:{line} may not import {name}")
    return wrong


def test_every_import_is_in_its_room():
    wrong = [v for path in sorted(PACKAGE.rglob("*.py")) for v in violations(path)]
    assert not wrong, "\n".join(wrong)


def test_a_line_in_the_wrong_room_is_found(tmp_path):
    room = tmp_path / "ops" / "indexed_linear"
    room.mkdir(parents=True)
    (room / "reference.py").write_text("import torch\nfrom slimkern.ops import _registry\n")
    assert violations(room / "reference.py", tmp_path) == [
        "ops/indexed_linear/reference.py:2 may not import slimkern.ops._registry"
    ]
    (tmp_path / "plan.py").write_text("from slimkern.surgery import mask_\n")
    assert violations(tmp_path / "plan.py", tmp_path) == [
        "plan.py:1 may not import slimkern.surgery.mask_"
    ]


def test_nothing_imports_the_command_or_the_report():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).as_posix()
        if relative.startswith(("cli/", "report/")):
            continue
        for line, name in _imports(ast.parse(path.read_text()), "slimkern"):
            assert not name.startswith(NOBODY_IMPORTS), f"{relative}:{line} imports {name}"


def test_only_the_registry_calls_torch_library_and_only_native_imports_the_module():
    for path in sorted(PACKAGE.rglob("*.py")):
        relative, text = path.relative_to(PACKAGE).as_posix(), path.read_text()
        if relative != "ops/_registry.py":
            assert "torch.library." not in text, relative
        if relative != "ops/_native.py":
            assert "import _C" not in text, relative


@pytest.fixture(scope="module")
def imported_with_the_package():
    """The modules that a fresh process has after the import, and did not have after torch's."""
    code = (
        "import torch, sys; before = set(sys.modules); import slimkern; "
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


@pytest.mark.parametrize("heavy", ["triton", "transformers", "rich", "scipy", "matplotlib"])
def test_importing_the_package_is_light(imported_with_the_package, heavy):
    assert "slimkern" in imported_with_the_package
    assert heavy not in imported_with_the_package
