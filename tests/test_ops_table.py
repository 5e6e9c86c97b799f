"""The README's table of what runs where is what the registry says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import ops_table
from bench.report import into_readme
from slimkern.ops._registry import OPS, Backends, Op

README = Path(__file__).resolve().parents[1] / "README.md"


def lines() -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _rows()]
    return {name.strip("`"): rest for name, *rest in cells}


def _rows() -> list[str]:
    return [line for line in ops_table.table().splitlines() if line.startswith("| `")]


def test_the_readme_holds_what_is_generated():
    text = README.read_text(encoding="utf-8")
    wanted = into_readme(text, ops_table.table(), markers=ops_table.MARKERS)
    assert text == wanted, "run: python -m bench.ops_table --readme README.md"


def test_the_command_writes_the_table_between_its_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- ops table -->old<!-- /ops table -->\nafter\n")
    ops_table.main(["--readme", str(readme)])
    text = readme.read_text(encoding="utf-8")
    assert ops_table.table().strip() in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")


def test_every_public_op_has_a_line():
    import slimkern.ops

    functions = {name for name in slimkern.ops.__all__ if callable(getattr(slimkern.ops, name))}
    ops = {name for name in functions if (README.parent / "slimkern" / "ops" / name).is_dir()}
    assert ops - {"common_slice"} <= set(lines())


def test_an_op_is_where_its_function_is(tmp_path, monkeypatch):
    package = tmp_path / "doubling"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "reference.py").write_text("def double(x): ...\ndef double_grad(g): ...\n")
    (package / "cpu.py").write_text("def double(x): ...\n")
    (package / "triton.py").write_text("import no_such_module\nfrom a import b as double\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    backends = Backends("doubling", default={})
    ops = [Op("double", backends, ("forward",)), Op("double_grad", backends, ("backward",))]
    assert [ops[0].has(name) for name in ("reference", "cpu", "triton")] == [True, True, True]
    assert [ops[1].has(name) for name in ("reference", "cpu", "triton")] == [True, False, False]
    for op in ops:
        monkeypatch.setitem(OPS, op.name, op)
    monkeypatch.setitem(ops_table.COMPOSED, "both_of_them", ("doubling", "activation"))
    found = lines()
    assert found["doubling"] == ["both", "forward", "forward", "forward", "no", "forward"]
    assert found["both_of_them"][:5] == ["both", "forward", "forward", "forward", "no"]


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("ffn", ("forward",)),
        ("indexed_linear_dx", ("backward",)),
        ("add_norm_grad", ("backward",)),
        ("seeded_dropout", ("forward", "backward")),
    ],
)
def test_the_passes_of_an_op(name, passes):
    assert OPS[name].passes == passes
