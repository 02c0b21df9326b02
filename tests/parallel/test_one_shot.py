"""The sum of our own over memory that all ranks read, between processes."""

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


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_rank_has_the_sum_in_the_order_of_ranks(size: int) -> None:
    """Also when ranks are late, and when sums differ in how many programs they take."""
    nbytes = SymmetricBuffer.nbytes(size)
    file = create(nbytes * size)
    memory = torch.frombuffer(mmap.mmap(file, nbytes * size), dtype=torch.uint8)
    for own in memory.split(nbytes):
        SymmetricBuffer.blank(own, size)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).resolve().parents[2] / "src"), *filter(None, sys.path)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    script = str(Path(__file__).with_name("sum_child.py"))
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
