"""Replace the values of a model's parameters while it stands ready: same memory, new content."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reprise.errors import LoadError
from reprise.layers import CausalLM, Destination
from reprise.loading.destinations import (
    Misfits,
    as_stored,
    by_our_names,
    converts,
    destinations,
    is_computed,
    ties,
)
from reprise.loading.odd_numbers import find_odd, refuse_odd
from reprise.loading.transfer import Copy, copy_to, transfer
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def plan_update(model: CausalLM, weights: NamedTensors) -> dict[str, list[Copy]]:
    """Check weights against the model and change nothing.

    Args:
        model: Says what it takes (:func:`reprise.loading.destinations.destinations`).
        weights: By name in the checkpoint, some or all of them; on any device. Other dtypes of
            floating point numbers are converted.

    Returns:
        What :func:`update_weights` is to copy, by name.

    Raises:
        LoadError: Lists all names that are unknown or come twice, all wrong shapes and dtypes, and
            tied tensors that differ; or the tensors with numbers that are not finite.
    """
    misfits = Misfits("given", "needed")
    wanted = destinations(model)
    given = by_our_names(_pairs(weights, misfits), model.renames, misfits)
    as_stored(model, wanted, given)
    tied = ties(wanted)
    copies: dict[str, list[Copy]] = {}
    for ours, (name, source) in given.items():
        kept = tied[ours][0] if ours in tied else ours
        if kept not in wanted:
            if not is_computed(ours) and not ours.startswith(model.others):
                misfits.add("unexpected", name)
            continue
        mine: list[Copy] = []
        for each in wanted[kept]:
            if not misfits.shape_fits(name, source.shape, each):
                break
            if not _usable(source, each.stored_dtype):
                kind = "meta" if source.is_meta else f"{source.dtype}, {source.layout}"
                misfits.add("wrong dtype", f"{name}: {kind} given, {each.stored_dtype} needed")
                break
            if isinstance(each, Destination):
                mine.append(copy_to(each, source[each.part], f"{name} of the new weights"))
            elif not misfits.says_what_is_known(name, source, each):
                break
        known = copies.setdefault(kept, mine)
        pairs = zip(known, mine, strict=False)
        if known is not mine and not all(_equal(old, new) for old, new in pairs):
            misfits.add("not equal to what the config ties it to", name)
    misfits.refuse("the new weights do not fit the model and nothing was changed")
    refuse_odd(find_odd(list(itertools.chain(*copies.values()))), "nothing was changed")
    return copies


def update_weights(copies: Mapping[str, Sequence[Copy]], platform: Platform) -> None:
    """Copy into the parameters' memory; everything has landed when this returns.

    Raises:
        LoadError: A copy failed; some tensors have their new values and some do not.
    """
    started = time.perf_counter()
    on_host: list[Copy] = []
    with torch.inference_mode():
        for each in itertools.chain(*copies.values()):
            if each.source.device.type == "cpu" or each.convert is not None:
                on_host.append(each)
            else:
                each.target.copy_(each.source)
                if each.offset:
                    each.target.add_(each.offset)
    transfer(on_host, platform)  # waits for all of it: the caller's weights are his own again
    total = sum(each.target.nbytes for each in itertools.chain(*copies.values()))
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


def _usable(source: Tensor, dtype: torch.dtype) -> bool:
    plain = source.layout is torch.strided and not source.is_meta
    return plain and converts(source.dtype, dtype)


def _equal(one: Copy, other: Copy) -> bool:
    """Whether both give the same values in the model."""
    dtype = one.target.dtype
    return torch.equal(one.source.to("cpu", dtype), other.source.to("cpu", dtype))
