"""Fill a model's parameters from safetensors files, or with random values."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch import Tensor

from reprise.errors import LoadError
from reprise.layers import Destination, Implied, Linear, Stack, StoredModel
from reprise.layers.formats import DENSE, Format
from reprise.loading.destinations import (
    Misfits,
    as_stored,
    by_our_names,
    converts,
    destinations,
    is_computed,
    is_needed,
    is_plain,
    ties,
)
from reprise.loading.odd_numbers import refuse_odd
from reprise.loading.transfer import Copy, copy_to, transfer
from reprise.loading.weight_files import stored_tensors
from reprise.platforms import Platform
from reprise.progress import progress

logger = logging.getLogger(__name__)


def load_weights(
    model: StoredModel, path: Path, load_format: str, platform: Platform, seed: int = 0
) -> None:
    """Fill every parameter of ``model``, in the dtype and on the device that it has.

    A head that the config ties and the checkpoint stores with other values gets its own weight.

    Args:
        model: Says what it takes (:func:`reprise.loading.destinations.destinations`).
        path: Directory of a checkpoint.
        load_format: ``auto`` and ``safetensors`` read files; ``dummy`` fills at random.
        platform: Drives the device.
        seed: Of ``dummy``.

    Raises:
        LoadError: A file is missing or corrupted, tensors do not fit (lists all of them, and
            nothing has been copied), one cannot be copied, or numbers are not finite.
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


def _fill_at_random(model: StoredModel, seed: int) -> None:
    """As each format says; what has no format as plain numbers."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    modules = list(model.modules())
    filled: set[int] = set()
    with progress("random weights", len(modules)) as bar, torch.no_grad():
        for module in modules:
            format: Format = DENSE
            tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
            if isinstance(module, Linear | Stack):
                format, tensors = module.format, module.tensors
            new = {name: each for name, each in tensors.items() if id(each) not in filled}
            filled.update(map(id, tensors.values()))
            format.fill_at_random(new, generator)
            bar.advance()


def _load_files(model: StoredModel, path: Path, platform: Platform) -> None:
    misfits = Misfits("in the file", "in the model")
    wanted = destinations(model)
    stored = by_our_names(stored_tensors(path).items(), model.renames, misfits)
    as_stored(model, wanted, stored)
    tied = ties(wanted)
    twins: dict[str, Tensor] = {}
    for other, (kept, shared) in tied.items():
        if other in stored and kept in stored:
            # The same once more: if it is.
            twins[other] = torch.empty_like(shared.target)
            wanted[other] = [shared._replace(target=twins[other])]
        else:
            del wanted[other]
            if other in stored:
                stored[kept] = stored.pop(other)
    copies: list[Copy] = []
    for key, places in wanted.items():
        if key not in stored:
            if is_needed(places):
                misfits.add("missing", key)
            continue
        name, found = stored.pop(key)
        for place in places:
            if not misfits.shape_fits(name, found.shape, place):
                break
            source = found.read() if isinstance(place, Implied) else found.read(place.part)
            if not converts(source.dtype, place.stored_dtype):
                misfits.add(*_wrong_dtype(name, source.dtype, place.stored_dtype))
                break
            if isinstance(place, Destination):
                copies.append(copy_to(place, source, f"{name} of {found.file}"))
            elif not misfits.says_what_is_known(name, source, place):
                break
    beside = [key for key in stored if key.startswith(model.others)]
    for key in beside:
        del stored[key]
    if beside:
        kinds = sorted({each for each in model.others for key in beside if key.startswith(each)})
        logger.info("weights: %d tensors of %s are not read", len(beside), ", ".join(kinds))
    for name, _ in stored.values():
        if not is_computed(name):
            misfits.add("unexpected", name)
    misfits.refuse("the checkpoint does not fit the model")
    refuse_odd(transfer(copies, platform), "the checkpoint is damaged: fetch or save it again")
    for other, twin in twins.items():
        kept, shared = tied[other]
        if torch.equal(twin, shared.target):
            continue
        if not model.untie(other, twin):
            raise LoadError(f"{other} and {kept} are one in the model and differ in the checkpoint")
        logger.warning(
            "%s: the config ties it to the embedding (tie_word_embeddings), the checkpoint "
            "stores another one; the stored one is used",
            other,
        )


def _wrong_dtype(name: str, stored: torch.dtype, ours: torch.dtype) -> tuple[str, str]:
    if is_plain(ours):
        kind = "not plain floating-point numbers, as in a quantised checkpoint"
        return kind, f"{name}: {_short(stored)}"
    return "wrong dtype", f"{name}: {_short(stored)} in the file, {_short(ours)} in the model"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
