"""Which requests of a step had logits that were no numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from reprise.platforms import Platform
from reprise.runner.output import Landing, PendingOutput

REQUESTS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6
)
"""Of each, whether it samples, its drafts, and how many of them count."""


@given(requests=REQUESTS, data=st.data())
def test_rows_behind_a_draft_that_does_not_count_are_nobodys(
    platform: Platform, requests: list[tuple[bool, int, int]], data: st.DataObject
) -> None:
    rows = sum(1 + drafts for samples, drafts, _ in requests if samples)
    odd = data.draw(st.sets(st.integers(0, max(0, rows - 1)), max_size=rows))
    value = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    peaks = torch.full((rows,), data.draw(st.sampled_from([0.0, -1.5, torch.finfo(dtype).max])))
    peaks = peaks.to(dtype)
    peaks[list(odd)] = value
    emitted = torch.full((len(requests), 5), -1)
    expected, begin = [], 0
    for number, (samples, drafts, counting) in enumerate(requests):
        if not samples:
            continue
        count = 1 + min(drafts, counting)
        emitted[number, :count] = 7
        if any(begin + place in odd for place in range(count)):
            expected.append(number)
        begin += 1 + drafts
    emitted[:, -1] = torch.tensor([each[1] for each in requests])
    step: Any = SimpleNamespace(
        rows=list(range(len(requests))),
        samples=[each[0] for each in requests],
        drafts=[each[1] for each in requests],
    )
    landing = Landing(len(requests), 5, max(1, rows), platform)
    nobody: Any = SimpleNamespace(num_drafts=0, admitted={})
    landing.send(emitted[:1].to(platform.device), peaks[:0].to(platform.device))
    # As many of another dtype, in which the largest may be infinite.
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    landing.send(emitted.to(platform.device), torch.zeros(rows, dtype=other).to(platform.device))
    on_device = (each.to(platform.device) for each in (emitted, peaks))
    output = PendingOutput(step, nobody, *on_device, None, {}, landing).wait()
    assert list(output.failed) == expected
    for number, tokens in enumerate(output.sampled):
        count = int((emitted[number, :-1] >= 0).sum())
        assert len(tokens) == (0 if number in expected else count)
