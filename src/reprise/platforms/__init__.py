"""Devices: the only package that names a device API.

A platform comes from this package or from the entry-point group ``reprise.platforms`` of any
installed package; the entry's name is what users type after ``--device``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from reprise.cpu_limits import usable_cpus
from reprise.errors import PlatformError
from reprise.platforms.drivers import wake

if TYPE_CHECKING:
    from reprise.platforms.base import Adjustment, MemoryInfo, Platform

__all__ = [
    "Adjustment",
    "MemoryInfo",
    "Platform",
    "available",
    "load",
    "names",
    "resolve",
    "usable_cpus",
    "wake",
]

ENTRY_POINT_GROUP = "reprise.platforms"

_BUILT_IN = {
    "cuda": "reprise.platforms.cuda:CudaPlatform",
    "rocm": "reprise.platforms.rocm:RocmPlatform",
    "xpu": "reprise.platforms.xpu:XpuPlatform",
    "cpu": "reprise.platforms.cpu:CpuPlatform",
}


def __getattr__(name: str) -> Any:
    # What needs torch is imported on first use, so that drivers may be woken before.
    if name in ("Adjustment", "MemoryInfo", "Platform"):
        return getattr(importlib.import_module("reprise.platforms.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _plug_ins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def names() -> list[str]:
    """Names of all known platforms, whether or not they work on this machine."""
    return [*_BUILT_IN, *(name for name in _plug_ins() if name not in _BUILT_IN)]


def load(name: str) -> type[Platform]:
    """The platform class called ``name``.

    Raises:
        PlatformError: No such platform, or its plug-in fails to import.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
    else:
        plug_ins = _plug_ins()
        if name not in plug_ins:
            raise PlatformError(f"device={name!r} is unknown; known: auto, {', '.join(names())}")
        try:
            found = plug_ins[name].load()
        except Exception as error:
            raise PlatformError(
                f"device={name!r}: plug-in {plug_ins[name].value!r} does not import: {error}"
            ) from error
    from reprise.platforms.base import Platform

    if not (isinstance(found, type) and issubclass(found, Platform)):
        raise PlatformError(f"device={name!r}: {found!r} is not a subclass of Platform")
    return found


def available() -> dict[str, str | None]:
    """Every known platform with the reason why it cannot be used here (None: it can)."""
    return {name: _unavailable_reason(name) for name in names()}


def _unavailable_reason(name: str) -> str | None:
    try:
        return load(name).unavailable_reason()
    except PlatformError as error:
        return str(error)
    except Exception as error:
        # A plug-in whose probe raises, for want of its driver for one, says no to itself alone.
        return f"{type(error).__name__}: {error}"


def resolve(device: str = "auto") -> Platform:
    """The platform for ``device``: ``auto``, a platform name, or ``name:index``.

    Raises:
        PlatformError: The device is unknown or not on this machine; the message lists what is. Or
            its plug-in declares defaults that no engine can have.
    """
    name, _, index_text = device.partition(":")
    if index_text and not index_text.isdecimal():
        raise PlatformError(f"device={device!r}: expected NAME or NAME:INDEX, such as cuda:0")
    if name == "auto":
        usable = [load(each) for each, reason in available().items() if reason is None]
        platform = max(usable, key=lambda each: each.priority)
    else:
        platform = load(name)
        reason = _unavailable_reason(name)
        if reason is not None:
            here = [each for each, why in available().items() if why is None]
            raise PlatformError(
                f"device={device!r} is not available: {reason}. Available here: {', '.join(here)}"
            )
    index = int(index_text or 0)
    if index >= platform.device_count():
        raise PlatformError(
            f"device={device!r}: index {index} is out of range, "
            f"{platform.device_count()} device(s) of this kind are visible"
        )
    found = platform(index)
    _require_sound(found)
    return found


_NOTHING = object()


def _require_sound(platform: Platform) -> None:
    """What users may say is checked where they say it; this is what a platform says instead.
    Properties may wake a device, and are not asked here."""
    for field, hint in _fields().items():
        declared = inspect.getattr_static(platform, field, _NOTHING)
        if declared is _NOTHING:
            raise PlatformError(f"platform {type(platform).__qualname__} does not declare {field}")
        if isinstance(declared, (property, functools.cached_property)):
            continue
        if not _is_a(getattr(platform, field), hint):
            wanted = str(hint).removeprefix("typing.").removeprefix("ClassVar")
            raise PlatformError(
                f"platform {platform.name!r} declares {field}={declared!r}, which must be {wanted}"
            )
    size, tokens = platform.default_block_size, platform.default_batched_tokens
    if size < 1 or size & (size - 1):
        raise PlatformError(
            f"platform {platform.name!r} declares default_block_size={size!r}, which must be a "
            "power of two, such as 16"
        )
    if tokens < 1:
        raise PlatformError(
            f"platform {platform.name!r} declares default_batched_tokens={tokens!r}, which must be "
            "a whole number of at least 1"
        )


@functools.cache
def _fields() -> Mapping[str, Any]:
    """Attributes of :class:`Platform`, and their types."""
    from reprise.platforms.base import Platform

    return get_type_hints(Platform)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a type of :class:`Platform`'s data, as far as a look at it tells."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is ClassVar:
        return _is_a(value, parts[0])
    if kind is Literal:
        return value in parts
    if kind in (Union, UnionType):
        return any(_is_a(value, part) for part in parts)
    if hint is int and isinstance(value, bool):
        return False
    return isinstance(value, kind or hint)
