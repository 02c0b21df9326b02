"""Sums and rows over memory that all ranks reach, between processes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reprise.distributed.board import create
from reprise.distributed.symmetric import SymmetricBuffer

pytest.importorskip("triton")


SIZES = [2, pytest.param(4, marks=pytest.mark.long)]


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_the_sum_in_the_order_of_ranks(size: int) -> None:
    """Also when ranks are late, and when sums differ in how many programs they take."""
    run_ranks("sum_child.py", size)


@pytest.mark.parametrize("size", SIZES)
def test_rows_go_where_their_experts_are_and_nowhere_else(size: int) -> None:
    """And come back as sums in the order of ranks; also those that nobody wants."""
    run_ranks("rows_child.py", size)


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
