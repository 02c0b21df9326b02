"""Fill a model's parameters from safetensors files, or with random values."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from reprise.errors import LoadError
from reprise.loading.transfer import Copy, transfer
from reprise.platforms import Platform
from reprise.progress import progress

logger = logging.getLogger(__name__)

NO_FIT = "the checkpoint does not fit the model"
NOT_TIED = "not equal to what the config ties it to"


def load_weights(
    model: nn.Module, path: Path, load_format: str, platform: Platform, seed: int = 0
) -> None:
    """Fill every parameter of ``model``, in the dtype and on the device that it has.

    Args:
        model: Its parameter names are the checkpoint's; merged layers say what they merge.
        path: Directory of a checkpoint.
        load_format: ``auto`` and ``safetensors`` read files; ``dummy`` fills at random.
        platform: Drives the device.
        seed: Of ``dummy``.

    Raises:
        LoadError: A file is missing or corrupted, tensors do not fit (lists all of them, and
            nothing has been copied), or one cannot be copied.
    """
    started = time.perf_counter()
    if load_format == "dummy":
        _fill_at_random(model, seed)
    else:
        _load_files(model, _weight_files(path), platform)
    total = sum(each.numel() * each.element_size() for each in model.parameters())
    seconds = time.perf_counter() - started
    logger.info(
        "weights: %.2f GiB (%s) in %.2f s, %.2f GB/s",
        total / 2**30,
        load_format,
        seconds,
        total / seconds / 1e9,
    )


def checkpoint_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Destination of each tensor that a checkpoint must have, by its name there."""
    destinations: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        split = getattr(module, "checkpoint_tensors", None)
        if split is not None:
            parent = path.rpartition(".")[0]
            tensors: Iterator[tuple[str, Tensor]] = split()
        else:
            parent = path
            tensors = module.named_parameters(recurse=False)
        for name, tensor in tensors:
            if tensor.data_ptr() in seen and tensor.numel() > 0:
                continue
            seen.add(tensor.data_ptr())
            destinations[f"{parent}.{name}" if parent else name] = tensor
    return destinations


def _fill_at_random(model: nn.Module, seed: int) -> None:
    """Matrices as transformers initialises them (normal, 0.02); vectors keep their defaults."""
    parameters = [each for each in model.parameters() if each.dim() > 1]
    generator = torch.Generator(device=parameters[0].device).manual_seed(seed)
    with progress("random weights", len(parameters)) as bar, torch.no_grad():
        for each in parameters:
            each.normal_(0.0, 0.02, generator=generator)
            bar.advance()


def _weight_files(path: Path) -> list[Path]:
    """As transformers chooses them, or all there are: other tools choose other names."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(path / name for name in names)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise LoadError(f"{index} is not a valid weight index: {error!r}") from error
        absent = [each.name for each in files if not each.is_file()]
        if absent:
            raise LoadError(f"{path} lacks {', '.join(absent)}, which {index.name} lists")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise LoadError(
            f"{path} has no *.safetensors file; use load_format='dummy' for random weights"
        )
    return files


def _load_files(model: nn.Module, files: list[Path], platform: Platform) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = checkpoint_tensors(model)
    missing = set(targets)
    unexpected: list[str] = []
    misshapen: list[str] = []
    different: list[str] = []
    misfits: dict[str, Collection[str]] = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": misshapen,
        NOT_TIED: different,
    }
    copies: dict[str, Copy] = {}
    stored = _stored_tensors(files)
    for name in missing - stored.keys():
        alias = tied_name(name, targets[name], parameters)
        if alias in stored:
            stored[name] = stored.pop(alias)
    for name, (file, source) in stored.items():
        missing.discard(name)
        if name in targets:
            target = targets[name]
            if source.shape != target.shape:
                shapes = f"{list(source.shape)} in the file, {list(target.shape)} in the model"
                misshapen.append(f"{name}: {shapes}")
                continue
        elif name in parameters:
            # A tied head may be stored though it is the embedding once more: if it is.
            if source.shape != parameters[name].shape:
                different.append(name)
                continue
            target = torch.empty_like(parameters[name])
        else:
            if not is_computed(name):
                unexpected.append(name)
            continue
        copies[name] = Copy(f"{name} of {file}", source, target)
    if missing or unexpected or misshapen:
        refuse_misfits(NO_FIT, misfits)
    transfer(list(copies.values()), platform)
    different += [
        name
        for name, copy in copies.items()
        if name not in targets and not torch.equal(copy.target, parameters[name])
    ]
    refuse_misfits(NO_FIT, misfits)


def _stored_tensors(files: list[Path]) -> dict[str, tuple[Path, Tensor]]:
    """Every tensor of the files with the file that has it, mapped and not yet read."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, tuple[Path, Tensor]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    if name in stored:
                        raise LoadError(
                            f"{name} is in {stored[name][0]} and in {file}: remove one of them, or "
                            "name the files to load in model.safetensors.index.json"
                        )
                    stored[name] = file, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{file} is corrupted or unreadable: {error}") from error
    return stored


def tied_name(name: str, tensor: Tensor, parameters: Mapping[str, Tensor]) -> str | None:
    """Another name that a checkpoint may have for a tied parameter: it stores one of them."""
    for other, parameter in parameters.items():
        same = parameter.data_ptr() == tensor.data_ptr() and parameter.shape == tensor.shape
        if same and other != name:
            return other
    return None


def is_computed(name: str) -> bool:
    """Buffers that old checkpoints store although they follow from the config."""
    return name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))


def refuse_misfits(what: str, misfits: Mapping[str, Collection[str]]) -> None:
    """Raise a LoadError that lists all tensors that do not fit, by kind, if there are any."""
    problems = [
        f"{kind} ({len(names)}): {', '.join(sorted(names))}"
        for kind, names in misfits.items()
        if names
    ]
    if problems:
        raise LoadError(f"{what}; " + "; ".join(problems))
