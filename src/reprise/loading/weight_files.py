"""Find and open the safetensors files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from torch import Tensor

from reprise.errors import LoadError
from reprise.loading.files import read_object, require_regular
from reprise.loading.foreign import foreign_content


class Stored(NamedTuple):
    """A tensor in a file, mapped and not yet read."""

    file: Path
    slices: Any
    """safetensors' slice of all of it."""

    @property
    def shape(self) -> list[int]:
        shape: list[int] = self.slices.get_shape()
        return shape

    def read(self, part: tuple[slice, ...] = ()) -> Tensor:
        """A part of it, or all. Its content is read from the file as it is used."""
        tensor: Tensor = self.slices[part]
        return tensor


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, by name.

    Of a tensor that several files have, the one counts that the index names.

    Args:
        path: Directory of the checkpoint.

    Raises:
        LoadError: A file is missing, corrupted or no file, or it is unclear which one counts.
    """
    from safetensors import SafetensorError, safe_open

    try:
        files, index = _weight_files(path)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            require_regular(file)
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    earlier = stored.get(name)
                    if earlier is None or _replaces(name, file, earlier.file, index):
                        stored[name] = Stored(file, tensors.get_slice(name))
        except (SafetensorError, OSError, ValueError) as error:
            raise LoadError(f"{file} is corrupted or unreadable: {error}") from error
    return stored


def _replaces(name: str, file: Path, earlier: Path, index: Mapping[str, Path]) -> bool:
    """Whether a tensor that both files have is to be read from ``file``.

    Raises:
        LoadError: The index names neither.
    """
    chosen = index.get(name)
    if chosen not in (file, earlier):
        raise LoadError(
            f"{name} is in {earlier} and in {file}: remove one of them, or name the files to load "
            "in model.safetensors.index.json"
        )
    return chosen == file


def _weight_files(path: Path) -> tuple[list[Path], Mapping[str, Path]]:
    """As transformers chooses them, or all there are: other tools choose other names.

    Returns:
        The files, and for each tensor that an index lists the file that it names.
    """
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.exists():
        return [whole], {}
    if index.exists():
        places = _index(index)
        files = sorted(set(places.values()))
        absent = [each.name for each in files if not each.exists()]
        if absent:
            raise LoadError(f"{path} lacks {', '.join(absent)}, which {index.name} lists")
        return files, places
    files = sorted(path.glob("*.safetensors"))
    if not files:
        found = foreign_content(path)
        raise LoadError(
            f"{path} has no *.safetensors file{f' ({found})' if found else ''}; use "
            "load_format='dummy' for random weights"
        )
    return files, {}


def _index(file: Path) -> dict[str, Path]:
    """The file of each tensor, by ``weight_map``.

    Raises:
        LoadError: It is no such map, or leads out of the directory.
    """
    try:
        places: Any = read_object(file)["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
            raise ValueError("weight_map must give a file name for each tensor")
    except (ValueError, KeyError, OSError) as error:
        raise LoadError(f"{file} is not a valid weight index: {error!r}") from error
    for tensor, name in places.items():
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
            raise LoadError(
                f"{file} is not a valid weight index: {tensor} is in {name!r}, which is not in "
                "the checkpoint's directory"
            )
    return {tensor: file.parent / name for tensor, name in places.items()}
