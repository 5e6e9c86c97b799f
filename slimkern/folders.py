"""Folders that appear whole or not at all, and the files that travel with a model."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a model's folder holds that does not belong into the folder of a smaller one: its weights in
# any format, and what training left behind. Pickles are left behind wherever they lie.
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin.index.json",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.ot",
    "adapter_config.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_TRAINING = ("trainer_state.json", "checkpoint-*", "global_step*", "runs", "onnx", "openvino")


@contextmanager
def whole_folder(folder: Path, replaces: tuple[str, ...] | None = None) -> Iterator[Path]:
    """Yield an empty folder to write into, which becomes ``folder`` when the block has succeeded.

    Everything is written to a hidden sibling, flushed to the disk, and renamed: a reader sees the
    old folder, for the moment between two renames none, or the new one, never half of one. Where
    the block raises, nothing has changed.

    Args:
        folder: where it is to stand; its parents are created.
        replaces: ``None`` refuses a folder that is there and not empty. A tuple of file names
            replaces it if one of them is in it: a folder without them is something else.

    Raises:
        FileExistsError: ``folder`` is there and may not be replaced.
    """
    folder = Path(os.path.realpath(folder))  # a link keeps pointing at what is replaced
    _refuse(folder, replaces)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        yield fresh
        _flush(fresh)
        _refuse(folder, replaces)
        old = scratch / "old"
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(fresh, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        _flush_entry(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def copy_companions(source: Path, target: Path, other: str) -> list[str]:
    """Copy tokenizer, vocabulary, pooling and other files of a model's folder, not its weights.

    Files that ``target`` already has stay as they are. Weights are left behind at the top level
    only (a pooling or projection module in a subfolder keeps its own), pickles everywhere, hidden
    files and what training leaves everywhere. A subfolder with a file ``other`` is left behind
    too: a slim model that was saved there.

    Returns:
        the paths copied, relative to ``target``.
    """
    copied: list[str] = []
    for base, folders, files in os.walk(source):
        here = Path(base)
        skip = _PICKLES + _TRAINING + (_WEIGHTS if here == source else ())
        folders[:] = sorted(
            f for f in folders if not _matches(f, _TRAINING) and not (here / f / other).exists()
        )
        for name in sorted(files):
            relative = (here / name).relative_to(source)
            if _matches(name, skip) or (target / relative).exists():
                continue
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here / name, target / relative)
            copied.append(relative.as_posix())
    return copied


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return name.startswith(".") or any(fnmatch.fnmatch(name, p) for p in patterns)


def _refuse(folder: Path, replaces: tuple[str, ...] | None) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is there and is no folder")
    if not any(folder.iterdir()):
        return
    if replaces is None:
        raise FileExistsError(f"{folder} is there and not empty; overwrite=True replaces it")
    if not any((folder / name).is_file() for name in replaces):
        raise FileExistsError(
            f"{folder} is there and holds none of {', '.join(replaces)}: not a model's folder, "
            "so it is not replaced"
        )


def _flush(folder: Path) -> None:
    for base, _, files in os.walk(folder):
        for name in files:
            _flush_entry(Path(base) / name)
        _flush_entry(Path(base))


def _flush_entry(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows has no flush of a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
