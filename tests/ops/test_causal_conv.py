from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import verifying

from reprise.ops import causal_conv

SIZE, TAPS = 24, 4


def expected(x, weight):
    """[T, D] of one request, from its first token on, in float64."""
    padded = F.pad(x.double().T, (TAPS - 1, 0)).unsqueeze(0)
    return F.silu(F.conv1d(padded, weight.double().unsqueeze(1), groups=SIZE)[0].T)


def run(function, x, weight, state, slots, counts, seq_lens, fresh, padding=0, query_len=0):
    """Requests side by side, into poisoned memory; rows behind them are of no request."""
    x = torch.cat((x, torch.full((padding, SIZE), torch.nan, dtype=x.dtype, device=x.device)))
    out = torch.full_like(x, torch.nan)
    starts = [sum(counts[:n]) for n in range(len(counts) + 1)]
    ints = [torch.tensor(each, dtype=torch.int32, device=x.device)
            for each in (slots, starts, seq_lens)]  # fmt: skip
    # Slots are a column of a table.
    ints[0] = ints[0].unsqueeze(1).repeat(1, 3)[:, 1]
    flags = torch.tensor(fresh, device=x.device)
    function(x, weight, state, *ints, flags, out, query_len)
    return out


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1], [2, 3], [3, 1, 2], [7], [5, 70, 1, 64]])
def test_any_cuts_give_the_convolution_of_the_whole(implementation, randn, name, cuts) -> None:
    """Whatever slots hold before a request begins, and whatever padding's slot holds."""
    conv = implementation(causal_conv, name)
    x, weight = randn(sum(cuts), SIZE), randn(SIZE, TAPS)
    state = torch.full((4, TAPS - 1, SIZE), torch.nan, device=x.device)
    found, begin = [], 0
    for cut in cuts:
        lengths = [0, begin + cut]
        rows = x[begin : begin + cut]
        out = run(conv, rows, weight, state, [0, 2], [0, cut], lengths, [False, begin == 0], 3)
        assert not out[cut:].count_nonzero()
        found.append(out[:cut])
        begin += cut
    torch.testing.assert_close(torch.cat(found).double(), expected(x, weight), rtol=0, atol=1e-5)
    others = state[[0, 1, 3]]
    assert others.isnan().all(), "no other slot is written"


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_requests_side_by_side_do_not_meet(implementation, randn, name) -> None:
    conv = implementation(causal_conv, name)
    weight = randn(SIZE, TAPS)
    texts = [randn(length, SIZE) for length in (9, 1, 6)]
    state = torch.full((5, TAPS - 1, SIZE), torch.nan, device=weight.device)
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        live = [number for number, text in enumerate(texts) if len(text) > begin]
        parts = [texts[number][begin:end] for number in live]
        counts = [*map(len, parts), 0]
        lengths = [min(end, len(texts[number])) for number in live] + [0]
        slots, fresh = [4 - number for number in live] + [0], [begin == 0] * len(live) + [False]
        out = run(conv, torch.cat(parts), weight, state, slots, counts, lengths, fresh, 2)
        place = 0
        for number, part in zip(live, parts, strict=True):
            whole = expected(texts[number], weight)[begin : begin + len(part)]
            torch.testing.assert_close(
                out[place : place + len(part)].double(), whole, rtol=0, atol=1e-5
            )
            place += len(part)
        assert not out[place:].count_nonzero()


@pytest.mark.covering(2)
@pytest.mark.parametrize("num_drafts", [1, 3, 7])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_drafts_that_do_not_count_leave_no_trace(
    implementation, randn, platform, name, num_drafts, uniform, pytestconfig
) -> None:
    """Chunks and verifying steps in any order, drafts of any quality; poisoned slots. Of Triton's
    interpreter, which takes a second for each, short runs have one order."""
    function = implementation(causal_conv, name)
    interpreted = name == "triton" and platform.device_type == "cpu"
    for seed in range(1 if interpreted and not pytestconfig.getoption("--long") else 4):
        x, weight = randn(90, SIZE), randn(SIZE, TAPS)
        shape = 4, TAPS - 1 + num_drafts, SIZE
        state = torch.full(shape, torch.nan, device=x.device)

        def call(rows, *, x=x, weight=weight, state=state, **step):
            given = torch.where((rows < 0).unsqueeze(1), 1e6, x[rows.clamp(min=0)])
            out = torch.full_like(given, torch.nan)
            function(given, weight, state, out=out, **step)
            return out

        plan = verifying.plans(seed, num_drafts, len(x))
        found = verifying.run(call, plan, num_drafts, platform.device, uniform=uniform)
        torch.testing.assert_close(found.double(), expected(x, weight), rtol=0, atol=1e-5)
        assert state[[0, 1, 3]].isnan().all(), "no other slot is written"
