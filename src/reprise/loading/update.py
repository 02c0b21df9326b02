"""Replace the values of a model's parameters while it stands ready: same memory, new content."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reprise.errors import LoadError
from reprise.loading.transfer import Copy, transfer
from reprise.loading.weights import (
    checkpoint_tensors,
    is_computed,
    refuse_misfits,
    tied_name,
)
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def plan_update(model: nn.Module, weights: NamedTensors) -> dict[str, Copy]:
    """Check weights against the model and change nothing.

    Args:
        model: Its parameter names are the checkpoint's; merged layers say what they merge.
        weights: By name in the checkpoint, some or all of them; on any device. Other dtypes of
            floating point numbers are converted.

    Returns:
        What :func:`update_weights` is to copy, by name.

    Raises:
        LoadError: Lists all names that are unknown or come twice, all wrong shapes and dtypes, and
            tied tensors that differ.
    """
    given, twice, no_tensors = _collect(weights)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = checkpoint_tensors(model)
    copies: dict[str, Copy] = {}
    unexpected: list[str] = []
    misshapen: list[str] = []
    unusable: list[str] = []
    different: list[str] = []
    for name, source in given.items():
        kept = name if name in targets else _kept_as(name, targets, parameters)
        if kept is None:
            if not is_computed(name):
                unexpected.append(name)
            continue
        target = targets[kept]
        if source.shape != target.shape:
            misshapen.append(f"{name}: {list(source.shape)} given, {list(target.shape)} needed")
        elif not _is_plain(source):
            kind = "meta" if source.is_meta else f"{source.dtype}, {source.layout}"
            unusable.append(f"{name}: {kind} given, {target.dtype} needed")
        elif kept in copies:
            if not _equal(copies[kept].source, source, target.dtype):
                different.append(name)
        else:
            copies[kept] = Copy(f"{name} of the new weights", source, target)
    refuse_misfits(
        "the new weights do not fit the model and nothing was changed",
        {
            "given twice": twice,
            "no tensors": no_tensors,
            "unexpected": unexpected,
            "wrong shape": misshapen,
            "wrong dtype": unusable,
            "not equal to what the config ties it to": different,
        },
    )
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


def _collect(weights: NamedTensors) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Tensors by name, names that came twice, and names of what is no tensor."""
    pairs: Iterable[Any] = weights.items() if isinstance(weights, Mapping) else weights
    given: dict[str, Tensor] = {}
    twice: list[str] = []
    no_tensors: list[str] = []
    try:
        for name, tensor in pairs:
            if name in given:
                twice.append(str(name))
            elif isinstance(name, str) and isinstance(tensor, Tensor):
                given[name] = tensor
            else:
                no_tensors.append(f"{name!r}: {type(tensor).__name__}")
    except (TypeError, ValueError) as error:
        raise LoadError(
            f"weights must be a mapping of names to tensors, or pairs of a name and a tensor: "
            f"{error}"
        ) from error
    return given, twice, no_tensors


def _kept_as(
    name: str, targets: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> str | None:
    """The name under which the model keeps a tensor that is tied to another one."""
    if name not in parameters:
        return None
    return tied_name(name, parameters[name], targets)


def _is_plain(tensor: Tensor) -> bool:
    """Numbers that mean the same in another dtype; smaller ones come with scales."""
    wide = tensor.is_floating_point() and tensor.element_size() > 1
    return wide and tensor.layout is torch.strided and not tensor.is_meta


def _equal(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether both give the same values in the model."""
    return torch.equal(one.to("cpu", dtype), other.to("cpu", dtype))
