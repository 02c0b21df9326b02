"""The indexer's search for what so many scores reach: wherever it begins, it ends there."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from reprise.ops import all_ops  # noqa: E402
from reprise.ops.indexer.search import NONE, bounds, largest, search  # noqa: E402

N, TOP, ENOUGH = 64, 9, 12
KINDS = ("any", "scores", "side by side", "all equal", "at the ends")


@triton.jit
def search_kernel(
    keys_ptr, guesses_ptr, found_ptr, taken_ptr, N: tl.constexpr, TOP: tl.constexpr,
    ENOUGH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.arange(0, N)
    keys = tl.load(keys_ptr + row * N + place)
    low, shift = tl.load(guesses_ptr + row * 2), tl.load(guesses_ptr + row * 2 + 1)
    bounded = shift < 0
    if bounded:
        low, shift = bounds(keys, TOP)
    number, _, exact = search(keys, low, shift, bounded, TOP, ENOUGH, True)
    tl.store(found_ptr + row * 2, number)
    tl.store(found_ptr + row * 2 + 1, exact.to(tl.int32))
    taken, _ = largest(keys, low, shift, bounded, TOP, False)
    tl.store(taken_ptr + row * N + place, (taken & (keys != NONE)).to(tl.int32))


def some_keys(kind: str, rows: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, N] int32, of which some are not there."""
    wide = torch.randint(-(1 << 31) + 1, 1 << 31, (rows, N), generator=generator)
    found = {
        "any": wide,
        "scores": torch.randn(rows, N, generator=generator).abs().view(torch.int32).long(),
        "side by side": wide % 40 - 20,
        "all equal": wide[:, :1].expand(rows, N).clone(),
        "at the ends": torch.where(wide < 0, -(1 << 31) + 1, (1 << 31) - 1),
    }[kind]
    absent = torch.rand(rows, N, generator=generator) < 0.3
    absent[1::4, TOP - 1 :] = True  # too few
    return torch.where(absent, -(1 << 31), found).int()


def test_a_search_ends_at_what_so_many_reach(platform, implementation, pytestconfig) -> None:
    """From what :func:`bounds` says, from one of the keys, from anywhere, in parts of any width; of
    equal ones the first are taken, and all where there are too few."""
    implementation(all_ops()["indexer"], "triton")
    long = platform.device_type != "cpu" or pytestconfig.getoption("--long")
    generator = torch.Generator().manual_seed(0)
    sets = [some_keys(kind, 30 if long else 3, generator) for kind in KINDS[:: 1 if long else 3]]
    keys = torch.cat(sets)
    rows = len(keys)
    guesses = torch.randint(-(1 << 31) + 1, 1 << 31, (rows, 2), generator=generator)
    guesses[::3, 0] = keys[::3, 5].clamp(min=-(1 << 31) + 1)
    guesses[:, 1] %= 30
    guesses[1::3, 1] = -1
    guesses[2::6] = torch.tensor([-(1 << 31) + 1, 0])  # far off, in the narrowest parts
    enough = (keys != NONE.value).sum(1) >= TOP
    guesses[~enough, 1] = guesses[~enough, 1].clamp(min=0)
    there = keys.to(platform.device), guesses.int().to(platform.device)
    found = torch.zeros(rows, 2, dtype=torch.int32, device=platform.device)
    taken = torch.zeros(rows, N, dtype=torch.int32, device=platform.device)
    search_kernel[(rows,)](*there, found, taken, N=N, TOP=TOP, ENOUGH=ENOUGH)
    for row, (number, exact) in enumerate(found.tolist()):
        reach = int((keys[row] >= number).sum())
        assert reach >= min(TOP, int((keys[row] != NONE.value).sum()))
        assert (TOP <= reach <= ENOUGH) == bool(exact)
        if reach > ENOUGH:
            assert int((keys[row] > number).sum()) < TOP  # equal ones
    order = keys.long().sort(dim=1, descending=True, stable=True).indices[:, :TOP]
    expected = torch.zeros(rows, N, dtype=torch.int32).scatter_(1, order, 1)
    assert torch.equal(taken.cpu(), expected * (keys != NONE.value))
