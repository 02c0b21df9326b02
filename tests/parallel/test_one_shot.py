"""Sums and rows over memory that all ranks reach, between processes."""

from __future__ import annotations

import importlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reprise.distributed import Communicator, Group
from reprise.distributed.board import create
from reprise.distributed.symmetric import SymmetricBuffer
from reprise.ops.rms_norm.reference import reference as rms_norm

pytest.importorskip("triton")
communicator_module = importlib.import_module("reprise.distributed.communicator")


SIZES = [2, pytest.param(4, marks=pytest.mark.long)]


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_the_sum_in_the_order_of_ranks(size: int) -> None:
    """Also when ranks are late, and when sums differ in how many programs they take."""
    run_ranks("sum_child.py", size)


@pytest.mark.parametrize("size", SIZES)
def test_rows_go_where_their_experts_are_and_nowhere_else(size: int) -> None:
    """And come back as sums in the order of ranks; also those that nobody wants."""
    run_ranks("rows_child.py", size)


def test_what_kernels_do_not_take_is_summed_by_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream of other numbers than what is added to it, or one that lies in pieces; rows that are
    too long, or odd, for one program."""
    triton = importlib.import_module("reprise.ops.all_reduce.triton")
    ranks = Communicator(Group("one-shot", 0, 1))
    monkeypatch.setitem(communicator_module._known, ranks.group.name, ranks)
    ranks.symmetric = object()  # type: ignore[assignment]  # not to be looked at
    monkeypatch.setattr(triton, "rms_norm", rms_norm)
    for partial, residual in (
        (torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(2, 8)),
        (torch.ones(2, 8), torch.ones(2, 16)[:, ::2]),
    ):
        triton.all_reduce_add(partial, residual, ranks.group.name)
        assert torch.equal(residual, torch.full((2, 8), 2.0))
        gain = torch.ones(8)
        out = triton.all_reduce_add_norm(partial, residual, gain, 0.0, ranks.group.name)
        assert torch.equal(residual, torch.full((2, 8), 3.0))
        torch.testing.assert_close(out, torch.ones(2, 8))
    for rows, width, dtype, taken in (
        (64, 4096, torch.bfloat16, True),
        (64, 4097, torch.bfloat16, False),
        (1, 8192, torch.bfloat16, True),
        (1, 8194, torch.bfloat16, False),
        (129, 4096, torch.bfloat16, False),  # more than is pushed at all
        (512, 64, torch.bfloat16, True),
        (513, 64, torch.bfloat16, False),
    ):
        x = torch.empty(rows, width, dtype=dtype)
        assert triton.norms(x, torch.empty_like(x)) == taken, (rows, width)


def run_ranks(name: str, size: int) -> None:
    """Start the script as each rank, over memory that all share."""
    nbytes = SymmetricBuffer.nbytes(size)
    file = create(nbytes * size)
    memory = torch.frombuffer(mmap.mmap(file, nbytes * size), dtype=torch.uint8)
    for own in memory.split(nbytes):
        SymmetricBuffer.blank(own)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).resolve().parents[2] / "src"), *filter(None, sys.path)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    script = str(Path(__file__).with_name(name))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(size), str(file)],
            pass_fds=(file,), env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        for each in ranks:
            _, error = each.communicate(timeout=300)
            assert each.returncode == 0, error
    finally:
        for each in ranks:
            each.kill()
        os.close(file)
