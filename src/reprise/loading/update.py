"""Replace the values of a model's parameters while it stands ready: same memory, new content."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reprise.errors import LoadError
from reprise.layers import CausalLM
from reprise.loading.destinations import (
    Misfits,
    by_our_names,
    converts,
    destinations,
    is_computed,
    ties,
)
from reprise.loading.transfer import Copy, transfer
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def plan_update(model: CausalLM, weights: NamedTensors) -> dict[str, Copy]:
    """Check weights against the model and change nothing.

    Args:
        model: Says what it takes (:func:`reprise.loading.destinations.destinations`).
        weights: By name in the checkpoint, some or all of them; on any device. Other dtypes of
            floating point numbers are converted.

    Returns:
        What :func:`update_weights` is to copy, by name.

    Raises:
        LoadError: Lists all names that are unknown or come twice, all wrong shapes and dtypes, and
            tied tensors that differ.
    """
    misfits = Misfits("given", "needed")
    wanted = destinations(model)
    tied = ties(wanted)
    given = by_our_names(_pairs(weights, misfits), model.renames, misfits)
    copies: dict[str, Copy] = {}
    for ours, (name, source) in given.items():
        kept = tied[ours][0] if ours in tied else ours
        if kept not in wanted:
            if not is_computed(ours):
                misfits.add("unexpected", name)
            continue
        destination = wanted[kept]
        if destination is None or not misfits.shape_fits(name, source.shape, destination):
            continue
        target = destination.target
        usable = source.layout is torch.strided and not source.is_meta
        if not usable or not converts(source.dtype, target.dtype):
            kind = "meta" if source.is_meta else f"{source.dtype}, {source.layout}"
            misfits.add("wrong dtype", f"{name}: {kind} given, {target.dtype} needed")
            continue
        source = source[destination.part]
        if kept not in copies:
            copies[kept] = Copy(f"{name} of the new weights", source, target)
        elif not _equal(copies[kept].source, source, target.dtype):
            misfits.add("not equal to what the config ties it to", name)
    misfits.refuse("the new weights do not fit the model and nothing was changed")
    return copies


def update_weights(copies: Mapping[str, Copy], platform: Platform) -> None:
    """Copy into the parameters' memory; everything has landed when this returns.

    Raises:
        LoadError: A copy failed; some tensors have their new values and some do not.
    """
    started = time.perf_counter()
    on_host: list[Copy] = []
    with torch.inference_mode():
        for each in copies.values():
            if each.source.device.type == "cpu":
                on_host.append(each)
            else:
                each.target.copy_(each.source)
    transfer(on_host, platform)
    platform.synchronize()
    total = sum(each.target.nbytes for each in copies.values())
    seconds = time.perf_counter() - started
    logger.info(
        "weights: %d tensors, %.2f GiB, replaced in %.2f s", len(copies), total / 2**30, seconds
    )


def _pairs(weights: NamedTensors, misfits: Misfits) -> Iterator[tuple[str, Tensor]]:
    """The tensors with their names; notes what is no such pair."""
    pairs: Iterable[Any] = weights.items() if isinstance(weights, Mapping) else weights
    try:
        for name, tensor in pairs:
            if isinstance(name, str) and isinstance(tensor, Tensor):
                yield name, tensor
            else:
                misfits.add("no tensors", f"{name!r}: {type(tensor).__name__}")
    except (TypeError, ValueError) as error:
        raise LoadError(
            f"weights must be a mapping of names to tensors, or pairs of a name and a tensor: "
            f"{error}"
        ) from error


def _equal(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether both give the same values in the model."""
    return torch.equal(one.to("cpu", dtype), other.to("cpu", dtype))
