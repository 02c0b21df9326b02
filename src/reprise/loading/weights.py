"""Fill a model's parameters from safetensors files, or with random values."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from reprise.errors import LoadError
from reprise.layers import CausalLM
from reprise.loading.transfer import Copy, transfer
from reprise.loading.weight_files import stored_tensors
from reprise.platforms import Platform
from reprise.progress import progress

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a weight may be stored in. Numbers of any other dtype mean nothing without scales."""


def load_weights(
    model: CausalLM, path: Path, load_format: str, platform: Platform, seed: int = 0
) -> None:
    """Fill every parameter of ``model``, in the dtype and on the device that it has.

    A head that the config ties and the checkpoint stores with other values gets its own weight.

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
        _load_files(model, path, platform)
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


def _load_files(model: CausalLM, path: Path, platform: Platform) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = checkpoint_tensors(model)
    missing = set(targets)
    unexpected: list[str] = []
    misshapen: list[str] = []
    not_plain: list[str] = []
    copies: dict[str, Copy] = {}
    stored = stored_tensors(path)
    for name in missing - stored.keys():
        alias = tied_name(name, targets[name], parameters)
        if alias in stored:
            stored[name] = stored.pop(alias)
    for name, (file, source) in stored.items():
        missing.discard(name)
        target = targets.get(name)
        if target is None and model.tied and name == HEAD:
            target = parameters[HEAD]
        if target is None:
            if not is_computed(name):
                unexpected.append(name)
        elif source.shape != target.shape:
            shapes = f"{list(source.shape)} in the file, {list(target.shape)} in the model"
            misshapen.append(f"{name}: {shapes}")
        elif source.dtype not in _PLAIN:
            not_plain.append(f"{name}: {str(source.dtype).removeprefix('torch.')}")
        else:
            # A tied head may be stored though it is the embedding once more: if it is.
            target = target if name in targets else torch.empty_like(target)
            copies[name] = Copy(f"{name} of {file}", source, target)
    refuse_misfits(
        "the checkpoint does not fit the model",
        {
            "missing": missing,
            "unexpected": unexpected,
            "wrong shape": misshapen,
            "not plain floating-point numbers, as in a quantised checkpoint": not_plain,
        },
    )
    transfer(list(copies.values()), platform)
    if HEAD in copies and HEAD not in targets:
        head = copies[HEAD].target
        if not torch.equal(head, parameters[HEAD]):
            model.untie(head)
            logger.warning(
                "%s: the config ties it to the embedding (tie_word_embeddings), the checkpoint "
                "stores another one; the stored one is used",
                HEAD,
            )


def tied_name(name: str, tensor: Tensor, parameters: Mapping[str, Tensor]) -> str | None:
    """Another name that a checkpoint may have for a tied parameter: it stores one of them."""
    for other, parameter in parameters.items():
        same = parameter.data_ptr() == tensor.data_ptr() and parameter.shape == tensor.shape
        if same and other != name:
            return other
    return None


def is_computed(name: str) -> bool:
    """Buffers that old checkpoints store although they follow from the config."""
    return name.endswith(
        (
            ".rotary_emb.inv_freq",
            ".rotary_emb.cos_cached",
            ".rotary_emb.sin_cached",
            ".attn.bias",
            ".attn.masked_bias",
        )
    )


def refuse_misfits(what: str, misfits: Mapping[str, Collection[str]]) -> None:
    """Raise a LoadError that lists all tensors that do not fit, by kind, if there are any."""
    problems = [
        f"{kind} ({len(names)}): {', '.join(sorted(names))}"
        for kind, names in misfits.items()
        if names
    ]
    if problems:
        raise LoadError(f"{what}; " + "; ".join(problems))
