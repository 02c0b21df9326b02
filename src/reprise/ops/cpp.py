"""Kernels in C++ for a CPU, which are compiled where they run (:mod:`reprise.compiling`).

A source in the folder of its op has a function that takes a struct of addresses and sizes. The
first call with numbers of a dtype waits for its library. Where there is no compiler, the op has
other implementations; where it fails, they compute what it would. The log says why.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from reprise import compiling
from reprise.errors import OpError, describe
from reprise.ops import put_off
from reprise.platforms import Platform

logger = logging.getLogger(__name__)

KINDS = {getattr(torch, name): kind for kind, name in enumerate(compiling.NUMBERS)}
"""The dtypes of numbers that kernels take, as they are told those of a gain."""

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


def needs_compiler(platform: Platform) -> str | None:
    """The requirement of implementations in C++."""
    return "computes on the CPU" if platform.device.type != compiling.DEVICE else _missing()


@functools.cache
def _missing() -> str | None:
    """Why nothing can be compiled and kept here; said once, for it is the same for every op."""
    try:
        compiling.compiler()
        compiling.cache_directory()
    except (OpError, OSError, RuntimeError) as error:
        logger.warning("kernels in C++ are left out: %s", describe(error))
        return describe(error)
    return None


class Kernel:
    """The function of a source, by the file's name: it takes the address of a struct and returns 0,
    or what is wrong. Within :func:`reprise.ops.put_off.together` it waits for the others.
    Before it is called for numbers of a dtype, :meth:`takes` is asked.

    Args:
        source: Path below ``reprise/ops``.
        fields: Of the struct: name and type in C.
        wrong: What each number that it returns means.

    Raises:
        OpError: Nothing can be compiled here.
    """

    def __init__(
        self, source: str, fields: Sequence[tuple[str, Any]], wrong: Mapping[int, str] | None = None
    ) -> None:
        self._source = compiling.HOME / source
        self.name = self._source.parent.name
        self.wrong = wrong or {}
        self._arguments = type("Arguments", (ctypes.Structure,), {"_fields_": list(fields)})
        self._functions: dict[torch.dtype, tuple[Any, int | None] | None] = {}
        _run_launches()  # what cannot be compiled is not noticed in the midst of a step

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether it computes with numbers of the dtype; the first time, when it is compiled."""
        if dtype not in self._functions:
            self._functions[dtype] = self._loaded(dtype)
        return self._functions[dtype] is not None

    def _loaded(self, dtype: torch.dtype) -> tuple[Any, int | None] | None:
        if dtype not in KINDS:
            return None
        number = compiling.NUMBERS[str(dtype).removeprefix("torch.")]
        try:
            function = _function(self._source, number, (POINTER,))
        except (OpError, OSError, RuntimeError) as error:
            logger.warning("%s in C++ is left out for %s: %s", self.name, dtype, describe(error))
            return None
        return function, ctypes.cast(function, POINTER).value

    def __call__(self, dtype: torch.dtype, tensors: Any, *values: Any) -> None:
        """Compute, or put it off.

        Args:
            dtype: Of the numbers.
            tensors: What must live until then: all of which it is told the address; None: left out.
            values: Of the struct.

        Raises:
            IndexError: What it found wrong in the tensors; later, if it is put off.
            OpError: One is not in the host's memory.
        """
        for each in tensors:
            if each is not None and not each.is_cpu:
                raise OpError(f"{self.name}: a tensor is on {each.device}, and others on the CPU")
        arguments = self._arguments(*values)
        found = self._functions[dtype]
        assert found is not None, "nobody has asked whether it takes them"
        function, address = found
        if not put_off.here.open:
            code = function(ctypes.addressof(arguments))
            if code:
                self.refuse(code)
            return
        waiting = put_off.here.waiting
        if waiting is None:
            waiting = put_off.here.waiting = _Launches()
        assert isinstance(waiting, _Launches), "there is one kind of such work on a CPU"
        waiting.add(self, address, arguments, tensors)

    def refuse(self, code: int) -> NoReturn:
        raise IndexError(f"{self.name}: {self.wrong[code]}")


class _Launches:
    """Calls of kernels, in order."""

    def __init__(self) -> None:
        self._kernels: list[Kernel] = []
        self._addresses: list[int | None] = []
        self._memory: list[Any] = []

    def add(
        self, kernel: Kernel, address: int | None, arguments: ctypes.Structure, tensors: Any
    ) -> None:
        self._kernels.append(kernel)
        self._addresses += address, ctypes.addressof(arguments)
        self._memory += arguments, tensors

    def run(self) -> None:
        done = LONG()
        addresses = (POINTER * len(self._addresses))(*self._addresses)
        code = _run_launches()(addresses, len(self._kernels), ctypes.byref(done))
        if code:
            self._kernels[done.value].refuse(code)


@functools.cache
def _run_launches() -> Any:
    return _function(compiling.HOME / "launches.cpp", "", (POINTER, LONG, POINTER))


def _function(source: Path, number: str, arguments: Sequence[Any]) -> Any:
    found = getattr(ctypes.CDLL(str(compiling.library(source, number))), source.stem)
    found.argtypes, found.restype = list(arguments), INT
    return found


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor that may be left out begins."""
    return None if tensor is None else tensor.data_ptr()


def lies_as(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> bool:
    """Whether it is what a kernel, which sees an address alone, takes it for: numbers of the dtype
    without gaps, or left out."""
    return tensor is None or (
        tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous()
    )
