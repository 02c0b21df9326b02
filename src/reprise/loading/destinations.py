"""Where each tensor of a checkpoint goes, and whether it fits there."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from reprise.errors import LoadError, ModelError
from reprise.layers import Destination, Implied, Place, StoredModel

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Numbers that mean the same in each other's dtype. Those of any other mean nothing without
scales, or nothing but themselves."""

T = TypeVar("T")


def destinations(model: StoredModel) -> dict[str, list[Place]]:
    """By the name that a checkpoint has for each tensor of the model, or would have, where it goes:
    in one piece or in several; nowhere if it is another device's.

    A module with a method ``destinations`` says itself what it takes, by full names, one that goes
    to several places as often; what it knows and leaves to others is None. Of every other module
    the parameters' names are the checkpoint's; one with a method ``destination`` says where its
    parameters go.

    Raises:
        ModelError: Two modules claim the same tensor.
    """
    found: dict[str, list[Place]] = {}
    for path, module in model.named_modules():
        mine: dict[str, list[Place]] = {}
        own = getattr(module, "destinations", None)
        place = getattr(module, "destination", Destination)
        pairs: Iterable[tuple[str, Place | None]] = (
            own()
            if own is not None
            else (
                (f"{path}.{name}" if path else name, place(each))
                for name, each in module.named_parameters(recurse=False)
            )
        )
        for name, destination in pairs:
            mine.setdefault(name, [])
            if destination is not None:
                mine[name].append(destination)
        for name in mine:
            if name in found:
                raise ModelError(
                    f"{name} is claimed by two modules of the model, the second one {path!r}: "
                    "give each its own path (build.at)"
                )
        found.update(mine)
    return found


def as_stored(model: StoredModel, wanted: dict[str, list[Place]], stored: Container[str]) -> None:
    """Of what a checkpoint may store in pieces or as one, want the one where it is there.

    A module with such tensors has a method ``merged``, which gives the name of each, where it goes
    and the names of its pieces.

    Args:
        model: What is to be filled.
        wanted: What :func:`destinations` gives for it; changed.
        stored: The names that there are, as the model has them.
    """
    for module in model.modules():
        for name, places, pieces in getattr(module, "merged", tuple)():
            if name in stored:
                for piece in pieces:
                    wanted.pop(piece, None)
                wanted[name] = places


def ties(wanted: Mapping[str, Sequence[Place]]) -> dict[str, tuple[str, Destination]]:
    """Names whose target has another name before: that name, and where both go."""
    first: dict[object, str] = {}
    found: dict[str, tuple[str, Destination]] = {}
    for name, places in wanted.items():
        destination = places[0] if len(places) == 1 else None
        if isinstance(destination, Destination) and destination.target.numel():
            key = destination.target.data_ptr(), destination.target.shape
            if first.setdefault(key, name) != name:
                found[name] = first[key], destination
    return found


def by_our_names(
    given: Iterable[tuple[str, T]], renames: Mapping[str, str], misfits: Misfits
) -> dict[str, tuple[str, T]]:
    """What is given, together with its name, by the name that the model has for it.

    Args:
        given: Name of each in the checkpoint.
        renames: Prefix in a checkpoint to the prefix that the model has for it. The longest one
            that fits counts.
        misfits: Where to put what comes twice.
    """
    found: dict[str, tuple[str, T]] = {}
    lengths = sorted({len(each) for each in renames}, reverse=True)
    for name, each in given:
        # Of a large model there are so many names and so many prefixes that not each meets each.
        prefix = next((name[:size] for size in lengths if name[:size] in renames), "")
        ours = renames.get(prefix, "") + name[len(prefix) :]
        if ours in found:
            misfits.add("given twice", name)
        else:
            found[ours] = name, each
    return found


def is_needed(places: Sequence[Place]) -> bool:
    """Whether a checkpoint must have what goes there."""
    return any(isinstance(each, Destination) and not each.optional for each in places)


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


def is_plain(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype are plain floating-point ones."""
    return dtype in _PLAIN


def converts(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether numbers keep their meaning when they are copied: dtypes agree or both are plain."""
    return source == target or (is_plain(source) and is_plain(target))


class Misfits:
    """Collects all that is wrong with some tensors, so that one error says it.

    Args:
        given: Said behind what a tensor is: ``in the file``.
        needed: Said behind what it should be: ``in the model``.
    """

    def __init__(self, given: str, needed: str) -> None:
        self._given, self._needed = given, needed
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, text: str) -> None:
        self._found.setdefault(kind, []).append(text)

    def shape_fits(self, name: str, shape: Iterable[int], place: Place) -> bool:
        """Whether a tensor of this shape has the part that goes there; it is noted if not."""
        wanted = place.stored_shape
        # One number may be a vector of one, or none.
        if (list(shape) or [1]) == (list(wanted) or [1]):
            return True
        shapes = f"{list(shape)} {self._given}, {list(wanted)} {self._needed}"
        self.add("wrong shape", f"{name}: {shapes}")
        return False

    def says_what_is_known(self, name: str, tensor: Tensor, place: Implied) -> bool:
        """Whether a tensor that goes nowhere has the values that it must have; it is noted if
        not."""
        wrong = place.check(tensor)
        if wrong is not None:
            self.add("not what the config says", f"{name}: {wrong}")
        return wrong is None

    def refuse(self, what: str) -> None:
        """Raise a LoadError that lists all that was noted, by kind, if there is anything."""
        problems = [
            f"{kind} ({len(texts)}): {', '.join(sorted(texts))}"
            for kind, texts in self._found.items()
        ]
        if problems:
            raise LoadError(f"{what}; " + "; ".join(problems))
